"""Stage two as a whole: store and labels joined, a run folder claimed, a head trained, the best epoch kept."""

import platform
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

import affcache
from affcache.devices import GIGABYTE, default_memory, resolve_device
from affcache.errors import InputError
from affcache.progress import Listener, Result, counted
from affcache.settings import command, existing_store, flag
from affcache.store.joined import open_stores
from affcache.store.pooled import PooledStore, RowStore
from affcache.tasks.annotations import JoinedLabels, join_labels, labelled_parts, require_learnable
from affcache.tasks.kinds import Task
from affcache.tasks.label_files import SPLIT_FOLDERS
from affcache.tasks.label_sources import labels_of
from affcache.tasks.metrics import Table
from affcache.tasks.multitask import MultiTask
from affcache.tasks.splits import group_frames, hold_out, of_videos, unite
from affcache.tasks.tasks import definition_of, is_own
from affcache.training.data import (
    FLOAT16,
    FrameSource,
    Scaler,
    epoch_length,
    load_frames,
    load_splits,
    require_finite,
)
from affcache.training.epochs import Epochs, SavedRun, completed
from affcache.training.learner import find_head
from affcache.training.objective import ClassCounts
from affcache.training.plain import new_learner
from affcache.training.ridge import Ridge, Run, ridge_baseline
from affcache.training.risk import tail_size
from affcache.training.run_folder import (
    RunFolder,
    claim_run,
    describe_store,
    locked_run,
    settings_to_json,
    task_to_fit,
)
from affcache.training.settings import FitSettings, resolved_pool

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
    chosen_before: bool  # epoch or strength, and not on validation


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
    task = task_to_fit(settings)
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

    def scaler(self, normalize: str) -> Scaler:
        """Return what is done to embeddings first, fitted to the training frames where it needs them."""
        if normalize != "standard":
            return Scaler(normalize)
        return self._standard

    @cached_property
    def _standard(self) -> Scaler:
        return Scaler.fit("standard", self.train.evaluation_batches())


