"""The pipeline of stage one in one process: crops decoded ahead in threads, and encoded in batches.

Both happen at once, and hand over through a queue of fixed length, so that memory doesn't depend on the number of
crops. What comes out is committed by extract.py.
"""

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, pairwise
from threading import Lock
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from affcache.crops.archives import UnreadableCropError
from affcache.crops.crop_list import CropList
from affcache.crops.folders import require_source
from affcache.crops.images import DecodedCrop, decode_crop, mirrored
from affcache.devices import resolve_device
from affcache.encoders.side_by_side import AnyEncoder
from affcache.extraction.encode_pool import Embeddings, EncodePool, calls_at_once
from affcache.extraction.settings import ExtractSettings
from affcache.extraction.tuning import prepare_encoder
from affcache.progress import Listener
from affcache.store.frames import ENCODED, UNREADABLE, Rows

PHOTO_SIDE = 512  # pixels; crops of faces are seldom larger, and Aff-Wild2's have 112
PHOTOS = (
    f"Most images are more than {PHOTO_SIDE} pixels on a side. Expected crops of faces: an encoder sees an image as a "
    "whole, and little of a face in a photo. Unless these are large crops, cut out and align the faces with 'affcache "
    "faces' first."
)
STAGES = ("decode", "copy", "encode", "write")
BATCHES_AHEAD = 4  # decoded batches that wait for the encoder, besides one for each further call at once
CROPS_A_TASK = 16  # decoded by one thread in one go: handing over each crop alone would cost as much as decoding it
Decoded = list[DecodedCrop | str]  # a crop, or why it can't be read
Encoded = tuple[npt.NDArray[np.float16], npt.NDArray[np.uint8]]  # features (n, D), status (n,)


