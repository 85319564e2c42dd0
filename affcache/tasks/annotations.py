"""Labels joined to the rows of a store, by video and frame number."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from affcache.crops.names import VideoNames, canonical
from affcache.errors import InputError
from affcache.progress import Result, counted
from affcache.store.frames import ABSENT, ENCODED, FrameIndex
from affcache.tasks.kinds import Task
from affcache.tasks.label_files import LabelFiles, LabelSource, find_label_files
from affcache.tasks.tasks import find_task


@dataclass(frozen=True)
class JoinAccount(Result):
    """How many frames a join used and left out, and why. Every count is in frames unless it says otherwise."""

    used: int = 0
    no_crop: int = 0  # valid labels whose frame has no crop in the store
    no_label: int = 0  # crops of labelled videos past the last line of the label file
    invalid_label: int = 0  # crops whose label is marked invalid
    unreadable_crop: int = 0  # valid labels whose crop could not be read
    label_files: int = 0
    videos_without_crops: tuple[str, ...] = ()  # label files of videos that the store doesn't have

    def sentence(self, split: str, unit: str = "frame") -> str:
        """Say the account in one line; of whole videos, ``unit`` is video."""
        crop = "crop" if unit == "frame" else unit
        left_out = (
            (self.no_crop, "label", f" without a {crop}"),
            (self.no_label, "crop", " without a label"),
            (self.invalid_label, "invalid label", ""),
            (self.unreadable_crop, f"unreadable {crop}", ""),
        )
        words = ", ".join(counted(count, what) + why for count, what, why in left_out if count)
        videos = len(self.videos_without_crops)
        if videos:
            words += f"{', ' if words else ''}{counted(videos, 'label file')} of videos not in the store"
            words += f" ({', '.join(self.videos_without_crops[:3])}{', ...' if videos > 3 else ''})"
        used = counted(self.used, unit)
        if unit == "frame":
            used += f" of {counted(self.label_files - videos, 'video')}"
        return f"{split}: {used}; left out: {words or 'nothing'}"


@dataclass(frozen=True)
class JoinedLabels:
    """Labels joined to store rows: entry i of every array belongs to the same frame. Rows rise."""

    rows: npt.NDArray[np.int64]  # (n,) rows of the store
    labels: npt.NDArray[Any]  # (n,) class indices, or (n, C) values: 0 and 1, or decimals
    account: JoinAccount

    def __len__(self) -> int:
        return len(self.rows)

    def to_json(self) -> dict[str, Any]:
        """Return the account, and a sha256 over rows and labels to recognise them by, as one JSON object."""
        digest = hashlib.sha256(self.rows.tobytes() + self.labels.tobytes()).hexdigest()
        return {**self.account.to_json(), "sha256": digest}


def join_labels(store: FrameIndex, annotations: Path | str, task: Task | str, split: str) -> JoinedLabels:
    """Join the labels of a split, train or validation, to the rows of a store by (video, frame number).

    Line i of a label file (the header is line 0) belongs to frame number i, never to the i-th crop. Which video a label
    file is of, ``VideoNames`` says.

    Raises:
        InputError: label files that can't be read or may be of several videos, or none that belongs to a crop of the
            store.
        ConfigError: there is no such task or split.
    """
    task = find_task(task) if isinstance(task, str) else task
    source: LabelSource = LabelFiles(find_label_files(annotations, task, split), task)
    video_index = _videos_of_labels(source, store)
    rows: list[npt.NDArray[np.int64]] = []
    labels: list[npt.NDArray[Any]] = []
    counts = dict.fromkeys(("used", "no_crop", "no_label", "invalid_label", "unreadable_crop"), 0)
    missing: list[str] = []
    for name in source.videos:
        of_video = source.read(name)
        if name not in video_index:
            missing.append(name)
            counts["no_crop"] += int(of_video.valid.sum())
            continue
        first, last = store.video_start[video_index[name] : video_index[name] + 2]
        entry = _entries(of_video.frame_numbers, store.frame_number[first:last])  # (n,) of each crop's label
        there = entry != ABSENT
        is_valid = np.zeros(len(entry), dtype=bool)
        is_valid[there] = of_video.valid[entry[there]]
        used = is_valid & (store.status[first:last] == ENCODED)
        rows.append(first + np.flatnonzero(used))
        labels.append(of_video.labels[entry[used]])
        counts["used"] += int(used.sum())
        counts["no_crop"] += max(int(of_video.valid.sum() - is_valid.sum()), 0)  # a video's one label has many crops
        counts["no_label"] += int((~there).sum())
        counts["invalid_label"] += int((there & ~is_valid).sum())
        counts["unreadable_crop"] += int((is_valid & ~used).sum())
    account = JoinAccount(**counts, label_files=len(source.videos), videos_without_crops=tuple(missing))
    if not counts["used"]:
        raise InputError(
            f"No {split} label of task {task.name} belongs to a crop of {store.path}. "
            f"{account.sentence(split, store.unit)}. "
            f"The labels are of videos like {next(iter(source.videos))!r}, the crops of videos like "
            f"{store.video_names[0]!r}: expected the same names. Point --store and --annotations at the same data."
        )
    order = np.argsort(np.concatenate(rows), kind="stable")
    return JoinedLabels(np.concatenate(rows)[order], np.concatenate(labels)[order], account)


def _entries(labelled: npt.NDArray[np.int64] | None, wanted: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Return where each wanted frame number (n,) stands among the labelled ones (L,), or ``ABSENT``."""
    if labelled is None:
        return np.zeros(len(wanted), np.int64)
    if not len(labelled):
        return np.full(len(wanted), ABSENT)
    order = labelled.argsort(kind="stable")
    place = np.searchsorted(labelled, wanted, sorter=order).clip(max=len(labelled) - 1)
    entry = order[place]
    return np.where(labelled[entry] == wanted, entry, ABSENT)


def _videos_of_labels(source: LabelSource, store: FrameIndex) -> dict[str, int]:
    """Return which video of a store each labelled one is; of several of one video, the one with its whole name is.

    Raises:
        InputError: none has, or a labelled name may be of several videos.
    """
    called: dict[int, list[str]] = {}
    for name, video in VideoNames(store.known_names).match(source.videos, source.where).items():
        if video < len(store.video_names):
            called.setdefault(video, []).append(name)
    chosen = {}
    for video, names in called.items():
        whole = [name for name in names if name == canonical(store.video_names[video])]
        if len(names) > 1 and not whole:
            raise InputError(
                f"{source.where}: {' and '.join(names)} are both labels of the video {store.video_names[video]}. "
                "Expected one. Remove the others."
            )
        chosen[(whole or names)[0]] = video
    return chosen
