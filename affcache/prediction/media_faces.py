"""The faces of photos and videos on their way through the encoder: gathered into batches, and put together again."""

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from affcache.extraction.encode_pool import Embeddings, EncodePool
from affcache.faces.media import Media
from affcache.faces.scan import ScannedFrame
from affcache.faces.table import FaceRows, identity
from affcache.faces.tracks import Tracker
from affcache.prediction.outputs import LogitsOfHeads, TaskHeads

PHOTOS = 256  # that are kept together: a file and a call of the heads for each would take longer than all else
Embedding = npt.NDArray[np.float16]  # (D,)
Take = Callable[[Embedding], None]


class FaceBatches:
    """Gathers crops of all inputs into batches for the encoder, and hands back embeddings in the order they came."""

    def __init__(self, pool: EncodePool, size: int) -> None:
        self._pool, self._size = pool, size
        self._crops: list[npt.NDArray[np.uint8]] = []
        self._takers: list[Take] = []
        self._under_way: deque[tuple[Callable[[], Embeddings], list[Take]]] = deque()

    def add(self, crop: npt.NDArray[np.uint8], take: Take) -> None:
        """Take a crop, and what is called with its embedding, sooner or later."""
        self._crops.append(crop)
        self._takers.append(take)
        if len(self._crops) == self._size:
            self._begin()
            if len(self._under_way) > self._pool.at_once:
                self._wait()

    def finish(self) -> None:
        """Encode what is left, and wait for all of it."""
        if self._crops:
            self._begin()
        while self._under_way:
            self._wait()

    def _begin(self) -> None:
        self._under_way.append((self._pool.begin(self._crops), self._takers))
        self._crops, self._takers = [], []

    def _wait(self) -> None:
        wait, takers = self._under_way.popleft()
        parts, _ = wait()
        with np.errstate(over="ignore"):  # beyond float16 is inf, which the head refuses
            embeddings = np.concatenate(parts).astype(np.float16)
        for take, embedding in zip(takers, embeddings, strict=True):
            take(embedding)


class MediaWork:
    """One photo or video on its way: what was found in it, and what is said of it so far.

    Args:
        media: which one.
        tracker: of its faces.
        take: called with each embedding, as they come.
        finish: called once all of it is known.
    """

    def __init__(
        self, media: Media, tracker: Tracker, take: Callable[[Embedding], None], finish: "Callable[[MediaWork], None]"
    ) -> None:
        self.media, self.file, self._take_embedding = media, identity(media), take  # as it is before it is read
        self.said: list[int] = []  # rows, in the order in which their embeddings came
        self._rows, self._tracker, self._finish = FaceRows(str(media.path)), tracker, finish
        self._begun, self._whole = 0, False  # crops that were handed to the encoder; whether no more come

    def add(self, found: ScannedFrame, batches: FaceBatches) -> None:
        """Take a frame, and hand its faces to the encoder."""
        for crop, track, row in zip(found.crops, found.tracks, self._rows.add(found), strict=True):
            self._begun += 1
            batches.add(crop, partial(self._take, track, row))

    def scanned(self) -> None:
        """Hear that no more frames come."""
        self._whole = True
        self._finish_if_whole()

    def table(self, same_person: float) -> tuple[pa.Table, npt.NDArray[np.int64]]:
        """Return its rows, with landmarks, and the person (n,) of each, below n + 1."""
        persons = self._tracker.persons(same_person)
        keys, points = self._rows.columns(persons)
        return pa.table({**keys, **points}), self._rows.persons(persons).astype(np.int64)

    def _take(self, track: int, row: int, embedding: Embedding) -> None:
        self._tracker.tracks[track].embed(embedding)
        self._take_embedding(embedding)
        self.said.append(row)
        self._finish_if_whole()

    def _finish_if_whole(self) -> None:
        if self._whole and len(self.said) == self._begun:
            self._finish(self)


class FinishedPhotos:
    """Gathers photos of which all is known, and hands over many at a time.

    Args:
        heads: of all tasks.
        keep: takes photos, and the logits of their faces, in their order.
    """

    def __init__(self, heads: Sequence[TaskHeads], keep: Callable[[Sequence[MediaWork], LogitsOfHeads], None]) -> None:
        self._keep, self._logits = keep, LogitsOfHeads(heads)
        self._waiting: list[MediaWork] = []

    def begin(self, media: Media, tracker: Tracker) -> MediaWork:
        """Return what a photo's faces are handed to."""
        embeddings: list[Embedding] = []
        return MediaWork(media, tracker, embeddings.append, partial(self._add, embeddings))

    def finish(self) -> None:
        """Hand over what is left."""
        if self._waiting:
            self._keep(self._waiting, self._logits)
            self._waiting = []

    def _add(self, embeddings: list[Embedding], work: MediaWork) -> None:
        if embeddings:  # one without a face may be known before those that came first
            self._logits.add(np.stack(embeddings))
        self._waiting.append(work)
        if len(self._waiting) == PHOTOS:
            self.finish()