@dataclass
class ExtractionStats:
    """Of one process, or gathered from several.

    A stage's seconds are those for which it held the run up, as the thread that feeds the encoder sees it. Stages
    overlap, so this is not the work that each one did: while the encoder is busy, decoding costs nothing. The seconds
    add up to the run's duration, but for bookkeeping.
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    unreadable: dict[int, str] = field(default_factory=dict)  # row -> why its crop can't be read
    modes: Counter[str] = field(default_factory=Counter)  # crops read, by Pillow's mode
    large: int = 0  # crops read that are as large as photos

    def divide(self, seconds: float, parts: Mapping[str, float]) -> None:
        """Charge seconds to several stages, in proportion to ``parts``."""
        whole = sum(parts.values()) or 1.0
        for stage, part in parts.items():
            self.seconds[stage] += seconds * part / whole

    def shares(self) -> dict[str, float]:
        """Return the fraction of the charged time per stage; each in [0, 1], their sum 1 (or 0 before the start)."""
        spent = sum(self.seconds.values()) or 1.0
        return {stage: seconds / spent for stage, seconds in self.seconds.items()}

    def take(self, other: "ExtractionStats") -> None:
        """Add what another process kept account of."""
        for stage, seconds in other.seconds.items():
            self.seconds[stage] += seconds
        self.unreadable |= other.unreadable
        self.modes.update(other.modes)
        self.large += other.large


def is_large(pixels: npt.NDArray[np.uint8]) -> bool:
    """Say whether an image (height, width, 3) is so large that it may be a whole photo."""
    return max(pixels.shape) > PHOTO_SIDE


def shares_text(shares: Mapping[str, float]) -> str:
    """Write shares for people: ``decode 71%, copy 1%, encode 22%, write 6%``."""
    return ", ".join(f"{stage} {share:.0%}" for stage, share in shares.items())


def bottleneck(shares: Mapping[str, float], *, workers: int, cores: int, device: str, precision: str) -> str:
    """Return one sentence: which stage holds the run up, how much, and the flag to turn; empty before the start.

    ``workers`` are threads that decode, on a machine of so many ``cores``.
    """
    stage = max(shares, key=lambda name: shares[name])
    if not shares[stage]:
        return ""
    return (
        f"{stage}-bound ({shares[stage]:.0%}): "
        + {
            "decode": _about_decoding(workers, cores),
            "copy": "moving crops to the device takes longest; raise --batch-size, or make the crops smaller",
            "encode": _about_encoding(device, precision, waiting=1 - shares[stage]),
            "write": "the encoder waits for the disk; put --store on a faster, local one",
        }[stage]
    )


def _about_decoding(workers: int, cores: int) -> str:
    if workers < cores:
        return f"the encoder waits for crops; raise --workers (now {workers}, of {cores} cores)"
    return (
        f"the encoder waits for crops although --workers is {workers} on {cores} cores; read --crops from a faster "
        "disk or one .zip or .tar, or use a machine with more cores"
    )


def _about_encoding(device: str, precision: str, waiting: float) -> str:
    if device.startswith("cuda"):
        faster = "--precision bf16" if precision == "fp32" else "a smaller --model, or a faster GPU"
    else:
        faster = "--device cuda" if torch.cuda.is_available() else "a machine with a GPU, or a smaller --model"
        faster += ", or --precision bf16 where it is exact enough" if precision == "fp32" else ""
    limit = "the encoder is the limit" if waiting < 0.1 else f"the encoder takes longest, though it waits {waiting:.0%}"
    return f"{limit}; what makes it faster is {faster}"


class Encoding(Protocol):
    """Crops being encoded."""

    stats: ExtractionStats

    def run(self, pending: Rows) -> Generator[tuple[Rows, Encoded], None, None]:
        """Yield consecutive rows with their float16 features (n, D) and status (n,), in any order of the yields."""

    def bottleneck(self) -> str:
        """Return one sentence on what holds the run up and which flag to turn."""

    def note(self) -> str:
        """Return how it stands, in a few words."""
        return f"{shares_text(self.stats.shares())}; {self.bottleneck().partition(' ')[0]}"


@dataclass
class Pipeline(Encoding):
    """Encodes rows of a list of crops in this process, and keeps account of what happened on the way."""

    crops: CropList
    encoder: AnyEncoder
    listener: Listener
    batch_size: int
    workers: int  # threads that decode
    mirror: bool = False  # encode each crop with left and right changed over
    cores: int | None = None  # threads that encode on a CPU; None for as many as torch would use
    stats: ExtractionStats = field(default_factory=ExtractionStats)
    largest_call: int = 0  # crops per encoder call: the batch size, until the device runs out of memory
    large_images: Lock = field(default_factory=Lock)  # they are decoded one at a time

    def run(
        self, pending: Rows, turn: AbstractContextManager[Any] | None = None
    ) -> Generator[tuple[Rows, Encoded], None, None]:
        """Yield batches of consecutive rows with float16 features (B, D), zero where unreadable, and status (B,).

        Args:
            pending: int64 (n,), rising.
            turn: held while the encoder is used; decoding begins before.

        Raises:
            InputError: the crops' folder or archive is gone.
            ConfigError: the device has not even room for one crop.
        """
        self.largest_call = self.largest_call or self.batch_size
        batches = consecutive_batches(pending, self.batch_size)
        with (
            self._decoded_ahead(batches, BATCHES_AHEAD + calls_at_once(self.encoder, self.cores) - 1) as ahead,
            turn or nullcontext(),
            EncodePool(self.encoder, self.largest_call, self.listener, self.cores) as calls,
        ):
            in_flight: deque[Callable[[], tuple[Rows, Encoded]]] = deque()
            for rows, decoded in ahead:
                in_flight.append(self._begin(rows, decoded, calls))
                if len(in_flight) >= calls.at_once:
                    yield in_flight.popleft()()
            while in_flight:
                yield in_flight.popleft()()
            self.largest_call = calls.largest_call

    @contextmanager
    def _decoded_ahead(self, batches: Iterator[Rows], most: int) -> Iterator[Iterator[tuple[Rows, Decoded]]]:
        """Give batches of rows with their crops, in order. Decoding begins at once, before the first one is asked for.

        At most ``most`` batches are decoded, or being so, at a time, which bounds the memory.
        """
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")
        begun: deque[tuple[Rows, list[Future[Decoded]]]] = deque()

        def begin() -> None:
            for rows in islice(batches, most - len(begun)):
                tasks = [rows[i : i + CROPS_A_TASK].tolist() for i in range(0, len(rows), CROPS_A_TASK)]
                begun.append((rows, [pool.submit(list, map(self._decode, task)) for task in tasks]))

        def decoded() -> Iterator[tuple[Rows, Decoded]]:
            while begun:
                rows, futures = begun.popleft()
                start = time.perf_counter()
                crops = [crop for future in futures for crop in future.result()]
                self.stats.seconds["decode"] += time.perf_counter() - start
                begin()
                yield rows, crops

        begin()
        try:
            yield decoded()
        finally:
            pool.shutdown(cancel_futures=True)

    def _decode(self, row: int) -> DecodedCrop | str:
        """Read and decode one crop, or say why that can't be done. Safe to call from several threads."""
        try:
            crop = decode_crop(self.crops.read(row), self.large_images)
        except OSError as error:
            require_source(self.crops.container(row), error)
            return error.strerror or str(error)
        except UnreadableCropError as error:
            return str(error)
        pixels = mirrored(crop.pixels) if self.mirror else crop.pixels
        return DecodedCrop(self.encoder.resize_large(pixels), crop.mode, is_large(pixels))

    def _begin(self, rows: Rows, decoded: Decoded, calls: EncodePool) -> Callable[[], tuple[Rows, Encoded]]:
        """Keep account of a batch's crops, and hand the readable ones to the encoder; return what waits for them."""
        start = time.perf_counter()
        status = np.full(len(rows), UNREADABLE, dtype=np.uint8)
        pixels = []
        for index, crop in enumerate(decoded):
            if isinstance(crop, str):
                self.stats.unreadable[int(rows[index])] = crop
            else:
                self.stats.modes[crop.mode] += 1
                self.stats.large += crop.large
                status[index] = ENCODED
                pixels.append(crop.pixels)
        return partial(self._finish, rows, status, calls.begin(pixels), time.perf_counter() - start)

    def _finish(
        self, rows: Rows, status: npt.NDArray[np.uint8], wait: Callable[[], Embeddings], seconds_to_begin: float
    ) -> tuple[Rows, Encoded]:
        """Wait for a batch; return its rows (B,), features (B, D) and status (B,)."""
        start = time.perf_counter()
        features = np.zeros((len(rows), self.encoder.width), dtype=np.float16)
        parts, stages = wait()
        if parts:
            with np.errstate(over="ignore"):  # an overflow becomes inf, which the writer refuses by row
                features[status == ENCODED] = np.concatenate(parts).astype(np.float16)
        held = seconds_to_begin + time.perf_counter() - start
        self.stats.divide(held, stages or {"encode": 1.0})
        return rows, (features, status)

    def bottleneck(self) -> str:
        return bottleneck(
            self.stats.shares(),
            workers=self.workers,
            cores=os.cpu_count() or 1,
            device=str(self.encoder.device),
            precision=self.encoder.precision,
        )


