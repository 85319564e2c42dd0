"""Label files of Aff-Wild2 and ABAW, their join to the rows of a store, and a part of their videos held out."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from affcache.crops.names import VideoNames, canonical
from affcache.errors import ConfigError, InputError
from affcache.files import read_lines
from affcache.progress import Result, counted
from affcache.store.frames import ENCODED, FrameIndex
from affcache.tasks.tasks import Task, find_task

LARGEST_LABEL_FILE = 2**24  # bytes; of 24 hours of video at 30 frames a second a few million
SPLIT_FOLDERS = {"train": "Train_Set", "validation": "Validation_Set"}
PERSONS = ("_left", "_right")  # ends of names where a video shows two persons


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

    def sentence(self, split: str) -> str:
        """Say the account in one line."""
        left_out = (
            (self.no_crop, "label", " without a crop"),
            (self.no_label, "crop", " without a label"),
            (self.invalid_label, "invalid label", ""),
            (self.unreadable_crop, "unreadable crop", ""),
        )
        words = ", ".join(counted(count, what) + why for count, what, why in left_out if count)
        videos = len(self.videos_without_crops)
        if videos:
            words += f"{', ' if words else ''}{counted(videos, 'label file')} of videos not in the store"
            words += f" ({', '.join(self.videos_without_crops[:3])}{', ...' if videos > 3 else ''})"
        used = f"{counted(self.used, 'frame')} of {counted(self.label_files - videos, 'video')}"
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


def find_label_files(annotations: Path | str, task: Task, split: str) -> dict[str, Path]:
    """Map each labelled video of a split to its label file, by the canonical path below the split's folder.

    ``annotations`` may be the folder that holds the challenge folders, one above it, or a challenge folder itself;
    its name doesn't matter.

    Raises:
        InputError: no such folder, no label files in it (says where it looked), or those of several releases.
        ConfigError: there is no such split.
    """
    if split not in SPLIT_FOLDERS:
        known = " or ".join(SPLIT_FOLDERS)
        raise ConfigError(f"There is no split {split!r}. Expected {known}; labels of the test set are not published.")
    annotations = Path(annotations)
    tried: list[Path] = []
    for name in task.folders:
        inside = sorted(annotations.glob(f"*/{name}")) if annotations.is_dir() else []
        resolved = Path(os.path.realpath(annotations))  # of "."
        itself = [annotations] if name in (annotations.name, resolved.name) else []
        for places in ([annotations / name, *itself], inside):
            folders = [place / SPLIT_FOLDERS[split] for place in places]
            tried += folders
            found = {folder: files for folder in folders if (files := _text_files(folder))}
            if len(found) > 1:
                raise InputError(
                    f"{annotations} holds {len(found)} releases of the {split} labels of task {task.name}: "
                    f"{', '.join(map(str, found))}. Expected one. Say which with --annotations DIR."
                )
            for files in found.values():
                return files
    raise InputError(
        f"No {split} labels of task {task.name} found: looked for <video>.txt in "
        f"{', '.join(str(path) for path in tried)}. Say where the labels are with --annotations DIR, or with "
        'annotations = "..." in affcache.toml: the folder that holds '
        f"{' or '.join(task.folders)}."
    )


def _text_files(folder: Path) -> dict[str, Path]:
    """Return the label files in a folder, at any depth, by the canonical name of their video."""
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*.txt")):
        video = path.relative_to(folder).with_suffix("")
        if any(part.startswith(".") for part in video.parts):
            continue
        if files.setdefault(canonical(video.as_posix()), path) != path:
            raise InputError(
                f"{folder} holds two label files of the video {video}, whose names differ in the form of their "
                "accents only. Expected one. Remove the other."
            )
    return files


def read_label_file(path: Path, task: Task) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Read one label file.

    Returns:
        The labels, (L,) class indices or (L, C) values, of the task's ``label_dtype``, entry i for frame number
        i + 1; and bool (L,), whether each is valid.

    Raises:
        InputError: a wrong header, a wrong count of values, a value that is no number or out of range; names the line.
    """
    try:
        header, *lines = list(read_lines(path, LARGEST_LABEL_FILE)) or [""]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} can't be read as a label file: {reason}. Restore it from the download.") from None
    while lines and not lines[-1].strip():
        lines.pop()
    if [name.strip().lower() for name in header.split(",")] != [name.lower() for name in task.classes]:
        raise InputError(
            f"{path}, line 1: the header is {header[:80]!r}, expected {task.header!r}. Is this a label file of task "
            f"{task.name}? Correct the file, or point --annotations at the right folder."
        )
    exact = np.float64 if np.dtype(task.label_dtype).kind == "f" else task.label_dtype  # float32 rounds into the range
    values = np.empty((0, task.values_per_line), dtype=exact)
    if lines:
        if not set().union(*lines) <= _signs_of(task):  # older numpy reads 2.5 as the integer 2
            raise InputError(_first_bad_line(path, lines, task))
        try:
            values = np.loadtxt(lines, dtype=exact, delimiter=",", comments=None, ndmin=2)
        except ValueError:
            raise InputError(_first_bad_line(path, lines, task)) from None
    invalid = (values == task.invalid_value).any(axis=1)
    low, high = task.valid_range
    in_range = ((values >= low) & (values <= high)).all(axis=1) | invalid
    if values.shape != (len(lines), task.values_per_line) or not in_range.all():
        raise InputError(_first_bad_line(path, lines, task))
    values = values.astype(task.label_dtype, copy=False)
    return values[:, 0] if task.exclusive else values, ~invalid


