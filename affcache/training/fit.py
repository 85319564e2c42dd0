"""Stage two as a whole: store and labels joined, a run folder claimed, a head trained, the best epoch kept."""

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from affcache.devices import default_memory, resolve_device
from affcache.progress import Listener, Result, counted
from affcache.settings import command, existing_store, flag
from affcache.tasks.task import Task
from affcache.training.data import (
    epoch_length,
)
from affcache.training.epochs import Epochs, SavedRun, choice_taken, completed, task_to_train
from affcache.training.learner import find_head
from affcache.training.objective import ClassCounts
from affcache.training.plain import new_learner
from affcache.training.ridge import Ridge, Run, ridge_baseline
from affcache.training.risk import tail_size
from affcache.training.run_folder import (
    RunFolder,
    claim_run,
    locked_run,
)
from affcache.training.settings import FitSettings, chosen_on
from affcache.training.splits import JoinedSplits, LoadedSplits

HEADER = ("task", "settings", "store")  # of config.json, in the header of saved heads
RAISE_RARE = {"logit_adjustment": 0.0, "class_weights": "none", "focal_gamma": 0.0}  # and how each is off
FEW_STEPS = 200
SMALLEST_TAIL = 5  # losses; below this CVaR's gradient rests on a handful of frames


@dataclass(frozen=True)
class FitResult(Result):
    """What a training run found."""

    run: str
    task: str
    kind: str  # of the task: classes, units or values
    head: str
    metric: str
    value: float  # the metric on the validation split at the best epoch; means nothing where that was trained on
    best_epoch: int  # counted from 1; for a ridge, which of the strengths
    epochs: int
    frames: int  # training frames
    validation_frames: int
    tail: float  # losses per batch that CVaR averages
    ridge: float | None  # the metric of a ridge head, solved in a moment: what a trained one has to beat
    seconds: float
    device: str
    train_on: str  # train or all
    chosen_before: bool  # whether the epoch or the strength was given
    chosen_on: str  # where it was chosen: validation, folds, heldout (training videos), or "" where nobody knows


@command(FitSettings, completed)
def fit(settings: FitSettings, listener: Listener) -> FitResult:
    """Train a head on a store and labels, keeping the best epoch by the validation metric.

    A ridge head has no epochs: the strength is chosen as the epoch is otherwise. With resume, ``run`` alone is enough:
    its folder knows store, labels and settings. Those given beside it must be the same; store, annotations and device
    may be elsewhere. With ``as_``, settings and epoch are what a run or an ablation chose; ``train_on="all"`` then
    trains on validation too. A KeyboardInterrupt says in words what is kept.

    Raises:
        InputError: labels that can't be read or that join to no crop.
        StoreError: the store is incomplete or damaged, or (with resume) not the one the run began with.
        ConfigError: a setting is unknown or out of range, the run folder is taken, or the training diverges.
    """
    task = task_to_train(settings)
    settings.require_fitting(task)
    find_head(settings.head)
    settings.require_choice()
    device = resolve_device(settings.device)
    with locked_run(settings.run, task.name, listener, resume=settings.resume) as (folder, resume):
        settings = replace(settings, memory=settings.memory or default_memory(device), resume=resume)
        return _fit(settings, task, folder, device, listener)


def _fit(settings: FitSettings, task: Task, folder: RunFolder, device: torch.device, listener: Listener) -> FitResult:
    """Train in a folder that nobody else works in; ``resume`` says whether a run is there."""
    stores, how = settings.store or (existing_store(listener),), ("partial", "train_on", "pool")
    said = {name: getattr(settings, name) for name in how}
    joined = JoinedSplits.open(stores, task, settings.annotations, listener, **said)
    task = joined.task
    if settings.held_out:
        joined = joined.holding_out(settings.held_out, "for decision rules", listener, select=False)
    frames = len(joined.train)
    _say_tail(settings, joined, listener)
    if twice := raised_twice(settings):
        listener.warning(twice)
    assert settings.memory is not None  # resolved
    loaded = joined.load(device, settings.memory, listener)
    listener.message(f"run folder: {folder.path}")
    config = joined.describe_run(settings)
    if settings.as_ is not None:
        config["chosen_on"] = choice_taken(settings)
    claim_run(folder, config, resume=settings.resume)
    run, why = run_of([settings], loaded, device)
    if why:
        listener.warning(f"{why}.")
    saved = SavedRun(run, folder, {name: config[name] for name in HEADER})
    if settings.resume:
        saved.restore()
    start = time.perf_counter()
    try:
        saved.train(loaded.train, loaded.validation, listener)
    except KeyboardInterrupt:
        done = counted(len(folder.read_history()), run.unit)
        command_line = shlex.join(["affcache", "fit", "--run", str(folder.path), "--resume"])
        kept = f"{done} of {run.steps:,} kept in {folder.path}; this continues: {command_line}"
        raise KeyboardInterrupt(kept) from None
    (best,) = saved.run.best
    seconds = time.perf_counter() - start
    ridge = None
    if settings.head != "ridge" and settings.train_on == "train":
        ridge = ridge_baseline(task, loaded.width, loaded.train, loaded.validation)
    return FitResult(
        run=str(folder.path),
        task=task.name,
        kind=task.kind,
        head=settings.head,
        metric=task.metric,
        value=best.value,
        best_epoch=best.epoch,
        epochs=len(best.history),
        frames=frames,
        validation_frames=len(joined.validation),
        tail=tail_of(settings, joined),
        ridge=ridge,
        seconds=seconds,
        device=str(device),
        train_on=settings.train_on,
        chosen_before=settings.chosen_before,
        chosen_on=chosen_on(folder.read_config()),
    )


