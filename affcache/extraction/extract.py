"""Stage one: every crop through the frozen encoder once, into an embedding store, resumable at any moment."""

import time
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from affcache.crops.crop_list import LARGEST_LIST, CropList, canonical, keep_each, keep_listed
from affcache.crops.folders import find_crops
from affcache.devices import on_device
from affcache.errors import InputError, StoreError
from affcache.extraction.pipeline import PHOTOS, Encoded, Encoding, Engine, ExtractionStats, is_large
from affcache.extraction.settings import EncodingSettings, ExtractSettings
from affcache.faces.crop_kind import LEAST_CONFIDENCE, crop_kind, sample_of
from affcache.faces.detector import detector_at_hand
from affcache.faces.settings import DETECTION_SIDE
from affcache.files import read_lines, remove, write_text
from affcache.progress import Listener, Result, counted
from affcache.settings import CROPS, command
from affcache.store.reading import UNREADABLE, EmbeddingStore, Rows, differing_fields, fingerprint, view_path
from affcache.store.writing import StoreWriter, create_store, writing_lock

# what encodes, by --engine: modules with driver_device and opened_engine, imported when they are asked for
ENGINES = {"local": "affcache.extraction.pipeline", "ray": "affcache.cluster.encoding"}
COMMIT_SECONDS = 10.0  # work that a kill may cost, at most about this much
COMMIT_ROWS = 4096
ENOUGH = 16  # crops, to say what most of them are
FORWARD = "Choose another --store FILE for these, or delete that store to make it anew."


@dataclass(frozen=True)
class ExtractResult(Result):
    """What an extraction did."""

    store: str
    view: str  # plain or flip; the counts below are of this view
    view_store: str  # the file that holds it; the store itself for the plain view
    rows: int  # N, crops found
    encoded: int  # rows with an embedding, earlier runs included
    unreadable: int  # rows whose crop can't be read, earlier runs included
    encoded_now: int  # rows of this run alone
    seconds: float
    rate: float  # crops per second of this run
    shares: dict[str, float]  # fraction of the time that the run was held up by decode, copy, encode, write
    bottleneck: str  # one sentence: what holds the run up, and the flag to turn; empty when nothing was encoded
    converted: dict[str, int]  # crops of another mode than RGB that were converted, by mode
    unreadable_list: str | None  # text file that names the unreadable crops
    engine: str  # local or ray
    actors: int  # of Ray, that encoded; 0 for local
    nodes: int  # machines that encoded
    device: str
    precision: str
    batch_size: int
    workers: int  # threads that decode, of each actor
    compiled: bool


@command(ExtractSettings)
def extract(settings: ExtractSettings, listener: Listener) -> ExtractResult:
    """Encode every crop of one or several folders or archives into an embedding store, or continue one.

    Raises:
        InputError: no crops, none of them readable, or weights that can't be loaded.
        StoreError: the store is of other crops or another encoder, damaged, in use, or out of disk space.
        ConfigError: a setting is unknown or out of range.
    """
    path = settings.store or settings.usual_store()
    engines = import_module(ENGINES[settings.engine])
    device = engines.driver_device(settings)  # says what can't work before crops are listed, which takes a while
    crops = list_crops(settings, listener)
    warn_of_photos(crops, listener)
    with writing_lock(path, listener), on_device(device), ExitStack() as stack:
        recorded: Mapping[str, Any] = {}
        if path.exists():
            # before the encoder is loaded, which takes a while
            recorded = open_begun(path, crops, settings.every).encoder
        engine: Engine = stack.enter_context(engines.opened_engine(settings, recorded, crops, listener))
        for view in dict.fromkeys(("plain", settings.view)):
            result = _extract_view(settings, path, view, crops, engine, listener)
    return result


