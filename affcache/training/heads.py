"""The head: a small multilayer perceptron from embeddings to logits. Knows nothing of files."""

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
