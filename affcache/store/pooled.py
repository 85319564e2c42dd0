"""A store by its videos: a row is a whole video, pooled from the embeddings of its frames."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from affcache.errors import InputError
from affcache.store.frames import ENCODED, UNREADABLE, FrameIndex, Rows
from affcache.store.joined import AnyStore

WHOLE = 0  # in place of a frame number
QUANTILES = (0.1, 0.5, 0.9)
COLUMNS = 128  # of float64 at a time: a video of an hour takes 100 MB
Values = npt.NDArray[np.float64]

# of the values (n, d) of a video's frames: (k, d). A further one is a line here, and a choice of --pool
STATISTICS: Mapping[str, Callable[[Values], Values]] = {
    "mean": lambda values: values.mean(axis=0, keepdims=True),
    "std": lambda values: values.std(axis=0, keepdims=True),
    "quantiles": lambda values: np.quantile(values, QUANTILES, axis=0),
}


def pooled_width(pool: str, width: int) -> int:
    """Return how many values ``pool`` makes of embeddings of D values; none leaves them as they are."""
    one = np.zeros((1, 1))
    return width if pool == "none" else width * sum(len(STATISTICS[name](one)) for name in pool.split("+"))


def pool_frames(embeddings: npt.NDArray[Any], pool: str) -> npt.NDArray[np.float32]:
    """Return the statistics of one video's embeddings.

    Args:
        embeddings: float (n, D), n at least 1, in the order of their frames.
        pool: names of ``STATISTICS``, joined by +.

    Returns:
        float32 (``pooled_width``,), computed in float64: all D means, all D deviations (the population's), and so on;
        nan or inf where an embedding has some.
    """
    names, width = pool.split("+"), embeddings.shape[1]
    found = np.empty((pooled_width(pool, 1), width), np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        for first in range(0, width, COLUMNS):
            some = slice(first, first + COLUMNS)
            values = embeddings[:, some].astype(np.float64)  # (n, d)
            found[:, some] = np.concatenate([STATISTICS[name](values) for name in names])
    return found.ravel()


@dataclass(frozen=True)
class PooledStore(FrameIndex):
    """The videos of a store, or of several side by side: row v is video v. One without an encoded frame is unreadable.

    Rows are pooled when they are read, video by video. With the pool "none" they have no values: the index says which
    videos there are, and ``frames_of`` which frames each has.
    """

    source: AnyStore  # of frames
    pool: str

    unit = "video"

    @classmethod
    def of(cls, source: AnyStore, pool: str) -> "PooledStore":
        """Return the videos of a store; ``pool`` is none, or names of ``STATISTICS`` joined by +."""
        videos = len(source.video_names)
        status = np.full(videos, UNREADABLE, np.uint8)
        status[source.video_of_rows()[source.status == ENCODED]] = ENCODED
        numbers, starts = np.full(videos, WHOLE, np.int32), np.arange(videos + 1)
        return cls(source.path, status, numbers, source.video_names, starts, source, pool)

    def __repr__(self) -> str:
        return f"<PooledStore {self.path}: {len(self):,} videos, {self.pool} of {len(self.source):,} frames>"

    @property
    def width(self) -> int:
        """How many values a row has."""
        return 0 if self.pool == "none" else pooled_width(self.pool, self.source.width)

    @property
    def known_names(self) -> tuple[str, ...]:
        return self.source.known_names

    @property
    def parts(self) -> tuple[Any, ...]:
        """The stores whose embeddings stand side by side in a frame's."""
        return self.source.parts

    def frames_of(self, videos: Rows) -> tuple[Rows, npt.NDArray[np.int64]]:
        """Return the rows (n,) of the source that are encoded frames of some videos, and which video's each is (n,)."""
        starts, status = self.source.video_start, self.source.status
        each = [starts[v] + np.flatnonzero(status[starts[v] : starts[v + 1]] == ENCODED) for v in videos.tolist()]
        frames = np.concatenate([np.empty(0, np.int64), *each])
        return frames, np.repeat(videos, [len(of) for of in each])

    def read(self, rows: Rows) -> npt.NDArray[np.float32]:
        """Return the pooled embeddings (n, width) of some videos.

        Raises:
            InputError: an embedding isn't finite.
        """
        found = np.empty((len(rows), self.width), np.float32)
        for place, video in enumerate(rows):
            frames, _ = self.frames_of(rows[place : place + 1])
            found[place] = pool_frames(self.source.read(frames), self.pool)
            if not np.isfinite(found[place]).all():
                raise InputError(
                    f"The video {self.video_names[video]} of {self.path} has an embedding with nan or inf in it. "
                    "Expected finite numbers. Extract or import these embeddings again."
                )
        return found

    def fingerprint(self) -> str:
        """Return a sha256 over what the stores of frames hold."""
        return self.source.fingerprint()

    def view(self, name: str) -> "PooledStore":
        """Return the videos of another view of the same crops; StoreError as of a store."""
        return replace(self, source=self.source.view(name))

    def verify(self, on_block: Callable[[int, int], None] | None = None) -> None:
        """Read all frames and check them; as ``EmbeddingStore.verify``."""
        self.source.verify(on_block)


RowStore: TypeAlias = AnyStore | PooledStore  # a row is a frame, or a whole video
