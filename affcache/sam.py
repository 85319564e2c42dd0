"""Sharpness-aware minimisation around any torch optimiser. Knows nothing of files.

Foret, Kleiner, Mobahi and Neyshabur, Sharpness-Aware Minimization for Efficiently Improving Generalization, 2021.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


class SAM(Optimizer):
    """Steps with the gradient taken at the worst nearby point, ``rho`` away along the gradient.

    A step in full::

        loss_of(head, batch).backward()
        with optimiser.perturbed(), frozen_batch_norm(head):
            loss_of(head, batch).backward()
        optimiser.step()
        optimiser.zero_grad()

    The perturbation is ``rho * g / |g|`` with one norm over all parameters (formula 2 of the paper). Parameter groups
    are the base optimiser's own, so learning-rate schedulers work on either; ``state_dict`` includes its state.

    Args:
        base: the optimiser that updates the parameters.
        rho: radius of the perturbation, at least 0. With 0 leave ``perturbed`` out: the rest is the base optimiser.
    """

    def __init__(self, base: Optimizer, rho: float = 0.5) -> None:
        if not rho >= 0:
            raise ValueError(f"rho is {rho}; expected at least 0")
        self.base = base
        self.rho = rho
        self._originals: dict[torch.Tensor, torch.Tensor] = {}  # room for the parameters while they are moved
        super().__init__(base.param_groups, {})
        self.param_groups = base.param_groups  # the very same groups: a scheduler changes both
        self.state = base.state

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """Move the parameters to the worst nearby point, drop the gradients, and move back on leaving.

        The parameters come back to the bit. Where there is no gradient, nothing moves.
        """
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for parameter in parameters:
            if parameter not in self._originals:
                self._originals[parameter] = torch.empty_like(parameter)
        originals = [self._originals[parameter] for parameter in parameters]
        with torch.no_grad():
            if parameters:
                torch._foreach_copy_(originals, parameters)
                gradients = [p.grad for p in parameters]
                norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
                torch._foreach_mul_(gradients, self.rho / (norm + 1e-12))  # they are dropped next
                torch._foreach_add_(parameters, gradients)
        self.zero_grad()
        try:
            yield
        finally:
            if parameters:
                with torch.no_grad():
                    torch._foreach_copy_(parameters, originals)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters with the base optimiser from the gradients as they are.

        With a closure that clears the gradients, computes the loss and calls ``backward``, both passes are made here.
        """
        if closure is None:
            self.base.step()
            return None
        with torch.enable_grad():
            loss = closure()
            if self.rho:
                with self.perturbed():
                    closure()
        self.base.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of all parameters."""
        self.base.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the radius and the base optimiser's whole state."""
        return {"rho": self.rho, "base": self.base.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.rho = state_dict["rho"]
        self.base.load_state_dict(state_dict["base"])
        self.param_groups = self.base.param_groups
        self.state = self.base.state


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
