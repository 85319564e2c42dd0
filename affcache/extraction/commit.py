"""Gathering encoded batches and committing them beside the encoder, so that it never waits for a disk that keeps up."""

import time
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from affcache.extraction.stats import ExtractionStats
from affcache.store.writing import StoreWriter

COMMIT_SECONDS = 10.0  # work that a kill may cost, at most about this much
COMMIT_ROWS = 4096

Encoded = tuple[npt.NDArray[np.float16], npt.NDArray[np.uint8]]  # features (n, D), status (n,)


class BackgroundWriter:
    """Gathers consecutive batches, and lets one thread commit them every few seconds, one commit at a time."""

    def __init__(self, writer: StoreWriter, pool: ThreadPoolExecutor, stats: ExtractionStats) -> None:
        self._writer, self._pool, self._stats = writer, pool, stats
        self._gathered: list[Encoded] = []
        self._first_row = self._next_row = -1
        self._last_commit = time.monotonic()
        self._writing: Future[None] | None = None

    def add(self, rows: npt.NDArray[np.int64], encoded: Encoded) -> None:
        """Take one encoded batch; begin to commit what came before it when that is due or not adjacent."""
        full = self._next_row - self._first_row >= COMMIT_ROWS
        if rows[0] != self._next_row or full or time.monotonic() - self._last_commit >= COMMIT_SECONDS:
            self._begin_commit()
            self._first_row, self._last_commit = int(rows[0]), time.monotonic()
        self._gathered.append(encoded)
        self._next_row = int(rows[-1]) + 1

    def finish(self) -> None:
        """Commit what is left, and wait until everything is on the disk."""
        self._begin_commit()
        self._wait()

    def _begin_commit(self) -> None:
        self._wait()
        if self._gathered:
            if len(self._gathered) == 1:  # a block of a cluster, say: no need for a copy
                ((features, status),) = self._gathered
            else:
                features, status = (np.concatenate(parts) for parts in zip(*self._gathered, strict=True))
            self._writing = self._pool.submit(self._writer.commit, self._first_row, features, status)
            self._gathered = []

    def _wait(self) -> None:
        """Wait for the commit under way, and raise what went wrong in it."""
        if self._writing is not None:
            start = time.perf_counter()
            writing, self._writing = self._writing, None
            writing.result()
            self._stats.charge("write", time.perf_counter() - start)
