"""Which cells train side by side: those of one source and one form of computation, as many as memory holds."""

from collections.abc import Iterator, Sequence

import torch

from affcache.ablation.trials import Cell
from affcache.devices import device_memory
from affcache.tasks.tasks import Task
from affcache.training.head_parameters import HeadShape
from affcache.training.learner import FORM, build_head
from affcache.training.settings import FitSettings

MOST_HEADS = {"cpu": 16, "cuda": 64}  # beyond these a head costs the same, and a kill loses more
SHARE = 0.25  # of the device's memory is for heads
COPIES = 7  # of a head's parameters: themselves, gradients, two moments, the point nearby, the best epoch, one to spare
FLOAT = 4  # bytes


def form_of(settings: FitSettings) -> tuple[object, ...]:
    """Return what the settings of heads side by side have in common; a ridge stands alone."""
    alone = settings.seed if settings.head == "ridge" else None
    return (*(getattr(settings, name) for name in FORM), settings.rho > 0, alone)


def heads_memory(device: torch.device) -> float:
    """Return the bytes that the heads of a group may take on a device: a quarter of its memory."""
    return device_memory(device) * SHARE


def group_cells(
    cells: Sequence[Cell], device: torch.device, memory: float, largest: int | None = None
) -> Iterator[list[Cell]]:
    """Yield the groups in which cells are trained.

    Groups depend on nothing but the cells and the memory, and finished ones don't change the others: after a kill, what
    is left falls into the same groups, in the same order.

    Args:
        cells: of one source.
        device: where they train.
        memory: bytes that the heads of a group may take.
        largest: cells in a group, at most; None where nothing else limits them.
    """
    by_form: dict[tuple[object, ...], list[Cell]] = {}
    for cell in cells:
        by_form.setdefault(form_of(cell.settings), []).append(cell)
    for form in sorted(by_form, key=repr):  # not by what comes first, which changes when it is finished
        alike = by_form[form]
        first = alike[0]
        frames = len(first.source.validation)
        size = most_heads(first.settings, first.source.task, first.source.store.width, frames, memory, device)
        size = min(size, largest or size)
        for start in range(0, len(alike), size):
            yield alike[start : start + size]


def most_heads(settings: FitSettings, task: Task, width: int, frames: int, budget: float, device: torch.device) -> int:
    """Return how many heads train side by side within ``budget`` bytes, at least 1."""
    with torch.device("meta"):
        shape = HeadShape.of(build_head(settings, width, task))
    activations = 8 * shape.layers * shape.width * settings.batch_size
    a_head = FLOAT * (COPIES * sum(shape.lengths) + activations + 3 * frames * task.outputs)
    return max(1, min(MOST_HEADS.get(device.type, 1), int(budget // a_head)))
