"""What a trained trial of the grid leaves: a run folder with its result, from which all tables are made."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import affcache
from affcache.ablation.grid import Variant
from affcache.ablation.settings import AblateSettings
from affcache.devices import GIGABYTE
from affcache.errors import StoreError
from affcache.files import read_tensors, write_json, write_tensors, write_text
from affcache.progress import Listener
from affcache.store.reading import EmbeddingStore
from affcache.tasks.annotations import JoinedLabels
from affcache.tasks.metrics import Table
from affcache.tasks.splits import group_frames, hold_out
from affcache.tasks.tasks import Task
from affcache.training.data import FrameSource, load_frames, load_splits, require_finite
from affcache.training.epochs import Entry
from affcache.training.fit import join_splits
from affcache.training.run_folder import RunFolder, describe_store, settings_to_json
from affcache.training.settings import FitSettings

RESULT = ("value", "selected", "best_epoch", "diverged")  # of an outcome, in result.json
MACHINE_SETTINGS = ("annotations", "device", "memory")  # where and how it is computed, not what


@dataclass(frozen=True)
class JoinedSplits:
    """Joined labels of a store: train to train on, selection to choose by, validation to report."""

    store: EmbeddingStore
    task: Task
    train: JoinedLabels
    selection: JoinedLabels  # validation itself, unless training videos were held out
    validation: JoinedLabels

    @classmethod
    def open(cls, path: Path, task: Task, settings: AblateSettings, listener: Listener) -> "JoinedSplits":
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
        """What finished trials are recognised by, beside their settings; trials are many, and it takes a while."""
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

    def load(self, device: torch.device, memory: float, listener: Listener) -> "LoadedSplits":
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
        sizes, videos = (self.store.width, len(self.store.video_names)), group_frames(self.store, self.validation)
        return LoadedSplits(self.task, *sizes, train, selection, validation, *videos)


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
class Trial:
    """One head of the grid: a setting with a seed, on one store with its labels."""

    variant: Variant
    settings: FitSettings
    splits: JoinedSplits
    folder: RunFolder

    @classmethod
    def of(cls, variant: Variant, settings: FitSettings, splits: JoinedSplits, out: Path) -> "Trial":
        """Name a trial by everything that decides its result, so that it is found again in whatever grid it stands."""
        recipe = {name: v for name, v in settings_to_json(settings).items() if name not in MACHINE_SETTINGS}
        identity = json.dumps({"settings": recipe, **splits.identity}, sort_keys=True)
        name = hashlib.sha256(identity.encode()).hexdigest()[:16]
        return cls(variant, settings, splits, RunFolder(out / "cells" / name))

    @property
    def name(self) -> str:
        """The folder's name, which no other trial has."""
        return self.folder.path.name

    @property
    def finished(self) -> bool:
        """Whether the result is there; it is written last."""
        return self._result.is_file()

    @property
    def _result(self) -> Path:
        return self.folder.path / "result.json"

    @property
    def _statistics(self) -> Path:
        return self.folder.path / "videos.safetensors"

    def description(self) -> dict[str, Any]:
        """Return what config.json keeps, as that of a run of ``fit``."""
        return {
            "affcache": affcache.__version__,
            "task": self.splits.task.name,
            "classes": list(self.splits.task.classes),
            "settings": settings_to_json(self.settings),
            **self.splits.description,
            "versions": {"torch": torch.__version__},
        }

    def write(self, outcome: "Outcome", videos: list[str], head: dict[str, torch.Tensor] | None) -> None:
        """Write the run folder, its result last."""
        self.folder.path.mkdir(parents=True, exist_ok=True)
        config = self.description()
        write_json(self.folder.config, config)
        write_text(self.folder.history, "".join(json.dumps(entry) + "\n" for entry in outcome.history))
        if outcome.statistics is not None:
            write_tensors(self._statistics, {"sums": torch.from_numpy(outcome.statistics)}, {"videos": videos})
        if head is not None:
            header = {name: config[name] for name in ("task", "settings", "store")}  # as that of a run of fit
            best = {"epoch": outcome.best_epoch, self.splits.task.metric: outcome.value}
            write_tensors(self.folder.head, head, {**header, **best})
        write_json(self._result, outcome.to_json())

    def read(self) -> "Outcome":
        """Return the result.

        Raises:
            StoreError: it is damaged.
        """
        try:
            found = json.loads(self._result.read_text(encoding="utf-8"))
            history = self.folder.read_history()
            value, selected, best_epoch, diverged = (found[name] for name in RESULT)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"The result in {self.folder.path} can't be read ({error}). Expected what 'affcache ablate' wrote. "
                "Delete that folder and call again: the cell is trained anew."
            ) from None
        if diverged is not None:
            return Outcome(None, None, best_epoch, diverged, history, None, [])
        tensors, header = read_tensors(self._statistics)
        return Outcome(value, selected, best_epoch, None, history, tensors["sums"].numpy(), header["videos"])


@dataclass(frozen=True)
class Outcome:
    """What training a trial found."""

    value: float | None  # the metric on validation at the best epoch; None where it diverged
    selected: float | None  # the metric by which that epoch was chosen, there
    best_epoch: int  # counted from 1
    diverged: int | None  # the epoch in which it did
    history: list[Entry]
    statistics: Table | None  # (G, C, S) of validation's videos, for ``Task.metric_of``
    videos: list[str]  # (G,)

    @classmethod
    def of(
        cls, splits: LoadedSplits, logits: torch.Tensor, selected: float, best_epoch: int, history: list[Entry]
    ) -> "Outcome":
        """Return what a head's logits (n, C) on validation say."""
        task, names, labels = splits.task, splits.video_names, splits.validation.labels.cpu().numpy()
        decided = task.decide(task.probabilities(logits).cpu().numpy())
        value = task.score(labels, decided).value
        statistics = task.sums_by_video(labels, decided, splits.video_of_frame, len(names))
        return cls(value, selected, best_epoch, None, history, statistics, names)

    def to_json(self) -> dict[str, Any]:
        """Return the result as one JSON object."""
        return {name: getattr(self, name) for name in RESULT}
