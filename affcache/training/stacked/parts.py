"""What stacked heads are made of: where their parameters lie, points near them, dropout, AdamW, a recorded step.

Knows tensors only.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from affcache.training.heads import MLPHead
from affcache.training.sam import SMALLEST_NORM

WARM_UP = 3  # steps made one by one before one is recorded: libraries set themselves up, AdamW makes its state

Step = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class HeadShape:
    """Shape of an ``MLPHead``: D inputs, L hidden layers of W units, C outputs."""

    inputs: int
    layers: int
    width: int
    outputs: int

    @classmethod
    def of(cls, head: nn.Module) -> "HeadShape":
        """Return the shape of a head, which is an ``MLPHead``."""
        assert isinstance(head, MLPHead)
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


class StackedDropout:
    """Drops units: sixteen random bits decide each, four units to a draw of 64.

    Args:
        probabilities: of dropping a unit, for each of H heads, in [0, 1); rounded to 1 / 65536.
        like: gives dtype and device.
    """

    def __init__(self, probabilities: Sequence[float], like: torch.Tensor) -> None:
        dropped = torch.tensor([round(p * 65536) for p in probabilities]).clamp(max=65535)
        self._none = not bool(dropped.any())
        last = (dropped - 32769).tolist()  # the last of the 65536 values that drops
        self._shared = last[0] if len(set(last)) == 1 else None
        self._last = torch.tensor(last, dtype=like.dtype, device=like.device)[:, None, None]  # (H, 1, 1)
        gain = 65536 / (65536 - dropped.double())
        self.gain = gain.to(like)[:, None, None]  # (H, 1, 1), by which units that stay make up for those dropped

    def draw(
        self, layers: int, width: int, frames: int, generators: Sequence[torch.Generator] | None
    ) -> Sequence[torch.Tensor]:
        """Return int16 (H, W, B) for each layer, for ``drop``; none where nothing is dropped."""
        if self._none or not layers:
            return []
        heads, units = len(self.gain), layers * width * frames
        words = torch.empty(heads, -(-units // 4), dtype=torch.int64, device=self.gain.device)
        for head in range(heads):
            words[head].random_(-(2**63), None, generator=generators[head] if generators else None)
        return words.view(torch.int16)[:, :units].view(heads, layers, width, frames).unbind(1)

    def kept(self, drawn: torch.Tensor) -> torch.Tensor:
        """Return bool (H, W, B), what ``drop`` keeps."""
        return drawn > self._last

    def drop(self, units: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        """Return units (H, W, B) with 0 where one is dropped."""
        values = drawn.to(units.dtype)
        if self._shared is not None:
            return torch.ops.aten.threshold_backward(units, values, self._shared)  # 0 up to the last that drops
        return torch.ops.aten.threshold_backward(units, values - self._last, 0)


class StackedAdamW:
    """A parameter group for each head: a row of the buffer. Fused, and on a GPU fit for a recorded step.

    Args:
        parameters: (H, P), updated in place.
        gradients: (H, P), read at each step where they lie.
        rates: (H,) learning rates to begin with.
        weight_decays: (H,), decoupled.
    """

    def __init__(
        self,
        parameters: torch.Tensor,
        gradients: torch.Tensor,
        rates: Sequence[float],
        weight_decays: Sequence[float],
    ) -> None:
        recorded = parameters.device.type == "cuda"  # a recorded step reads the rate where it lies
        groups = []
        for row, of_row, rate, decay in zip(parameters.split(1), gradients.split(1), rates, weight_decays, strict=True):
            row.grad = of_row
            lr = torch.tensor(rate, device=row.device) if recorded else rate
            groups.append({"params": [row], "lr": lr, "weight_decay": decay})
        self.adamw = torch.optim.AdamW(groups, fused=True, capturable=recorded)

    def set_rates(self, rates: Sequence[float]) -> None:
        """Take other learning rates (H,)."""
        for group, rate in zip(self.adamw.param_groups, rates, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def step(self) -> None:
        """Update all heads from the gradients as they are."""
        self.adamw.step()


@torch.no_grad()
def write_stacked_worst_point(
    parameters: torch.Tensor,
    gradients: torch.Tensor,
    rho: torch.Tensor,
    out: torch.Tensor,
    *,
    adaptive: bool = False,
    pieces: Sequence[int],
) -> None:
    """Write the worst point nearby of H heads whose parameters lie in one buffer, as ``SAM`` has it for one.

    Args:
        parameters: (H, P).
        gradients: (H, P).
        rho: (H,), the radius for each head, each at least 0.
        out: (H, P), written.
        adaptive: ASAM's instead of SAM's.
        pieces: lengths of the layers in a row. Norms are taken layer by layer, as they are where layers lie apart: a
            float32 norm of millions of values at once is off by 2e-5 on a CPU.
    """
    scaled = parameters * gradients if adaptive else gradients
    norms = torch.stack([torch.linalg.vector_norm(piece, dim=1) for piece in scaled.split(list(pieces), dim=1)])
    scale = rho / (torch.linalg.vector_norm(norms, dim=0) + SMALLEST_NORM)  # (H,)
    direction = parameters.square().mul_(gradients) if adaptive else gradients
    torch.addcmul(parameters, direction, scale.to(parameters)[:, None], out=out)


@torch.no_grad()
def clip_stacked_gradients(gradients: torch.Tensor, limit: float) -> None:
    """Scale each head's gradients (H, P), in place, to a norm of at most ``limit``, as torch's ``clip_grad_norm_``."""
    norm = torch.linalg.vector_norm(gradients, dim=1, keepdim=True)  # (H, 1)
    gradients.mul_((limit / (norm + 1e-6)).clamp(max=1))


class RecordedStep:
    """A step on inputs of fixed shapes.

    Args:
        step: takes the inputs and returns a tensor; everything else that it reads and changes are tensors that stay
            where they are. It is called once, which records it and changes nothing.
        inputs: CUDA tensors of the shapes and dtypes that all inputs will have.
        generators: CUDA generators that the step draws from. Each replay goes on where the last one stopped.
    """

    def __init__(self, step: Step, inputs: Sequence[torch.Tensor], generators: Iterable[torch.Generator]) -> None:
        self._inputs = [tensor.clone() for tensor in inputs]
        self._graph = torch.cuda.CUDAGraph()
        for generator in generators:
            self._graph.register_generator_state(generator)
        with torch.cuda.graph(self._graph):
            self._result = step(*self._inputs)

    def __call__(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Make the step on these inputs; return its result, not waited for."""
        for held, given in zip(self._inputs, inputs, strict=True):
            held.copy_(given)
        self._graph.replay()
        return self._result.clone()