def consecutive_batches(rows: Rows, size: int) -> Iterator[Rows]:
    """Cut rising rows into batches of consecutive rows that end at multiples of ``size``.

    A batch is then the same set of rows in a continued run as in an uninterrupted one.
    """
    cuts = np.flatnonzero((np.diff(rows) != 1) | (rows[1:] % size == 0)) + 1
    for first, last in pairwise([0, *cuts.tolist(), len(rows)] if len(rows) else []):
        yield rows[first:last]


@dataclass(frozen=True)
class Engine:
    """An encoder that is ready to run, in this process or in a cluster."""

    description: Mapping[str, Any]  # what a store keeps of the encoder, batch_size and compiled with it
    encoding: Callable[[int, bool], Encoding]  # (crops per call, whether mirrored) -> what encodes rows of the crops
    facts: Callable[[], dict[str, Any]]  # engine, device, workers, actors and nodes, for the result


def default_workers() -> int:
    """Return how many threads decode unless said otherwise: one per core, at most 16."""
    return min(16, os.cpu_count() or 1)


def driver_device(settings: ExtractSettings) -> torch.device:
    """Return the device that this process encodes on; raises as ``resolve_device``."""
    return resolve_device(settings.device)


@contextmanager
def opened_engine(
    settings: ExtractSettings, recorded: Mapping[str, Any], crops: CropList, listener: Listener
) -> Iterator[Engine]:
    """Give an engine with the encoder loaded.

    Args:
        settings: of the extraction.
        recorded: the encoder that the store to continue was begun with; empty for a new one.
        crops: what is going to be encoded.
        listener: receives messages.

    Raises:
        ConfigError: the model is unknown, or doesn't fit the device.
        InputError: the weights can't be loaded.
    """
    encoder = prepare_encoder(settings, recorded, listener)
    workers = settings.workers or default_workers()
    yield Engine(
        encoder.description,
        lambda batch_size, mirror: Pipeline(crops, encoder, listener, batch_size, workers, mirror),
        lambda: {"engine": "local", "device": str(encoder.device), "workers": workers, "actors": 0, "nodes": 1},
    )
