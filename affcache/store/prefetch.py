"""Rows of a store read group by group, one group ahead: a thread reads the next while the caller works on one.

Rows are read through the file and not through the memory map, whose pages would count as the process's memory. A read
lets go of Python's lock, so the caller isn't held up.
"""

from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from io import RawIOBase
from itertools import pairwise
from threading import Event

import numpy as np
import numpy.typing as npt
import torch

from affcache.errors import StoreError
from affcache.store.frames import Rows
from affcache.store.joined import AnyStore
from affcache.store.pooled import PooledStore, RowStore
from affcache.store.reading import EmbeddingStore, read_rows

SPAN_ROWS = 64  # rows of one read, about 100 KB: the call costs little beside the copy, and the lock is held briefly
STAGING_ROWS = 8192  # rows on their way to a GPU


def read_ahead(store: RowStore, groups: Sequence[Rows], device: torch.device) -> Generator[torch.Tensor, None, None]:
    """Yield the embeddings of groups of rows.

    There are two buffers, which take turns: what was yielded is overwritten once the one after it has been taken.
    The thread ends with the group it reads; when the generator is closed, sooner.

    Args:
        store: what is read, or several side by side; their memory maps aren't touched. Videos are pooled as they are
            asked for.
        groups: int64 arrays of rows, each rising.
        device: where the embeddings go; to a GPU by way of pinned memory.

    Yields:
        float16 tensors (rows of the group, D); of videos float32.

    Raises:
        StoreError: the file is cut short or can't be read any more.
    """
    if isinstance(store, PooledStore):
        yield from (torch.from_numpy(store.read(group)).to(device) for group in groups)
        return
    if not groups:
        return
    most = max(len(group) for group in groups)
    buffers = [_empty(most, store.width, device) for _ in groups[:2]]
    with ExitStack() as stack:
        files = [stack.enter_context(_opened(part)) for part in store.parts]
        reader = _Reader(store, files, device)
        ahead = _in_thread(reader, groups[0], buffers[0])
        try:
            for number in range(1, len(groups) + 1):
                embeddings = ahead.result()
                if number < len(groups):  # into the buffer that the caller is done with
                    ahead = _in_thread(reader, groups[number], buffers[number % 2])
                yield embeddings
        finally:
            reader.stop.set()
            wait([ahead])  # the file closes after it


def _opened(store: EmbeddingStore) -> RawIOBase:
    try:
        return store.path.open("rb", buffering=0)
    except OSError as error:
        raise StoreError(
            f"The store {store.path} can't be opened any more: {error.strerror}. Expected the file to stay where it "
            "was when the command began. Put it back, then run the command again."
        ) from None


class _Reader:
    """Reads rows into a buffer on a device."""

    def __init__(self, store: AnyStore, files: Sequence[RawIOBase], device: torch.device) -> None:
        self.store, self.files, self.device = store, files, device
        self.stop = Event()
        self.staging = _staging(store.width, device)

    def read(self, rows: Rows, buffer: torch.Tensor) -> torch.Tensor:
        """Read rising rows (n,) into the first n of a buffer; return those, float16 (n, D)."""
        target = buffer[: len(rows)]
        try:
            if self.staging is None:
                self._read(rows, target)
                return target
            for first in range(0, len(rows), STAGING_ROWS):
                piece = rows[first : first + STAGING_ROWS]
                self._read(piece, self.staging[: len(piece)])
                # on the stream of the training: after its work on what this buffer held before
                target[first : first + len(piece)].copy_(self.staging[: len(piece)], non_blocking=True)
                _synchronize(self.device)
            return target
        except OSError as error:
            raise StoreError(
                f"The store {self.store.path} can't be read any more: {error.strerror}. Expected the file to stay as "
                "it was when the command began. See to the disk, then run the command again."
            ) from None

    def _read(self, rows: Rows, target: torch.Tensor) -> None:
        """Read rising rows (n,) into a tensor (n, D) on the CPU."""
        if isinstance(self.store, EmbeddingStore):
            self._read_part(self.store, self.files[0], rows, target.numpy())
            return
        first = 0  # column
        for part, of, file in zip(self.store.parts, self.store.rows_of_parts, self.files, strict=True):
            self._read_part(part, file, of[rows], target.numpy()[:, first : first + part.width])
            first += part.width

    def _read_part(self, store: EmbeddingStore, file: RawIOBase, rows: Rows, out: npt.NDArray[np.float16]) -> None:
        """Read rows in spans that end at multiples of ``SPAN_ROWS``, and where the rows of another video go back."""
        cuts = np.flatnonzero((np.diff(rows // SPAN_ROWS) != 0) | (np.diff(rows) < 0)) + 1
        for first, last in pairwise([0, *cuts.tolist(), len(rows)]):
            if self.stop.is_set():  # nobody waits for the rest
                return
            wanted = rows[first:last]
            span = read_rows(file, store.features, int(wanted[0]), int(wanted[-1]) + 1)
            out[first:last] = span if len(span) == len(wanted) else span[wanted - wanted[0]]


def _in_thread(reader: _Reader, rows: Rows, buffer: torch.Tensor) -> "Future[torch.Tensor]":
    """Read in a thread of its own, which ends with its work: none is left if the generator is never closed."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
    future = pool.submit(reader.read, rows, buffer)
    pool.shutdown(wait=False)
    return future


def _empty(rows: int, width: int, device: torch.device) -> torch.Tensor:
    return torch.empty(rows, width, dtype=torch.float16, device=device)


def _staging(width: int, device: torch.device) -> torch.Tensor | None:
    """Return the pinned memory by way of which rows go to a GPU, (STAGING_ROWS, D); None where the CPU trains."""
    if device.type != "cuda":
        return None
    return torch.empty(STAGING_ROWS, width, dtype=torch.float16, pin_memory=True)


def _synchronize(device: torch.device) -> None:
    torch.cuda.current_stream(device).synchronize()
