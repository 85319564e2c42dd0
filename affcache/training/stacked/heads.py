"""H heads of one shape, side by side, with their gradients written out: what stage two trains; one head is H = 1.

All parameters lie in one buffer (H, P), all gradients in another, so that SAM, clipping and AdamW are a pass over
memory each. The forward and backward pass are those of ``MLPHead`` (the tests hold them to autograd), batched over H.
Products with the weights of hidden layers may run in bfloat16; everything else stays in float32.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from affcache.training.sam import SMALLEST_NORM
from affcache.training.stacked.parts import HeadParameters, HeadShape, OuterProducts, Point, StackedDropout

EPSILON, MOMENTUM = 1e-5, 0.1  # of BatchNorm, as torch has them


@dataclass(frozen=True)
class _Layer:
    """What the forward pass leaves of a hidden layer for the backward pass."""

    hidden: torch.Tensor  # (H, D, B), what the layer was given
    inputs: torch.Tensor  # (1, H * W, B), of BatchNorm
    gain: torch.Tensor  # (H * W,)
    mean: torch.Tensor  # (1, H * W), of the batch
    scale: torch.Tensor  # (1, H * W): 1 / sqrt(variance + EPSILON)
    active: torch.Tensor  # (H, W, B), what the layer returned


class StackedHeads:
    """Parameters, running statistics and gradients of H heads.

    Args:
        heads: H ``MLPHead`` of the same shape and dtype; their values are copied.
        dropout: (H,) probability of dropping a unit, for each head.
        products: torch.bfloat16 to multiply with hidden layers' weights in it, or None for the parameters' own dtype.
        device: where they live.
    """

    def __init__(
        self,
        heads: Sequence[nn.Module],
        *,
        dropout: Sequence[float],
        products: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.count, self.shape = len(heads), HeadShape.of(heads[0])  # H
        dtype, self.hidden_layers = next(heads[0].parameters()).dtype, self.shape.layers  # L
        self.parameters = torch.empty(self.count, sum(self.shape.lengths), dtype=dtype, device=device)  # (H, P)
        self.gradients = torch.zeros_like(self.parameters)
        self.running_mean = torch.zeros(self.count, self.hidden_layers, self.shape.width, dtype=dtype, device=device)
        self.running_var = torch.ones_like(self.running_mean)  # (H, L, W)
        self.batches = [0] * self.count  # how many the running statistics have seen
        self._products = products or dtype
        self._own, self._of_gradients = self.point(self.parameters), HeadParameters.of(self.shape, self.gradients)
        self._near = self._near_point()
        self.dropout = StackedDropout(dropout, self.parameters)
        self._point, self._layers = self._own, list[_Layer]()
        self._factors: list[OuterProducts] = []
        for index, head in enumerate(heads):
            self.load_state_dict(index, head.state_dict())

    def point(self, flat: torch.Tensor) -> Point:
        """Return the point whose parameters lie in a buffer (H, P), to run the heads there; its values may change."""
        parameters, weights = HeadParameters.of(self.shape, flat), flat[:, : self.shape.hidden_weights]
        if self._products == flat.dtype:
            return Point(parameters, parameters.weights)
        rounded = torch.empty_like(weights, dtype=self._products)
        return Point(parameters, self.shape.weights(rounded), rounding=(weights, rounded))

    def forward(
        self,
        embeddings: torch.Tensor,
        generators: Sequence[torch.Generator] | None = None,
        *,
        count_batch: bool = True,
        at: Point | None = None,
    ) -> torch.Tensor:
        """Return training logits (H, B, C) of embeddings (H, B, D): BatchNorm by the batch, dropout drawn.

        Args:
            embeddings: float tensor (H, B, D), a batch for each head.
            generators: one for each head draws what is dropped; None for torch's own.
            count_batch: whether BatchNorm's running statistics see this batch.
            at: where to run, also for ``backward``; None for the heads' own parameters.

        Raises:
            ValueError: a batch of one frame, with hidden layers.
        """
        frames = embeddings.shape[1]
        if self.hidden_layers and frames < 2:
            raise ValueError(f"a batch of {frames} frame; expected at least 2, as BatchNorm needs")
        self._point = point = at or self._own
        point.round()
        drawn = self.dropout.draw(self.hidden_layers, self.shape.width, frames, generators)
        # what ReLU returns grows as what it is given: what makes up for dropped units comes before it
        norms = (
            (point.parameters.norms * self.dropout.gain.unsqueeze(3)).permute(1, 2, 0, 3).flatten(2)
        )  # (2, L, H * W)
        gains, shifts = (of_layers.unbind(0) for of_layers in norms)
        self._layers = []
        hidden = embeddings.mT  # (H, D, B): a unit's batch lies in one piece, which BatchNorm runs over
        for layer in range(self.hidden_layers):
            # the Linear's bias is left out: BatchNorm takes it off again
            product = point.product(layer, hidden)  # (H, W, B)
            inputs, units = product.view(1, -1, frames), len(gains[layer])
            # BatchNorm over a batch is torch's group norm with a group for each unit
            active, mean, scale = torch.native_group_norm(
                inputs, gains[layer], shifts[layer], 1, units, frames, units, EPSILON
            )
            active = active.view_as(product).relu_()
            if drawn:
                active = self.dropout.drop(active, drawn[layer])
            self._layers.append(_Layer(hidden, inputs, gains[layer], mean, scale, active))
            hidden = active
        if count_batch:
            self._count(frames)
        self._hidden = hidden
        output_bias = point.parameters.output_bias.unsqueeze(2)  # (H, C, 1)
        return torch.baddbmm(output_bias, point.parameters.output_weight, hidden).mT  # (H, B, C)

    def backward(self, gradient: torch.Tensor, *, factored: bool = False) -> None:
        """Write the gradients of all parameters, given the loss's gradient (H, B, C) with respect to the logits.

        The biases before BatchNorm have none: adding a constant to a batch doesn't change what BatchNorm returns.

        Args:
            gradient: (H, B, C).
            factored: leave those of hidden weights as factors, for ``worst_point``, instead of writing them.
        """
        point, target = self._point, self._of_gradients
        gradient = gradient.mT  # (H, C, B)
        torch.sum(gradient, 2, out=target.output_bias)
        torch.bmm(gradient, self._hidden.mT, out=target.output_weight)
        self._factors, of_gains, of_shifts = [], [], []
        above = torch.bmm(point.parameters.output_weight.mT, gradient)  # (H, W, B)
        for layer in reversed(range(self.hidden_layers)):
            kept = self._layers[layer]
            of_product, of_gain, of_shift = self._before_norm(layer, above)  # (H, W, B), (H * W,), (H * W,)
            if factored:
                self._factors.append(OuterProducts(of_product, self._multiplied(layer)))
            else:
                torch.bmm(of_product, kept.hidden.mT, out=target.weights[layer])
            of_gains.append(of_gain.view(self.count, -1))  # (H, W)
            of_shifts.append(of_shift.view(self.count, -1))
            if layer:
                above = point.transposed_product(layer, of_product)
        if self.hidden_layers:
            of_units = torch.stack(of_gains[::-1] + of_shifts[::-1], 1).view_as(target.norms)  # (H, 2, L, W)
            torch.mul(of_units, self.dropout.gain.unsqueeze(3), out=target.norms)
        self._factors.reverse()

    def _multiplied(self, layer: int) -> torch.Tensor:
        """Return what a layer's weight was multiplied with (H, D, B), as a factor of the weight's gradient.

        Of embeddings the mean over the batch is taken off: before BatchNorm a gradient sums to 0 over the batch, so
        it has no part in the product. Rounding would grow with it, and embeddings share more than they differ by.
        """
        hidden = self._layers[layer].hidden
        return hidden if layer else hidden - hidden.mean(2, keepdim=True)

    def _before_norm(self, layer: int, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return gradients of BatchNorm's input (H, W, B), gain and shift (H * W,), given that (H, W, B) of a layer."""
        kept = self._layers[layer]
        _, units, frames = kept.inputs.shape
        gradient = torch.ops.aten.threshold_backward(gradient, kept.active, 0)  # 0 where a unit was, also if dropped
        of_inputs, of_gain, of_shift = torch.ops.aten.native_group_norm_backward(
            gradient.view_as(kept.inputs), kept.inputs, kept.mean, kept.scale, kept.gain,
            1, units, frames, units, [True, True, True],
        )  # fmt: skip
        return of_inputs.view_as(gradient), of_gain, of_shift

    def worst_point(self, rho: float | torch.Tensor) -> Point:
        """Return SAM's worst point nearby, from what ``backward`` with ``factored`` left: to run on the same batch.

        It lies ``rho * g / |g|`` away, |g| being the norm of a head's gradients. Nothing of the size of the hidden
        weights is read or written for it.

        Args:
            rho: the radius, one for all heads or one for each (H,).
        """
        own, gradients, near = self._own.parameters.rest, self._of_gradients.rest, self._near.parameters.rest  # (H, S)
        squares = torch.linalg.vecdot(gradients, gradients)  # (H,)
        for factors in self._factors:
            squares = squares + factors.squared_norm()
        scale = (rho / (squares.sqrt() + SMALLEST_NORM)).to(own)  # (H,)
        torch.addcmul(own, gradients, scale[:, None], out=near)
        if not self.hidden_layers:
            return self._near
        changes = [factors.scaled(scale) for factors in self._factors]
        return replace(
            self._near, changes=changes, first_product=self._layers[0].inputs.view_as(self._layers[0].active)
        )

    def _near_point(self) -> Point:
        """Return a point with the heads' own weights of hidden layers, and room for other values of the rest."""
        own = self._own.parameters
        near = HeadParameters.beside(self.shape, own.weights, torch.empty_like(own.rest))
        return Point(near, self._own.weights)  # rounded as they were for the first pass

    def state_dict(self, head: int) -> dict[str, torch.Tensor]:
        """Return one head's parameters and statistics under the names of ``MLPHead``."""
        state = {name: part[head] for name, part in self._named().items()}
        for layer in range(self.hidden_layers):
            state[f"layers.{4 * layer + 1}.num_batches_tracked"] = torch.tensor(self.batches[head])
        return state

    def load_state_dict(self, head: int, state: Mapping[str, torch.Tensor]) -> None:
        """Take up one head's parameters and statistics, as ``state_dict`` and ``MLPHead.state_dict`` name them."""
        for name, part in self._named().items():
            part[head].copy_(state[name])
        if self.hidden_layers:
            self.batches[head] = int(state["layers.1.num_batches_tracked"])

    def gradients_of(self, head: int) -> dict[str, torch.Tensor]:
        """Return one head's gradients under the names of ``MLPHead``'s parameters."""
        return {name: part[head] for name, part in self._of_gradients.named().items()}

    def _named(self) -> dict[str, torch.Tensor]:
        """Return parameters and statistics (H, *shape) under their names in ``MLPHead``."""
        named = self._own.parameters.named()
        for layer in range(self.hidden_layers):
            named[f"layers.{4 * layer + 1}.running_mean"] = self.running_mean[:, layer]
            named[f"layers.{4 * layer + 1}.running_var"] = self.running_var[:, layer]
        return named

    def _count(self, frames: int) -> None:
        """Let BatchNorm's running statistics see the batch, as torch does: the variance unbiased."""
        self.batches = [batches + 1 for batches in self.batches]
        if not self.hidden_layers:
            return
        mean = torch.stack([kept.mean.view(self.count, -1) for kept in self._layers], 1)  # (H, L, W)
        scale = torch.stack([kept.scale.view(self.count, -1) for kept in self._layers], 1)
        self.running_mean.lerp_(mean + self._own.parameters.biases, MOMENTUM)
        unbiased = (scale**-2 - EPSILON).mul_(frames / (frames - 1))  # scale is 1 / sqrt(variance + EPSILON)
        self.running_var.lerp_(unbiased, MOMENTUM)
