"""The pipeline of stage one: crops decoded ahead in threads, encoded in batches, committed every few seconds."""

import os
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from affcache.encoder import Encoder
from affcache.errors import InputError
from affcache.frames import CropList
from affcache.images import DecodedCrop, UnreadableCropError, decode_crop
from affcache.listener import Listener
from affcache.store import ENCODED, UNREADABLE
from affcache.store_writer import StoreWriter

COMMIT_SECONDS = 10.0  # work that a kill may cost, at most about this much
COMMIT_ROWS = 4096
BATCHES_AHEAD = 4  # decoded batches that wait for the encoder; bounds the memory

Rows = npt.NDArray[np.int64]
Encoded = tuple[npt.NDArray[np.float16], npt.NDArray[np.uint8]]  # features (n, D), status (n,)


@dataclass
class Pipeline:
    """Encodes pending rows of a store, and keeps account of where the time went and what could not be read."""

    crops: CropList
    encoder: Encoder
    writer: StoreWriter
    listener: Listener
    batch_size: int
    workers: int
    seconds: dict[str, float] = field(default_factory=lambda: {"decode": 0.0, "encode": 0.0, "write": 0.0})
    unreadable: dict[int, str] = field(default_factory=dict)  # row -> why its crop can't be read
    modes: Counter[str] = field(default_factory=Counter)  # crops read, by Pillow's mode

    def run(self, pending: Rows) -> None:
        """Encode the rows, which rise, batch by batch. What is committed stays, whatever happens to the process."""
        with warnings.catch_warnings():  # here: threads that each did this would undo one another's filters
            warnings.filterwarnings("ignore", module=r"PIL\.")  # Pillow warns of odd metadata in files it reads well
            self._run(pending)

    def _run(self, pending: Rows) -> None:
        done = len(self.crops) - len(pending)
        waiting: list[Encoded] = []  # consecutive batches that are not committed yet
        first_row = next_row = -1
        last_commit = time.monotonic()
        try:
            for rows, decoded in self._decoded_batches(pending):
                commit_is_due = next_row - first_row >= COMMIT_ROWS or time.monotonic() - last_commit >= COMMIT_SECONDS
                if rows[0] != next_row or commit_is_due:
                    self._commit(first_row, waiting)
                    first_row, last_commit = int(rows[0]), time.monotonic()
                waiting.append(self._encode_batch(rows, decoded))
                next_row = int(rows[-1]) + 1
                done += len(rows)
                self.listener.progress(done, len(self.crops), "crop", self._note())
        except KeyboardInterrupt:
            self._commit(first_row, waiting)
            raise
        self._commit(first_row, waiting)

    def _decoded_batches(self, pending: Rows) -> Iterator[tuple[Rows, list[DecodedCrop | str]]]:
        """Yield (rows, their crops or why they can't be read), decoded ahead of time by a pool of threads."""
        batches = iter(_consecutive_batches(pending, self.batch_size))
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")
        ahead: list[tuple[Rows, list[Future[DecodedCrop | str]]]] = []
        try:
            while True:
                for rows in islice(batches, BATCHES_AHEAD - len(ahead)):
                    ahead.append((rows, [pool.submit(self._read, int(row)) for row in rows]))
                if not ahead:
                    return
                rows, futures = ahead.pop(0)
                start = time.perf_counter()
                decoded = [future.result() for future in futures]
                self.seconds["decode"] += time.perf_counter() - start
                yield rows, decoded
        finally:
            pool.shutdown(cancel_futures=True)

    def _read(self, row: int) -> DecodedCrop | str:
        """Read and decode one crop; return the reason where that can't be done."""
        path = self.crops.path(row)
        try:
            return decode_crop(path.read_bytes())
        except OSError as error:
            _require_folder(path.parent)
            return error.strerror or str(error)
        except UnreadableCropError as error:
            return str(error)

    def _encode_batch(self, rows: Rows, decoded: list[DecodedCrop | str]) -> Encoded:
        """Return float16 features (B, D), zero where unreadable, and status (B,), and keep account of the crops."""
        start = time.perf_counter()
        features = np.zeros((len(rows), self.encoder.width), dtype=np.float16)
        status = np.full(len(rows), UNREADABLE, dtype=np.uint8)
        pixels = []
        for index, crop in enumerate(decoded):
            if isinstance(crop, str):
                self.unreadable[int(rows[index])] = crop
            else:
                self.modes[crop.mode] += 1
                status[index] = ENCODED
                pixels.append(crop.pixels)
        if pixels:
            with np.errstate(over="ignore"):  # an overflow becomes inf, which the writer refuses by row
                features[status == ENCODED] = self.encoder.encode(pixels).numpy().astype(np.float16)
        self.seconds["encode"] += time.perf_counter() - start
        return features, status

    def _commit(self, first_row: int, waiting: list[Encoded]) -> None:
        """Commit consecutive batches that begin at ``first_row``, and empty the list."""
        if waiting:
            start = time.perf_counter()
            features, status = (np.concatenate(parts) for parts in zip(*waiting, strict=True))
            self.writer.commit(first_row, features, status)
            waiting.clear()
            self.seconds["write"] += time.perf_counter() - start

    def shares(self) -> dict[str, float]:
        """Return the fraction of the time spent waiting for decoded crops, in the encoder, and in writing."""
        spent = sum(self.seconds.values()) or 1.0
        return {stage: value / spent for stage, value in self.seconds.items()}

    def _note(self) -> str:
        return ", ".join(f"{stage} {share:.0%}" for stage, share in self.shares().items())


def _consecutive_batches(rows: Rows, size: int) -> Iterator[Rows]:
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


def _require_folder(folder: Path) -> None:
    """Raise InputError when a crop is gone because its folder is: a lost connection, not a bad file."""
    try:
        with os.scandir(folder):
            return
    except OSError as error:
        raise InputError(
            f"The crops folder {folder} can't be read any more ({error.strerror}). Expected it to stay while crops are "
            "encoded. Reconnect it and run the same command again: it continues at the last committed row."
        ) from None
