"""Stage one: every crop through the frozen encoder once, into an embedding store, resumable at any moment."""

import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from affcache.config import build
from affcache.encoder import Encoder, differing_fields, load_encoder, resolve_device
from affcache.errors import InputError, StoreError
from affcache.frames import CropList, find_crops
from affcache.images import DecodedCrop, UnreadableCropError, decode_crop
from affcache.listener import Listener
from affcache.settings import CROPS, ExtractSettings, default_store
from affcache.store import ENCODED, UNREADABLE, EmbeddingStore
from affcache.store_writer import StoreWriter, create_store, writing_lock

COMMIT_SECONDS = 10.0  # work that a kill may cost, at most about this much
COMMIT_ROWS = 4096
BATCHES_AHEAD = 4  # decoded batches that wait for the encoder; bounds the memory


@dataclass(frozen=True)
class ExtractResult:
    """What an extraction did."""

    store: str
    rows: int  # N, crops found
    encoded: int  # rows with an embedding, earlier runs included
    unreadable: int  # rows whose crop can't be read, earlier runs included
    encoded_now: int  # rows of this run alone
    seconds: float
    rate: float  # crops per second of this run
    shares: dict[str, float]  # fraction of the time spent waiting for decode, in encode, in write
    converted: dict[str, int]  # crops of another mode than RGB that were converted, by mode
    unreadable_list: str | None  # text file that names the unreadable crops
    device: str
    precision: str

    def to_json(self) -> dict[str, Any]:
        """Return the result as one JSON object."""
        return asdict(self)


def extract(
    settings: ExtractSettings | None = None, /, *, listener: Listener | None = None, **values: Any
) -> ExtractResult:
    """Encode every crop of one or several folders into an embedding store, or continue one.

    Args:
        settings: all settings, or none and single ones by name, for instance ``extract(crops=(folder,), store=path)``.
        listener: receives messages and progress.

    Raises:
        InputError: no crops, none of them readable, or weights that can't be loaded.
        StoreError: the store is of other crops or another encoder, damaged, in use, or out of disk space.
        ConfigError: a setting is unknown or out of range.
    """
    settings = settings or build(ExtractSettings, values)
    listener = listener or Listener()
    path = settings.store or default_store(settings.model, settings.pretrained)
    device = resolve_device(settings.device)
    crops = _list_crops(settings, listener)
    with writing_lock(path):
        encoder = load_encoder(
            settings.model,
            settings.pretrained,
            activation=settings.activation,
            precision=settings.precision,
            device=device,
        )
        if path.exists():
            _check_continues(EmbeddingStore.open(path), crops, encoder)
        else:
            create_store(path, crops, encoder.width, encoder.description, encoder.fingerprint)
        with StoreWriter(path) as writer:
            return _Extraction(settings, crops, encoder, writer, listener).run()


def _list_crops(settings: ExtractSettings, listener: Listener) -> CropList:
    # the second default folder came with later editions: not everybody has it
    roots = [r for r in settings.crops if r.is_dir()] if settings.crops == CROPS else list(settings.crops)
    crops = find_crops(roots or settings.crops[:1], lambda done, total: listener.progress(done, total, "listing"))
    listener.message(f"{len(crops):,} crops in {len(crops.video_names):,} videos")
    if crops.ignored_files:
        listener.message(f"{crops.ignored_files:,} other files ignored: not images, or without a frame number")
    for folder in crops.shadowed_folders:
        listener.warning(f"{folder} is left out: an earlier --crops folder has a video of that name")
    return crops


