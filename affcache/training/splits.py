"""The labelled frames of a training: labels joined to stores, videos held out, and the frames loaded or streamed."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

import affcache
from affcache.devices import GIGABYTE
from affcache.errors import InputError
from affcache.progress import Listener, counted, metric_name
from affcache.store.joined import open_stores
from affcache.store.pooled import PooledStore, RowStore
from affcache.tasks.annotations import JoinedLabels, join_labels, labelled_parts, require_learnable, unlabelled
from affcache.tasks.label_files import SPLIT_FOLDERS
from affcache.tasks.label_sources import labels_of
from affcache.tasks.metrics import Table
from affcache.tasks.multitask import MultiTask
from affcache.tasks.splits import group_frames, hold_out, join_either, of_videos, unite
from affcache.tasks.task import Task
from affcache.tasks.tasks import definition_of, is_own
from affcache.training.data import (
    FLOAT16,
    FrameSource,
    Scaler,
    load_frames,
    load_splits,
    require_finite,
)
from affcache.training.run_folder import (
    describe_store,
    settings_to_json,
)
from affcache.training.settings import FitSettings, resolved_pool


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
        stand in train too, and one of the splits may have no labels; where that is validation, train stands for it. Of
        several tasks those are left out that one of the splits, or of all frames none, has a label of. ``pool`` says
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
        if train_on == "all":
            task, train, validation = _joined_as_one(store, where, task, partial, listener)
        else:
            task, train, validation = _joined_apart(store, where, task, partial, listener)
        if len(train) < 2:
            raise InputError(
                f"Only {len(train)} training {store.unit}: expected at least 2. Point --annotations at more labels."
            )
        if is_own(task):
            require_learnable(task, train, validation)
            if never := unlabelled(task, validation):
                words = f"No validation {store.unit} is labelled {', '.join(never)}"
                listener.warning(f"{words}: each counts as 0 in {metric_name(task.metric)}")
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
    def chosen_on(self) -> str:
        """Where a training chooses its epoch or strength: a key of ``CHOSEN_ON``."""
        apart = "validation" if self.selection is self.validation else "heldout"
        return "folds" if self.fold else apart

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
            "chosen_on": "" if settings.chosen_before else self.chosen_on,
            "versions": {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()},
        }


def _joined_apart(
    store: RowStore, where: Path, task: Task, partial: str, listener: Listener
) -> tuple[Task, JoinedLabels, JoinedLabels]:
    """Return the task, as far as both splits are labelled, and the frames of train and of validation; say what is."""
    joined = [join_labels(store, where, task, split, partial) for split in SPLIT_FOLDERS]
    if isinstance(task, MultiTask):
        task, joined = labelled_parts(task, joined, listener)
    train, validation = joined
    videos = store.video_of_rows()
    if len(both := np.intersect1d(videos[train.rows], videos[validation.rows])):
        examples = ", ".join(store.video_names[video] for video in both[:3])
        listener.warning(f"{counted(len(both), 'video')} in both splits, so validation flatters: {examples}")
    _say_accounts(train, validation, store.unit, listener)
    return task, train, validation


def _joined_as_one(
    store: RowStore, where: Path, task: Task, partial: str, listener: Listener
) -> tuple[Task, JoinedLabels, JoinedLabels]:
    """Return the task, as far as any frame is labelled, all frames, and those of validation; say what there is.

    Where validation has no labels, of one of several tasks too, all frames stand for it.
    """
    train, validation = join_either(store, where, task, partial, listener)
    _say_accounts(train, validation, store.unit, listener)
    train = unite(store, train, validation)
    if isinstance(task, MultiTask):
        task, (train,) = labelled_parts(task, [train], listener)
        own = train.at(np.isin(train.rows, validation.rows))
        validation = replace(own, account=replace(validation.account, used=len(own)))
    listener.message(f"both splits together: {counted(len(train), store.unit)}")
    parts = zip(task.parts, task.split(validation.labels), strict=True) if isinstance(task, MultiTask) else ()
    if not len(validation) or not all(part.labelled(own).any() for part, own in parts):
        validation = train
    return task, train, validation


def _say_accounts(train: JoinedLabels, validation: JoinedLabels, unit: str, listener: Listener) -> None:
    listener.message(train.account.sentence("train", unit))
    listener.message(validation.account.sentence("validation", unit))