def run_of(recipes: Sequence[FitSettings], splits: LoadedSplits, device: torch.device) -> tuple[Run, str]:
    """Return what trains heads side by side, or a ridge alone, untrained; and why not the fast way, if it isn't."""
    if recipes[0].head == "ridge":
        return Ridge(recipes[0], splits.task, splits.width, splits.scaler(recipes[0].normalize)), ""
    counts = ClassCounts.of(splits.task, splits.train.labels)
    scaler = splits.scaler(recipes[0].normalize)
    learner, why = new_learner(recipes, splits.task, splits.width, device, counts, splits.videos, scaler)
    return Epochs(learner), why


def frames_of_epoch(settings: FitSettings, joined: JoinedSplits) -> int:
    """Return how many frames an epoch draws."""
    videos = torch.from_numpy(joined.store.video_of_rows()[joined.train.rows].astype(np.int64))
    return epoch_length(videos, stride=settings.stride, frames_per_epoch=settings.frames_per_epoch)


def tail_of(settings: FitSettings, joined: JoinedSplits) -> float:
    """Return how many losses of a batch CVaR averages."""
    frames = min(settings.batch_size, frames_of_epoch(settings, joined))
    return tail_size(frames * joined.task.losses_per_frame, settings.alpha)


def raised_twice(settings: FitSettings) -> str:
    """Say which setting raises rare and hard frames beside CVaR, which has been measured to do worse; "" if none."""
    raising = [flag(name) for name, off in RAISE_RARE.items() if getattr(settings, name) != off]
    if not raising or settings.alpha == 1 or settings.head == "ridge":
        return ""
    return (
        f"{' and '.join(raising)} with --alpha {settings.alpha:g} raises rare and hard frames twice, which did worse "
        "than with --alpha 1 wherever it was tried (docs/recipes.md). Train that, too."
    )


def _say_tail(settings: FitSettings, joined: JoinedSplits, listener: Listener) -> None:
    """Say where there are few steps, and how many losses CVaR averages in each; warn when these are few."""
    steps = settings.last_epoch * max(1, frames_of_epoch(settings, joined) // settings.batch_size)
    if steps < FEW_STEPS and settings.head == "mlp" and (settings.dropout or settings.rho):
        few = f"{counted(steps, 'step')} in all, few for dropout and SAM"
        listener.message(f"{few}: more --epochs, or --dropout 0 --rho 0, may learn more")
    if settings.alpha == 1 or settings.head == "ridge":
        return
    tail, level = tail_of(settings, joined), f"CVaR at alpha {settings.alpha:g}"
    if settings.cvar_level == "set":
        listener.message(f"{level} counts losses above a threshold over recent batches: {tail:g} a batch on average")
    elif joined.task.parts:
        listener.message(f"{level} averages the worst losses of each task's labels in a batch by itself")
    elif settings.cvar_within != "batch":
        listener.message(f"{level} averages the worst losses of each {settings.cvar_within} in a batch by itself")
    else:
        listener.message(f"{level} averages the worst {tail:g} losses of each batch")
        if tail < SMALLEST_TAIL:
            listener.warning(
                f"CVaR's tail is {tail:g} losses a batch, fewer than {SMALLEST_TAIL}: its gradient will be noisy. "
                "Raise --batch-size or --alpha, or find the threshold over more batches with --cvar-level set."
            )
