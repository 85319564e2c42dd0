"""Training what is missing of a grid, group after group; every finished group is on disk before the next one starts."""

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from affcache.ablations.cell_folder import Cell, Outcome
from affcache.ablations.group_training import GroupTraining
from affcache.ablations.grouping import group_cells
from affcache.ablations.sources import LoadedSource
from affcache.learner import build_head, predict
from affcache.listener import Listener
from affcache.ridge_run import RidgeRun
from affcache.runs import RunFolder, Tensors, read_tensors
from affcache.stacked_heads import StackedHeads


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
        kept = outcome.diverged is None and (self.keep == "all" or (self.keep == "best" and beaten is not None))
        cell.write(outcome, videos, head if kept else None)
        if self.keep == "best" and beaten is not None and beaten is not cell:
            beaten.folder.head.unlink(missing_ok=True)


class GridRun:
    """Trains cells and tells how far it is.

    Args:
        out: folder of the ablation.
        heads: which heads are kept.
        device: where they train.
        total: epochs of all heads to come.
        listener: receives progress.
    """

    def __init__(self, out: Path, heads: BestHeads, device: torch.device, total: int, listener: Listener) -> None:
        self.out, self.heads, self.device, self.total, self.listener = out, heads, device, total, listener
        self.done = 0  # epochs of heads

    def run(
        self, cells: Sequence[Cell], source: LoadedSource, after_each: Callable[[dict[str, Outcome]], None]
    ) -> None:
        """Train cells of one source; ``after_each`` gets the outcomes, by the cells' names, of each finished group."""
        for group in group_cells(cells, self.device):
            if group[0].settings.head == "ridge":
                outcomes = [self._ridge(group[0], source)]
            else:
                outcomes = self._group(group, source)
            after_each({cell.name: outcome for cell, outcome in zip(group, outcomes, strict=True)})

    def _group(self, group: list[Cell], source: LoadedSource) -> list[Outcome]:
        training = GroupTraining(group, source, self.device, self.out / "groups" / f"{group[0].name}.safetensors")
        if continued := training.restore():
            self._report(continued * len(group), "continued")
        training.run(self._report)
        outcomes = training.outcomes()
        for cell, outcome, head in zip(group, outcomes, training.best_heads, strict=True):
            if outcome.diverged is not None:
                self.listener.warning(
                    f"{cell.setting.name}, seed {cell.settings.seed}: diverged in epoch {outcome.diverged}"
                )
            self.heads.write(cell, outcome, source.video_names, head)
        training.discard_checkpoint()
        return outcomes

    def _ridge(self, cell: Cell, source: LoadedSource) -> Outcome:
        """Solve a ridge: its strength is chosen as an epoch is otherwise."""
        task, width = source.of.task, source.of.store.width
        folder = RunFolder(self.out / "groups" / cell.name)
        shutil.rmtree(folder.path, ignore_errors=True)  # of a kill
        folder.path.mkdir(parents=True)
        ridge = RidgeRun(cell.settings, task, width, folder, {})
        ridge.run(source.train, source.selection, Listener())
        tensors, _ = read_tensors(folder.head)
        head = build_head(cell.settings, width, task)
        head.load_state_dict(tensors)
        stacked = StackedHeads([head], dropout=[0.0], device=self.device)
        (logits,) = predict(stacked, source.validation, cell.settings.normalize)  # (n, C)
        outcome = Outcome.of(source, logits, ridge.best_value, ridge.best_epoch, folder.read_history())
        self.heads.write(cell, outcome, source.video_names, tensors)
        shutil.rmtree(folder.path)
        self._report(1, f"ridge: {task.metric} {outcome.value:.3f}")
        return outcome

    def _report(self, epochs: int, note: str) -> None:
        self.done += epochs
        self.listener.progress(self.done, self.total, "epoch", note)


def epochs_of(cells: Sequence[Cell]) -> int:
    """Return how many epochs of heads cells take; a ridge counts as one."""
    return sum(1 if cell.settings.head == "ridge" else cell.settings.epochs for cell in cells)
