"""Reading what ``affcache export`` wrote: a folder of npy, a .parquet or a .safetensors file."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import affcache
from affcache.errors import InputError
from affcache.exchange.clip_retrieval import matching_parts, npy_part
from affcache.exchange.sources import (
    FrameKeys,
    ImportSource,
    Matrix,
    Part,
    cannot_read,
    gather,
    parquet_file,
    require_columns,
    rows_of,
    unpack,
)
from affcache.store.reading import ENCODED, UNREADABLE, EmbeddingStore

IMPORTED_FROM = "affcache export"
KEY_COLUMNS = ("video", "frame_number", "status")
TENSORS = {"video_start": "I64", "frame_number": "I32", "features": "F16", "status": "U8"}  # by falling size of a value
_DTYPES = {"F16": "<f2", "U8": "u1", "I32": "<i4", "I64": "<i8"}
EXPORT_FORMAT, EXPORT_VERSION = "affcache-export", 1
PARQUET_KEY = b"affcache"  # of the schema metadata
SAFETENSORS_KEY = "affcache"  # of the header's metadata
NPY_FILE = "provenance.json"


def open_npy_export(folder: Path) -> ImportSource:
    """Open an exported folder: img_emb/, metadata/ and provenance.json."""
    try:
        provenance = read_provenance(folder / NPY_FILE, (folder / NPY_FILE).read_bytes())
    except OSError as error:
        raise cannot_read(folder / NPY_FILE, error) from None
    ((embeddings, metadata),) = matching_parts(folder)[:1]
    part = npy_part(embeddings, metadata, _keys_of(metadata, rows_of(metadata, KEY_COLUMNS)))
    dtype = part.open(folder).dtype
    if dtype != np.dtype("<f2"):
        raise cannot_read(embeddings, ValueError(f"an export holds float16, this is {dtype}"))
    return ImportSource(folder, [part], IMPORTED_FROM, provenance)


def open_parquet_export(path: Path) -> ImportSource:
    """Open an exported Parquet file."""
    with parquet_file(path) as file:
        provenance = read_provenance(path, (file.schema_arrow.metadata or {}).get(PARQUET_KEY))
        require_columns(path, file, (*KEY_COLUMNS, "embedding"))
        kind = getattr(file.schema_arrow.field("embedding").type, "value_type", None)
        if str(kind) != "float":
            raise cannot_read(path, TypeError(f"embedding is a {kind or 'single value'}, not a list of float"))
    keys, width = _keys_of(path, rows_of(path, KEY_COLUMNS)), int(provenance.get("width", 0))
    if not (keys and width):
        raise cannot_read(path, ValueError("no rows, or embeddings of no width"))

    def matrix(folder: Path) -> Matrix:
        return unpack(folder, _unpacked_groups(path, width), np.dtype("<f2"), (len(keys), width))

    return ImportSource(path, [Part(path, keys, width, matrix)], IMPORTED_FROM, provenance)


def open_safetensors_export(path: Path) -> ImportSource:
    """Open an exported safetensors file."""
    header, first = _safetensors_header(path)
    described = header.get("__metadata__", {})
    provenance = read_provenance(path, described.get(SAFETENSORS_KEY))
    maps: dict[str, Matrix] = {}
    try:
        names = np.array([str(name) for name in json.loads(described["video_name"])], dtype=object)
        for name, kind in TENSORS.items():
            entry = header[name]
            if entry["dtype"] != kind:
                raise ValueError(f"{name} is {entry['dtype']}")
            start, shape = first + entry["data_offsets"][0], tuple(entry["shape"])
            maps[name] = np.memmap(path, dtype=_DTYPES[kind], mode="r", offset=start, shape=shape)
        videos = np.repeat(names, np.diff(maps["video_start"]))
        if len({len(videos), *(len(maps[name]) for name in ("features", "status", "frame_number"))}) != 1:
            raise ValueError("its tensors differ in length")
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise cannot_read(path, error) from None
    keys = _keys_of(path, zip(videos, maps["frame_number"].tolist(), maps["status"].tolist(), strict=True))
    part = Part(path, keys, maps["features"].shape[1], lambda folder: maps["features"])
    return ImportSource(path, [part], IMPORTED_FROM, provenance)


def _safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header, checked by the safetensors library against the file, and where the data begin."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass  # checks sizes and offsets
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return json.loads(file.read(length)), 8 + length
    except (OSError, SafetensorError, ValueError) as error:
        raise cannot_read(path, error) from None


def _keys_of(path: Path, rows: Iterable[tuple[Any, ...]]) -> FrameKeys:
    """Collect video, frame number and status of every row."""
    return gather(path, rows, _add, "the columns that 'affcache export' writes. Export the store again.")


def _add(keys: FrameKeys, video: Any, frame: Any, status: Any) -> None:
    if status not in (ENCODED, UNREADABLE):
        raise ValueError(f"has the status {status!r}, not 1 (encoded) or 2 (unreadable)")
    if not isinstance(frame, int) or not isinstance(video, str):
        raise ValueError(f"has the video {video!r} and the frame number {frame!r}")
    keys.add(video, frame, status)


def _unpacked_groups(path: Path, width: int) -> Iterator[Matrix]:
    """Yield the embeddings of each row group as float16 (n, D)."""
    first = 0
    with parquet_file(path) as file:
        for group in range(file.num_row_groups):
            column = file.read_row_group(group, columns=["embedding"]).column("embedding")
            rows = len(column)
            values = np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks])
            if column.null_count or values.size != rows * width:
                raise cannot_read(path, ValueError(f"embeddings of row group {group} are not {width} values each"))
            with np.errstate(over="ignore"):
                features = values.astype("<f2")
            wrong = np.flatnonzero(features != values)  # also where a value is not a number
            if len(wrong):
                raise InputError(
                    f"{path}, row {first + int(wrong[0]) // width} (counted from 0) holds {values[wrong[0]]}, which is "
                    "no finite float16. Expected the embeddings that 'affcache export' wrote. Export the store again."
                )
            first += rows
            yield features.reshape(rows, width)


def provenance_of(store: EmbeddingStore) -> dict[str, Any]:
    """Return the provenance of a store's rows, as one JSON object."""
    return {
        "format": EXPORT_FORMAT,
        "format_version": EXPORT_VERSION,
        "affcache": affcache.__version__,
        "encoder": store.encoder,
        "encoder_fingerprint": store.encoder_fingerprint,
        "store_fingerprint": store.fingerprint(),
        "rows": {status: count for status, count in store.counts.items() if status != "pending"},
        "videos": len(store.video_names),
        "width": store.width,
    }


def read_provenance(path: Path, text: str | bytes | None) -> Mapping[str, Any]:
    """Parse the provenance that was found in ``path``."""
    try:
        found = json.loads(text or "null")
        if found["format"] != EXPORT_FORMAT or found["format_version"] != EXPORT_VERSION:
            raise ValueError(f"{found['format']!r} version {found['format_version']}")
        wanted: dict[str, type] = {"encoder": dict, "encoder_fingerprint": str, "store_fingerprint": str}
        if not all(isinstance(found[name], kind) for name, kind in wanted.items()):
            raise TypeError("a field of another type")
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{path} doesn't say how its embeddings were made ({type(error).__name__}: {error}). Expected the "
            f"provenance that 'affcache export' writes, {EXPORT_FORMAT!r} version {EXPORT_VERSION}. Import what "
            "'affcache export' wrote, unchanged, or use the affcache version that wrote it."
        ) from None
    return found
