"""Where the parameters of H heads lie in one flat buffer. Knows tensors only."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from affcache.training.heads import MLPHead


@dataclass(frozen=True)
class HeadShape:
    """Shape of an ``MLPHead``: D inputs, L hidden layers of W units, C outputs."""

    inputs: int
    layers: int
    width: int
    outputs: int

    @classmethod
    def of(cls, head: MLPHead) -> "HeadShape":
        """Return the shape of a head."""
        layers, (outputs, last) = len(head.layers) // 4, head.output_layer.weight.shape
        inputs = head.get_parameter("layers.0.weight").shape[1] if layers else last
        return cls(inputs, layers, last if layers else 0, outputs)

    @property
    def lengths(self) -> list[int]:
        """How many values each parameter has, in the order of the buffer: hidden weights first."""
        if not self.layers:
            return [self.outputs * self.inputs, self.outputs]
        weights = [self.width * self.inputs, *[self.width * self.width] * (self.layers - 1)]
        return [*weights, *[self.width] * (3 * self.layers), self.outputs * self.width, self.outputs]

    @property
    def hidden_weights(self) -> int:
        """How many values at the start of the buffer are weights of hidden layers."""
        return sum(self.lengths[: self.layers])

    def weights(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Return the views (H, W, D) of a buffer of the hidden layers' weights alone."""
        return [weight.unflatten(1, (self.width, -1)) for weight in flat.split(self.lengths[: self.layers], dim=1)]


@dataclass(frozen=True)
class HeadParameters:
    """Views of the parameters, or of values for each of them, in a buffer (H, P)."""

    weights: Sequence[torch.Tensor]  # (H, W, D) for the first hidden layer, (H, W, W) for the others
    biases: torch.Tensor  # (H, L, W), of the hidden layers
    norms: torch.Tensor  # (H, 2, L, W), of BatchNorm: the gains, its "weight", and the shifts, its "bias"
    output_weight: torch.Tensor  # (H, C, W), or (H, C, D) without hidden layers
    output_bias: torch.Tensor  # (H, C)
    rest: torch.Tensor  # (H, S), all of these but the weights in one piece

    @classmethod
    def of(cls, shape: HeadShape, flat: torch.Tensor) -> "HeadParameters":
        """Return the views of a buffer (H, P)."""
        start = shape.hidden_weights
        return cls.beside(shape, shape.weights(flat[:, :start]), flat[:, start:])

    @classmethod
    def beside(cls, shape: HeadShape, weights: Sequence[torch.Tensor], rest: torch.Tensor) -> "HeadParameters":
        """Return weights (H, W, D) of hidden layers together with the views of a buffer (H, S) of all the rest."""
        of_layers = 3 * shape.layers * shape.width
        units = rest[:, :of_layers].unflatten(1, (3, shape.layers, shape.width))
        output_weight = rest[:, of_layers : -shape.outputs].unflatten(1, (shape.outputs, -1))
        return cls(weights, units[:, 0], units[:, 1:], output_weight, rest[:, -shape.outputs :], rest)

    def named(self) -> dict[str, torch.Tensor]:
        """Return each parameter (H, *shape) under its name in ``MLPHead``."""
        names: dict[str, torch.Tensor] = {}
        for layer, weight in enumerate(self.weights):
            linear, norm = f"layers.{4 * layer}", f"layers.{4 * layer + 1}"
            names |= {f"{linear}.weight": weight, f"{linear}.bias": self.biases[:, layer]}
            names |= {f"{norm}.weight": self.norms[:, 0, layer], f"{norm}.bias": self.norms[:, 1, layer]}
        return {**names, "output_layer.weight": self.output_weight, "output_layer.bias": self.output_bias}
