"""The epoch loop: H heads trained, evaluated and remembered epoch by epoch; one head's run saved as it goes; and the
epoch that an earlier run chose, taken up."""

import math
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from affcache.errors import ConfigError, StoreError, first_line
from affcache.files import read_json, read_tensors, write_tensors
from affcache.progress import Listener
from affcache.tasks.multitask import MultiTask
from affcache.tasks.task import Task
from affcache.tasks.tasks import find_task, name_of_same, task_of_run
from affcache.training.data import FrameSource
from affcache.training.learner import BaseLearner, Tensors, learning_rate
from affcache.training.risk import cvar
from affcache.training.run_folder import (
    ELSEWHERE,
    RunFolder,
    continued,
    refuse_changes,
    settings_from_json,
    stores_of_run,
    task_to_fit,
)
from affcache.training.settings import FitSettings, chosen_on

if TYPE_CHECKING:
    from affcache.training.ridge import Run

BEST = "best.json"  # in the folder of an ablation: what is best, and how it is trained
LAST_FIT = ("run", "resume", "train_on", "held_out", "seed", "memory")  # may be said beside a run whose choice is taken
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

    def take(self, entry: Entry, value: float, head: Tensors, *, anyway: bool = False) -> bool:
        """Take up a line of history; return whether it is the best so far, or the last, whose head is copied then."""
        self.history.append(entry)
        if not value > self.value and not anyway:
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
        self.steps = learner.settings.last_epoch
        self.done = 0
        self.best = [Best() for _ in learner.recipes]

    @property
    def task(self) -> Task:
        """What is predicted."""
        return self.learner.task

    def run(self, train: FrameSource, validation: FrameSource | None = None) -> Iterator[list[Entry]]:
        """Train the epochs that are left while a head is; yield a line of history for each head after each.

        The last epoch counts as the best where it was chosen before; so it does without validation frames, and metric.
        """
        while self.done < self.steps and not all(best.diverged for best in self.best):
            entries = train_epoch(self.learner, train, validation, self.done)
            self.done += 1
            for head, (entry, best) in enumerate(zip(entries, self.best, strict=True)):
                if best.diverged is None and has_diverged(entry):
                    best.diverged = self.done
                if best.diverged is None:
                    value = entry.get(self.learner.task.metric, float(self.done))
                    anyway = self.learner.settings.chosen_before
                    best.take(entry, value, self.learner.head_state(head), anyway=anyway)
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
        (best,), metric = self.run.best, self.run.task.metric
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
            loss, tail = losses_of(learner.task, of_head, labels, recipe)
            entry |= {"validation_loss": loss, "validation_cvar": tail}  # the last step may have broken the head
            of_frames = (of_head, labels, validation.videos)
            entry[learner.task.metric] = math.nan if has_diverged(entry) else metric_of(learner.task, *of_frames)
    for entry, rate in zip(entries, rates, strict=True):
        seconds = round(time.perf_counter() - start, 3)
        entry |= {"learning_rate": rate, "seconds": seconds, "training_seconds": round(trained - start, 3)}
    return entries


def losses_of(task: Task, logits: torch.Tensor, labels: torch.Tensor, settings: FitSettings) -> tuple[float, float]:
    """Return the mean loss and the CVaR over logits (n, C) and labels (n,) or (n, values).

    Of several tasks it is the weighted sum of theirs, as in training; one without labels counts 0.
    """
    if not isinstance(task, MultiTask):
        losses = task.labelled_losses(logits, labels)
        return float(losses.mean()), float(cvar(losses, settings.alpha))
    each = zip(settings.weights_of(task), task.parts, task.outputs_of(logits), task.split(labels), strict=True)
    found = [
        (weight, *losses_of(part, of, own, settings)) for weight, part, of, own in each if part.labelled(own).any()
    ]
    return sum(weight * loss for weight, loss, _ in found), sum(weight * tail for weight, _, tail in found)


def metric_of(task: Task, logits: torch.Tensor, labels: torch.Tensor, videos: torch.Tensor) -> float:
    """Return the task's metric of logits (n, C), labels (n,) or (n, C), and videos (n,) of frames.

    It is over frames, or over videos where labels are of these.
    """
    probabilities, labelled = task.scored(logits, videos)
    return task.score(labels.cpu().numpy()[labelled], task.decide(probabilities)).value


def has_diverged(entry: Entry) -> bool:
    """Say whether a line of history is of a head whose training broke down."""
    return not all(math.isfinite(entry[name]) for name in LOSSES if name in entry)


def completed(settings: FitSettings, given: Collection[str]) -> FitSettings:
    """Return the settings with those of the run that is to be continued, or whose choice is taken: ``continued``."""
    begun = settings.resume and settings.run is not None and RunFolder(settings.run).config.exists()
    return continued(settings, given) if begun or settings.as_ is None else as_chosen(settings, given)


