"""What is missing of a grid, trained group after group; every finished group is on disk as soon as it is."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from affcache.ablation.group_training import Group, Report, Trained, train_group
from affcache.ablation.settings import AblateSettings
from affcache.ablation.trials import LoadedSplits, Outcome, Trial
from affcache.devices import device_memory, resolve_device, wait_for
from affcache.errors import ConfigError
from affcache.files import Tensors
from affcache.progress import Listener, duration_text
from affcache.tasks.tasks import Task
from affcache.training.data import Frames, batches, epoch_length
from affcache.training.learner import FORM, build_head
from affcache.training.objective import ClassCounts
from affcache.training.plain import new_learner
from affcache.training.settings import FitSettings

MOST_HEADS = {"cpu": 16, "cuda": 64}  # beyond these a head costs the same, and a kill loses more
SHARE = 0.25  # of the device's memory is for heads
COPIES = 7  # of a head's parameters: themselves, gradients, two moments, the point nearby, the best epoch, one to spare
FLOAT = 4  # bytes
LONGEST = 24 * 3600.0  # seconds; what takes longer has to be asked for
TRIED, WARM_UP, STEPS = 5, 4, 12
SIDE_BY_SIDE = {"cuda": 16}  # heads tried at a time; on a CPU one says enough
TRIED_FRAMES = 2048  # of an evaluation


def form_of(settings: FitSettings) -> tuple[object, ...]:
    """Return what the settings of heads side by side have in common; a ridge stands alone."""
    alone = settings.seed if settings.head == "ridge" else None
    return (*(getattr(settings, name) for name in FORM), settings.rho > 0, alone)


def group_trials(
    trials: Sequence[Trial], device: torch.device, memory: float, largest: int | None = None
) -> Iterator[list[Trial]]:
    """Yield the groups in which trials are trained.

    Groups depend on nothing but the trials and the memory, and finished ones don't change the others: after a kill,
    what is left falls into the same groups, in the same order.

    Args:
        trials: of one store.
        device: where they train.
        memory: bytes that the heads of a group may take.
        largest: trials in a group, at most; None where nothing else limits them.
    """
    by_form: dict[tuple[object, ...], list[Trial]] = {}
    for trial in trials:
        by_form.setdefault(form_of(trial.settings), []).append(trial)
    for form in sorted(by_form, key=repr):  # not by what comes first, which changes when it is finished
        alike = by_form[form]
        settings, splits = alike[0].settings, alike[0].splits
        size = most_heads(settings, splits.task, splits.store.width, len(splits.validation), memory, device)
        size = min(size, largest or size)
        for start in range(0, len(alike), size):
            yield alike[start : start + size]


def most_heads(settings: FitSettings, task: Task, width: int, frames: int, budget: float, device: torch.device) -> int:
    """Return how many heads train side by side within ``budget`` bytes, at least 1."""
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build_head(settings, width, task).parameters())
    activations = 8 * settings.hidden_layers * settings.hidden_width * settings.batch_size
    a_head = FLOAT * (COPIES * parameters + activations + 3 * frames * task.outputs)
    return max(1, min(MOST_HEADS.get(device.type, 1), int(budget // a_head)))


def _seconds_of(recipe: FitSettings, splits: LoadedSplits, device: torch.device) -> float:
    counts = ClassCounts.of(splits.task, splits.train.labels)
    heads = SIDE_BY_SIDE.get(device.type, 1)
    seeds = [replace(recipe, seed=seed) for seed in range(heads)]
    learner, _ = new_learner(seeds, splits.task, splits.width, device, counts, splits.videos)
    embeddings = next(iter(splits.train.evaluation_batches()))[:TRIED_FRAMES].clone()
    frames = Frames(embeddings, splits.train.labels[: len(embeddings)], splits.train.videos[: len(embeddings)])
    size = min(recipe.batch_size, len(frames))
    generator = torch.Generator().manual_seed(0)  # the caller's random numbers stay his own
    order = torch.randint(0, len(frames), (heads, (WARM_UP + STEPS) * size), generator=generator)
    taken = batches(order.to(frames.labels.device), size)
    for batch in taken[:WARM_UP]:
        learner.step(frames, batch)
    step = _timed(lambda: [learner.step(frames, batch) for batch in taken[WARM_UP:]], device) / STEPS
    evaluation = _timed(lambda: learner.predict(frames), device) / len(frames)
    length = epoch_length(splits.train.videos.cpu(), stride=recipe.stride, frames_per_epoch=recipe.frames_per_epoch)
    return recipe.epochs * (-(-length // recipe.batch_size) * step + len(splits.selection) * evaluation) / heads


def _timed(work: Callable[[], object], device: torch.device) -> float:
    wait_for(device)
    start = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - start


def require_asked_for(trials: int, seconds: float, asked: bool) -> None:
    """Refuse what takes longer than a day unless it was asked for.

    Raises:
        ConfigError: it wasn't.
    """
    if seconds > LONGEST and not asked:
        raise ConfigError(
            f"The grid has {trials:,} heads to train: about {duration_text(seconds)}. Expected at most a day unless "
            "--yes is given. Say it, or vary less, or with fewer --seeds or --epochs, --stride or --frames-per-epoch."
        )


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

    def project(self, recipes: Sequence[FitSettings], splits: LoadedSplits) -> float:
        """Return the seconds that a head takes, divided by how many groups train at a time."""

    def train(self, groups: Sequence[Group], splits: LoadedSplits, report: Report) -> Iterator[tuple[int, Trained]]:
        """Yield the index of each group with what was found, as they finish."""


@dataclass(frozen=True)
class LocalTrainer:
    """Trains in this process."""

    device: torch.device
    at_once = 1

    @property
    def heads_memory(self) -> float:
        """Bytes that the heads of a group may take: a quarter of the device's."""
        return device_memory(self.device) * SHARE

    def project(self, recipes: Sequence[FitSettings], splits: LoadedSplits) -> float:
        """Return the seconds that a head takes, the mean of a few settings tried for a moment each.

        On a CPU one is tried at a time; side by side they share some of it, so that a grid takes somewhat less.
        """
        tried = [recipe for recipe in recipes if recipe.head != "ridge"][:TRIED]
        return statistics.fmean(_seconds_of(one, splits, self.device) for one in tried) if tried else 1.0

    def train(self, groups: Sequence[Group], splits: LoadedSplits, report: Report) -> Iterator[tuple[int, Trained]]:
        """Train one group after the other."""
        for index, group in enumerate(groups):
            yield index, train_group(group, splits, self.device, report)