# what a continued training takes up


def like(tensor: torch.Tensor, others: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """Return the tensor of a name; raises ValueError unless it has another one's shape and dtype."""
    found = others.get(name)
    if found is None or found.shape != tensor.shape or found.dtype != tensor.dtype:
        words = "missing" if found is None else f"{found.dtype} of shape {tuple(found.shape)}"
        raise ValueError(f"{name} is {words}, expected {tensor.dtype} of shape {tuple(tensor.shape)}")
    return found


def require_generator_state(name: str, found: torch.Tensor) -> None:
    """Refuse what can't be the state of a CPU's generator, before any of it is taken up; a GPU's may be any bits."""
    own = torch.Generator()
    try:
        if found.shape == own.get_state().shape:
            own.set_state(found.cpu())
    except RuntimeError:
        raise ValueError(f"{name} is no state of a generator") from None


def moments_of(optimiser: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return what an optimiser remembers of each parameter: ``<parameter>.<name>``."""
    states = optimiser.state_dict()["state"]
    return {f"{number}.{name}": tensor for number, state in states.items() for name, tensor in state.items()}


def load_moments(optimiser: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Take up what ``moments_of`` returned of an optimiser that made a step; raises ValueError where it is damaged."""
    states: dict[int, dict[str, torch.Tensor]] = {}
    for number, parameter in enumerate(parameter for group in optimiser.param_groups for parameter in group["params"]):
        likes = {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
        states[number] = {name: like(own, tensors, f"{number}.{name}") for name, own in likes.items()}
    optimiser.load_state_dict({"state": states, "param_groups": optimiser.state_dict()["param_groups"]})