def _signs_of(task: Task) -> frozenset[str]:
    """Return the characters that a line of labels is made of."""
    return frozenset("0123456789+-, \t" if np.dtype(task.label_dtype).kind == "i" else "0123456789+-, \t.eE")


def _first_bad_line(path: Path, lines: list[str], task: Task) -> str:
    """Find the line that made a label file unreadable and say what is wrong with it."""
    low, high = task.valid_range
    convert = int if np.dtype(task.label_dtype).kind == "i" else float
    kind = "whole numbers" if convert is int else "numbers"
    problem, number, line = "the values can't be read", 2, lines[0]
    for index, text in enumerate(lines):
        number, line = index + 2, text
        fields = line.split(",")
        if len(fields) != task.values_per_line or not line.strip():
            problem = f"{len(fields) if line.strip() else 'no'} values"
            break
        try:
            values = [convert(field) for field in fields]
        except ValueError:
            values = []
        # Python reads 1_0 and other scripts' digits, labels don't
        if not values or not _signs_of(task).issuperset(line):
            problem = "not a number"
            break
        if task.invalid_value not in values and not all(low <= value <= high for value in values):
            problem = "a value out of range"
            break
    return (
        f"{path}, line {number}: {problem} in {line[:80]!r}. Expected {task.values_per_line} {kind} from {low:g} to "
        f"{high:g} (or {task.invalid_value} where there is no label). Correct that line; don't drop it, since line i "
        "belongs to frame i."
    )


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
    files = find_label_files(annotations, task, split)
    video_index = _videos_of_labels(files, store)
    rows: list[npt.NDArray[np.int64]] = []
    labels: list[npt.NDArray[Any]] = []
    counts = dict.fromkeys(("used", "no_crop", "no_label", "invalid_label", "unreadable_crop"), 0)
    missing: list[str] = []
    for name, path in files.items():
        values, valid = read_label_file(path, task)
        if name not in video_index:
            missing.append(name)
            counts["no_crop"] += int(valid.sum())
            continue
        first, last = store.video_start[video_index[name] : video_index[name] + 2]
        line = store.frame_number[first:last].astype(np.int64) - 1  # (n,) the entry of each crop's label
        has_line = (line >= 0) & (line < len(values))
        is_valid = np.zeros(len(line), dtype=bool)
        is_valid[has_line] = valid[line[has_line]]
        used = is_valid & (store.status[first:last] == ENCODED)
        rows.append(first + np.flatnonzero(used))
        labels.append(values[line[used]])
        counts["used"] += int(used.sum())
        counts["no_crop"] += int(valid.sum() - is_valid.sum())
        counts["no_label"] += int((~has_line).sum())
        counts["invalid_label"] += int((has_line & ~is_valid).sum())
        counts["unreadable_crop"] += int((is_valid & ~used).sum())
    account = JoinAccount(**counts, label_files=len(files), videos_without_crops=tuple(missing))
    if not counts["used"]:
        raise InputError(
            f"No {split} label of task {task.name} belongs to a crop of {store.path}. {account.sentence(split)}. "
            f"The labels are of videos like {next(iter(files))!r}, the crops of videos like "
            f"{store.video_names[0]!r}: expected the same names. Point --store and --annotations at the same data."
        )
    order = np.argsort(np.concatenate(rows), kind="stable")
    return JoinedLabels(np.concatenate(rows)[order], np.concatenate(labels)[order], account)


