"""Stage two as a whole: store and labels joined, a run folder claimed, a head trained, the best epoch kept."""

import math
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

import affcache
from affcache.devices import GIGABYTE, default_memory, resolve_device
from affcache.errors import ConfigError, InputError, StoreError, first_line
from affcache.files import read_tensors, write_tensors
from affcache.progress import Listener, Result
from affcache.settings import RUNS, command, default_store
from affcache.store.reading import EmbeddingStore
from affcache.tasks.annotations import (
    SPLIT_FOLDERS,
    JoinedLabels,
    find_label_files,
    group_frames,
    hold_out,
    join_labels,
)
from affcache.tasks.tasks import TASKS, Task, find_task
from affcache.training.data import FrameSource, load_frames, load_splits, require_finite
from affcache.training.epochs import LOSSES, Epochs
from affcache.training.learner import find_head
from affcache.training.objective import ClassCounts
from affcache.training.plain import new_learner
from affcache.training.ridge import Ridge, Run
from affcache.training.risk import tail_size
from affcache.training.run_folder import RunFolder, claim_run, describe_store, require_free, settings_to_json
from affcache.training.settings import FitSettings

HEADER = ("task", "settings", "store")  # of config.json, in the header of saved heads
SMALLEST_TAIL = 5  # losses; below this CVaR's gradient rests on a handful of frames


@dataclass(frozen=True)
class FitResult(Result):
    """What a training run found."""

    run: str
    task: str
    head: str
    metric: str
    value: float  # the metric on the validation split at the best epoch
    best_epoch: int  # counted from 1; for a ridge, which of the strengths
    epochs: int
    frames: int  # training frames
    validation_frames: int
    tail: float  # losses per batch that CVaR averages
    seconds: float
    device: str


@command(FitSettings)
def fit(settings: FitSettings, listener: Listener) -> FitResult:
    """Train a head on a store and labels, keeping the best epoch by the validation metric.

    A ridge head has no epochs: the strength is chosen as the epoch is otherwise.

    Raises:
        InputError: labels that can't be read or that join to no crop.
        StoreError: the store is incomplete or damaged, or (with resume) not the one the run began with.
        ConfigError: a setting is unknown or out of range, the run folder is taken, or the training diverges.
    """
    task = find_task(settings.task)
    settings.require_fitting(task)
    find_head(settings.head)
    device = resolve_device(settings.device)
    folder = RunFolder(settings.run or RUNS / f"{task.name}-{datetime.now():%Y%m%d-%H%M%S}")
    if not settings.resume:
        require_free(folder)  # before the labels are read, which takes a while
    memory = _memory(settings, folder, device)
    settings = replace(settings, memory=memory)
    joined = JoinedSplits.open(settings.store or default_store(), task, settings.annotations, listener)
    if settings.held_out:
        joined = joined.holding_out(settings.held_out, "for decision rules", listener, select=False)
    frames = len(joined.train)
    _say_tail(settings, task, frames, listener)
    loaded = joined.load(device, memory, listener)
    listener.message(f"run folder: {folder.path}")
    config = joined.describe_run(settings)
    claim_run(folder, config, resume=settings.resume)
    run, why = run_of([settings], loaded, device)
    if why:
        listener.warning(f"{why}.")
    saved = SavedRun(run, folder, {name: config[name] for name in HEADER})
    if settings.resume:
        saved.restore()
    start = time.perf_counter()
    saved.train(loaded.train, loaded.validation, listener)
    (best,) = saved.run.best
    return FitResult(
        run=str(folder.path),
        task=task.name,
        head=settings.head,
        metric=task.metric,
        value=best.value,
        best_epoch=best.epoch,
        epochs=len(best.history),
        frames=frames,
        validation_frames=len(joined.validation),
        tail=tail_of(settings, task, frames),
        seconds=time.perf_counter() - start,
        device=str(device),
    )


@dataclass(frozen=True)
class LoadedSplits:
    """The frames of joined splits, and which video each validation frame is of. What training needs, and no more."""

    task: Task
    width: int  # D
    videos: int  # V, of the store
    train: FrameSource
    selection: FrameSource
    validation: FrameSource
    video_names: list[str]  # (G,) of validation, persons of a video together
    video_of_frame: Any  # int64 array (n,)


