"""What a group of heads trains on: one store's frames with the labels of one task, split for training and choosing."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from affcache.ablation.settings import AblateSettings
from affcache.devices import GIGABYTE
from affcache.progress import Listener
from affcache.store.reading import EmbeddingStore
from affcache.tasks.annotations import JoinedLabels
from affcache.tasks.splits import group_frames, hold_out
from affcache.tasks.tasks import Task
from affcache.training.data import FrameSource, require_finite
from affcache.training.fit import join_splits
from affcache.training.run_folder import describe_store
from affcache.training.streaming import load_frames, load_splits


@dataclass(frozen=True)
class Source:
    """Joined labels of a store: train to train on, selection to choose by, validation to report."""

    store: EmbeddingStore
    task: Task
    train: JoinedLabels
    selection: JoinedLabels  # validation itself, unless training videos were held out
    validation: JoinedLabels

    @classmethod
    def open(cls, path: Path, task: Task, settings: AblateSettings, listener: Listener) -> "Source":
        """Check a store, join both splits to it, and hold out training videos if that was asked for.

        Raises:
            InputError: labels that can't be read, join to nothing, or are of too few videos to hold one out.
            StoreError: the store is incomplete or damaged.
        """
        store = EmbeddingStore.open(path)
        store.require_complete()
        store.verify()
        train, validation = join_splits(store, settings.annotations, task, listener)
        selection = validation
        if settings.select == "heldout":
            train, selection = hold_out(store, train, settings.held_out)
            listener.message(
                f"held out to choose by: {len(selection):,} training frames, in whole videos; {len(train):,} are left"
            )
        return cls(store, task, train, selection, validation)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What finished cells are recognised by, beside their settings; cells are many, and it takes a while."""
        parts = {"train": self.train, "selection": self.selection, "validation": self.validation}
        return {
            "store": self.store.fingerprint(),
            "encoder": self.store.encoder_fingerprint,
            "labels": {name: joined.to_json()["sha256"] for name, joined in parts.items()},
        }

    @cached_property
    def description(self) -> dict[str, Any]:
        """What a run's config.json keeps of store and labels."""
        labels = {"train": self.train.to_json(), "validation": self.validation.to_json()}
        if self.selection is not self.validation:
            labels["selection"] = self.selection.to_json()
        return {"store": describe_store(self.store), "labels": labels}

    def load(self, device: torch.device, memory: float, listener: Listener) -> "LoadedSource":
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
        for frames, split in ((train, "training"), (selection, "held-out"), (validation, "validation")):
            require_finite(frames, split)
        store, names_and_videos = self.store, group_frames(self.store, self.validation)
        return LoadedSource(
            self.task, store.width, len(store.video_names), train, selection, validation, *names_and_videos
        )


@dataclass(frozen=True)
class LoadedSource:
    """The frames of a source, and which video each validation frame is of. What training needs, and no more."""

    task: Task
    width: int  # D
    videos: int  # V, of the store
    train: FrameSource
    selection: FrameSource
    validation: FrameSource
    video_names: list[str]  # (G,) of validation, persons of a video together
    video_of_frame: Any  # int64 array (n,)
