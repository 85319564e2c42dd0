"""Import as a whole: sources opened and checked, their rows put in order, a store written and renamed into place."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from affcache.errors import ConfigError, InputError, StoreError
from affcache.exchange.exporting import NPY_FILE, open_npy_export, open_parquet_export, open_safetensors_export
from affcache.exchange.layouts import name_videos, open_clip_retrieval, open_published_code, refuse_store
from affcache.exchange.settings import ImportSettings
from affcache.exchange.sources import ImportSource, Part, Rounding, SourceRows, blocks_of, facts_of
from affcache.exchange.tables import open_tables
from affcache.files import beside
from affcache.progress import Listener, Result, counted
from affcache.settings import command, default_store
from affcache.store.description import TABLE, differing_fields, fingerprint
from affcache.store.reading import EmbeddingStore
from affcache.store.writing import StoreWriter, create_store, writing_lock
from affcache.tabular import HDF5_MAGIC, PARQUET_MAGIC, magic_of

EXPECTED = (
    "an HDF5 file of the published code, a folder of clip-retrieval (img_emb/ and metadata/), a folder, .parquet or "
    ".safetensors file that 'affcache export' wrote, or, with --name, a .csv, .parquet or .npz table of frame features"
)


def open_sources(settings: ImportSettings, listener: Listener) -> ImportSource:
    """Open every source, check that they may go into one store, and take them together as one.

    Raises:
        ConfigError: no source, or another number of lists than of HDF5 files.
        InputError: a source is missing, damaged, or of an unknown layout; or their widths differ.
        StoreError: they were made with two encoders.
    """
    if not settings.sources:
        raise ConfigError(f"No source is given. Expected {EXPECTED}: affcache import SOURCE --store FILE.")
    tables = settings.name is not None
    sources = open_tables(settings, listener) if tables else _open_embeddings(settings.sources, settings.list)
    for source in sources[1:]:
        _require_same_encoder(sources[0], source)
    parts = [part for source in sources for part in source.parts]
    _require_same_width(parts)
    name_videos(sources)
    labels, left_out = (sum(getattr(source, of) for source in sources) for of in ("labels", "left_out"))
    return replace(sources[0], parts=parts, labels=labels, left_out=left_out)


def _open_embeddings(paths: Sequence[Path], lists: Sequence[Path]) -> list[ImportSource]:
    """Open sources of embeddings that an encoder made; the lists are of the HDF5 files among them, in their order."""
    hdf5 = [path for path in paths if magic_of(path) == HDF5_MAGIC]
    for path in hdf5:
        refuse_store(path)
    if len(hdf5) != len(lists):
        raise ConfigError(
            f"{len(hdf5)} HDF5 files and {len(lists)} lists are given. Expected a list for each, in the same order, "
            "since it says which row is which frame: "
            "affcache import train.h5 val.h5 --list train.txt --list val.txt ..."
        )
    remaining = iter(lists)
    return [open_published_code(path, next(remaining)) if path in hdf5 else _open_other(path) for path in paths]


def _open_other(path: Path) -> ImportSource:
    if path.is_dir():
        return open_npy_export(path) if (path / NPY_FILE).exists() else open_clip_retrieval(path)
    if magic_of(path).startswith(PARQUET_MAGIC):
        return open_parquet_export(path)
    if path.suffix == ".safetensors":
        return open_safetensors_export(path)
    raise InputError(f"{path} is nothing that can be imported. Expected {EXPECTED}. Check the path.")


def _require_same_encoder(first: ImportSource, other: ImportSource) -> None:
    forward = "Import each into a store of its own."
    if first.imported_from != other.imported_from:
        raise StoreError(
            f"{first.path} is from {first.imported_from}, {other.path} from {other.imported_from}: nothing says that "
            f"one encoder made both. Expected sources of one kind. {forward}"
        )
    if first.provenance.get("encoder_fingerprint") != other.provenance.get("encoder_fingerprint"):
        lines = "\n  ".join(differing_fields(first.provenance["encoder"], other.provenance["encoder"]))
        raise StoreError(
            f"{first.path} and {other.path} were made with two encoders. Expected the same one; these differ (first "
            f"against second):\n  {lines}\n{forward}"
        )


def _require_same_width(parts: Sequence[Part]) -> None:
    first, *others = parts
    for part in others:
        if part.width != first.width:
            raise InputError(
                f"{first.file} has embeddings of {first.width} values, {part.file} of {part.width}. Expected one "
                "encoder, and so one width. Import each into a store of its own."
            )


@dataclass(frozen=True)
class ImportResult(Result):
    """What an import did."""

    store: str
    imported_from: str  # "published code", "clip-retrieval", "affcache export" or "table"
    sources: int
    rows: int  # N
    encoded: int  # rows with an embedding
    unreadable: int  # rows that an export marks as unreadable
    videos: int
    width: int  # D
    rows_left_out: int  # rows of tables in which a value is missing
    labels_not_used: int  # labels met in lists
    values: int  # numbers read, N * D without unreadable rows
    changed_values: int  # numbers that float16 can't hold exactly, and that were rounded
    largest_relative_change: float  # of a number that isn't 0, as a fraction of it
    largest_change: float  # in the unit of the embeddings
    normalised: bool | None  # whether every embedding has length 1; None for exports, whose encoder says it
    encoder_fingerprint: str
    same_as_exported: bool | None  # whether the store equals the exported one; None unless it is one whole export
    seconds: float


@command(ImportSettings)
def import_embeddings(settings: ImportSettings, listener: Listener) -> ImportResult:
    """Make an embedding store of embeddings or frame features that another tool, or ``export_embeddings``, wrote.

    Sources are HDF5 files of the code published with arXiv 2403.09915, with a list of frames each; folders of
    clip-retrieval; exports; and, with a name for what they hold, tables by video and frame. Several of one kind go into
    one store. The store keeps float16 (N, D), ordered by video and frame; other numbers are rounded to it, and the
    result says by how much.

    Raises:
        InputError: a source is missing, damaged or ambiguous, or holds a number that float16 can't.
        StoreError: the store exists already, is in use, or has no room; or the sources are of two encoders.
        ConfigError: a setting is unknown or missing, or pyarrow isn't installed.
    """
    start = time.perf_counter()
    source = open_sources(settings, listener)
    path = settings.store or _default_store(settings, source)
    _require_new(path)
    rows = SourceRows(source.parts)
    crops = rows.crops
    listener.message(
        f"{counted(len(crops), 'frame')} in {counted(len(crops.video_names), 'video')}, from {source.imported_from}"
    )
    from_zero = int((crops.frame_number[crops.video_start[:-1]] == 0).sum())
    if source.imported_from == TABLE and from_zero:
        listener.warning(
            f"the frames of {from_zero:,} of {counted(len(crops.video_names), 'video')} begin at 0. Labels, and the "
            "crops of Aff-Wild2, count frames from 1: unless yours count from 0, add 1 to the numbers in the table and "
            "import it again"
        )
    with writing_lock(path, listener), _written_store(path) as partial:
        _require_new(path)  # another process may have made it while this one waited
        rows.matrices = [part.open(path.parent) for part in rows.parts]
        found = rows.check_float16(listener)
        encoder, encoder_fingerprint = _encoder(source, settings, found, listener)
        create_store(partial, crops, rows.width, encoder, encoder_fingerprint)
        with StoreWriter(partial) as writer:
            for block in blocks_of(len(crops)):
                writer.commit(block.start, *rows.read(block))
                listener.progress(block.stop, len(crops), "row", "writing")
        written = EmbeddingStore.open(partial)
        same = _compare(source, written, listener) if len(settings.sources) == 1 else None
        facts = facts_of(written)
    _say_what_was_left(found, source, listener)
    return ImportResult(
        store=str(path),
        imported_from=source.imported_from,
        sources=len(settings.sources),
        **facts,
        rows_left_out=source.left_out,
        labels_not_used=source.labels,
        **{**asdict(found), **({"normalised": None} if source.provenance else {})},
        encoder_fingerprint=encoder_fingerprint,
        same_as_exported=same,
        seconds=time.perf_counter() - start,
    )


def _say_what_was_left(found: Rounding, source: ImportSource, listener: Listener) -> None:
    if source.left_out:
        listener.message(f"{counted(source.left_out, 'row')} left out, since a value is missing there")
    if found.changed_values:
        listener.message(
            f"{found.changed_values:,} of {found.values:,} values were rounded to float16, by at most "
            f"{found.largest_change:.2g}, or {found.largest_relative_change:.2g} of the value"
        )
    if source.labels:
        listener.message(
            f"{source.labels:,} labels in the lists are not used: 'affcache fit' reads them from --annotations"
        )


def _default_store(settings: ImportSettings, source: ImportSource) -> Path:
    if settings.name:
        return default_store(settings.name, "")
    said = source.provenance.get("encoder", {})
    if settings.model:
        return default_store(settings.model, settings.pretrained)
    if said.get("model"):
        return default_store(said["model"], said.get("pretrained", ""))
    raise ConfigError(
        "Nothing says where the store goes. Expected --store FILE, or --model and --pretrained, which name it."
    )


def _require_new(path: Path) -> None:
    if path.exists():
        raise StoreError(
            f"{path} exists already. Expected a new file, since an import never adds to a store. Choose another "
            "--store FILE, delete that one, or import all sources together."
        )


@contextmanager
def _written_store(path: Path) -> Iterator[Path]:
    """Give a temporary name to write the store to, as ``beside``; messages name the store itself."""
    try:
        with beside(path) as partial:
            yield partial
    except StoreError as error:
        raise StoreError(str(error).replace(str(partial), str(path))) from None
    except OSError as error:
        raise StoreError(
            f"The store {path} can't be written: {error.strerror or error}. Expected a folder that can be written, "
            "with room for the embeddings. Choose another place with --store FILE."
        ) from None


def _encoder(
    source: ImportSource, settings: ImportSettings, found: Rounding, listener: Listener
) -> tuple[Mapping[str, Any], str]:
    """Return the store's encoder description and fingerprint: an export's own, else what can be known."""
    provenance = source.provenance
    if provenance:
        if settings.model:
            listener.message("--model and --pretrained are not looked at: the export says its encoder itself")
        return provenance["encoder"], provenance["encoder_fingerprint"]
    if source.features:
        if settings.model:
            listener.message("--model and --pretrained are not looked at: --name says what the features are")
        encoder: dict[str, Any] = {
            "model": settings.name, "pretrained": "", **source.features, "weights_sha256": None, "imported_from": TABLE,
            "normalised": None, "width": source.parts[0].width,
        }  # fmt: skip
        return encoder, fingerprint(encoder)
    if settings.model is None:
        listener.warning(
            "--model isn't said, so these embeddings can't be told from those of another encoder of the same width"
        )
    encoder = {
        "model": settings.model,
        "pretrained": settings.pretrained,
        # counts in the fingerprint, since nothing else tells encoders apart
        "said_to_be": [settings.model, settings.pretrained],
        "weights_sha256": None,
        "imported_from": source.imported_from,
        "normalised": found.normalised,
        "width": source.parts[0].width,
    }
    return encoder, fingerprint(encoder)


def _compare(source: ImportSource, written: EmbeddingStore, listener: Listener) -> bool | None:
    """Say whether a store that was exported, as a whole, is back as it was; None where it isn't from an export."""
    if not source.provenance:
        return None
    same = written.fingerprint() == source.provenance["store_fingerprint"]
    if not same:
        listener.warning(
            f"{source.path} was changed after its export, or was damaged: the embeddings, frames or statuses are "
            "not those of the store that it names"
        )
    return same
