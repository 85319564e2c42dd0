"""How a grid trains: in groups of heads side by side, ridges alone; what a kill leaves of a group is continued."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from affcache.ablation.settings import AblateSettings
from affcache.ablation.summary import Outcome, Trial
from affcache.devices import device_memory, resolve_device, wait_for
from affcache.errors import ConfigError, StoreError
from affcache.files import Tensors, discard_partials, read_tensors, remove, write_tensors
from affcache.progress import Listener, counted, duration_text
from affcache.tasks.task import Task
from affcache.training.data import Frames, batches, epoch_length
from affcache.training.epochs import Epochs
from affcache.training.fit import run_of
from affcache.training.learner import FORM, build_head
from affcache.training.ridge import Run
from affcache.training.settings import FitSettings
from affcache.training.splits import LoadedSplits

MOST_HEADS = {"cpu": 16, "cuda": 64}  # beyond these a head costs the same, and a kill loses more
SHARE = 0.25  # of the device's memory is for heads
COPIES = 7  # of a head's parameters: themselves, gradients, two moments, the point nearby, the best epoch, one to spare
FLOAT = 4  # bytes
LONGEST = 24 * 3600.0  # seconds; what takes longer has to be asked for
WARM_UP, STEPS = 4, 12
SIDE_BY_SIDE = {"cuda": 16}  # heads tried at a time; on a CPU one says enough
TRIED_FRAMES = 2048  # of an evaluation
SECONDS_BETWEEN_CHECKPOINTS = 30.0
Report = Callable[[int, str], None]  # epochs of heads finished now, how it stands


def form_of(settings: FitSettings) -> tuple[object, ...]:
    """Return what the settings of heads side by side have in common."""
    return (*(getattr(settings, name) for name in FORM), settings.rho > 0)


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
        size = 1 if settings.head == "ridge" else min(size, largest or size)
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
    heads = SIDE_BY_SIDE.get(device.type, 1)
    run, _ = run_of([replace(recipe, seed=seed) for seed in range(heads)], splits, device)
    assert isinstance(run, Epochs)  # it is no ridge's
    learner = run.learner
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
            f"The grid has {counted(trials, 'head')} to train: about {duration_text(seconds)}. Expected at most a day "
            "unless --yes is given. Say it, or vary less, or with fewer --seeds or --epochs, --stride or "
            "--frames-per-epoch."
        )


@dataclass(frozen=True)
class Group:
    """Trials that train side by side; a ridge is alone."""

    trials: Sequence[str]  # names
    recipes: Sequence[FitSettings]
    checkpoint: Path  # absolute; to continue from after a kill
    predicts: bool = False  # whether what the heads say of validation is wanted too

    @classmethod
    def of(cls, trials: Sequence[Trial], out: Path, *, predicts: bool = False) -> "Group":
        """Return the group of some trials, its checkpoint in the ablation's folder."""
        checkpoint = out.absolute() / "groups" / f"{trials[0].name}.safetensors"
        return cls([trial.name for trial in trials], [trial.settings for trial in trials], checkpoint, predicts)

    def discard_checkpoint(self) -> None:
        """Remove what the group would continue from: all its results are written."""
        remove(self.checkpoint)
        discard_partials(self.checkpoint)


@dataclass(frozen=True)
class Trained:
    """What a group's training found."""

    outcomes: Sequence[Outcome]
    heads: Sequence[Tensors]  # of the best epoch; empty where a head diverged at once
    probabilities: Sequence[torch.Tensor] = ()  # (n, C) of each head, on the CPU, where they are wanted


def train_group(
    group: Group, splits: LoadedSplits, device: torch.device, report: Report, *, keep_checkpoint: bool = True
) -> Trained:
    """Train the heads of one group, or solve its ridge; now and then write the checkpoint."""
    run, _ = run_of(group.recipes, splits, device)
    heads, saved = len(group.trials), time.monotonic()
    done = _restore(run, group) if keep_checkpoint and isinstance(run, Epochs) else 0
    if done:
        report(done * heads, "continued")
    for entries in run.run(splits.train, splits.selection):
        done = entries[0]["epoch"]
        report(heads if run.unit == "epoch" else 0, f"{run.unit} {done} of {run.steps}, {_standing(run, splits)}")
        due = time.monotonic() - saved >= SECONDS_BETWEEN_CHECKPOINTS
        if keep_checkpoint and due and isinstance(run, Epochs) and done < run.steps:
            tensors, progress = run.state()
            write_tensors(group.checkpoint, tensors, {**progress, "trials": list(group.trials)})
            saved = time.monotonic()
    report(heads * (run.steps - done) if run.unit == "epoch" else 1, _standing(run, splits))
    logits = run.predict_best(splits.validation)  # (H, n, C)
    outcomes = [Outcome.of(best, of_head, splits) for best, of_head in zip(run.best, logits, strict=True)]
    probabilities = [splits.task.probabilities(of_head).cpu() for of_head in logits] if group.predicts else []
    return Trained(outcomes, [best.head for best in run.best], probabilities)


def _standing(run: Run, splits: LoadedSplits) -> str:
    best = max(one.value for one in run.best)
    return f"best {splits.task.metric} of this group's {counted(len(run.best), 'head')} {best:.3f}"


def _restore(run: Epochs, group: Group) -> int:
    """Continue from the checkpoint if there is one of these trials; return how many epochs it had finished."""
    try:
        tensors, progress = read_tensors(group.checkpoint)
    except StoreError:  # none, or none that can be read: its work is made again
        return 0
    if progress.get("trials") == list(group.trials):
        with suppress(ValueError):  # damaged: its work is made again
            run.load_state(tensors, progress)
    return run.done


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
        tried = [recipe for recipe in recipes if recipe.head != "ridge"]
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