def _videos_of_labels(files: Mapping[str, Path], store: FrameIndex) -> dict[str, int]:
    """Return which video of a store each label file is of; of several of one video, the one with its whole name is.

    Raises:
        InputError: none has, or a label file may be of several videos.
    """
    first, path = next(iter(files.items()))
    folder = path.parents[first.count("/")]
    called: dict[int, list[str]] = {}
    for name, video in VideoNames(store.known_names).match(files, folder).items():
        if video < len(store.video_names):
            called.setdefault(video, []).append(name)
    chosen = {}
    for video, names in called.items():
        whole = [name for name in names if name == canonical(store.video_names[video])]
        if len(names) > 1 and not whole:
            raise InputError(
                f"{folder}: {' and '.join(names)} are both label files of the video {store.video_names[video]}. "
                "Expected one. Remove the others."
            )
        chosen[(whole or names)[0]] = video
    return chosen


def stripped_name(video: str) -> str:
    """Return a video's name without the mark of a person: two crops of one video were filmed together."""
    video = canonical(video)
    for person in PERSONS:
        video = video.removesuffix(person)
    return video


def group_frames(store: FrameIndex, joined: JoinedLabels) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Return the names (G) of the videos that joined frames are of, sorted, and the number of each frame's (n,)."""
    names = np.array([stripped_name(name) for name in store.video_names])
    found, group = np.unique(names[store.video_of_rows()[joined.rows]], return_inverse=True)
    return found.tolist(), group.astype(np.int64)


def hold_out(store: FrameIndex, joined: JoinedLabels, share: float) -> tuple[JoinedLabels, list[str]]:
    """Set about ``share`` of the videos aside: return the frames of the others, and the names of those set aside.

    A video is set aside or not by its own name alone, a hash of it: whatever other videos a store or a label folder has
    or lacks. Only where that would leave none, or none of the others, the nearest one changes sides.

    Raises:
        InputError: the frames are of one video.
    """
    names, _ = group_frames(store, joined)
    if len(names) < 2:
        raise InputError(
            f"All training frames are of one video, {names[0]}: none can be held out. Expected at least 2 videos. "
            "Choose on validation with --select validation, or train on more videos."
        )
    digests = [hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest() for name in names]
    lots = np.array([int.from_bytes(digest[:8], "big") / 2**64 for digest in digests])  # (G,) in [0, 1)
    held = lots < np.clip(share, np.nextafter(lots.min(), 1), lots.max())
    aside = [name for name, is_held in zip(names, held, strict=True) if is_held]
    return of_videos(store, joined, aside, without=True), aside


def of_videos(store: FrameIndex, joined: JoinedLabels, names: Sequence[str], *, without: bool = False) -> JoinedLabels:
    """Return the frames of videos, named as ``group_frames`` does; or all others."""
    known, group = group_frames(store, joined)
    chosen = np.isin(known, list(names))[group] != without
    account = replace(joined.account, used=int(chosen.sum()))
    return JoinedLabels(joined.rows[chosen], joined.labels[chosen], account)
