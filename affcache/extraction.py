"""Stage one: every crop through the frozen encoder once, into an embedding store, resumable at any moment."""

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from affcache.config import build
from affcache.crop_list import CropList
from affcache.devices import on_device, resolve_device
from affcache.encoder import Encoder
from affcache.encoder_loading import load_encoder
from affcache.errors import InputError
from affcache.frames import find_crops
from affcache.listed_crops import keep_listed
from affcache.listener import Listener
from affcache.pipeline import Pipeline
from affcache.settings import CROPS, ExtractSettings, default_store
from affcache.store import EmbeddingStore, view_path
from affcache.store_match import require_same_crops, require_same_encoder
from affcache.store_writer import StoreWriter, create_store, writing_lock
from affcache.tuning import ROWS_WORTH_COMPILING, compile_encoder, find_batch_size
from affcache.unreadable import list_unreadable


@dataclass(frozen=True)
class ExtractResult:
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
    device: str
    precision: str
    batch_size: int
    workers: int
    compiled: bool

    def to_json(self) -> dict[str, Any]:
        """Return the result as one JSON object."""
        return asdict(self)


def extract(
    settings: ExtractSettings | None = None, /, *, listener: Listener | None = None, **values: Any
) -> ExtractResult:
    """Encode every crop of one or several folders or archives into an embedding store, or continue one.

    Args:
        settings: all settings, or none and single ones by name, for instance ``extract(crops=(folder,), store=path)``.
        listener: receives messages and progress.

    Raises:
        InputError: no crops, none of them readable, or weights that can't be loaded.
        StoreError: the store is of other crops or another encoder, damaged, in use, or out of disk space.
        ConfigError: a setting is unknown or out of range.
    """
    settings = build(ExtractSettings, values, over=settings)
    listener = listener or Listener()
    path = settings.store or default_store(settings.model, settings.pretrained)
    device = resolve_device(settings.device)
    crops = list_crops(settings, listener)
    with writing_lock(path), on_device(device):
        recorded: Mapping[str, Any] = {}
        if path.exists():
            begun = EmbeddingStore.open(path)
            require_same_crops(begun, crops)  # before the encoder is loaded, which takes a while
            recorded = begun.encoder
        encoder = prepare_encoder(settings, recorded, len(crops), listener)
        result = _extract_view(settings, path, path, "plain", crops, encoder, listener)
        if settings.view != "plain":
            flipped = replace(encoder, description={**encoder.description, "view": settings.view})
            listener.message(f"view {settings.view}: mirrored crops, into {view_path(path, settings.view)}")
            target = view_path(path, settings.view)
            result = _extract_view(settings, path, target, settings.view, crops, flipped, listener)
    return result


def prepare_encoder(settings: ExtractSettings, recorded: Mapping[str, Any], rows: int, listener: Listener) -> Encoder:
    """Load the encoder, and settle how it is run: as the store was begun, else as suits the device.

    Args:
        settings: model, weights, precision, device, batch size, compile.
        recorded: the encoder that the store to continue was begun with; empty for a new one.
        rows: N, for how many crops the encoder is to be used.
        listener: hears what was chosen.

    Returns:
        The encoder; its description carries ``batch_size`` and ``compiled`` for a store to keep.
    """
    precision = settings.precision
    if precision == "auto":
        precision = recorded.get("precision", "auto")
    listener.message(f"loading the encoder {settings.model}; its weights are fetched if they are not here yet")
    encoder = load_encoder(
        settings.model,
        settings.pretrained,
        activation=settings.activation,
        precision=precision,
        device=resolve_device(settings.device),
    )
    batch_size = settings.batch_size or recorded.get("batch_size") or find_batch_size(encoder)
    worth_it = encoder.device.type == "cuda" and rows >= ROWS_WORTH_COMPILING
    wanted = recorded.get("compiled", worth_it) if settings.compile == "auto" else settings.compile == "on"
    if wanted:
        encoder = compile_encoder(encoder, batch_size, listener)
    how = {"batch_size": batch_size, "compiled": encoder.compiled is not None}
    listener.message(
        f"encoding on {encoder.device} in {encoder.precision}, {batch_size} crops a call"
        + (", compiled" if how["compiled"] else "")
    )
    return replace(encoder, description={**encoder.description, **how})