@contextmanager
def local_trainer(settings: AblateSettings, listener: Listener) -> Iterator[tuple[LocalTrainer, torch.device]]:
    """Give what trains heads in this process, and the device on which frames are kept.

    Raises:
        ConfigError: the device isn't there.
    """
    device = resolve_device(settings.device)
    yield LocalTrainer(device), device


class BestHeads:
    """Which heads are kept: all, none, or of each task the one with the best metric where epochs were chosen.

    Args:
        keep: "all", "none" or "best".
        finished: trials that were trained before, with their outcomes.
    """

    def __init__(self, keep: str, finished: Sequence[tuple[Trial, Outcome]]) -> None:
        self.keep = keep
        self.best: dict[str, tuple[float, Trial]] = {}  # by task
        for trial, outcome in finished:
            self._take(trial, outcome)

    def _take(self, trial: Trial, outcome: Outcome) -> Trial | None:
        """Take note of a trial; return the one that was the best before if this one is better."""
        task, selected = trial.splits.task.name, outcome.selected
        before, best = self.best.get(task, (-math.inf, trial))
        if selected is None or not selected > before:
            return None
        self.best[task] = (selected, trial)
        return best

    def write(self, trial: Trial, outcome: Outcome, videos: list[str], head: Tensors) -> None:
        """Write a finished trial, with its head if that is kept; the head that was the best before goes then."""
        beaten = self._take(trial, outcome)
        wanted = self.keep == "all" or (self.keep == "best" and beaten is not None)
        kept = wanted and outcome.diverged is None and bool(head)  # a cluster sends what may be kept, and no more
        trial.write(outcome, videos, head if kept else None)
        if self.keep == "best" and beaten is not None and beaten is not trial:
            beaten.folder.head.unlink(missing_ok=True)
