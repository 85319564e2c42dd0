"""Labels in one table, CSV or Parquet: a row for each frame, or for each video, and a column for its split."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from affcache.crops.crop_list import LARGEST_FRAME_NUMBER, parse_path
from affcache.crops.names import canonical, plain_path
from affcache.errors import InputError, did_you_mean
from affcache.tabular import no_rows
from affcache.tasks.kinds import Values
from affcache.tasks.label_columns import Rows, label_columns, matching, number_of, open_labels, roles_of
from affcache.tasks.label_files import UnlabelledSplit, VideoLabels
from affcache.tasks.task import Task

SUFFIXES = (".csv", ".tsv", ".parquet")
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "val", "valid", "dev"), "validation"),
    "test": "test",
}
PRESENT = {"false": 0, "true": 1, "": -1}
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TableLabels:
    """The labels of one split of a table, a ``LabelSource``."""

    where: Path
    by_video: Mapping[str, VideoLabels]
    test_rows: int  # of the table, which are of neither split
    folds: Mapping[str, str] | None  # by video, of those that have one; None without such a column

    @property
    def videos(self) -> Collection[str]:
        """The canonical names of the labelled videos."""
        return self.by_video.keys()

    def read(self, video: str) -> VideoLabels:
        """Return the labels of one of them."""
        return self.by_video[video]


@dataclass(frozen=True)
class LabelTable:
    """All rows of a table that aren't test rows, sorted by video and frame."""

    path: Path
    names: Sequence[str]  # (V,) of the videos
    splits: Sequence[str]  # (V,) train or validation
    folds: Sequence[str] | None  # (V,) "" where a video has none
    starts: Numbers  # (V + 1,) where the rows of each video begin
    frame_numbers: Numbers | None  # (n,) None where a row is of a whole video
    labels: npt.NDArray[Any]  # (n,) or (n, C) of the task's ``label_dtype``; -1, or NaN of a value, where there is none
    valid: npt.NDArray[np.bool_]  # (n,) whether a row has a label
    test_rows: int

    def of_split(self, split: str) -> TableLabels:
        """Return the labels of train or validation; raises UnlabelledSplit where it has none."""
        found = {}
        for video, (name, own) in enumerate(zip(self.names, self.splits, strict=True)):
            if own == split:
                rows = slice(*self.starts[video : video + 2].tolist())
                numbers = None if self.frame_numbers is None else self.frame_numbers[rows]
                found[name] = VideoLabels(numbers, self.labels[rows], self.valid[rows])
        if not found:
            raise UnlabelledSplit(
                f"{self.path} has no row of the split {split}. Expected rows of train and of validation. Say in the "
                "column split which videos are which."
            )
        folds = None
        if self.folds is not None:
            folds = {name: fold for name, fold in zip(self.names, self.folds, strict=True) if name in found and fold}
        return TableLabels(self.path, found, self.test_rows, folds)


def read_label_table(path: Path, task: Task) -> LabelTable:
    """Read a table of a task's labels.

    A frame is named by the columns video and frame, or by its image's path; of ``Task.level`` "video", a row is of a
    whole video. The column split says train or validation; test rows are left out. Then comes one column of class
    names, or one for each unit or value. An empty cell is no label.

    Raises:
        InputError: the table can't be read, lacks a column, or a row is wrong; names the line and what was expected.
    """
    table = open_labels(path, task)
    roles = roles_of(path, table.named, task)
    labels = label_columns(path, table.named, task, roles)
    rows = table.rows({*roles.values(), *labels})
    splits = np.array(rows.decoded(roles["split"], _split_of))
    kept = splits != "test"
    test_rows = int((~kept).sum())
    rows, splits = rows.only(kept), splits[kept]
    if not len(rows):
        raise no_rows(path)
    names, video, frames = _keys(rows, roles)
    found = _labels(rows, labels, task)
    folds = rows.decoded(roles["fold"], canonical) if "fold" in roles else None
    order = np.lexsort((video,) if frames is None else (frames, video))
    rows, video, found = replace(rows, cells={}, number=rows.number[order]), video[order], found[order]
    frames = None if frames is None else frames[order]
    _require_once(rows, names, video, frames)
    starts = np.searchsorted(video, np.arange(len(names) + 1))

    def of_videos(what: str, each: Sequence[str]) -> list[str]:
        return _of_videos(rows, names, starts, [each[row] for row in order], what)

    missing = np.isnan(found) if isinstance(task, Values) else found < 0
    return LabelTable(
        path=path,
        names=names,
        splits=of_videos("split", splits.tolist()),
        folds=None if folds is None else of_videos("fold", folds),
        starts=starts,
        frame_numbers=frames,
        labels=found,
        valid=np.asarray(~missing.reshape(len(found), -1).all(axis=1)),
        test_rows=test_rows,
    )


