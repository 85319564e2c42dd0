"""Which row is which frame: keys from paths, and the order in which a store keeps them."""

import os
import re
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from affcache.crops.crop_list import CropList
from affcache.crops.folders import IMAGE_SUFFIXES, LARGEST_FRAME_NUMBER
from affcache.errors import InputError

_SEPARATOR = re.compile(r"[/\\]")  # lists made on Windows mix both
_FRAME_NUMBER = re.compile(r"\d+$", re.ASCII)


@dataclass(frozen=True)
class FrameKeys:
    """The video and the frame number of n rows, in any order."""

    video_names: tuple[str, ...]  # each used by at least one row
    video: npt.NDArray[np.int64]  # (n,) index into video_names
    frame_number: npt.NDArray[np.int32]  # (n,)

    def __len__(self) -> int:
        return len(self.video)


class KeyCollector:
    """Gathers the keys of one source, row after row, in little memory."""

    def __init__(self) -> None:
        self._index: dict[str, int] = {}
        self._video = array("q")
        self._frame = array("q")

    def __len__(self) -> int:
        return len(self._video)

    def add(self, video: str, frame: int) -> None:
        """Take the key of the next row.

        Raises:
            ValueError: says what is wrong with it, as a part of a sentence.
        """
        if not video or "\0" in video:  # HDF5 ends a text at a zero byte
            raise ValueError(f"has the video name {video!r}, which a store can't keep")
        if not 0 <= frame <= LARGEST_FRAME_NUMBER:
            raise ValueError(f"has the frame number {frame}, outside 0 to {LARGEST_FRAME_NUMBER}")
        self._video.append(self._index.setdefault(video, len(self._index)))
        self._frame.append(frame)

    def add_path(self, path: str) -> None:
        """Take the key of the next row from the path of its crop, as ``find_crops`` would.

        Raises:
            ValueError: says what is wrong with the path, as a part of a sentence.
        """
        *folders, name = _SEPARATOR.split(path)
        video = folders[-1] if folders else ""
        if video in ("", ".", ".."):
            raise ValueError(f"has the path {path!r}, in which no folder names the video")
        stem, suffix = os.path.splitext(name)
        match = _FRAME_NUMBER.search(stem)
        if match is None or (suffix and suffix.lower() not in IMAGE_SUFFIXES):
            raise ValueError(f"has the path {path!r}, which doesn't end in a frame number and the suffix of an image")
        self.add(video, int(match.group()))

    def keys(self) -> FrameKeys:
        """Return what was gathered."""
        return FrameKeys(
            video_names=tuple(self._index),
            video=np.array(self._video, dtype=np.int64),
            frame_number=np.array(self._frame, dtype=np.int32),
        )


def join_keys(parts: Sequence[FrameKeys]) -> FrameKeys:
    """Return the keys of several sources as those of one, rows in the order given."""
    index: dict[str, int] = {}
    videos = []
    for part in parts:
        of_part = [index.setdefault(name, len(index)) for name in part.video_names]
        videos.append(np.array(of_part, dtype=np.int64)[part.video])
    return FrameKeys(tuple(index), np.concatenate(videos), np.concatenate([part.frame_number for part in parts]))


def stored_order(keys: FrameKeys, place: Callable[[int], str]) -> tuple[CropList, npt.NDArray[np.int64]]:
    """Sort rows as a store keeps them: by video name, then by frame number.

    Args:
        keys: of N rows, at least one.
        place: names a row for messages.

    Returns:
        The list of crops, and int64 (N,): row i of the store is row ``order[i]`` of ``keys``.

    Raises:
        InputError: a frame occurs twice.
    """
    by_name = sorted(range(len(keys.video_names)), key=keys.video_names.__getitem__)
    names = [keys.video_names[index] for index in by_name]
    rank = np.empty(len(names), dtype=np.int64)
    rank[by_name] = np.arange(len(names))
    video = rank[keys.video]
    order = np.lexsort((keys.frame_number, video))
    video, frame_number = video[order], keys.frame_number[order]
    repeated = np.flatnonzero((np.diff(video) == 0) & (np.diff(frame_number) == 0))
    if len(repeated):
        first, second = sorted(int(row) for row in order[repeated[0] : repeated[0] + 2])
        raise InputError(
            f"Frame {frame_number[repeated[0]]} of the video {names[video[repeated[0]]]} occurs twice: {place(first)} "
            f"and {place(second)}. Expected every frame once. Remove one of the two, or import sources that overlap, "
            "such as those of two tasks, into a store each."
        )
    crops = CropList(
        folders=tuple(Path(name) for name in names),
        video_names=tuple(names),
        video_start=np.concatenate([[0], np.cumsum(np.bincount(video, minlength=len(names)))]).astype(np.int64),
        frame_number=frame_number,
    )
    return crops, order.astype(np.int64)
