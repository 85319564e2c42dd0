"""Crops decoded ahead of the encoder by a pool of threads, batch by batch."""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from threading import Lock

import numpy as np

from affcache.crops.archives import UnreadableCropError
from affcache.crops.crop_list import CropList
from affcache.crops.folders import require_source
from affcache.crops.images import DecodedCrop, Preprocessing, decode_crop, mirrored
from affcache.extraction.stats import ExtractionStats
from affcache.store.reading import Rows

CROPS_A_TASK = 16  # decoded by one thread in one go: handing over each crop alone would cost as much as decoding it

Decoded = list[DecodedCrop | str]  # a crop, or why it can't be read


@dataclass
class CropDecoder:
    """Reads and decodes single crops. Safe to use from several threads."""

    crops: CropList
    preprocessing: Preprocessing
    mirror: bool = False  # left and right changed over
    large_images: Lock = field(default_factory=Lock)  # they are decoded one at a time

    def decode(self, rows: list[int]) -> Decoded:
        """Read and decode some crops; the reason stands where that can't be done.

        Raises:
            InputError: the crops' folder or archive is gone.
        """
        return [self._decode(row) for row in rows]

    def _decode(self, row: int) -> DecodedCrop | str:
        try:
            crop = decode_crop(self.crops.read(row), self.large_images)
        except OSError as error:
            require_source(self.crops.container(row), error)
            return error.strerror or str(error)
        except UnreadableCropError as error:
            return str(error)
        pixels = mirrored(crop.pixels) if self.mirror else crop.pixels
        return DecodedCrop(self.preprocessing.resize_large(pixels), crop.mode)


class DecodedAhead:
    """Batches of rows with their crops, in order. Decoding begins at once, before the first one is asked for.

    Args:
        decoder: reads and decodes.
        batches: rows of each batch.
        workers: threads that decode.
        most: batches that are decoded, or being so, at a time; bounds the memory.
        stats: is charged with the time for which somebody waits here.
    """

    def __init__(self, decoder: CropDecoder, batches: Iterator[Rows], workers: int, most: int, stats: ExtractionStats):
        self._decoder, self._batches, self._most, self._stats = decoder, batches, most, stats
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
            self._ahead.append((rows, [self._pool.submit(self._decoder.decode, task) for task in tasks]))


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
