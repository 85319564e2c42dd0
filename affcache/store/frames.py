"""Which row is which frame, and the frames that several stores share, or that at least one of them has."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from affcache.crops.names import canonical

PENDING, ENCODED, UNREADABLE = 0, 1, 2  # values of /status
Rows = npt.NDArray[np.int64]  # of a store
BESIDE = " + "  # between the names of files
ABSENT = -1  # in place of a row: the store hasn't this frame, or no embedding of it


@dataclass(frozen=True)
class FrameIndex:
    """Which row is which frame: the rows of video v are ``video_start[v]:video_start[v + 1]``, in frame order."""

    path: Path  # where they lie; of several files all their names, for messages
    status: npt.NDArray[np.uint8]  # (N,) 0 pending, 1 encoded, 2 unreadable
    frame_number: npt.NDArray[np.int32]  # (N,) the number in the crop's file name
    video_names: tuple[str, ...]  # (V,)
    video_start: npt.NDArray[np.int64]  # (V + 1,)

    unit: ClassVar[str] = "frame"  # what a row is

    def __len__(self) -> int:
        return len(self.status)

    @property
    def known_names(self) -> tuple[str, ...]:
        """``video_names``, and after them those of videos that stores have of which nothing is here."""
        return self.video_names

    def video_of_rows(self) -> npt.NDArray[np.int64]:
        """Return the video index of every row, int64 (N,)."""
        return np.repeat(np.arange(len(self.video_names)), np.diff(self.video_start))

    def has_frames_of(self, other: "FrameIndex") -> bool:
        """Say whether row i is the same frame in both, for all rows, whatever can be read of them."""
        return (
            len(self) == len(other)
            and list(map(canonical, self.video_names)) == list(map(canonical, other.video_names))
            and np.array_equal(self.video_start, other.video_start)
            and np.array_equal(self.frame_number, other.frame_number)
        )


def shared_frames(stores: Sequence[FrameIndex]) -> tuple[FrameIndex, list[Rows]]:
    """Return the frames (n,) that all stores have an embedding of, in the first one's order; and each one's rows (n,).

    Frames are the same by their video and their number there. Videos without any are left out.
    """
    places = [_places(store) for store in stores]
    names, starts = list[str](), [0]
    frames: list[npt.NDArray[np.int32]] = []
    rows: list[list[Rows]] = [[] for _ in stores]
    for video, name in enumerate(stores[0].video_names):
        key = canonical(name)
        if any(key not in of for of in places):
            continue
        encoded = [_encoded(store, of[key]) for store, of in zip(stores, places, strict=True)]
        numbers = [store.frame_number[of] for store, of in zip(stores, encoded, strict=True)]
        both = reduce(lambda one, other: np.intersect1d(one, other, assume_unique=True), numbers)
        if not len(both):
            continue
        names.append(stores[0].video_names[video])
        starts.append(starts[-1] + len(both))
        frames.append(both)
        for found, of, own in zip(rows, encoded, numbers, strict=True):
            found.append(of[np.searchsorted(own, both)])
    return _index(stores, names, starts, frames, True), [_concatenated(found) for found in rows]


def all_frames(stores: Sequence[FrameIndex]) -> tuple[FrameIndex, list[Rows]]:
    """Return the frames (n,) of all stores, by video and number; and each one's rows (n,), or ``ABSENT``.

    A frame is encoded where a store has an embedding of it. Videos of which no store has any are here without frames,
    so that a name that may mean one of them isn't taken for another's.
    """
    places = [_places(store) for store in stores]
    spelled = {canonical(name): name for store in reversed(stores) for name in store.known_names}
    names, starts = sorted(spelled.values()), [0]
    frames: list[npt.NDArray[np.int32]] = []
    rows: list[list[Rows]] = [[] for _ in stores]
    for name in names:
        key = canonical(name)
        having = [np.arange(*of[key]) if key in of else np.arange(0) for of in places]
        every = reduce(np.union1d, (store.frame_number[of] for store, of in zip(stores, having, strict=True)))
        starts.append(starts[-1] + len(every))
        frames.append(every)
        for found, store, of in zip(rows, stores, having, strict=True):
            own = np.full(len(every), ABSENT, np.int64)
            encoded = of[store.status[of] == ENCODED]
            own[np.searchsorted(every, store.frame_number[encoded])] = encoded
            found.append(own)
    each = [_concatenated(found) for found in rows]
    there = reduce(np.logical_or, (found != ABSENT for found in each))
    return _index(stores, names, starts, frames, there), each


def _places(store: FrameIndex) -> dict[str, tuple[int, int]]:
    """Return the first row of each video and the one after its last, by the video's canonical name."""
    starts = store.video_start.tolist()
    return {canonical(name): (starts[v], starts[v + 1]) for v, name in enumerate(store.video_names)}


def _encoded(store: FrameIndex, place: tuple[int, int]) -> Rows:
    first, last = place
    return first + np.flatnonzero(store.status[first:last] == ENCODED)


def _concatenated(parts: Sequence[Rows]) -> Rows:
    return np.concatenate([np.empty(0, np.int64), *parts])


def _index(
    stores: Sequence[FrameIndex],
    names: Sequence[str],
    starts: Sequence[int],
    frames: Sequence[npt.NDArray[np.int32]],
    there: "npt.NDArray[np.bool_] | bool",
) -> FrameIndex:
    paths = (part.path for store in stores for part in getattr(store, "parts", (store,)))
    path = Path(BESIDE.join(dict.fromkeys(map(str, paths))))
    status = np.full(starts[-1], UNREADABLE, np.uint8)
    status[there if isinstance(there, np.ndarray) else slice(None)] = ENCODED
    numbers = np.concatenate([np.empty(0, np.int32), *frames])
    return FrameIndex(path, status, numbers, tuple(names), np.asarray(starts, np.int64))
