"""torch's AdamW over H heads that lie in one buffer, each with a learning rate and a weight decay of its own."""

from collections.abc import Sequence

import torch

Tensors = dict[str, torch.Tensor]


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
        self._adamw = torch.optim.AdamW(groups, fused=True, capturable=recorded)

    def set_rates(self, rates: Sequence[float]) -> None:
        """Take other learning rates (H,)."""
        for group, rate in zip(self._adamw.param_groups, rates, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def step(self) -> None:
        """Update all heads from the gradients as they are."""
        self._adamw.step()

    def state(self) -> Tensors:
        """Return the moments and the count of steps of each head: ``<head>.<name>``."""
        states = self._adamw.state_dict()["state"]
        return {f"{head}.{name}": tensor for head, state in states.items() for name, tensor in state.items()}

    def load_state(self, tensors: Tensors) -> None:
        """Take up what ``state`` returned."""
        states: dict[int, Tensors] = {}
        for key, tensor in tensors.items():
            head, _, name = key.partition(".")
            states.setdefault(int(head), {})[name] = tensor
        self._adamw.load_state_dict({"state": states, "param_groups": self._adamw.state_dict()["param_groups"]})
