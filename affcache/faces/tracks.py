"""Tracks: which face of a frame is which of the frames before, so that a person keeps an id through a video."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

LEAST_OVERLAP = 0.3  # of a face's boxes in frames that follow one another, intersection over union
GAP = 3.0  # seconds in which a face that isn't seen may come back to the same place
CUT = 40.0  # mean difference of two frames' thumbnails, in grey levels; within the clips tried at most 5, at cuts 97
THUMBNAIL = (32, 18)  # pixels, width and height
TINY = float(np.finfo(np.float64).tiny)
Box = npt.NDArray[np.floating]


def overlaps(boxes: Sequence[Box], others: Sequence[Box]) -> npt.NDArray[np.float64]:
    """Return the intersection over union (n, m) of boxes (4,): x, y, width, height."""
    one, other = (np.asarray(b, np.float64).reshape(-1, 4) for b in (boxes, others))
    first = np.maximum(one[:, None, :2], other[None, :, :2])
    last = np.minimum((one[:, :2] + one[:, 2:])[:, None], (other[:, :2] + other[:, 2:])[None])
    shared = (last - first).clip(min=0).prod(axis=2)  # (n, m)
    whole = one[:, 2:].prod(axis=1)[:, None] + other[:, 2:].prod(axis=1)[None] - shared
    return np.divide(shared, whole, out=np.zeros_like(shared), where=whole > 0)


@dataclass
class Track:
    """One face through frames that follow one another."""

    box: Box  # where it was seen last
    times: list[tuple[float, float]]  # seconds: from when to when it was seen
    frames: int = 1
    embedding_sum: npt.NDArray[np.float64] | None = None  # (D,) of embeddings of length 1

    def embed(self, embedding: npt.NDArray[np.floating]) -> None:
        """Take the embedding (D,) of one of its crops."""
        unit = embedding.astype(np.float64)
        unit /= max(float(np.linalg.norm(unit)), np.finfo(np.float64).tiny)
        self.embedding_sum = unit if self.embedding_sum is None else self.embedding_sum + unit


@dataclass
class Tracker:
    """Gives the faces of a video's frames the numbers of their tracks, frame after frame."""

    tracks: list[Track] = field(default_factory=list)
    _active: list[int] = field(default_factory=list)  # tracks that may go on
    _thumbnail: npt.NDArray[np.floating] | None = None  # of the frame before
    _before: float = -np.inf  # seconds, of the frame before

    def update(self, time: float, thumbnail: npt.NDArray[np.floating], boxes: Sequence[Box]) -> list[int]:
        """Return the track of each face of the next frame.

        Args:
            time: of the frame, in seconds.
            thumbnail: the frame in few pixels, of any shape that is the same in each; a cut is seen by it.
            boxes: of its faces, (4,) each.
        """
        if self._thumbnail is not None and np.abs(thumbnail - self._thumbnail).mean() > CUT:
            self._active = []
        self._active = [t for t in self._active if self.tracks[t].times[-1][1] >= min(time - GAP, self._before)]
        self._thumbnail, self._before = thumbnail, time
        found = overlaps([self.tracks[t].box for t in self._active], boxes)  # (active, faces)
        numbers = [-1] * len(boxes)
        for row, column in zip(*linear_sum_assignment(-found), strict=True):
            if found[row, column] >= LEAST_OVERLAP:
                numbers[column] = self._active[row]
        for face, number in enumerate(numbers):
            if number < 0:
                numbers[face] = len(self.tracks)
                self._active.append(len(self.tracks))
                self.tracks.append(Track(boxes[face], [(time, time)]))
            else:
                track = self.tracks[number]
                track.box, track.frames = boxes[face], track.frames + 1
                track.times[-1] = (track.times[-1][0], time)
        return numbers

    def persons(self, same_person: float) -> list[int]:
        """Return the number of the person, from 1 in the order in which they come, for each track.

        A track belongs to the person whose tracks' mean embedding it is most like, from a cosine of ``same_person`` on,
        unless both were seen at the same time. Without embeddings each track is a person.
        """
        persons: list[Track] = []
        width = max((len(t.embedding_sum) for t in self.tracks if t.embedding_sum is not None), default=0)
        units = np.zeros((len(self.tracks) if width else 0, width))  # (persons, D) mean embeddings, of length 1
        numbers = []
        for track in self.tracks:
            best = -1
            if track.embedding_sum is not None:
                likeness = units[: len(persons)] @ _unit(track)
                alike = np.flatnonzero(likeness >= max(same_person, TINY))
                apart = (p for p in alike[np.argsort(-likeness[alike], kind="stable")] if not _met(track, persons[p]))
                best = next(map(int, apart), -1)
            if best >= 0:
                _join(persons[best], track)
            else:
                best = len(persons)
                persons.append(Track(track.box, list(track.times), track.frames, track.embedding_sum))
            if width and persons[best].embedding_sum is not None:
                units[best] = _unit(persons[best])
            numbers.append(best + 1)
        return numbers


def _unit(track: Track) -> npt.NDArray[np.float64]:
    """Return the mean embedding (D,) of a track that has one, of length 1, or 0 where it is 0."""
    assert track.embedding_sum is not None
    return track.embedding_sum / max(float(np.linalg.norm(track.embedding_sum)), TINY)


def _met(track: Track, person: Track) -> bool:
    """Say whether both were seen at the same time; a photo's time is nan, which is neither before nor after."""
    return any(not (b < c or d < a) for a, b in track.times for c, d in person.times)


def _join(person: Track, track: Track) -> None:
    person.times += track.times
    person.frames += track.frames
    if track.embedding_sum is not None and person.embedding_sum is not None:
        person.embedding_sum = person.embedding_sum + track.embedding_sum


def thumbnail_of(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Return a frame (height, width, 3) in few pixels, float32 in grey levels."""
    import cv2

    return np.asarray(cv2.resize(pixels, THUMBNAIL, interpolation=cv2.INTER_AREA), np.float32)
