"""What is missing of a grid, trained group after group; every finished group is on disk as soon as it is."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from affcache.ablation.grouping import group_cells
from affcache.ablation.sources import LoadedSource
from affcache.ablation.trainer import Group, Trainer
from affcache.ablation.trials import Cell, Outcome
from affcache.progress import Listener
from affcache.training.run_folder import Tensors


class BestHeads:
    """Which heads are kept: all, none, or of each task the one with the best metric where epochs were chosen.

    Args:
        keep: "all", "none" or "best".
        finished: cells that were trained before, with their outcomes.
    """

    def __init__(self, keep: str, finished: Sequence[tuple[Cell, Outcome]]) -> None:
        self.keep = keep
        self.best: dict[str, tuple[float, Cell]] = {}  # by task
        for cell, outcome in finished:
            self._take(cell, outcome)

    def _take(self, cell: Cell, outcome: Outcome) -> Cell | None:
        """Take note of a cell; return the one that was the best before if this one is better."""
        task, selected = cell.source.task.name, outcome.selected
        before, best = self.best.get(task, (-math.inf, cell))
        if selected is None or not selected > before:
            return None
        self.best[task] = (selected, cell)
        return best

    def write(self, cell: Cell, outcome: Outcome, videos: list[str], head: Tensors) -> None:
        """Write a finished cell, with its head if that is kept; the head that was the best before goes then."""
        beaten = self._take(cell, outcome)
        wanted = self.keep == "all" or (self.keep == "best" and beaten is not None)
        kept = wanted and outcome.diverged is None and bool(head)  # a cluster sends what may be kept, and no more
        cell.write(outcome, videos, head if kept else None)
        if self.keep == "best" and beaten is not None and beaten is not cell:
            beaten.folder.head.unlink(missing_ok=True)


class GridRun:
    """Gets cells trained, writes them, and tells how far it is.

    Args:
        out: folder of the ablation.
        heads: which heads are kept.
        trainer: trains groups.
        cells: of the whole grid, finished ones too: with what the trainer does at once, they decide how large
            groups are, so that these are the same after a kill.
        total: epochs of all heads to come.
        listener: receives progress.
    """

    def __init__(
        self, out: Path, heads: BestHeads, trainer: Trainer, cells: int, total: int, listener: Listener
    ) -> None:
        self.out, self.heads, self.trainer, self.total, self.listener = out, heads, trainer, total, listener
        self.largest_group = -(-cells // trainer.at_once)
        self.done = 0  # epochs of heads

    def run(
        self, cells: Sequence[Cell], source: LoadedSource, after_each: Callable[[dict[str, Outcome]], None]
    ) -> None:
        """Train cells of one source; ``after_each`` gets the outcomes, by the cells' names, of each finished group."""
        trainer = self.trainer
        groups = list(group_cells(cells, trainer.device, trainer.heads_memory, self.largest_group))
        work = [
            Group(
                [cell.name for cell in group],
                [cell.settings for cell in group],
                self.out.absolute() / "groups" / f"{group[0].name}.safetensors",
            )
            for group in groups
        ]
        for index, trained in trainer.train(work, source, self._report):
            for cell, outcome, head in zip(groups[index], trained.outcomes, trained.heads, strict=True):
                if outcome.diverged is not None:
                    self.listener.warning(
                        f"{cell.setting.name}, seed {cell.settings.seed}: diverged in epoch {outcome.diverged}"
                    )
                self.heads.write(cell, outcome, source.video_names, head)
            discard_checkpoint(work[index])
            after_each(dict(zip(work[index].cells, trained.outcomes, strict=True)))

    def _report(self, epochs: int, note: str) -> None:
        self.done += epochs
        self.listener.progress(self.done, self.total, "epoch", note)


def discard_checkpoint(group: Group) -> None:
    """Remove what a group would continue from: all its results are written."""
    group.checkpoint.unlink(missing_ok=True)


def epochs_of(cells: Sequence[Cell]) -> int:
    """Return how many epochs of heads cells take; a ridge counts as one."""
    return sum(1 if cell.settings.head == "ridge" else cell.settings.epochs for cell in cells)
