"""Stage two as a whole: store and labels joined, a run folder claimed, a head trained, the best epoch kept."""

import math
import platform
import time
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import affcache
from affcache.devices import default_memory, resolve_device
from affcache.errors import ConfigError, InputError
from affcache.files import read_tensors, write_tensors
from affcache.progress import Listener, Result
from affcache.settings import RUNS, build, default_store
from affcache.store.reading import EmbeddingStore
from affcache.tasks.annotations import JoinedLabels, find_label_files, join_labels
from affcache.tasks.splits import hold_out
from affcache.tasks.tasks import TASKS, Task, find_task
from affcache.training.data import FrameSource, load_splits, require_finite
from affcache.training.epochs import LOSSES, Best, Entry, Epochs, Run
from affcache.training.learner import find_head
from affcache.training.objective import ClassCounts
from affcache.training.plain import new_learner
from affcache.training.ridge import Ridge
from affcache.training.risk import tail_size
from affcache.training.run_folder import RunFolder, claim_run, describe_store, require_free, settings_to_json
from affcache.training.settings import FitSettings

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


def fit(settings: FitSettings | None = None, /, *, listener: Listener | None = None, **values: Any) -> FitResult:
    """Train a head on a store and labels, keeping the best epoch by the validation metric.

    Args:
        settings: all settings, or none and single ones by name, for instance ``fit(task="au", store=path)``.
        listener: receives messages and progress.

    A ridge head has no epochs: the strength is chosen as the epoch is otherwise.

    Raises:
        InputError: labels that can't be read or that join to no crop.
        StoreError: the store is incomplete or damaged, or (with resume) not the one the run began with.
        ConfigError: a setting is unknown or out of range, the run folder is taken, or the training diverges.
    """
    settings = build(FitSettings, values, over=settings)
    listener = listener or Listener()
    task = find_task(settings.task)
    settings.require_fitting(task)
    find_head(settings.head)
    device = resolve_device(settings.device)
    folder = RunFolder(settings.run or RUNS / f"{task.name}-{datetime.now():%Y%m%d-%H%M%S}")
    if not settings.resume:
        require_free(folder)  # before the labels are read, which takes a while
    memory = _memory(settings, folder, device)
    settings = replace(settings, memory=memory)
    store = EmbeddingStore.open(settings.store or default_store())
    store.require_complete()
    store.verify()  # two seconds for a million rows; a damaged one would train without a word
    train, validation = join_splits(store, settings.annotations, task, listener)
    if settings.held_out:
        train, held_out = hold_out(store, train, settings.held_out)
        listener.message(f"held out for decision rules: {len(held_out):,} training frames; {len(train):,} are left")
    _say_tail(settings, task, len(train), listener)
    frames = load_splits(store, train, validation, device, memory, listener)
    for source, split in zip(frames, ("training", "validation"), strict=True):
        require_finite(source, split)
    listener.message(f"run folder: {folder.path}")
    claim_run(folder, _describe_run(settings, store, task, train, validation), resume=settings.resume)
    identity = {"task": task.name, "settings": settings_to_json(settings), "store": describe_store(store)}
    saved = SavedRun(_run_of(settings, task, store, train, device, listener), folder, identity)
    if settings.resume:
        saved.restore()
    start = time.perf_counter()
    saved.train(*frames, listener)
    (best,) = saved.run.best
    return FitResult(
        run=str(folder.path),
        task=task.name,
        head=settings.head,
        metric=task.metric,
        value=best.value,
        best_epoch=best.epoch,
        epochs=len(best.history),
        frames=len(train),
        validation_frames=len(validation),
        tail=tail_of(settings, task, len(train)),
        seconds=time.perf_counter() - start,
        device=str(device),
    )


def _run_of(
    settings: FitSettings,
    task: Task,
    store: EmbeddingStore,
    train: JoinedLabels,
    device: torch.device,
    listener: Listener,
) -> Run:
    """Return the run that the settings ask for, untrained."""
    if settings.head == "ridge":
        return Ridge(settings, task, store.width)
    counts = ClassCounts.of(task, torch.from_numpy(train.labels))
    learner, why = new_learner([settings], task, store.width, device, counts, len(store.video_names))
    if why:
        listener.warning(f"{why}.")
    return Epochs(learner)


class SavedRun:
    """A run of one head in its folder, saved step by step: a kill costs the step that is under way.

    Args:
        run: what trains the head.
        folder: the claimed run folder.
        identity: goes into the header of every saved head: task, settings, and the store's description.
    """

    def __init__(self, run: Run, folder: RunFolder, identity: dict[str, Any]) -> None:
        self.run, self.folder, self.identity = run, folder, identity

    def train(self, train: FrameSource, validation: FrameSource, listener: Listener) -> None:
        """Make the steps that are left.

        Raises:
            ConfigError: the training diverges.
        """
        (best,), metric = self.run.best, TASKS[self.identity["task"]].metric
        for (entry,) in self.run.run(train, validation):
            self._require_finite(best, entry)
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

    def _require_finite(self, best: Best, entry: Entry) -> None:
        """Refuse to go on with, or to keep, a head that diverged."""
        if best.diverged is not None:
            loss = next(entry[name] for name in LOSSES if not math.isfinite(entry[name]))
            raise ConfigError(
                f"The training diverged in epoch {entry['epoch']}: the loss is {loss}. Expected a finite loss. "
                "Lower --lr or --rho, or try --normalize l2. The epochs before it are kept in "
                f"{self.folder.path}."
            )

    def restore(self) -> None:
        """Continue from the last finished epoch, as if there had been no interruption; a ridge begins anew."""
        done = 0
        if isinstance(self.run, Epochs) and self.folder.last.exists():  # else killed in the first one
            tensors, progress = read_tensors(self.folder.last)
            self.run.learner.load_state(tensors)
            self.run.done = done = progress["epoch"]
            (best,) = self.run.best
            best.value, best.epoch = progress["best_value"], progress["best_epoch"]
            best.history = self.folder.read_history()[:done]
        self.folder.keep_history(done)


def join_splits(
    store: EmbeddingStore, annotations: Path, task: Task, listener: Listener
) -> tuple[JoinedLabels, JoinedLabels]:
    """Join the labels of both splits to a store and say what was left out."""
    both = set(find_label_files(annotations, task, "train")) & set(find_label_files(annotations, task, "validation"))
    if both:
        examples = ", ".join(sorted(both)[:3])
        listener.warning(f"{len(both)} videos are in both splits, so validation flatters: {examples}")
    train = join_labels(store, annotations, task, "train")
    validation = join_labels(store, annotations, task, "validation")
    listener.message(train.account.sentence("train"))
    listener.message(validation.account.sentence("validation"))
    if len(train) < 2:
        raise InputError(f"Only {len(train)} training frame: expected at least 2. Point --annotations at more labels.")
    return train, validation


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


def _describe_run(
    settings: FitSettings, store: EmbeddingStore, task: Task, train: JoinedLabels, validation: JoinedLabels
) -> dict[str, Any]:
    """Return what config.json keeps: everything that decides the run, resolved."""
    return {
        "affcache": affcache.__version__,
        "task": task.name,
        "classes": list(task.classes),
        "settings": settings_to_json(settings),
        "store": describe_store(store),
        "labels": {"train": train.to_json(), "validation": validation.to_json()},
        "versions": {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()},
    }
