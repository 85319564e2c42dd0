"""Points in the space of parameters at which stacked heads are run: their own, or one near it. Knows tensors only."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from affcache.training.head_parameters import HeadParameters


@dataclass(frozen=True)
class OuterProducts:
    """A change of a weight matrix of each of H heads, kept as its factors: ``left @ right.mT``, which is never formed.

    The gradient of a weight matrix is of this kind: the gradient of what the layer returned times what it was given,
    summed over a batch of B frames. Its rank is at most B: with D columns, applying it to a batch takes 2 B / D of the
    operations that a product with the matrix takes.
    """

    left: torch.Tensor  # (H, W, B)
    right: torch.Tensor  # (H, D, B)

    def squared_norm(self) -> torch.Tensor:
        """Return the sum (H,) of the squared entries: ``trace((left^T left) (right^T right))``."""
        of_left, of_right = torch.bmm(self.left.mT, self.left), torch.bmm(self.right.mT, self.right)  # (H, B, B) each
        return torch.linalg.vecdot(of_left.flatten(1), of_right.flatten(1))

    def scaled(self, scale: torch.Tensor) -> "OuterProducts":
        """Return ``scale`` (H,) times the change."""
        return OuterProducts(self.left * scale[:, None, None], self.right)

    def times(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the change times a batch (H, D, B): (H, W, B)."""
        return torch.bmm(self.left, torch.bmm(self.right.mT, hidden))

    def transposed_times(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return the transposed change times gradients (H, W, B): (H, D, B)."""
        return torch.bmm(self.right, torch.bmm(self.left.mT, gradient))


@dataclass(frozen=True)
class Point:
    """A point at which H heads are run; its products with weights of hidden layers may take them rounded.

    Where there are ``changes``, one for each hidden layer, they come on top of the weights, and are never rounded.
    ``first_product`` (H, W, B) is the first weight times the batch, where it is known.
    """

    parameters: HeadParameters
    weights: Sequence[torch.Tensor]  # those of the parameters, in the number format of products
    rounding: tuple[torch.Tensor, torch.Tensor] | None = None  # exact weights, and where they stand rounded
    changes: Sequence[OuterProducts] = ()
    first_product: torch.Tensor | None = None

    def round(self) -> None:
        """Round the weights as they are now."""
        if self.rounding:
            exact, rounded = self.rounding
            rounded.copy_(exact)

    def product(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return a hidden layer's weight times a batch (H, D, B): (H, W, B)."""
        known = self.first_product if layer == 0 else None
        product = _multiply(self.weights[layer], hidden) if known is None else known
        return product + self.changes[layer].times(hidden) if self.changes else product

    def transposed_product(self, layer: int, gradient: torch.Tensor) -> torch.Tensor:
        """Return a hidden layer's transposed weight times gradients (H, W, B): (H, D, B)."""
        product = _multiply(self.weights[layer].mT, gradient)
        return product + self.changes[layer].transposed_times(gradient) if self.changes else product


def _multiply(weight: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    """Multiply in the number format of the weight, and return the product in that of the batch."""
    return torch.bmm(weight, batch.to(weight.dtype)).to(batch.dtype)
