"""Stage two as a whole: store and labels joined, a run folder claimed, a head trained, the best epoch kept."""

import platform
import time
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import affcache
from affcache.devices import default_memory, resolve_device
from affcache.errors import InputError
from affcache.progress import Listener
from affcache.settings import RUNS, build, default_store
from affcache.store.reading import EmbeddingStore
from affcache.tasks.annotations import JoinedLabels, find_label_files, join_labels
from affcache.tasks.splits import hold_out
from affcache.tasks.tasks import Task, find_task
from affcache.training.data import require_finite
from affcache.training.epochs import Training
from affcache.training.learner import Learner
from affcache.training.objective import ClassCounts
from affcache.training.ridge import RidgeRun
from affcache.training.risk import tail_size
from affcache.training.run_folder import RunFolder, claim_run, describe_store, require_free, settings_to_json
from affcache.training.settings import FitSettings
from affcache.training.streaming import load_splits

SMALLEST_TAIL = 5  # losses; below this CVaR's gradient rests on a handful of frames


@dataclass(frozen=True)
class FitResult:
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

    def to_json(self) -> dict[str, Any]:
        """Return the result as one JSON object."""
        return asdict(self)


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
    training = _training(settings, task, store, train, folder, device)
    if settings.resume:
        training.restore()
    start = time.perf_counter()
    training.run(*frames, listener)
    return FitResult(
        run=str(folder.path),
        task=task.name,
        head=settings.head,
        metric=task.metric,
        value=training.best_value,
        best_epoch=training.best_epoch,
        epochs=training.epoch,
        frames=len(train),
        validation_frames=len(validation),
        tail=tail_of(settings, task, len(train)),
        seconds=time.perf_counter() - start,
        device=str(device),
    )


def _training(
    settings: FitSettings,
    task: Task,
    store: EmbeddingStore,
    train: JoinedLabels,
    folder: RunFolder,
    device: torch.device,
) -> Training | RidgeRun:
    """Return the run that the settings ask for, untrained."""
    identity = {"task": task.name, "settings": settings_to_json(settings), "store": describe_store(store)}
    if settings.head == "ridge":
        return RidgeRun(settings, task, store.width, folder, identity)
    counts = ClassCounts.of(task, torch.from_numpy(train.labels))
    learner = Learner([settings], task, store.width, device, counts, videos=len(store.video_names))
    return Training(learner, folder, identity)


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
