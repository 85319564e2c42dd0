"""The pipeline of stage one: crops decoded ahead in threads, encoded in batches, committed every few seconds.

Three things happen at once. Threads read and decode the next batches; the device encodes; one thread commits finished
rows. Each hands over through a queue of fixed length, so memory doesn't depend on the number of crops.
"""

import os
import time
import warnings
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from threading import Lock

import numpy as np
import numpy.typing as npt
import torch

from affcache.archives import DamagedMemberError
from affcache.committer import Committer, Encoded
from affcache.crop_list import CropList, require_source
from affcache.encoder import Encoder
from affcache.errors import ConfigError, InputError
from affcache.images import DecodedCrop, UnreadableCropError, decode_crop, mirrored
from affcache.listener import Listener
from affcache.store import ENCODED, UNREADABLE
from affcache.store_writer import StoreWriter
from affcache.submission import Submission
from affcache.timing import StageClock, bottleneck, shares_text

BATCHES_AHEAD = 4  # decoded batches that wait for the encoder; bounds the memory
CROPS_A_TASK = 16  # decoded by one thread in one go: handing over each crop alone would cost as much as decoding it

Rows = npt.NDArray[np.int64]
Decoded = list[DecodedCrop | str]  # a crop, or why it can't be read


@dataclass
class Pipeline:
    """Encodes pending rows of a store, and keeps account of where the time went and what could not be read."""

    crops: CropList
    encoder: Encoder
    writer: StoreWriter
    listener: Listener
    batch_size: int
    workers: int
    mirror: bool = False  # encode each crop with left and right changed over
    clock: StageClock = field(default_factory=StageClock)
    unreadable: dict[int, str] = field(default_factory=dict)  # row -> why its crop can't be read
    modes: Counter[str] = field(default_factory=Counter)  # crops read, by Pillow's mode
    large_images: Lock = field(default_factory=Lock)  # they are decoded one at a time
    largest_call: int = 0  # crops per encoder call: the batch size, until the device runs out of memory

    def run(self, pending: Rows) -> None:
        """Encode the rows, which rise, batch by batch. What is committed stays, whatever happens to the process."""
        self.largest_call = self.largest_call or self.batch_size
        with warnings.catch_warnings():  # here: threads that each did this would undo one another's filters
            warnings.filterwarnings("ignore", module=r"PIL\.")  # Pillow warns of odd metadata in files it reads well
            with ThreadPoolExecutor(1, thread_name_prefix="commit") as committer:
                self._run(pending, Committer(self.writer, committer, self.clock))

    def _run(self, pending: Rows, committer: Committer) -> None:
        done = len(self.crops) - len(pending)
        batches_on_device = 1 if self.encoder.device.type == "cuda" else 0  # besides the one being handed over
        in_flight: deque[EncodingBatch] = deque()

        def collect() -> None:
            nonlocal done
            batch = in_flight.popleft()
            committer.add(batch.rows, self._finish(batch))
            done += len(batch.rows)
            self.listener.progress(done, len(self.crops), "crop", self._note())

        try:
            for rows, decoded in self._decoded_batches(pending):
                in_flight.append(self._begin(rows, decoded))
                if len(in_flight) > batches_on_device:
                    collect()
            while in_flight:
                collect()
        except (KeyboardInterrupt, InputError):  # what is encoded is worth keeping
            committer.finish()
            raise
        committer.finish()

    def _decoded_batches(self, pending: Rows) -> Iterator[tuple[Rows, Decoded]]:
        """Yield (rows, their crops or why they can't be read), decoded ahead of time by a pool of threads."""
        batches = iter(consecutive_batches(pending, self.batch_size))
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")
        ahead: deque[tuple[Rows, list[Future[Decoded]]]] = deque()
        try:
            while True:
                for rows in islice(batches, BATCHES_AHEAD - len(ahead)):
                    tasks = [rows[i : i + CROPS_A_TASK].tolist() for i in range(0, len(rows), CROPS_A_TASK)]
                    ahead.append((rows, [pool.submit(self._decode, task) for task in tasks]))
                if not ahead:
                    return
                rows, futures = ahead.popleft()
                start = time.perf_counter()
                decoded = [crop for future in futures for crop in future.result()]
                self.clock.add("decode", time.perf_counter() - start)
                yield rows, decoded
        finally:
            pool.shutdown(cancel_futures=True)

    def _decode(self, rows: list[int]) -> Decoded:
        """Read and decode some crops; the reason stands where that can't be done."""
        return [self._decode_one(row) for row in rows]

    def _decode_one(self, row: int) -> DecodedCrop | str:
        try:
            crop = decode_crop(self.crops.read(row), self.large_images)
        except OSError as error:
            require_source(self.crops.container(row), error)
            return error.strerror or str(error)
        except (UnreadableCropError, DamagedMemberError) as error:
            return str(error)
        pixels = mirrored(crop.pixels) if self.mirror else crop.pixels
        return DecodedCrop(self.encoder.preprocessing.resize_large(pixels), crop.mode)

    def _begin(self, rows: Rows, decoded: Decoded) -> "EncodingBatch":
        """Keep account of a batch's crops, and hand the readable ones to the device."""
        start = time.perf_counter()
        status = np.full(len(rows), UNREADABLE, dtype=np.uint8)
        pixels = []
        for index, crop in enumerate(decoded):
            if isinstance(crop, str):
                self.unreadable[int(rows[index])] = crop
            else:
                self.modes[crop.mode] += 1
                status[index] = ENCODED
                pixels.append(crop.pixels)
        submissions = self._submit(pixels)
        return EncodingBatch(rows, status, submissions, time.perf_counter() - start)

    def _submit(self, pixels: list[npt.NDArray[np.uint8]]) -> list[Submission]:
        """Hand crops to the device in calls that fit its memory; smaller ones from the first that doesn't."""
        while True:
            size = self.largest_call
            try:
                return [self.encoder.submit(pixels[i : i + size]) for i in range(0, len(pixels), size)]
            except torch.OutOfMemoryError:
                if size == 1:
                    raise ConfigError(
                        f"{self.encoder.device} has not enough memory to encode one crop. Expected room for the model "
                        "and a batch. Free the device, or use --device cpu, --precision bf16 or a smaller --model."
                    ) from None
            self.largest_call = max(min(size, len(pixels)) // 2, 1)
            torch.cuda.empty_cache()
            self.listener.warning(
                f"{self.encoder.device} ran out of memory with {size} crops; going on with {self.largest_call} a call"
            )

    def _finish(self, batch: "EncodingBatch") -> Encoded:
        """Wait for a batch; return float16 features (B, D), zero where unreadable, and status (B,)."""
        start = time.perf_counter()
        features = np.zeros((len(batch.rows), self.encoder.width), dtype=np.float16)
        parts = [submission.wait() for submission in batch.submissions]
        if parts:
            with np.errstate(over="ignore"):  # an overflow becomes inf, which the writer refuses by row
                features[batch.status == ENCODED] = np.concatenate(parts).astype(np.float16)
        stages: Counter[str] = Counter()
        for submission in batch.submissions:
            stages.update(submission.seconds())
        held = batch.seconds_to_begin + time.perf_counter() - start
        self.clock.divide(held, stages or {"encode": 1.0})
        return features, batch.status

    def bottleneck(self) -> str:
        """Return one sentence on what holds the run up and which flag to turn."""
        return bottleneck(
            self.clock.shares(),
            workers=self.workers,
            cores=os.cpu_count() or 1,
            device=str(self.encoder.device),
            precision=self.encoder.precision,
        )

    def _note(self) -> str:
        return f"{shares_text(self.clock.shares())}; {self.bottleneck().partition(' ')[0]}"


@dataclass
class EncodingBatch:
    """A batch of rows whose readable crops are on the device."""

    rows: Rows  # (B,) consecutive
    status: npt.NDArray[np.uint8]  # (B,)
    submissions: list[Submission]
    seconds_to_begin: float


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
