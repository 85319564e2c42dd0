"""Crops decoded ahead of the encoder by a pool of threads, batch by batch."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import numpy as np

from affcache.crops.images import DecodedCrop
from affcache.extraction.stats import ExtractionStats
from affcache.store.reading import Rows

CROPS_A_TASK = 16  # decoded by one thread in one go: handing over each crop alone would cost as much as decoding it

Decoded = list[DecodedCrop | str]  # a crop, or why it can't be read
Decode = Callable[[int], DecodedCrop | str]  # of a row


class DecodedAhead:
    """Batches of rows with their crops, in order. Decoding begins at once, before the first one is asked for.

    Args:
        decode: reads and decodes the crop of a row; the reason is what it returns where that can't be done.
        batches: rows of each batch.
        workers: threads that decode.
        most: batches that are decoded, or being so, at a time; bounds the memory.
        stats: is charged with the time for which somebody waits here.
    """

    def __init__(
        self, decode: Decode, batches: Iterator[Rows], workers: int, most: int, stats: ExtractionStats
    ) -> None:
        self._decode, self._batches, self._most, self._stats = decode, batches, most, stats
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        self._ahead: deque[tuple[Rows, list[Future[Decoded]]]] = deque()
        self._begin()

    def __enter__(self) -> "DecodedAhead":
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[tuple[Rows, Decoded]]:
        """Yield (rows, their crops or why they can't be read)."""
        while self._ahead:
            rows, futures = self._ahead.popleft()
            start = time.perf_counter()
            decoded = [crop for future in futures for crop in future.result()]
            self._stats.charge("decode", time.perf_counter() - start)
            self._begin()
            yield rows, decoded

    def _begin(self) -> None:
        for rows in islice(self._batches, self._most - len(self._ahead)):
            tasks = [rows[i : i + CROPS_A_TASK].tolist() for i in range(0, len(rows), CROPS_A_TASK)]
            self._ahead.append((rows, [self._pool.submit(list, map(self._decode, task)) for task in tasks]))


def consecutive_batches(rows: Rows, size: int) -> Iterator[Rows]:
    """Cut rising rows into batches of consecutive rows that end at multiples of ``size``.

    A batch is then the same set of rows in a continued run as in an uninterrupted one.
    """
    start = 0
    while start < len(rows):
        until_multiple = size - int(rows[start]) % size
        batch = rows[start : start + until_multiple]
        consecutive = batch == rows[start] + np.arange(len(batch))
        batch = batch[consecutive]
        yield batch
        start += len(batch)
