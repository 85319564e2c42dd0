"""The epoch loop: H heads trained, evaluated and remembered epoch by epoch; and one head's run saved as it goes."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from affcache.errors import ConfigError, StoreError, first_line
from affcache.files import read_tensors, write_tensors
from affcache.progress import Listener
from affcache.tasks.kinds import Task
from affcache.tasks.tasks import TASKS
from affcache.tasks.whole_videos import scored
from affcache.training.data import FrameSource
from affcache.training.learner import BaseLearner, Tensors, learning_rate
from affcache.training.risk import cvar
from affcache.training.run_folder import RunFolder

if TYPE_CHECKING:
    from affcache.training.ridge import Run

Entry = dict[str, Any]  # a line of history
LOSSES = ("train_loss", "validation_loss")


@dataclass
class Best:
    """The best epoch of one head so far; epochs are counted from 1. For a ridge an epoch is a strength."""

    value: float = -math.inf
    epoch: int = 0
    entry: Entry = field(default_factory=dict)
    head: Tensors = field(default_factory=dict)  # on the CPU
    history: list[Entry] = field(default_factory=list)
    diverged: int | None = None  # the epoch in which the training broke down; what came before is kept

    def take(self, entry: Entry, value: float, head: Tensors) -> bool:
        """Take up a line of history; return whether it is the best so far, whose head is copied then."""
        self.history.append(entry)
        if not value > self.value:
            return False
        self.value, self.epoch, self.entry = value, len(self.history), entry
        self.head = {name: tensor.detach().to("cpu", copy=True) for name, tensor in head.items()}
        return True


class Epochs:
    """H heads in training: the learner, and of each head its history and its best epoch.

    A head that diverges is out: its numbers go on being computed beside the others', which they can't reach.

    Args:
        learner: the heads with their optimisers.
    """

    unit = "epoch"  # what a step is called

    def __init__(self, learner: BaseLearner) -> None:
        self.learner = learner
        self.steps = learner.settings.epochs
        self.done = 0
        self.best = [Best() for _ in learner.recipes]

    def run(self, train: FrameSource, validation: FrameSource | None = None) -> Iterator[list[Entry]]:
        """Train the epochs that are left while a head is; yield a line of history for each head after each.

        Without validation frames there is no metric, and the last epoch counts as the best.
        """
        while self.done < self.steps and not all(best.diverged for best in self.best):
            entries = train_epoch(self.learner, train, validation, self.done)
            self.done += 1
            for head, (entry, best) in enumerate(zip(entries, self.best, strict=True)):
                if best.diverged is None and has_diverged(entry):
                    best.diverged = self.done
                if best.diverged is None:
                    value = entry.get(self.learner.task.metric, float(self.done))
                    best.take(entry, value, self.learner.head_state(head))
            yield entries

    def predict_best(self, frames: FrameSource) -> torch.Tensor:
        """Return the logits (H, n, C) of each head's best epoch, in one pass. The training is over then."""
        for head, best in enumerate(self.best):
            if best.head:  # a head may have diverged at once
                self.learner.load_head(head, best.head)
        return self.learner.predict(frames)

    def state(self) -> tuple[Tensors, dict[str, Any]]:
        """Return the tensors and the progress that a continued training needs to equal an uninterrupted one."""
        tensors = self.learner.state()
        for head, best in enumerate(self.best):
            tensors |= {f"best.{head}.{name}": tensor for name, tensor in best.head.items()}
        own = ("epoch", "entry", "history", "diverged")
        progress = [
            {**{name: getattr(best, name) for name in own}, "value": best.value if best.epoch else None}
            for best in self.best
        ]
        return tensors, {"epoch": self.done, "best": progress}

    def load_state(self, tensors: Tensors, progress: dict[str, Any]) -> None:
        """Take up what ``state`` returned; raises ValueError where its tensors are damaged."""
        self.learner.load_state({name: tensor for name, tensor in tensors.items() if not name.startswith("best.")})
        self.done = progress["epoch"]
        for head, (best, of) in enumerate(zip(self.best, progress["best"], strict=True)):
            best.epoch, best.entry, best.history, best.diverged = (
                of[name] for name in ("epoch", "entry", "history", "diverged")
            )
            best.value = -math.inf if of["value"] is None else of["value"]
            prefix = f"best.{head}."
            best.head = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