def _check_continues(store: EmbeddingStore, crops: CropList, encoder: Encoder) -> None:
    """Refuse to continue a store that was made with another encoder or of other crops, saying what differs."""
    forward = "Choose another --store FILE for these, or delete that store to make it anew."
    if store.encoder_fingerprint != encoder.fingerprint:
        lines = "\n  ".join(differing_fields(store.encoder, encoder.description))
        raise StoreError(
            f"{store.path} was made with another encoder. Expected the same one; these differ (store against now):\n"
            f"  {lines}\n{forward}"
        )
    differences = []
    if store.video_names != crops.video_names:
        gone = sorted(set(store.video_names) - set(crops.video_names))
        new = sorted(set(crops.video_names) - set(store.video_names))
        differences += [f"{len(v)} videos {what} (first: {v[0]})" for v, what in ((gone, "gone"), (new, "new")) if v]
    elif len(store) != len(crops):
        differences.append(f"{len(store):,} crops in the store, {len(crops):,} now")
    elif (store.frame_number != crops.frame_number).any() or (store.video_start != crops.video_start).any():
        differences.append("the frame numbers")
    if differences:
        raise StoreError(
            f"{store.path} was made of other crops. Expected the same ones; these differ: {'; '.join(differences)}. "
            f"{forward}"
        )