def _extract_view(
    settings: ExtractSettings, store: Path, view: str, crops: CropList, engine: Engine, listener: Listener
) -> ExtractResult:
    """Make or continue the file of one view, and say what was done."""
    path, description = store, dict(engine.description)
    if settings.every > 1:
        description["every"] = settings.every
    if view != "plain":
        path, description = view_path(store, view), {**description, "view": view}
        listener.message(f"view {view}: mirrored crops, into {path}")
    batch_size = int(description["batch_size"])
    if path.exists():
        begun = open_begun(path, crops, settings.every)
        require_same_encoder(begun, description)
        batch_size = settings.batch_size or begun.encoder.get("batch_size", batch_size)  # a view may have its own
    else:
        create_store(path, crops, int(description["width"]), description, fingerprint(description))
    with StoreWriter(path) as writer:
        encoding = engine.encoding(batch_size, view == "flip")
        if settings.retry_unreadable:
            writer.reopen_unreadable()
        encoded_now, seconds, listed = _encode_pending(writer, encoding, crops, listener)
        counts = writer.store.counts
    stats = encoding.stats
    return ExtractResult(
        store=str(store),
        view=view,
        view_store=str(path),
        rows=len(crops),
        encoded=counts["encoded"],
        unreadable=counts["unreadable"],
        encoded_now=encoded_now,
        seconds=seconds,
        rate=encoded_now / seconds,
        shares=stats.shares(),
        bottleneck=encoding.bottleneck(),
        converted={mode: count for mode, count in sorted(stats.modes.items()) if mode != "RGB"},
        unreadable_list=str(listed) if listed else None,
        precision=str(description["precision"]),
        batch_size=batch_size,
        compiled=bool(description["compiled"]),
        **engine.facts(),
    )


def _encode_pending(
    writer: StoreWriter, encoding: Encoding, crops: CropList, listener: Listener
) -> tuple[int, float, Path | None]:
    """Encode what a store still lacks; return rows encoded now, seconds, and the unreadable list."""
    writer.finish_checksums()
    pending = writer.pending_rows()
    if 0 < len(pending) < len(crops):
        listener.message(f"continuing: {len(crops) - len(pending):,} of {len(crops):,} rows are committed")
    start = time.perf_counter()
    unreadable = encoding.stats.unreadable
    try:
        if len(pending):
            write_embeddings(writer, encoding, pending, listener)
    except BaseException:
        try:
            list_unreadable(writer.store, crops, unreadable)
        except InputError as error:  # not to hide what went wrong first
            listener.warning(str(error))
        raise
    listed = list_unreadable(writer.store, crops, unreadable)
    seconds = time.perf_counter() - start
    if not writer.store.counts["encoded"]:
        first = next(iter(sorted(unreadable.items())), None)
        example = f" The first one, {crops.path(first[0])}: {first[1]}." if first else ""
        raise InputError(
            f"None of the {len(crops):,} crops could be read.{example} Expected image files. They are all listed in "
            f"{listed}; mend them, then run the same command again with --retry-unreadable."
        )
    return len(pending), seconds, listed


def list_crops(settings: EncodingSettings, listener: Listener) -> CropList:
    """Find the crops that the settings name, and say what was found and what was left out."""
    # the second default folder came with later editions: not everybody has it
    roots = [r for r in settings.crops if r.is_dir()] if settings.crops == CROPS else list(settings.crops)
    crops = find_crops(
        roots or settings.crops[:1], lambda done, total, unit: listener.progress(done, total, unit, "listing")
    )
    listener.message(f"{counted(len(crops), 'crop')} in {counted(len(crops.video_names), 'video')}")
    if len(crops.ignored_files):
        listener.message(f"files ignored: {crops.ignored_files}")
    if crops.unsafe_members:
        listener.warning(
            f"{crops.unsafe_members:,} links, or names that lead out of their archive, are left out: none is followed"
        )
    for folder in crops.shadowed_folders:
        listener.warning(f"{folder} is left out: a video of that name was found before it")
    for link in crops.lost_links:
        listener.warning(f"{link} is left out: it is a link that leads nowhere")
    if settings.crop_list is not None:
        crops, missing = keep_listed(crops, settings.crop_list)
        listener.message(f"{len(crops):,} of them are in {settings.crop_list}")
        if missing:
            listener.warning(f"{counted(missing, 'crop')} that {settings.crop_list} names were not found")
    if settings.every > 1:
        videos, crops = len(crops.video_names), keep_each(crops, settings.every)
        listener.message(f"each frame 1 + n x {settings.every} of a video: {counted(len(crops), 'crop')}")
        if lost := videos - len(crops.video_names):
            listener.warning(f"{counted(lost, 'video')} without such a frame left out")
    return crops


def warn_of_photos(crops: CropList, listener: Listener) -> None:
    """Warn where no face fills the pictures, if a detector is here to tell; very large ones are warned of later."""
    make_detector = detector_at_hand()
    if make_detector is None:
        return
    pictures = [pixels for pixels in sample_of(crops, ENOUGH) if not is_large(pixels)]
    if len(pictures) < ENOUGH // 2:
        return
    kind = crop_kind(pictures, make_detector(LEAST_CONFIDENCE, DETECTION_SIDE))
    if kind.kind in ("photos", "unknown"):
        listener.warning(
            f"Of {len(pictures)} pictures looked at: {kind.sentence}. Expected crops of faces. 'affcache faces' cuts "
            "them out of photos and videos."
        )


