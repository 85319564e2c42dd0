"""Sharpness-aware minimisation around any torch optimiser. Knows nothing of files.

SAM: Foret, Kleiner, Mobahi and Neyshabur, Sharpness-Aware Minimization for Efficiently Improving Generalization, 2021.
ASAM: Kwon, Kim, Park and Choi, ASAM: Adaptive Sharpness-Aware Minimization, 2021.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

SMALLEST_NORM = 1e-12  # added to a gradient's norm before dividing by it


class SAM(Optimizer):
    """Steps with the gradient taken at the worst nearby point, ``rho`` away along the gradient.

    A step in full::

        loss_of(head, batch).backward()
        with optimiser.perturbed(), frozen_batch_norm(head):
            loss_of(head, batch).backward()
        optimiser.step()
        optimiser.zero_grad()

    The perturbation is ``rho * g / |g|`` (SAM's formula 2), with one norm over all parameters; when adaptive,
    ``rho * w^2 g / |w g|`` (ASAM's formula 8 with the elementwise operator |w|), so that rescaling a layer doesn't
    change it. Gradients are clipped before ``step``, where they are those of the second pass. Parameter groups are the
    base optimiser's own, so learning-rate schedulers work on either; each has its ``rho``. ``state_dict`` is complete.

    Args:
        base: the optimiser that updates the parameters; or parameters, as other implementations take them.
        kind: with parameters, the class of that optimiser, as in ``SAM(parameters, AdamW, rho=0.05, lr=1e-3)``.
        rho: radius of the perturbation, at least 0. With 0 leave ``perturbed`` out: the rest is the base optimiser.
        adaptive: whether to scale the perturbation by the size of each parameter (ASAM); rho is then larger, 0.5 to 2.
        options: with a class, what it takes.

    Raises:
        ValueError: rho below 0, or not a number.
        TypeError: neither an optimiser nor parameters with a class of optimisers.
    """

    def __init__(
        self,
        base: Optimizer | Iterable[Any],
        kind: type[Optimizer] | None = None,
        *,
        rho: float = 0.5,
        adaptive: bool = False,
        **options: Any,
    ) -> None:
        if not rho >= 0:
            raise ValueError(f"rho is {rho}; expected at least 0")
        if isinstance(kind, type) and not isinstance(base, Optimizer):
            base = kind(base, **options)
        elif kind is not None or options or not isinstance(base, Optimizer):
            raise TypeError("expected SAM(optimiser, rho=...) or SAM(parameters, class of optimiser, rho=..., ...)")
        self.base = base
        self.rho = rho
        self.adaptive = adaptive
        self._originals: dict[torch.Tensor, torch.Tensor] = {}  # room for the parameters while they are moved
        super().__init__(base.param_groups, {})
        self._share_with_base()

    def _share_with_base(self) -> None:
        """Hold the very groups and state of the base: a scheduler on either changes both."""
        self.param_groups = self.base.param_groups
        self.state = self.base.state
        for group in self.param_groups:
            group.setdefault("rho", self.rho)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base; without a ``rho`` of its own it gets the one that was given."""
        if any(param_group is group for group in self.base.param_groups):  # while this is built
            super().add_param_group(param_group)
            return
        self.base.add_param_group(param_group)
        self._share_with_base()

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """Move the parameters to the worst nearby point, drop the gradients, and move back on leaving.

        The parameters come back to the bit. Where there is no gradient, nothing moves.
        """
        moved = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        with torch.no_grad():
            for parameter in moved:
                if parameter not in self._originals:
                    self._originals[parameter] = torch.empty_like(parameter)
                self._originals[parameter].copy_(parameter)
            if moved:
                self._move(moved)
        for parameter in moved:
            parameter.grad = None
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter in moved:
                    parameter.copy_(self._originals[parameter])

    @torch.no_grad()
    def _move(self, moved: Sequence[torch.Tensor]) -> None:
        """Move parameters that have a gradient to the worst nearby point."""
        norm = torch.linalg.vector_norm(torch.stack([self._scaled(p).norm() for p in moved]))  # over all of them
        for group in self.param_groups:
            scale = group["rho"] / (norm + SMALLEST_NORM)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    direction = parameter.square() * parameter.grad if self.adaptive else parameter.grad
                    parameter.add_(direction * scale.to(parameter))

    def _scaled(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return the gradient whose norm counts: ASAM's is scaled by the parameter's own size."""
        assert parameter.grad is not None  # for the type checker
        return parameter.grad * parameter if self.adaptive else parameter.grad

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters with the base optimiser from the gradients as they are.

        With a closure that clears the gradients, computes the loss and calls ``backward``, both passes are made here;
        where every rho is 0, one.
        """
        if closure is None:
            self.base.step()
            return None
        with torch.enable_grad():
            loss = closure()
            if any(bool(torch.as_tensor(group["rho"]).any()) for group in self.param_groups):
                with self.perturbed():
                    closure()
        self.base.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of all parameters."""
        self.base.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimiser's whole state, the radius of each group in it."""
        return {"rho": self.rho, "adaptive": self.adaptive, "base": self.base.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.rho, self.adaptive = state_dict["rho"], state_dict["adaptive"]
        self.base.load_state_dict(state_dict["base"])
        self._share_with_base()


@contextmanager
def frozen_batch_norm(head: nn.Module) -> Iterator[None]:
    """Keep BatchNorm's running statistics as they are, while batches are still normalised by their own.

    Around SAM's second pass it makes each batch count once.
    """
    layers = [m for m in head.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