def _split_of(cell: str) -> str:
    if cell.casefold() not in SPLIT_WORDS:
        raise ValueError(f"train, validation or test{did_you_mean(cell.casefold(), SPLIT_WORDS)}")
    return SPLIT_WORDS[cell.casefold()]


def _keys(rows: Rows, roles: Mapping[str, str]) -> tuple[list[str], Numbers, Numbers | None]:
    """Return the names (V,) of the videos, and of each row the video (n,) and the frame number (n,)."""
    frames: Sequence[int] | None = None
    if "path" in roles:
        called, frames = map(list, zip(*rows.decoded(roles["path"], _frame_of), strict=True))
    else:
        called = rows.decoded(roles["video"], _video_of)
        frames = rows.decoded(roles["frame"], _whole) if "frame" in roles else None
    index: dict[str, int] = {}
    video = np.array([index.setdefault(name, len(index)) for name in called])
    return list(index), video, None if frames is None else np.array(frames, np.int64)


def _frame_of(cell: str) -> tuple[str, int]:
    try:
        folder, _, frame = parse_path(cell)
    except ValueError:
        raise ValueError("the path of an image, <video>/00001.jpg") from None
    return canonical(plain_path(folder)), frame


def _video_of(cell: str) -> str:
    if not (name := canonical(plain_path(cell))):
        raise ValueError("the name of a video")
    return name


def _whole(cell: str) -> int:
    number = number_of(cell)
    if not (0 <= number <= LARGEST_FRAME_NUMBER and number.is_integer()):
        raise ValueError("the whole number of a frame")
    return int(number)


def _require_once(rows: Rows, names: Sequence[str], video: Numbers, frames: Numbers | None) -> None:
    """Refuse two rows of one frame, or of one video; all are sorted by these."""
    same = video[1:] == video[:-1]
    if frames is not None:
        same &= frames[1:] == frames[:-1]
    if same.any():
        row = int(np.flatnonzero(same)[0])
        what = f"frame {frames[row]} of the video" if frames is not None else "the video"
        raise InputError(
            f"{rows.path}: {rows.line(row)} and {rows.line(row + 1)} both are of {what} {names[video[row]]}. Expected "
            f"one label for each{'' if frames is not None else ' video'}. Remove one of the two."
        )


def _of_videos(rows: Rows, names: Sequence[str], starts: Numbers, each: Sequence[str], what: str) -> list[str]:
    """Return what all rows of each video (V,) say; rows are sorted by it."""
    found = []
    for video, name in enumerate(names):
        first, last = starts[video : video + 2].tolist()
        differing = next((row for row in range(first, last) if each[row] != each[first]), None)
        if differing is not None:
            raise InputError(
                f"{rows.path}: the video {name} is in the {what} {each[first]} in {rows.line(first)} and in "
                f"{each[differing]} in {rows.line(differing)}. Expected all frames of a video in one. Correct the "
                f"column {what}."
            )
        found.append(each[first])
    return found


def _labels(rows: Rows, columns: Sequence[str], task: Task) -> npt.NDArray[Any]:
    """Return the labels (n,) or (n, C) that cells say."""
    if task.exclusive:
        return np.array(rows.decoded(columns[0], partial(_class_of, task)), task.label_dtype)
    convert = partial(_value_of, task) if isinstance(task, Values) else _present
    return np.array([rows.decoded(column, convert) for column in columns], task.label_dtype).T.copy()  # (n, C)


def _class_of(task: Task, cell: str) -> int:
    """Return the index of a class: by its name, by its value where names are numbers, else by its place."""
    if not cell:
        return -1
    match = matching(cell, task.classes)
    if match is not None:
        return task.classes.index(match)
    number, values = number_of(cell), [number_of(name) for name in task.classes]
    are_numbers = not np.isnan(values).all()
    if not np.isnan(number) and number in values:
        return values.index(number)
    if not are_numbers and number.is_integer() and 0 <= number < task.outputs:
        return int(number)
    numbers = "" if are_numbers else f", a number from 0 to {task.outputs - 1}"
    named = f"{', '.join(task.classes)}{numbers}"
    raise ValueError(f"a class{did_you_mean(cell, task.classes)}: {named}, {_or_nothing(cell)}")


def _present(cell: str) -> int:
    number = number_of(cell)
    if number in (0, 1):
        return int(number)
    if cell.casefold() not in PRESENT:
        raise ValueError(f"0, 1, false or true, {_or_nothing(cell)}")
    return PRESENT[cell.casefold()]


def _value_of(task: Values, cell: str) -> float:
    value = number_of(cell)
    if cell and not task.low <= value <= task.high:  # of nan, too
        raise ValueError(f"a number from {task.low:g} to {task.high:g}, with a point, {_or_nothing(cell)}")
    return value


def _or_nothing(cell: str) -> str:
    is_nan = cell.casefold().lstrip("+-") == "nan"
    return "or nothing for no label" + " (an empty cell, in Parquet null, which nan isn't)" * is_nan
