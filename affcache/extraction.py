"""Stage one: every crop through the frozen encoder once, into an embedding store, resumable at any moment."""

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from affcache.config import build
from affcache.encoder import Encoder, differing_fields, load_encoder, resolve_device
from affcache.errors import InputError, StoreError
from affcache.frames import CropList, find_crops
from affcache.listener import Listener
from affcache.pipeline import Pipeline
from affcache.settings import CROPS, ExtractSettings, default_store
from affcache.store import UNREADABLE, EmbeddingStore
from affcache.store_writer import StoreWriter, create_store, writing_lock


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
    settings = build(ExtractSettings, values, over=settings)
    listener = listener or Listener()
    path = settings.store or default_store(settings.model, settings.pretrained)
    device = resolve_device(settings.device)
    crops = _list_crops(settings, listener)
    with writing_lock(path):
        listener.message(f"loading the encoder {settings.model}; its weights are fetched if they are not here yet")
        encoder = load_encoder(
            settings.model,
            settings.pretrained,
            activation=settings.activation,
            precision=settings.precision,
            device=device,
        )
        if path.exists():
            _require_same(EmbeddingStore.open(path), crops, encoder)
        else:
            create_store(path, crops, encoder.width, encoder.description, encoder.fingerprint)
        with StoreWriter(path) as writer:
            pipeline = Pipeline(
                crops,
                encoder,
                writer,
                listener,
                batch_size=settings.batch_size or (256 if device.type == "cuda" else 16),
                workers=settings.workers or min(16, os.cpu_count() or 1),
            )
            return _encode_pending(pipeline, retry_unreadable=settings.retry_unreadable)


def _encode_pending(pipeline: Pipeline, *, retry_unreadable: bool) -> ExtractResult:
    """Run the pipeline over what a store still lacks, and say what was done."""
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
        listed = _list_unreadable(writer.store, crops, pipeline.unreadable)
    seconds = time.perf_counter() - start
    counts = writer.store.counts
    if not counts["encoded"]:
        first = next(iter(sorted(pipeline.unreadable.items())), None)
        example = f" The first one, {crops.path(first[0])}: {first[1]}." if first else ""
        raise InputError(
            f"None of the {len(crops):,} crops could be read.{example} Expected image files. They are all listed in "
            f"{listed}; mend them, then run the same command again with --retry-unreadable."
        )
    return ExtractResult(
        store=str(writer.store.path),
        rows=len(crops),
        encoded=counts["encoded"],
        unreadable=counts["unreadable"],
        encoded_now=len(pending),
        seconds=seconds,
        rate=len(pending) / seconds,
        shares=pipeline.shares(),
        converted={mode: count for mode, count in sorted(pipeline.modes.items()) if mode != "RGB"},
        unreadable_list=str(listed) if listed else None,
        device=str(pipeline.encoder.device),
        precision=str(pipeline.encoder.description["precision"]),
    )


def _list_crops(settings: ExtractSettings, listener: Listener) -> CropList:
    # the second default folder came with later editions: not everybody has it
    roots = [r for r in settings.crops if r.is_dir()] if settings.crops == CROPS else list(settings.crops)
    crops = find_crops(
        roots or settings.crops[:1], lambda done, total: listener.progress(done, total, "video", "listing")
    )
    listener.message(f"{len(crops):,} crops in {len(crops.video_names):,} videos")
    if crops.ignored_files:
        listener.message(f"{crops.ignored_files:,} other files ignored: not images, or without a frame number")
    for folder in crops.shadowed_folders:
        listener.warning(f"{folder} is left out: an earlier --crops folder has a video of that name")
    return crops


def _require_same(store: EmbeddingStore, crops: CropList, encoder: Encoder) -> None:
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


def _list_unreadable(store: EmbeddingStore, crops: CropList, reasons: dict[int, str]) -> Path | None:
    """Name every unreadable crop, with the reason, in a text file beside the store; remove a list of none."""
    path = store.path.with_name(store.path.name + ".unreadable.txt")
    rows = np.flatnonzero(store.status == UNREADABLE)
    if not len(rows):
        path.unlink(missing_ok=True)
        return None
    known: dict[str, str] = {}  # from the list that an earlier run left
    if path.is_file():
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        known = dict(line.split("\t", 1) for line in lines if "\t" in line)
    named = [(str(crops.path(int(row))), reasons.get(int(row))) for row in rows]
    text = "".join(f"{crop}\t{reason or known.get(crop, 'unreadable')}\n" for crop, reason in named)
    path.write_text(text, encoding="utf-8", errors="surrogateescape")  # file names may be any bytes
    return path
