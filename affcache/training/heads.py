"""Heads: modules from embeddings to logits. Knows nothing of files."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn


class MLPHead(nn.Module):
    """Hidden layers of (Linear, BatchNorm, ReLU, Dropout) and a Linear to the logits.

    The defaults are the head of arXiv 2403.09915. Weights start Kaiming-uniform (for ReLU), biases as torch's Linear.

    Args:
        inputs: D, the width of an embedding.
        outputs: C, the number of logits.
        hidden_layers: how many hidden layers; 0 makes a linear head.
        hidden_width: units of each hidden layer.
        dropout: probability of dropping a unit after each hidden layer, in [0, 1).
    """

    def __init__(
        self, inputs: int, outputs: int, *, hidden_layers: int = 3, hidden_width: int = 768, dropout: float = 0.6
    ) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        width = inputs
        for _ in range(hidden_layers):
            modules += [nn.Linear(width, hidden_width), nn.BatchNorm1d(hidden_width), nn.ReLU(), nn.Dropout(dropout)]
            width = hidden_width
        self.layers = nn.Sequential(*modules)
        self.output_layer = nn.Linear(width, outputs)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return logits (B, C) for float embeddings (B, D)."""
        hidden = self.layers(embeddings)  # (B, hidden_width)
        return self.output_layer(hidden)  # (B, C)


def linear_head(inputs: int, outputs: int, **others: Any) -> MLPHead:
    """Return a head without hidden layers, whatever is said of hidden layers."""
    return MLPHead(inputs, outputs, hidden_layers=0)


# by the name that --head takes; a further head is a module, and a line here: it is called with D and C, and with
# hidden_layers, hidden_width and dropout as settings have them
HEADS: Mapping[str, Callable[..., nn.Module]] = {
    "mlp": MLPHead,
    "linear": linear_head,
    "ridge": linear_head,  # solved in closed form, by ridge.py
}
