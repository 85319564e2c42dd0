"""Labels of the multi-task challenge: one file a split, a line a frame: image, valence, arousal, expression, units."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from affcache.crops.crop_list import parse_path
from affcache.crops.names import canonical, plain_path
from affcache.errors import InputError
from affcache.files import read_lines
from affcache.tasks.label_files import LabelSource, VideoLabels, marked
from affcache.tasks.multitask import MultiTask
from affcache.tasks.task import Task

LARGEST = 2**28  # bytes; of 4 million frames
FILES = {"train": "training_set_annotations.txt", "validation": "validation_set_annotations.txt"}
HEADER = "image,valence,arousal,expression,aus"
COLUMNS = {"va": slice(0, 2), "expr": slice(2, 3), "au": slice(3, 15)}  # of what follows the image
WIDTH = 15


@dataclass(frozen=True)
class ChallengeFile(LabelSource):
    """The labels of one split of the multi-task challenge, of one of its tasks or of several."""

    path: Path
    task: Task

    @property
    def where(self) -> Path:
        """The file."""
        return self.path

    @property
    def videos(self) -> Collection[str]:
        """The canonical names of the labelled videos."""
        return self._lines.keys()

    def read(self, video: str) -> VideoLabels:
        """Return the labels of a video; of a frame that has several lines, those of the first."""
        numbers, values = self._lines[video]
        _, first = np.unique(numbers, return_index=True)
        first.sort()
        numbers, values = numbers[first], values[first]
        labels = _labels_of(self.task, values)
        some = self.task.labelled(labels)
        valid = np.asarray(some if some.ndim == 1 else some.any(axis=1))
        return VideoLabels(numbers, labels, valid, repeated=len(self._lines[video][0]) - len(numbers))

    @cached_property
    def _lines(self) -> Mapping[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]]:
        """Frame numbers (L,) and values (L, 15) of each video, in the order of the lines."""
        videos, numbers, values = _read(self.path)
        if not videos:
            raise InputError(
                f"{self.path} has a header and no line below it. Expected a line for each labelled frame. Restore it "
                "from the download, or point --annotations at another folder."
            )
        names, which = np.unique(np.array(videos), return_inverse=True)
        order = which.argsort(kind="stable")
        ends = np.searchsorted(which[order], np.arange(len(names)), "right")
        parts = [order[first:last] for first, last in zip([0, *ends], ends, strict=False)]
        return {str(name): (numbers[of], values[of]) for name, of in zip(names, parts, strict=True)}


def find_challenge_files(annotations: Path, split: str) -> list[Path]:
    """Return the files of a split in a folder or in one of those in it; the folder may be the file itself."""
    name = FILES[split]
    if annotations.name in FILES.values():
        return [path for path in (annotations.with_name(name),) if path.is_file()]
    return [path for path in (annotations / name, *sorted(annotations.glob(f"*/{name}"))) if path.is_file()]


def _labels_of(task: Task, values: npt.NDArray[np.float64]) -> npt.NDArray[Any]:
    """Return the labels of a task, of some of the challenge's tasks at once or of one, from values (L, 15)."""
    if isinstance(task, MultiTask):
        return task.joined([_labels_of(part, values) for part in task.parts])
    own = values[:, COLUMNS[task.name]]
    labels = marked(own, own == task.invalid_value, task)
    return labels[:, 0] if task.exclusive else labels


def _read(path: Path) -> tuple[list[str], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return the video, the frame number and the values (15) of every line.

    Raises:
        InputError: the file can't be read, or a line isn't of that form; names it.
    """
    try:
        header, *lines = list(read_lines(path, LARGEST)) or [""]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} can't be read as a label file: {reason}. Restore it from the download.") from None
    while lines and not lines[-1].strip():
        lines.pop()
    if [name.strip().lower() for name in header.split(",")] != HEADER.split(","):
        raise InputError(
            f"{path}, line 1: the header is {header[:80]!r}, expected {HEADER!r}. Is this a label file of the "
            "multi-task challenge? Correct the file, or point --annotations at the right folder."
        )
    cut = [line.partition(",") for line in lines]
    values = _values([fields for _, _, fields in cut])
    if len(values) < len(lines):
        raise _bad_line(path, len(values) + 2, lines[len(values)], "its values can't be read, or one is out of range")
    videos, numbers = list[str](), np.empty(len(lines), np.int64)
    for position, (image, _, _) in enumerate(cut):
        try:
            folder, _, numbers[position] = parse_path(image.strip())
        except ValueError as error:
            raise _bad_line(path, position + 2, lines[position], str(error)) from None
        videos.append(canonical(plain_path(folder)))
    return videos, numbers, values


def _bad_line(path: Path, number: int, line: str, problem: str) -> InputError:
    return InputError(
        f"{path}, line {number}: {line[:80]!r} is no line of the multi-task challenge: {problem}. Expected "
        "<video>/<frame number>.jpg, valence and arousal from -1 to 1 (or -5), an expression from 0 to 7 (or -1) and "
        "12 action units of 0 and 1 (or -1): 16 fields. Correct that line."
    )


def _values(fields: Sequence[str]) -> npt.NDArray[np.float64]:
    """Return the values (L, 15) of lines, up to the first that has others."""
    if not fields:
        return np.empty((0, WIDTH))
    try:
        if not all(field.strip() for field in fields):  # numpy leaves out empty lines
            raise ValueError("a line is empty")
        values = np.loadtxt(fields, delimiter=",", comments=None, ndmin=2)
        wrong = values.shape != (len(fields), WIDTH)
    except ValueError:
        wrong = True
    if wrong:  # which is slow, and rare
        if len(fields) == 1:
            return np.empty((0, WIDTH))
        half = len(fields) // 2
        first = _values(fields[:half])
        return first if len(first) < half else np.concatenate([first, _values(fields[half:])])
    affect, expression, units = (values[:, columns] for columns in COLUMNS.values())
    sound = ((affect >= -1) & (affect <= 1) | (affect == -5)).all(axis=1)
    sound &= (np.isin(expression, range(-1, 8))).all(axis=1) & np.isin(units, (-1, 0, 1)).all(axis=1)
    return values if sound.all() else values[: int(sound.argmin())]