@dataclass(frozen=True)
class JoinedSplits:
    """Joined labels of a store, or of several: train to train on, selection to choose by, validation to report."""

    store: RowStore  # of pooled videos where a row is one
    task: Task
    train: JoinedLabels
    selection: JoinedLabels  # validation itself, unless training videos were held out for it
    validation: JoinedLabels
    held_out: tuple[str, ...] = ()  # names of the training videos that were set aside, as ``group_frames`` has them
    fold: tuple[int, int] | None = None  # number, from 1, and of how many: validation is that fold, train the others

    @classmethod
    def open(
        cls,
        paths: Sequence[Path],
        task: Task,
        annotations: Path | None,
        listener: Listener,
        *,
        partial: str = "keep",
        train_on: str = "train",
        pool: str = "auto",
    ) -> "JoinedSplits":
        """Check a store, or several, join the labels of both splits, and say what was left out.

        ``partial`` is as of ``join_labels``. ``train_on`` is the split "train", or "all": then validation's frames
        stand in train too. Of several tasks those are left out that one of the splits has no label of. ``pool`` says
        what of whole videos is read.

        Raises:
            InputError: labels that can't be read, that join to nothing, or of a task of one's own that train can't
                teach; or stores that share no frame.
            StoreError: a store is incomplete or damaged.
        """
        frames = open_stores(paths, listener)
        frames.verify()  # two seconds for a million rows; a damaged one would train without a word
        taken = resolved_pool(pool, task)
        store: RowStore = frames if taken == "none" else PooledStore.of(frames, taken)
        where = labels_of(task, annotations)
        joined = [join_labels(store, where, task, split, partial) for split in SPLIT_FOLDERS]
        if isinstance(task, MultiTask):
            task, joined = labelled_parts(task, joined, listener)
        train, validation = joined
        videos = store.video_of_rows()
        if len(both := np.intersect1d(videos[train.rows], videos[validation.rows])) and train_on == "train":
            examples = ", ".join(store.video_names[video] for video in both[:3])
            listener.warning(f"{counted(len(both), 'video')} in both splits, so validation flatters: {examples}")
        listener.message(train.account.sentence("train", store.unit))
        listener.message(validation.account.sentence("validation", store.unit))
        if train_on == "all":
            train = unite(store, train, validation)
            listener.message(f"both splits together: {counted(len(train), store.unit)}")
        if len(train) < 2:
            raise InputError(
                f"Only {len(train)} training {store.unit}: expected at least 2. Point --annotations at more labels."
            )
        if is_own(task):
            require_learnable(task, train, validation)
        return cls(store, task, train, validation, validation)

    def holding_out(self, share: float, purpose: str, listener: Listener, *, select: bool) -> "JoinedSplits":
        """Take a share of the training frames away, in whole videos; ``select`` says whether they choose epochs.

        Raises:
            InputError: the frames are of one video.
        """
        train, names = hold_out(self.store, self.train, share)
        held_out = of_videos(self.store, self.train, names)
        listener.message(
            f"held out {purpose}: {counted(len(held_out), f'training {self.store.unit}')} of "
            f"{counted(len(names), 'video')}; "
            f"{len(train):,} are left"
        )
        sides = (names, group_frames(self.store, train)[0])
        above = [{name.partition("/")[0] for name in side if "/" in name} for side in sides]
        if both := sorted(above[0] & above[1]):
            listener.warning(
                f"Videos of {counted(len(both), 'folder')}, such as {both[0]}, stand on both sides: whole videos are "
                "held out, not the folders that they lie in. Where a folder is a person, what is fitted there flatters."
            )
        if abs(len(held_out) / len(self.train) - share) > share / 2:
            listener.warning(
                f"{len(held_out) / len(self.train):.0%} of the training {self.store.unit}s are held out, not the "
                f"{share:.0%} asked for: whole videos are held out by their names, and these are few or unequally long."
            )
        return replace(self, train=train, selection=held_out if select else self.selection, held_out=tuple(names))

    def load(self, device: torch.device, memory: float, listener: Listener) -> LoadedSplits:
        """Load the frames, or stream those that ``memory`` GB don't hold.

        Raises:
            InputError: an embedding isn't finite.
            ConfigError: ``memory`` is too little to shuffle by.
        """
        train, validation = load_splits(self.store, self.train, self.validation, device, memory, listener)
        selection = validation
        if self.selection is not self.validation:
            frame = self.store.width * FLOAT16
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
        if self.held_out:
            labels["train"]["held_out_videos"] = list(self.held_out)
        if self.selection is not self.validation:
            labels["selection"] = self.selection.to_json()
        return {"store": describe_store(self.store), "labels": labels}

    @property
    def validation_sums(self) -> Table:
        """Sums (G, C, S) over the frames of each validation video, as if all were decided rightly."""
        names, group = group_frames(self.store, self.validation)
        return self.task.sums_by_video(self.validation.labels, self.validation.labels, group, len(names))

    def describe_task(self, settings: FitSettings) -> dict[str, Any]:
        """Return what config.json keeps of the task, and the settings, which name it and say where its labels are."""
        annotations = labels_of(self.task, settings.annotations)
        return {
            "task": self.task.name,
            **definition_of(self.task),
            "classes": list(self.task.classes),
            "settings": settings_to_json(
                replace(settings.resolved(self.task), task=self.task.name, annotations=annotations)
            ),
        }

    def describe_run(self, settings: FitSettings) -> dict[str, Any]:
        """Return what config.json keeps: everything that decides a run, resolved."""
        return {
            "affcache": affcache.__version__,
            **self.describe_task(settings),
            **self.description,
            **({"fold": list(self.fold)} if self.fold else {}),
            "versions": {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()},
        }


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
    steps = settings.epochs * max(1, frames_of_epoch(settings, joined) // settings.batch_size)
    if steps < FEW_STEPS and settings.head == "mlp" and (settings.dropout or settings.rho):
        few = f"{counted(steps, 'step')} in all, few for dropout and SAM"
        listener.message(f"{few}: more --epochs, or --dropout 0 --rho 0, may learn more")
    if settings.alpha == 1 or settings.head == "ridge":
        return
    tail, level = tail_of(settings, joined), f"CVaR at alpha {settings.alpha:g}"
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