@dataclass(frozen=True)
class SavedRun:
    """A run of one head in its folder, saved step by step: a kill costs the step that is under way."""

    run: "Run"
    folder: RunFolder  # claimed
    identity: dict[str, Any]  # goes into the header of every saved head: what ``HEADER`` names

    def train(self, train: FrameSource, validation: FrameSource, listener: Listener) -> None:
        """Make the steps that are left.

        Raises:
            ConfigError: the training diverges.
        """
        (best,), metric = self.run.best, TASKS[self.identity["task"]].metric
        for (entry,) in self.run.run(train, validation):
            if best.diverged is not None:
                loss = next(entry[name] for name in LOSSES if not math.isfinite(entry[name]))
                raise ConfigError(
                    f"The training diverged in epoch {entry['epoch']}: the loss is {loss}. Expected a finite loss. "
                    "Lower --lr or --rho, or try --normalize l2. The epochs before it are kept in "
                    f"{self.folder.path}."
                )
            self.folder.write_history(best.history)
            own = {name: entry[name] for name in ("epoch", "strength", metric) if name in entry}
            if best.entry is entry:
                write_tensors(self.folder.head, best.head, {**self.identity, **own})
            if isinstance(self.run, Epochs):
                progress = {"epoch": self.run.done, "best_value": best.value, "best_epoch": best.epoch}
                write_tensors(self.folder.last, self.run.learner.state(), {**self.identity, **progress})
            strength = f"strength {entry['strength']:g}: " if "strength" in entry else ""
            words = f"{strength}{metric} {entry[metric]:.3f}, best {best.value:.3f}"
            listener.progress(entry["epoch"], self.run.steps, self.run.unit, words)

    def restore(self) -> None:
        """Continue from the last finished epoch, as if there had been no interruption; a ridge begins anew."""
        if not isinstance(self.run, Epochs) or not self.folder.last.exists():  # killed in the first epoch
            return
        tensors, progress = read_tensors(self.folder.last)
        (best,), history = self.run.best, self.folder.read_history()
        try:
            done, best.epoch = int(progress["epoch"]), int(progress["best_epoch"])
            best.value = float(progress["best_value"])
            if not 0 <= best.epoch <= done <= min(len(history), self.run.steps):
                raise ValueError(f"it is of epoch {done}, the history has {len(history)}")
            self.run.learner.load_state(tensors)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise StoreError(
                f"{self.folder.last} can't be continued from ({first_line(error)}). Expected the file as "
                "'affcache fit' wrote it. Restore it from a sound copy, or begin a new run with another --run DIR."
            ) from None
        self.run.done, best.history = done, history[:done]  # a kill may have left one more


def train_epoch(learner: BaseLearner, train: FrameSource, validation: FrameSource | None, epoch: int) -> list[Entry]:
    """Train an epoch, counted from 0, and evaluate; return a line of history for each head.

    A head that diverged has a loss that isn't finite, and a metric that is nan.
    """
    start = time.perf_counter()
    rates = [learning_rate(recipe, epoch) for recipe in learner.recipes]
    train_losses = learner.epoch(train, rates).tolist()
    trained = time.perf_counter()
    entries: list[Entry] = [{"epoch": epoch + 1, "train_loss": loss} for loss in train_losses]
    if validation is not None:
        logits = learner.predict(validation)  # (H, n, C)
        labels = validation.labels.to(logits.device)
        for entry, recipe, of_head in zip(entries, learner.recipes, logits, strict=True):
            losses = learner.task.labelled_losses(of_head, labels)
            entry["validation_loss"] = float(losses.mean())  # the last step may have broken the head
            entry["validation_cvar"] = float(cvar(losses, recipe.alpha))
            of_frames = (of_head, labels, validation.videos)
            entry[learner.task.metric] = math.nan if has_diverged(entry) else metric_of(learner.task, *of_frames)
    for entry, rate in zip(entries, rates, strict=True):
        seconds = round(time.perf_counter() - start, 3)
        entry |= {"learning_rate": rate, "seconds": seconds, "training_seconds": round(trained - start, 3)}
    return entries


def metric_of(task: Task, logits: torch.Tensor, labels: torch.Tensor, videos: torch.Tensor) -> float:
    """Return the task's metric of logits (n, C), labels (n,) or (n, C), and videos (n,) of frames.

    It is over frames, or over videos where labels are of these.
    """
    probabilities, labelled = scored(task, logits, videos)
    return task.score(labels.cpu().numpy()[labelled], task.decide(probabilities)).value


def has_diverged(entry: Entry) -> bool:
    """Say whether a line of history is of a head whose training broke down."""
    return not all(math.isfinite(entry[name]) for name in LOSSES if name in entry)
