"""What trains groups of heads: this process, or a cluster. Nothing here knows of the ablation's folder or tables."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from affcache.ablation.group_training import GroupTraining
from affcache.ablation.grouping import heads_memory
from affcache.ablation.projection import project
from affcache.ablation.sources import LoadedSource
from affcache.ablation.trials import Outcome
from affcache.progress import Listener
from affcache.training.learner import build_head, predict
from affcache.training.ridge_run import RidgeRun
from affcache.training.run_folder import RunFolder, Tensors, read_tensors
from affcache.training.settings import FitSettings
from affcache.training.stacked import StackedHeads

Report = Callable[[int, str], None]  # epochs of heads finished now, how it stands


@dataclass(frozen=True)
class Group:
    """Cells that train side by side; a ridge is alone."""

    cells: Sequence[str]  # names
    recipes: Sequence[FitSettings]
    checkpoint: Path  # absolute; to continue from after a kill


@dataclass(frozen=True)
class Trained:
    """What a group's training found."""

    outcomes: Sequence[Outcome]
    heads: Sequence[Tensors]  # of the best epoch; empty where a head diverged at once


class Trainer(Protocol):
    """Trains groups of heads somewhere."""

    @property
    def device(self) -> torch.device:
        """Where they train."""

    @property
    def heads_memory(self) -> float:
        """Bytes that the heads of a group may take there."""

    @property
    def at_once(self) -> int:
        """How many groups train at a time."""

    def project(self, recipes: Sequence[FitSettings], source: LoadedSource) -> float:
        """Return the seconds that a head takes, divided by how many groups train at a time."""

    def train(self, groups: Sequence[Group], source: LoadedSource, report: Report) -> Iterator[tuple[int, Trained]]:
        """Yield the index of each group with what was found, as they finish."""


@dataclass(frozen=True)
class LocalTrainer:
    """Trains in this process."""

    device: torch.device
    at_once = 1

    @property
    def heads_memory(self) -> float:
        """Bytes that the heads of a group may take."""
        return heads_memory(self.device)

    def project(self, recipes: Sequence[FitSettings], source: LoadedSource) -> float:
        """Return the seconds that a head takes."""
        return project(recipes, source, self.device)

    def train(self, groups: Sequence[Group], source: LoadedSource, report: Report) -> Iterator[tuple[int, Trained]]:
        """Train one group after the other."""
        for index, group in enumerate(groups):
            yield index, train_group(group, source, self.device, report)


def train_group(
    group: Group, source: LoadedSource, device: torch.device, report: Report, *, keep_checkpoint: bool = True
) -> Trained:
    """Train the heads of one group, or solve its ridge."""
    if group.recipes[0].head == "ridge":
        return _solve_ridge(group.recipes[0], source, device, report)
    checkpoint = group.checkpoint if keep_checkpoint else None
    training = GroupTraining(group.cells, group.recipes, source, device, checkpoint)
    if continued := training.restore():
        report(continued * len(group.cells), "continued")
    training.run(report)
    return Trained(training.outcomes(), training.best_heads)


def _solve_ridge(recipe: FitSettings, source: LoadedSource, device: torch.device, report: Report) -> Trained:
    """Solve a ridge: its strength is chosen as an epoch is otherwise."""
    task, width = source.task, source.width
    with tempfile.TemporaryDirectory(prefix="affcache-ridge-") as temporary:
        folder = RunFolder(Path(temporary))
        ridge = RidgeRun(recipe, task, width, folder, {})
        ridge.run(source.train, source.selection, Listener())
        tensors, _ = read_tensors(folder.head)
        history = folder.read_history()
    head = build_head(recipe, width, task)
    head.load_state_dict(tensors)
    stacked = StackedHeads([head], dropout=[0.0], device=device)
    (logits,) = predict(stacked, source.validation, recipe.normalize)  # (n, C)
    outcome = Outcome.of(source, logits, ridge.best_value, ridge.best_epoch, history)
    report(1, f"ridge: {task.metric} {outcome.value:.3f}")
    return Trained([outcome], [tensors])