def as_chosen(settings: FitSettings, given: Collection[str]) -> FitSettings:
    """Return the settings, with store and chosen epoch or strength, of the run or the ablation that ``as_`` names.

    Args:
        settings: what was said beside it.
        given: the names of the settings that were said.

    Raises:
        InputError: there is no such run.
        StoreError: it is damaged.
        ConfigError: it is unfinished, an ablation has no best of the task, or another setting was said, with which
            another epoch might be best.
    """
    where = settings.as_
    assert where is not None
    task = settings.task
    if "task" in given:  # by its name, be it given by the file that defines it
        settings = replace(settings, task=find_task(settings.task).name)
    if (ablated := where / BEST).is_file():
        entry = _best_of(ablated, settings.task if "task" in given else "")
        values, stores = dict(entry["settings"]), entry["store"]
    else:
        values, stores = _chosen_by(RunFolder(where))
    began = replace(settings_from_json(values), store=tuple(map(Path, stores)))
    said = {name: getattr(settings, name) for name in given if name != "as_"}
    refusal = f"What {where} chose is of no use to other settings"
    instead = "say what to keep, --keep-epoch E or --strength S, without --as"
    refuse_changes(refusal, instead, began, said, (*ELSEWHERE, *LAST_FIT))
    chosen = replace(began, **said, as_=where)
    if "task" in given:
        name_of_same(task, task_to_train(chosen), refusal)
    return chosen


def task_to_train(settings: FitSettings) -> Task:
    """Return the task of ``as_chosen`` settings, which a folder knows, or of others: ``task_to_fit``."""
    return task_to_fit(settings) if settings.as_ is None else task_of_run(_taken(settings.as_, settings.task))


def choice_taken(settings: FitSettings) -> str:
    """Return where the choice of ``as_chosen`` settings was made: a key of ``CHOSEN_ON``."""
    assert settings.as_ is not None
    found = _taken(settings.as_, settings.task)
    where, labels = chosen_on(found), found["settings"]["annotations"]
    moved = settings.annotations is None or str(settings.annotations.absolute()) != labels
    return "" if where == "heldout" and moved else where  # other labels may have other splits


def _taken(where: Path, task: str) -> dict[str, Any]:
    """Return what a run, or an ablation of its best of a task, says of task, settings and choice."""
    return _best_of(where / BEST, task) if (where / BEST).is_file() else RunFolder(where).read_config()


def _best_of(path: Path, task: str) -> dict[str, Any]:
    """Return what an ablation says of the best of a task; with "" of its only one."""
    try:
        found = {str(one["task"]): one for one in read_json(path)["best"]}
        named = [(one["settings"]["annotations"], *one["store"]) for one in found.values()]
        if not all(isinstance(name, str) for names in named for name in names):
            raise ValueError("it doesn't name labels and stores")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{path} can't be read ({first_line(error)}). Expected it as 'affcache ablate' wrote it. Call that again: "
            "what is finished is kept."
        ) from None
    if task not in found and (task or len(found) != 1):
        raise ConfigError(
            f"{path} has the best of {' and '.join(found) or 'nothing'}. Expected a task of these. Say which with "
            "--task, or ablate first."
        )
    return found[task or next(iter(found))]


def _chosen_by(folder: RunFolder) -> tuple[dict[str, Any], list[str]]:
    """Return the settings of a run with its best epoch or strength, and its stores."""
    config, history = folder.read_config(), folder.read_history()
    settings, result = settings_from_json(config["settings"]), folder.path / "result.json"
    ridge = settings.head == "ridge"
    try:
        best = int(read_json(result)["best_epoch"] if result.is_file() else read_tensors(folder.head)[1]["epoch"])
        if best < 1:
            raise ValueError("it diverged at once")
        chosen = {"strength": history[best - 1]["strength"]} if ridge else {"keep_epoch": best}
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise StoreError(
            f"{folder.path} doesn't say its best epoch ({first_line(error)}). Expected a run that 'affcache fit' or "
            "'affcache ablate' finished. Train it again."
        ) from None
    if not ridge and len(history) < settings.last_epoch:
        raise ConfigError(
            f"Run {folder.path} is unfinished: {len(history)} of {settings.last_epoch} epochs, so that the best may "
            f"be to come. Finish it with 'affcache fit --run {folder.path} --resume', or say --keep-epoch E."
        )
    held_out = 0.0 if "selection" in config["labels"] else settings.held_out  # it was for choosing
    stores = [store["path"] for store in stores_of_run(config)]
    return {**config["settings"], "held_out": held_out, **chosen}, stores