@dataclass(frozen=True)
class JoinedSplits:
    """Joined labels of a store: train to train on, selection to choose by, validation to report."""

    store: EmbeddingStore
    task: Task
    train: JoinedLabels
    selection: JoinedLabels  # validation itself, unless training videos were held out for it
    validation: JoinedLabels

    @classmethod
    def open(cls, path: Path, task: Task, annotations: Path, listener: Listener) -> "JoinedSplits":
        """Check a store, join the labels of both splits to it, and say what was left out.

        Raises:
            InputError: labels that can't be read or that join to nothing.
            StoreError: the store is incomplete or damaged.
        """
        store = EmbeddingStore.open(path)
        store.require_complete()
        store.verify()  # two seconds for a million rows; a damaged one would train without a word
        train_files, validation_files = (find_label_files(annotations, task, split) for split in SPLIT_FOLDERS)
        if both := sorted(train_files.keys() & validation_files.keys()):
            examples = ", ".join(both[:3])
            listener.warning(f"{len(both)} videos are in both splits, so validation flatters: {examples}")
        train, validation = (join_labels(store, annotations, task, split) for split in SPLIT_FOLDERS)
        listener.message(train.account.sentence("train"))
        listener.message(validation.account.sentence("validation"))
        if len(train) < 2:
            raise InputError(
                f"Only {len(train)} training frame: expected at least 2. Point --annotations at more labels."
            )
        return cls(store, task, train, validation, validation)

    def holding_out(self, share: float, purpose: str, listener: Listener, *, select: bool) -> "JoinedSplits":
        """Take a share of the training frames away, in whole videos; ``select`` says whether they choose epochs.

        Raises:
            InputError: the frames are of one video.
        """
        train, held_out = hold_out(self.store, self.train, share)
        listener.message(
            f"held out {purpose}: {len(held_out):,} training frames, in whole videos; {len(train):,} are left"
        )
        return replace(self, train=train, selection=held_out if select else self.selection)

    def load(self, device: torch.device, memory: float, listener: Listener) -> LoadedSplits:
        """Load the frames, or stream those that ``memory`` GB don't hold.

        Raises:
            InputError: an embedding isn't finite.
            ConfigError: ``memory`` is too little to shuffle by.
        """
        train, validation = load_splits(self.store, self.train, self.validation, device, memory, listener)
        selection = validation
        if self.selection is not self.validation:
            frame = self.store.width * self.store.features.itemsize
            left = memory * GIGABYTE - (len(self.train) + len(self.validation)) * frame
            selection = load_frames(self.store, self.selection, device, max(left, memory * GIGABYTE / 10))
            require_finite(selection, "held-out")
        require_finite(train, "training")
        require_finite(validation, "validation")
        sizes, videos = (self.store.width, len(self.store.video_names)), group_frames(self.store, self.validation)
        return LoadedSplits(self.task, *sizes, train, selection, validation, *videos)

    @cached_property
    def description(self) -> dict[str, Any]:
        """What config.json keeps of store and labels; the runs of a grid are many, and it takes a while."""
        labels = {"train": self.train.to_json(), "validation": self.validation.to_json()}
        if self.selection is not self.validation:
            labels["selection"] = self.selection.to_json()
        return {"store": describe_store(self.store), "labels": labels}

    def describe_run(self, settings: FitSettings) -> dict[str, Any]:
        """Return what config.json keeps: everything that decides a run, resolved."""
        return {
            "affcache": affcache.__version__,
            "task": self.task.name,
            "classes": list(self.task.classes),
            "settings": settings_to_json(settings),
            **self.description,
            "versions": {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()},
        }


def run_of(recipes: Sequence[FitSettings], splits: LoadedSplits, device: torch.device) -> tuple[Run, str]:
    """Return what trains heads side by side, or a ridge alone, untrained; and why not the fast way, if it isn't."""
    if recipes[0].head == "ridge":
        return Ridge(recipes[0], splits.task, splits.width), ""
    counts = ClassCounts.of(splits.task, splits.train.labels)
    learner, why = new_learner(recipes, splits.task, splits.width, device, counts, splits.videos)
    return Epochs(learner), why


@dataclass(frozen=True)
class SavedRun:
    """A run of one head in its folder, saved step by step: a kill costs the step that is under way."""

    run: Run
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
            self.folder.append_history(entry)
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
            self.folder.keep_history(0)
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
        self.run.done, best.history = done, history[:done]
        self.folder.keep_history(done)


def _memory(settings: FitSettings, folder: RunFolder, device: torch.device) -> float:
    """Return the GB of embeddings to hold at a time, resolved: they decide the order of frames when those stream.

    Unless it is said, a continued run takes what it began with, whatever machine it is continued on.
    """
    if settings.memory is not None:
        return settings.memory
    before = folder.read_config()["settings"].get("memory") if settings.resume else None
    return before or default_memory(device)


def tail_of(settings: FitSettings, task: Task, frames: int) -> float:
    """Return how many losses of a batch CVaR averages, with so many training frames."""
    return tail_size(min(settings.batch_size, frames) * task.losses_per_frame, settings.alpha)


def _say_tail(settings: FitSettings, task: Task, frames: int, listener: Listener) -> None:
    """Say how many losses CVaR averages per step, and warn when they are few."""
    if settings.alpha == 1 or settings.head == "ridge":
        return
    tail, level = tail_of(settings, task, frames), f"CVaR at alpha {settings.alpha:g}"
    if settings.cvar_level == "set":
        listener.message(f"{level} counts losses above a threshold over recent batches: {tail:g} a batch on average")
    elif settings.cvar_within != "batch":
        listener.message(f"{level} averages the worst losses of each {settings.cvar_within} in a batch by itself")
    else:
        listener.message(f"{level} averages the worst {tail:g} losses of each batch")
        if tail < SMALLEST_TAIL:
            listener.warning(
                f"CVaR's tail is {tail:g} losses a batch, fewer than {SMALLEST_TAIL}: its gradient will be noisy. "
                "Raise --batch-size or --alpha, or find the threshold over more batches with --cvar-level set."
            )