def write_embeddings(writer: StoreWriter, encoding: Encoding, pending: Rows, listener: Listener) -> None:
    """Encode the pending rows of a store, rising. What is committed stays, whatever happens to the process."""
    total = len(writer.store)
    done, stats, warned = total - len(pending), encoding.stats, False
    with warnings.catch_warnings(), ThreadPoolExecutor(1, thread_name_prefix="commit") as thread:
        # here: decoding threads that each did this would undo one another's filters
        warnings.filterwarnings("ignore", module=r"PIL\.")  # Pillow warns of odd metadata in files it reads well
        background = BackgroundWriter(writer, thread, encoding.stats)
        try:
            with closing(encoding.run(pending)) as batches:
                for rows, encoded in batches:
                    background.add(rows, encoded)
                    done += len(rows)
                    listener.progress(done, total, "crop", encoding.note())
                    read = stats.modes.total()
                    if not warned and (read >= ENOUGH or done == total) and 2 * stats.large > read:
                        warned = True
                        listener.warning(PHOTOS)
        except (KeyboardInterrupt, InputError):  # what is encoded is worth keeping
            background.finish()
            raise
        background.finish()


class BackgroundWriter:
    """Gathers consecutive batches, and lets one thread commit them every few seconds, one commit at a time."""

    def __init__(self, writer: StoreWriter, pool: ThreadPoolExecutor, stats: ExtractionStats) -> None:
        self._writer, self._pool, self._stats = writer, pool, stats
        self._gathered: list[Encoded] = []
        self._first_row = self._next_row = -1
        self._last_commit = time.monotonic()
        self._writing: Future[None] | None = None

    def add(self, rows: Rows, encoded: Encoded) -> None:
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
            self._stats.seconds["write"] += time.perf_counter() - start


def require_same_encoder(store: EmbeddingStore, description: Mapping[str, Any]) -> None:
    """Raise StoreError when a store was made with another encoder than the one described, saying what differs."""
    if store.encoder_fingerprint != fingerprint(description):
        lines = "\n  ".join(differing_fields(store.encoder, description))
        raise StoreError(
            f"{store.path} was made with another encoder. Expected the same one; these differ (store against now):\n"
            f"  {lines}\n{FORWARD}"
        )


def open_begun(path: Path, crops: CropList, every: int) -> EmbeddingStore:
    """Open a store to continue it; raise StoreError when it was made of other crops, saying what differs."""
    store = EmbeddingStore.open(path)
    before = store.encoder.get("every", 1)
    if before != every:
        raise StoreError(
            f"{path} was begun with --every {before}, and this is --every {every}: other frames. Expected the same. "
            f"Say --every {before}. {FORWARD}"
        )
    differences = []
    before, now = (list(map(canonical, one.video_names)) for one in (store, crops))
    if before != now:
        gone, new = sorted(set(before) - set(now)), sorted(set(now) - set(before))
        differences += [
            f"{counted(len(v), 'video')} {what} (first: {v[0]})" for v, what in ((gone, "gone"), (new, "new")) if v
        ]
        differences = differences or ["the order of the videos, by the form of accents in their names"]
    elif len(store) != len(crops):
        differences.append(f"{counted(len(store), 'crop')} in the store, {len(crops):,} now")
    elif (store.frame_number != crops.frame_number).any() or (store.video_start != crops.video_start).any():
        differences.append("the frame numbers")
    if differences:
        raise StoreError(
            f"{path} was made of other crops. Expected the same ones; these differ: {'; '.join(differences)}. {FORWARD}"
        )
    return store


def list_unreadable(store: EmbeddingStore, crops: CropList, reasons: dict[int, str]) -> Path | None:
    """Name every unreadable crop, with the reason, in a text file beside the store; remove a list of none."""
    path = store.path.with_name(store.path.name + ".unreadable.txt")
    rows = np.flatnonzero(store.status == UNREADABLE)
    if not len(rows):
        remove(path)
        return None
    known: dict[str, str] = {}  # from the list that an earlier run left
    with suppress(OSError):  # none, or none that can be read
        lines = read_lines(path, LARGEST_LIST, errors="surrogateescape")
        known = dict(line.split("\t", 1) for line in lines if "\t" in line)
    named = [(str(crops.path(int(row))), reasons.get(int(row))) for row in rows]
    text = "".join(f"{crop}\t{reason or known.get(crop, 'unreadable')}\n" for crop, reason in named)
    write_text(path, text)
    return path
