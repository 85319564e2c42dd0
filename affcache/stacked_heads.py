"""H heads of one shape, side by side, with their gradients written out: what stage two trains; one head is H = 1.

All parameters lie in one buffer (H, P), all gradients in another, so that SAM, clipping and AdamW are a pass over
memory each. The forward and backward pass are those of ``MLPHead``
(the tests hold them to autograd), batched over H. Products may run in bfloat16; everything else stays in float32.
"""

from collections.abc import Mapping, Sequence

import torch

from affcache.heads import MLPHead

EPSILON, MOMENTUM = 1e-5, 0.1  # of BatchNorm, as torch has them


class StackedHeads:
    """Parameters, running statistics and gradients of H heads.

    Args:
        heads: H modules of the same shape and dtype; their values are copied.
        dropout: (H,) probability of dropping a unit, for each head.
        products: torch.bfloat16 to multiply matrices in it, or None for the parameters' own dtype.
        device: where they live.
    """

    def __init__(
        self,
        heads: Sequence[MLPHead],
        *,
        dropout: Sequence[float],
        products: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        first = heads[0]
        self.count = len(heads)  # H
        self.hidden_layers = len(first.layers) // 4
        self._shapes = {name: p.shape for name, p in first.named_parameters()}
        flat = [torch.cat([p.detach().flatten() for p in head.parameters()]) for head in heads]
        self.parameters = torch.stack(flat).to(device)  # (H, P)
        self.gradients = torch.zeros_like(self.parameters)
        self._of_parameters = self._views(self.parameters)
        self._of_gradients = self._views(self.gradients)
        self._low = None if products is None else torch.empty_like(self.parameters, dtype=products)
        self.nearby = torch.empty_like(self.parameters)  # (H, P) other parameters, to run the heads with
        self._of_nearby = self._views(self.nearby)
        self._of_low = None if self._low is None else self._views(self._low)
        self._values, self._operands = self._of_parameters, self._of_low or self._of_parameters
        buffers = [name for name, _ in first.named_buffers() if name.endswith(("running_mean", "running_var"))]
        self._statistics = {
            name: torch.stack([head.get_buffer(name) for head in heads]).to(device) for name in buffers
        }  # (H, W) each
        self.batches = [int(head.get_buffer("layers.1.num_batches_tracked")) if buffers else 0 for head in heads]
        self._dropout = _Dropout(dropout, self.parameters)
        self._kept: list[tuple[torch.Tensor, ...]] = []  # what the forward pass leaves for the backward pass

    @property
    def lengths(self) -> list[int]:
        """How many of the P values each parameter has, in their order in the buffers."""
        return [shape.numel() for shape in self._shapes.values()]

    def _views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return each parameter's part (H, *shape) of a buffer (H, P)."""
        parts = flat.split(self.lengths, dim=1)
        return {n: part.unflatten(1, shape) for (n, shape), part in zip(self._shapes.items(), parts, strict=True)}

    def forward(
        self,
        embeddings: torch.Tensor,
        generators: Sequence[torch.Generator] | None = None,
        *,
        count_batch: bool = True,
        nearby: bool = False,
    ) -> torch.Tensor:
        """Return training logits (H, B, C) of embeddings (H, B, D): BatchNorm by the batch, dropout drawn.

        Args:
            embeddings: float tensor (H, B, D), a batch for each head.
            generators: one for each head draws what is dropped; None for torch's own.
            count_batch: whether BatchNorm's running statistics see this batch.
            nearby: whether to run with the parameters in ``nearby`` instead of the heads' own; so does ``backward``.

        Raises:
            ValueError: a batch of one frame, with hidden layers.
        """
        self._values = self._of_nearby if nearby else self._of_parameters
        self._operands = self._of_low or self._values
        if self._low is not None:
            self._low.copy_(self.nearby if nearby else self.parameters)
        self._kept = []
        frames = embeddings.shape[1]
        if self.hidden_layers and frames < 2:
            raise ValueError(f"a batch of {frames} frame; expected at least 2, as BatchNorm needs")
        stays = self._dropout.draw(self.hidden_layers, self._width, frames, generators)
        hidden = self._operand(embeddings).mT  # (H, D, B): a unit's batch lies in one piece, which BatchNorm runs over
        for layer in range(self.hidden_layers):
            # the Linear's bias is left out: BatchNorm takes it off again
            product = self._multiply(self._operands[f"layers.{4 * layer}.weight"], hidden)  # (H, W, B)
            inputs, gain = product.view(1, -1, frames), self._flat(layer, "weight")  # (1, H * W, B), (H * W,)
            units = inputs.shape[1]  # BatchNorm over a batch is torch's group norm, with a group for each unit
            active, mean, scale = torch.native_group_norm(
                inputs, gain, self._flat(layer, "bias"), 1, units, frames, units, EPSILON
            )
            if count_batch:
                self._count(layer, mean, scale, frames)
            active = active.view_as(product).relu_()
            if stays is not None:
                active.mul_(stays[layer])
            self._kept.append((hidden, inputs, gain, active, mean, scale))
            hidden = self._operand(active)
        self._kept.append((hidden,))
        self._stays = stays
        if count_batch:
            self.batches = [batches + 1 for batches in self.batches]
        logits = self._multiply(self._operands["output_layer.weight"], hidden)  # (H, C, B)
        return logits.add_(self._values["output_layer.bias"].unsqueeze(2)).mT  # (H, B, C)

    def backward(self, gradient: torch.Tensor) -> None:
        """Write the gradients of all parameters, given the loss's gradient (H, B, C) with respect to the logits.

        The biases before BatchNorm have none: adding a constant to a batch doesn't change what BatchNorm returns.
        """
        (hidden,) = self._kept.pop()
        gradient = gradient.mT  # (H, C, B)
        torch.sum(gradient, 2, out=self._of_gradients["output_layer.bias"])
        gradient = self._operand(gradient)
        self._multiply_into(self._of_gradients["output_layer.weight"], gradient, hidden.mT)
        for layer in reversed(range(self.hidden_layers)):
            above = "output_layer" if layer == self.hidden_layers - 1 else f"layers.{4 * layer + 4}"
            hidden, inputs, gain, active, mean, scale = self._kept.pop()
            gradient = self._multiply(self._operands[f"{above}.weight"].mT, gradient)  # (H, W, B)
            if self._stays is not None:
                gradient.mul_(self._stays[layer])
            gradient = torch.ops.aten.threshold_backward(gradient, active, 0)  # 0 where a unit was
            _, units, frames = inputs.shape
            of_inputs, of_gain, of_bias = torch.ops.aten.native_group_norm_backward(
                gradient.view_as(inputs), inputs, mean, scale, gain, 1, units, frames, units, [True, True, True]
            )
            for name, of_unit in (("weight", of_gain), ("bias", of_bias)):
                self._of_gradients[f"layers.{4 * layer + 1}.{name}"].copy_(of_unit.view(self.count, -1))  # (H, W)
            gradient = self._operand(of_inputs.view_as(active))  # (H, W, B)
            self._multiply_into(self._of_gradients[f"layers.{4 * layer}.weight"], gradient, hidden.mT)

    def _flat(self, layer: int, name: str) -> torch.Tensor:
        """Return BatchNorm's gain ("weight") or bias, one for each unit of each head (H * W,)."""
        return self._values[f"layers.{4 * layer + 1}.{name}"].reshape(-1)

    def evaluate(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return logits (H, n, C) of embeddings (n, D) as a trained head gives them: running statistics, no dropout."""
        hidden = embeddings.expand(self.count, -1, -1)  # (H, n, D)
        for layer in range(self.hidden_layers):
            linear, norm = f"layers.{4 * layer}", f"layers.{4 * layer + 1}"
            gain = self._of_parameters[f"{norm}.weight"] / (self._statistics[f"{norm}.running_var"] + EPSILON).sqrt()
            mean = self._statistics[f"{norm}.running_mean"] - self._of_parameters[f"{linear}.bias"]
            shift = torch.addcmul(self._of_parameters[f"{norm}.bias"], gain, mean, value=-1)  # (H, W)
            weight = self._of_parameters[f"{linear}.weight"] * gain.unsqueeze(2)  # BatchNorm folded into the product
            hidden = torch.baddbmm(shift.unsqueeze(1), hidden, weight.mT).relu_()  # (H, n, W)
        bias = self._of_parameters["output_layer.bias"].unsqueeze(1)
        return torch.baddbmm(bias, hidden, self._of_parameters["output_layer.weight"].mT)  # (H, n, C)

    def state_dict(self, head: int) -> dict[str, torch.Tensor]:
        """Return one head's parameters and statistics under the names of ``MLPHead``."""
        state = {name: part[head] for name, part in self._of_parameters.items()}
        state |= {name: part[head] for name, part in self._statistics.items()}
        for layer in range(self.hidden_layers):
            state[f"layers.{4 * layer + 1}.num_batches_tracked"] = torch.tensor(self.batches[head])
        return state

    def load_state_dict(self, head: int, state: Mapping[str, torch.Tensor]) -> None:
        """Take up one head's parameters and statistics, as ``state_dict`` and ``MLPHead.state_dict`` name them."""
        for name, part in {**self._of_parameters, **self._statistics}.items():
            part[head].copy_(state[name])
        if self.hidden_layers:
            self.batches[head] = int(state["layers.1.num_batches_tracked"])

    @property
    def _width(self) -> int:
        return self._shapes["layers.0.weight"][0] if self.hidden_layers else 0

    def _count(self, layer: int, mean: torch.Tensor, scale: torch.Tensor, frames: int) -> None:
        """Let BatchNorm's running statistics see a batch, as torch does: the variance unbiased."""
        name, bias = f"layers.{4 * layer + 1}", self._of_parameters[f"layers.{4 * layer}.bias"]
        self._statistics[f"{name}.running_mean"].lerp_(mean.view_as(bias) + bias, MOMENTUM)
        unbiased = (scale.view_as(bias) ** -2 - EPSILON).mul_(
            frames / (frames - 1)
        )  # scale is 1 / sqrt(variance + EPSILON)
        self._statistics[f"{name}.running_var"].lerp_(unbiased, MOMENTUM)

    def _operand(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self._low is None else tensor.to(self._low.dtype)

    def _multiply(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return torch.bmm(left, right).to(self.parameters.dtype)

    def _multiply_into(self, target: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        if self._low is None:
            torch.bmm(left, right, out=target)
        else:
            target.copy_(torch.bmm(left, right))


class _Dropout:
    """Draws which units are dropped: sixteen random bits decide each, four units to a draw of 64."""

    def __init__(self, probabilities: Sequence[float], like: torch.Tensor) -> None:
        dropped = torch.tensor([round(p * 65536) for p in probabilities]).clamp(max=65535)
        self._none = not bool(dropped.any())
        bounds = torch.stack([dropped - 32769, dropped - 32768])  # the last that drops, the first that stays
        bounds[:, dropped == 0] = 0  # nothing drops: all are clamped to what stays
        self._lower, self._upper = bounds.to(like.device, torch.int16)[:, :, None, None]  # (H, 1, 1) each
        first = bounds[:, 0].tolist()
        self._same = first if bool((bounds == bounds[:, :1]).all()) else None  # numbers are many times faster
        self._gain = (65536 / (65536 - dropped.double())).to(like)[
            :, None, None
        ]  # (H, 1, 1) makes up for those dropped

    def draw(
        self, layers: int, width: int, frames: int, generators: Sequence[torch.Generator] | None
    ) -> torch.Tensor | None:
        """Return (layers, H, W, B): 0 where a unit is dropped, else what makes up for those; None where none is."""
        if self._none or not layers:
            return None
        heads, units = len(self._gain), layers * width * frames
        words = torch.empty(heads, -(-units // 4), dtype=torch.int64, device=self._gain.device)
        for head in range(heads):
            words[head].random_(-(2**63), None, generator=generators[head] if generators else None)
        bits = words.view(torch.int16)[:, :units].view(heads, layers, width, frames).transpose(0, 1)
        lower, upper = self._same or (self._lower, self._upper)
        stays = bits.clamp(lower, upper).sub_(upper - 1)  # as fast as a copy, which a comparison is not
        return stays.to(self._gain.dtype).mul_(self._gain)
