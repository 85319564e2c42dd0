"""Tasks whose labels are of whole videos, and stores of them, for tests."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from affcache.store.frames import ENCODED
from affcache.store.reading import EmbeddingStore
from affcache.tasks import annotations
from affcache.tasks.kinds import Classes, Units, Values
from affcache.tasks.label_files import VideoLabels
from affcache.tasks.task import Task
from affcache.tasks.tasks import TASKS
from tests.conftest import write_store

BAH = Classes("bah", ("without", "with"), "Ambivalence or hesitancy in a video", level="video")
SIGNS = Units("signs", ("smile", "frown", "nod"), level="video")
PAIN = Values("pain", ("pain", "effort"), low=0, high=10, level="video")
WIDTH = 6
Labels = Mapping[str, Any]  # of each video


@dataclass(frozen=True)
class LabelsOfVideos:
    """Labels of one split, one a video."""

    labels: Labels
    task: Task
    where: Path = Path("labels.csv")
    test_rows: int = 0
    folds: None = None

    @property
    def videos(self) -> Collection[str]:
        return self.labels.keys()

    def read(self, video: str) -> VideoLabels:
        label = np.asarray([self.labels[video]], self.task.label_dtype)
        return VideoLabels(None, label, ~(label.reshape(-1) == self.task.invalid_value).any(keepdims=True))


def label(monkeypatch: pytest.MonkeyPatch, task: Task, splits: Mapping[str, Labels]) -> Task:
    """Let a task, of the given name, have labels of whole videos."""
    task = replace(task, level="video")
    monkeypatch.setitem(TASKS, task.name, task)
    found = lambda folder, task, split: LabelsOfVideos(splits[split], task)  # noqa: E731
    monkeypatch.setattr(annotations, "find_labels", found, raising=False)  # of a module that reads tables
    monkeypatch.setattr(annotations, "find_label_files", lambda folder, task, split: splits[split], raising=False)
    monkeypatch.setattr(annotations, "LabelFiles", LabelsOfVideos, raising=False)
    return task


@dataclass(frozen=True)
class Videos:
    """A store with a label for each video."""

    store: Path
    task: Task
    splits: Mapping[str, Labels]

    def frames(self, video: str) -> npt.NDArray[np.float16]:
        """Return the embeddings of a video's encoded frames, read by hand."""
        store = EmbeddingStore.open(self.store)
        first, last = store.video_start[store.video_names.index(video) :][:2]
        return np.asarray(store.features[first:last])[store.status[first:last] == ENCODED]

    def labels(self, split: str) -> npt.NDArray[Any]:
        """Return the labels of a split's readable videos, in the store's order."""
        return np.asarray([self.splits[split][name] for name in self.names(split)], self.task.label_dtype)

    def names(self, split: str) -> list[str]:
        """Return the readable videos of a split, sorted."""
        return sorted(name for name in self.splits[split] if len(self.frames(name)))


def make_videos(
    folder: Path, monkeypatch: pytest.MonkeyPatch, task: Task = BAH, count: int = 40, seed: int = 0, name: str = "v"
) -> Videos:
    """Write a store of videos, two persons in some, of 1 to 12 frames with unreadable ones among them; and labels.

    What tells the classes is the spread of values as much as their mean. Of the last training video none can be read.
    """
    random = np.random.default_rng(seed)
    names = sorted(f"{name}{number // 2:02d}{('', '_left')[number % 2]}" for number in range(count))
    lengths = random.integers(1, 13, count)
    lengths[-1] = 3
    kinds = random.integers(0, 2, count)
    drawn = [random.normal(kind, 1 + 2 * kind, (frames, WIDTH)) for kind, frames in zip(kinds, lengths, strict=True)]
    starts = np.cumsum([0, *lengths])
    lost = [*starts[2:-1][lengths[2:] > 4], *range(starts[-2], starts[-1])]
    listing = {name: range(3, 3 + 2 * frames, 2) for name, frames in zip(names, lengths, strict=True)}
    store = folder / f"{name}.h5"
    write_store(store, listing, np.concatenate(drawn).astype(np.float16), unreadable=lost)
    labels: dict[str, Any] = {name: int(kind) for name, kind in zip(names, kinds, strict=True)}
    if task.kind == "units":
        labels = {name: [kind, 1 - kind, kind] for name, kind in labels.items()}
    if task.kind == "values":
        labels = {name: [3.0 + 4 * kind, 5 - random.random()] for name, kind in labels.items()}
    validation = {name for name in names if int(name[1:3]) % 3 == 0}
    splits = {
        "train": {name: labels[name] for name in names if name not in validation},
        "validation": {name: labels[name] for name in names if name in validation},
    }
    return Videos(store, label(monkeypatch, task, splits), splits)
