"""Label files as the organisers of Aff-Wild2 and ABAW lay them out: one a video, line i for frame i."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from affcache.crops.names import canonical
from affcache.errors import InputError
from affcache.files import read_lines
from affcache.tasks.task import Task

LARGEST_LABEL_FILE = 2**24  # bytes; of 24 hours of video at 30 frames a second a few million
SPLIT_FOLDERS = {"train": "Train_Set", "validation": "Validation_Set"}


class NoLabels(Exception):
    """There are no label files; the text says for what was looked, and where."""


class UnlabelledSplit(InputError):
    """A split has no labels, or none that belongs to a crop; who takes both splits together may do without."""


@dataclass(frozen=True)
class VideoLabels:
    """The labels of one video."""

    frame_numbers: npt.NDArray[np.int64] | None  # (L,) each once; None where the one label (L = 1) is of every frame
    labels: npt.NDArray[Any]  # (L,) or (L, values) of the task's ``label_dtype``; marked where there is none
    valid: npt.NDArray[np.bool_]  # (L,) whether a frame has any label
    repeated: int = 0  # labels of frames that had one before, which are left out


class LabelSource(Protocol):
    """Where the labels of one split are; those of a video are read when they are asked for."""

    @property
    def where(self) -> Path:
        """The folder or the file, for messages."""

    @property
    def videos(self) -> Collection[str]:
        """The canonical names of the labelled videos, each once."""

    @property
    def folds(self) -> Mapping[str, str] | None:
        """The fold of each labelled video, where the labels say them."""
        return None

    @property
    def test_rows(self) -> int:
        """How many rows are left out since they are of neither split, but of a test set."""
        return 0

    def read(self, video: str) -> VideoLabels:
        """Return the labels of one of them; raises InputError where they can't be read."""


@dataclass(frozen=True)
class LabelFiles(LabelSource):
    """The label files of one split of a task."""

    files: Mapping[str, Path]  # by the canonical name of their video
    task: Task

    @property
    def where(self) -> Path:
        """The folder of the split."""
        first, path = next(iter(self.files.items()))
        return path.parents[first.count("/")]

    @property
    def videos(self) -> Collection[str]:
        """The canonical names of the labelled videos."""
        return self.files.keys()

    def read(self, video: str) -> VideoLabels:
        """Return the labels of a video; raises InputError as ``read_label_file``."""
        labels, valid = read_label_file(self.files[video], self.task)
        return VideoLabels(np.arange(1, len(labels) + 1), labels, valid)  # the header is line 0


def find_label_files(annotations: Path | str, task: Task, split: str) -> dict[str, Path]:
    """Map each labelled video of a split to its label file, by the canonical path below the split's folder.

    ``annotations`` may be the folder that holds the challenge folders, one above it, or a challenge folder itself;
    its name doesn't matter.

    Raises:
        NoLabels: no such folder, or no label files in it.
        InputError: there are those of several releases.
    """
    annotations = Path(annotations)
    tried: list[Path] = []
    if not task.folders and not task.parts:  # of one's own
        tried.append(annotations / SPLIT_FOLDERS[split])
        if own := _text_files(tried[0]):
            return own
    for name in task.folders:
        inside = sorted(annotations.glob(f"*/{name}")) if annotations.is_dir() else []
        resolved = Path(os.path.realpath(annotations))  # of "."
        itself = [annotations] if name in (annotations.name, resolved.name) else []
        for places in ([annotations / name, *itself], inside):
            folders = [place / SPLIT_FOLDERS[split] for place in places]
            tried += folders
            found = {folder: files for folder in folders if (files := _text_files(folder))}
            require_one(list(found), annotations, task, split)
            for files in found.values():
                return files
    raise NoLabels(f"for <video>.txt in {', '.join(map(str, tried))}" if tried else "")


def require_one(found: Sequence[Path], annotations: Path, task: Task, split: str) -> None:
    """Raise InputError where labels of a split were found in several places."""
    if len(found) > 1:
        raise InputError(
            f"{annotations} holds {len(found)} releases of the {split} labels of task {task.name}: "
            f"{', '.join(map(str, found))}. Expected one. Say which with --annotations DIR."
        )


def require_split(split: str) -> None:
    """Refuse a split that there is none of; raises InputError."""
    if split not in SPLIT_FOLDERS:
        known = " or ".join(SPLIT_FOLDERS)
        raise InputError(f"There is no split {split!r}. Expected {known}; labels of the test set are not published.")


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
        i + 1, with -1 or nan where there is none; and bool (L,), whether a frame has any.

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
    named, wanted = ([canonical(name.strip()).lower() for name in names] for names in (header.split(","), task.classes))
    if named != wanted:
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
    missing = values == task.invalid_value
    low, high = task.valid_range
    in_range = (values >= low) & (values <= high) | missing
    if values.shape != (len(lines), task.values_per_line) or not in_range.all():
        raise InputError(_first_bad_line(path, lines, task))
    values = marked(values, missing, task)
    return values[:, 0] if task.exclusive else values, ~missing.all(axis=1)


def marked(values: npt.NDArray[Any], missing: npt.NDArray[np.bool_], task: Task) -> npt.NDArray[Any]:
    """Return values as a task's labels, of its ``label_dtype``: nan or -1 where they are missing."""
    values = values.astype(task.label_dtype)
    values[missing] = np.nan if values.dtype.kind == "f" else -1
    return values


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
        if not all(low <= value <= high for value in values if value != task.invalid_value):
            problem = "a value out of range"
            break
    return (
        f"{path}, line {number}: {problem} in {line[:80]!r}. Expected {task.values_per_line} {kind} from {low:g} to "
        f"{high:g} (or {task.invalid_value} where there is no label). Correct that line; don't drop it, since line i "
        "belongs to frame i."
    )