def _extract_view(
    settings: ExtractSettings,
    store: Path,
    path: Path,
    view: str,
    crops: CropList,
    encoder: Encoder,
    listener: Listener,
) -> ExtractResult:
    """Make or continue the file of one view, and say what was done."""
    batch_size = int(encoder.description["batch_size"])
    if path.exists():
        begun = EmbeddingStore.open(path)
        require_same_crops(begun, crops)
        require_same_encoder(begun, encoder)
        batch_size = settings.batch_size or begun.encoder.get("batch_size", batch_size)  # a view may have its own
    else:
        create_store(path, crops, encoder.width, encoder.description, encoder.fingerprint)
    with StoreWriter(path) as writer:
        pipeline = Pipeline(
            crops,
            encoder,
            writer,
            listener,
            batch_size=batch_size,
            workers=settings.workers or default_workers(),
            mirror=view == "flip",
        )
        encoded_now, seconds, listed = _encode_pending(pipeline, retry_unreadable=settings.retry_unreadable)
        counts = writer.store.counts
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
        shares=pipeline.clock.shares(),
        bottleneck=pipeline.bottleneck(),
        converted={mode: count for mode, count in sorted(pipeline.modes.items()) if mode != "RGB"},
        unreadable_list=str(listed) if listed else None,
        device=str(encoder.device),
        precision=encoder.precision,
        batch_size=pipeline.batch_size,
        workers=pipeline.workers,
        compiled=encoder.compiled is not None,
    )


def default_workers() -> int:
    """Return how many threads decode unless said otherwise: one per core, at most 16."""
    return min(16, os.cpu_count() or 1)


def _encode_pending(pipeline: Pipeline, *, retry_unreadable: bool) -> tuple[int, float, Path | None]:
    """Run the pipeline over what a store still lacks; return rows encoded now, seconds, and the unreadable list."""
    writer, crops = pipeline.writer, pipeline.crops
    if retry_unreadable:
        writer.reopen_unreadable()
    writer.finish_checksums()
    pending = writer.pending_rows()
    if 0 < len(pending) < len(crops):
        pipeline.listener.message(f"continuing: {len(crops) - len(pending):,} of {len(crops):,} rows are committed")
    start = time.perf_counter()
    try:
        if len(pending):
            pipeline.run(pending)
    finally:
        listed = list_unreadable(writer.store, crops, pipeline.unreadable)
    seconds = time.perf_counter() - start
    if not writer.store.counts["encoded"]:
        first = next(iter(sorted(pipeline.unreadable.items())), None)
        example = f" The first one, {crops.path(first[0])}: {first[1]}." if first else ""
        raise InputError(
            f"None of the {len(crops):,} crops could be read.{example} Expected image files. They are all listed in "
            f"{listed}; mend them, then run the same command again with --retry-unreadable."
        )
    return len(pending), seconds, listed


def list_crops(settings: ExtractSettings, listener: Listener) -> CropList:
    """Find the crops that the settings name, and say what was found and what was left out."""
    # the second default folder came with later editions: not everybody has it
    roots = [r for r in settings.crops if r.is_dir()] if settings.crops == CROPS else list(settings.crops)
    crops = find_crops(
        roots or settings.crops[:1], lambda done, total, unit: listener.progress(done, total, unit, "listing")
    )
    listener.message(f"{len(crops):,} crops in {len(crops.video_names):,} videos")
    if crops.ignored_files:
        listener.message(f"{crops.ignored_files:,} other files ignored: not images, or without a frame number")
    if crops.unsafe_members:
        listener.warning(
            f"{crops.unsafe_members:,} links, or names that lead out of their archive, are left out: none is followed"
        )
    for folder in crops.shadowed_folders:
        listener.warning(f"{folder} is left out: an earlier --crops folder has a video of that name")
    if settings.crop_list is not None:
        crops, missing = keep_listed(crops, settings.crop_list)
        listener.message(f"{len(crops):,} of them are in {settings.crop_list}")
        if missing:
            listener.warning(f"{missing:,} crops that {settings.crop_list} names were not found")
    return crops