@dataclass
class _Extraction:
    """One run over the pending rows of a store: decode ahead in threads, encode, commit."""

    settings: ExtractSettings
    crops: CropList
    encoder: Encoder
    writer: StoreWriter
    listener: Listener
    seconds: dict[str, float] = field(default_factory=lambda: {"decode": 0.0, "encode": 0.0, "write": 0.0})
    reasons: dict[int, str] = field(default_factory=dict)  # row -> why its crop can't be read
    modes: Counter[str] = field(default_factory=Counter)

    def run(self) -> ExtractResult:
        """Encode what is pending and say what was done."""
        if self.settings.retry_unreadable:
            self.writer.reopen_unreadable()
        self.writer.finish_checksums()
        pending = self.writer.pending_rows()
        start = time.perf_counter()
        if len(pending):
            done_before = len(self.crops) - len(pending)
            if done_before:
                self.listener.message(f"continuing: {done_before:,} of {len(self.crops):,} rows are committed")
            self._encode(pending, done_before)
        seconds = time.perf_counter() - start
        counts = self.writer.store.counts
        listed = self._list_unreadable()
        if not counts["encoded"]:
            first = next(iter(self.reasons.items()), None)
            example = f" The first one, {self.crops.path(first[0])}: {first[1]}." if first else ""
            raise InputError(
                f"None of the {len(self.crops):,} crops could be read.{example} Expected image files. They are all "
                f"listed in {listed}; mend them, then run again with --retry-unreadable."
            )
        spent = sum(self.seconds.values()) or 1.0
        return ExtractResult(
            store=str(self.writer.store.path),
            rows=len(self.crops),
            encoded=counts["encoded"],
            unreadable=counts["unreadable"],
            encoded_now=len(pending),
            seconds=seconds,
            rate=len(pending) / seconds if len(pending) else 0.0,
            shares={stage: value / spent for stage, value in self.seconds.items()},
            converted={mode: n for mode, n in sorted(self.modes.items()) if mode != "RGB"},
            unreadable_list=str(listed) if listed else None,
            device=str(self.encoder.device),
            precision=str(self.encoder.description["precision"]),
        )

    def _encode(self, pending: npt.NDArray[np.int64], done: int) -> None:
        """Encode the pending rows batch by batch, committing every few seconds."""
        waiting: list[tuple[int, npt.NDArray[np.float16], npt.NDArray[np.uint8]]] = []
        rows_waiting, last_commit = 0, time.monotonic()
        for rows, decoded in self._decoded_batches(pending):
            features, status = self._encode_batch(rows, decoded)
            waiting.append((int(rows[0]), features, status))
            rows_waiting += len(rows)
            if rows_waiting >= COMMIT_ROWS or time.monotonic() - last_commit >= COMMIT_SECONDS:
                self._commit(waiting)
                rows_waiting, last_commit = 0, time.monotonic()
            done += len(rows)
            self.listener.progress(done, len(self.crops), self._where_time_goes())
        self._commit(waiting)

    def _decoded_batches(
        self, pending: npt.NDArray[np.int64]
    ) -> Iterator[tuple[npt.NDArray[np.int64], list[DecodedCrop | None]]]:
        """Yield (rows, their crops, None where unreadable), decoded ahead of time by a pool of threads."""
        batches = iter(_consecutive_batches(pending, self._batch_size()))
        workers = self.settings.workers or min(16, os.cpu_count() or 1)
        pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        ahead: list[tuple[npt.NDArray[np.int64], list[Future[DecodedCrop | None]]]] = []
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

    def _batch_size(self) -> int:
        return self.settings.batch_size or (256 if self.encoder.device.type == "cuda" else 16)

    def _read(self, row: int) -> DecodedCrop | None:
        """Read and decode one crop; None, with the reason noted, where that can't be done."""
        path = self.crops.path(row)
        try:
            try:
                data = path.read_bytes()
            except OSError as error:
                _require_folder(path.parent)
                raise UnreadableCropError(error.strerror or str(error)) from None
            decoded = decode_crop(data)
        except UnreadableCropError as error:
            self.reasons[row] = str(error)
            return None
        self.modes[decoded.mode] += 1
        return decoded

    def _encode_batch(
        self, rows: npt.NDArray[np.int64], decoded: list[DecodedCrop | None]
    ) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.uint8]]:
        """Return float16 features (B, D), zero where unreadable, and status (B,)."""
        start = time.perf_counter()
        features = np.zeros((len(rows), self.encoder.width), dtype=np.float16)
        readable = np.array([crop is not None for crop in decoded])
        if readable.any():
            embeddings = self.encoder.encode([crop.pixels for crop in decoded if crop is not None])
            with np.errstate(over="ignore"):  # an overflow becomes inf, which the writer refuses by row
                features[readable] = embeddings.numpy().astype(np.float16)
        self.seconds["encode"] += time.perf_counter() - start
        return features, np.where(readable, ENCODED, UNREADABLE).astype(np.uint8)

    def _commit(self, waiting: list[tuple[int, npt.NDArray[np.float16], npt.NDArray[np.uint8]]]) -> None:
        """Commit the waiting batches, joined where they are consecutive, and empty the list."""
        start = time.perf_counter()
        while waiting:
            first_row = next_row = waiting[0][0]
            together: list[tuple[npt.NDArray[np.float16], npt.NDArray[np.uint8]]] = []
            while waiting and waiting[0][0] == next_row:
                _, features, status = waiting.pop(0)
                together.append((features, status))
                next_row += len(status)
            self.writer.commit(
                first_row,
                np.concatenate([features for features, _ in together]),
                np.concatenate([status for _, status in together]),
            )
        self.seconds["write"] += time.perf_counter() - start

    def _where_time_goes(self) -> str:
        spent = sum(self.seconds.values()) or 1.0
        return ", ".join(f"{stage} {value / spent:.0%}" for stage, value in self.seconds.items())

    def _list_unreadable(self) -> Path | None:
        """Name every unreadable crop, with the reason, in a text file beside the store; remove a list of none."""
        store = self.writer.store
        path = store.path.with_name(store.path.name + ".unreadable.txt")
        known = _known_reasons(path)
        rows = np.flatnonzero(store.status == UNREADABLE)
        if not len(rows):
            path.unlink(missing_ok=True)
            return None
        lines = []
        for row in map(int, rows):
            crop = str(self.crops.path(row))
            lines.append(f"{crop}\t{self.reasons.get(row) or known.get(crop, 'unreadable')}\n")
        path.write_text("".join(lines), encoding="utf-8")
        return path


def _consecutive_batches(rows: npt.NDArray[np.int64], size: int) -> Iterator[npt.NDArray[np.int64]]:
    """Cut rising rows into batches of consecutive rows that start at multiples of ``size``.

    A batch is then the same set of rows in a continued run as in an uninterrupted one.
    """
    starts_anew = np.flatnonzero((np.diff(rows) != 1) | (np.diff(rows // size) != 0)) + 1
    yield from np.split(rows, starts_anew)


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


def _known_reasons(path: Path) -> dict[str, str]:
    """Read the list that an earlier run left: crop -> reason."""
    if not path.is_file():
        return {}
    return dict(line.split("\t", 1) for line in path.read_text(encoding="utf-8").splitlines() if "\t" in line)
