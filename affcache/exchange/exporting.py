"""Export as a whole: a complete, sound store written for other tools, to a temporary name first."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import affcache
from affcache.errors import InputError
from affcache.exchange.layouts import EMBEDDINGS, METADATA, matching_parts, npy_part
from affcache.exchange.settings import ExportSettings
from affcache.exchange.sources import WIDEST, FrameKeys, ImportSource, Matrix, Part, blocks_of, facts_of, gather, unpack
from affcache.files import LARGEST_JSON, beside, cannot_write, open_regular, parse_json, read_bytes, whole_file
from affcache.progress import Listener, Result
from affcache.settings import command, existing_store
from affcache.store.description import fingerprint
from affcache.store.frames import ENCODED, UNREADABLE
from affcache.store.reading import EmbeddingStore
from affcache.tabular import cannot_read, groups_of, import_pyarrow, parquet_file, reading, require_columns, rows_of

IMPORTED_FROM = "affcache export"
KEY_COLUMNS = ("video", "frame_number", "status")
TENSORS = {"video_start": "I64", "frame_number": "I32", "features": "F16", "status": "U8"}  # by falling size of a value
_DTYPES = {"F16": "<f2", "U8": "u1", "I32": "<i4", "I64": "<i8"}
EXPORT_FORMAT, EXPORT_VERSION = "affcache-export", 1
PROVENANCE_KEY = "affcache"  # of the metadata in a Parquet schema or a safetensors header
NPY_FILE = "provenance.json"
SAFETENSORS_ALIGNMENT = 8  # bytes; the header is padded with spaces up to it


def open_npy_export(folder: Path) -> ImportSource:
    """Open an exported folder: img_emb/, metadata/ and provenance.json."""
    with reading(folder / NPY_FILE):
        provenance = read_provenance(folder / NPY_FILE, read_bytes(folder / NPY_FILE, LARGEST_JSON))
    ((embeddings, metadata),) = matching_parts(folder)[:1]
    part = npy_part(embeddings, metadata, _keys_of(metadata, rows_of(metadata, KEY_COLUMNS)))
    dtype = part.open(folder).dtype
    if dtype != np.dtype("<f2"):
        raise cannot_read(embeddings, ValueError(f"an export holds float16, this is {dtype}"))
    return ImportSource(folder, [part], IMPORTED_FROM, provenance)


def open_parquet_export(path: Path) -> ImportSource:
    """Open an exported Parquet file."""
    with parquet_file(path) as file:
        provenance = read_provenance(path, (file.schema_arrow.metadata or {}).get(PROVENANCE_KEY.encode()))
        require_columns(path, file, (*KEY_COLUMNS, "embedding"))
        kind = getattr(file.schema_arrow.field("embedding").type, "value_type", None)
        if str(kind) != "float":
            raise cannot_read(path, TypeError(f"embedding is a {kind or 'single value'}, not a list of float"))
    keys, width = _keys_of(path, rows_of(path, KEY_COLUMNS)), provenance.get("width")
    if not keys or not isinstance(width, int) or not 0 < width <= WIDEST:
        raise cannot_read(path, ValueError("no rows, or embeddings of no width"))

    def matrix(folder: Path) -> Matrix:
        return unpack(folder, _unpacked_groups(path, width), np.dtype("<f2"), (len(keys), width))

    return ImportSource(path, [Part(path, keys, width, matrix)], IMPORTED_FROM, provenance)


def open_safetensors_export(path: Path) -> ImportSource:
    """Open an exported safetensors file."""
    header, first = _safetensors_header(path)
    described = header.get("__metadata__", {})
    provenance = read_provenance(path, described.get(PROVENANCE_KEY))
    maps: dict[str, Matrix] = {}
    with reading(path, KeyError, IndexError, TypeError, ValueError, RecursionError, AttributeError):
        names = np.array([str(name) for name in json.loads(described["video_name"])], dtype=object)
        for name, kind in TENSORS.items():
            entry = header[name]
            if entry["dtype"] != kind:
                raise ValueError(f"{name} is {entry['dtype']}")
            start, shape = first + entry["data_offsets"][0], tuple(entry["shape"])
            maps[name] = np.memmap(path, dtype=_DTYPES[kind], mode="r", offset=start, shape=shape)
        if maps["video_start"][-1] != len(maps["features"]):
            raise ValueError("its tensors differ in length")
        videos = np.repeat(names, np.diff(maps["video_start"]))
        if len({len(videos), *(len(maps[name]) for name in ("features", "status", "frame_number"))}) != 1:
            raise ValueError("its tensors differ in length")
    keys = _keys_of(path, zip(videos, maps["frame_number"].tolist(), maps["status"].tolist(), strict=True))
    part = Part(path, keys, maps["features"].shape[1], lambda folder: maps["features"])
    return ImportSource(path, [part], IMPORTED_FROM, provenance)


def _safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header, checked by the safetensors library against the file, and where the data begin."""
    from safetensors import SafetensorError, safe_open

    with reading(path, SafetensorError, ValueError), open_regular(path) as file:
        with safe_open(path, framework="numpy"):
            pass  # checks sizes and offsets
        length = int.from_bytes(file.read(8), "little")
        return parse_json(file.read(length)), 8 + length


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
        for group in groups_of(path, file):
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
        found = parse_json(text or "null")
        if found["format"] != EXPORT_FORMAT or found["format_version"] != EXPORT_VERSION:
            raise ValueError(f"{found['format']!r} version {found['format_version']}")
        wanted: dict[str, type] = {"encoder": dict, "encoder_fingerprint": str, "store_fingerprint": str}
        if not all(isinstance(found[name], kind) for name, kind in wanted.items()):
            raise TypeError("a field of another type")
        if fingerprint(found["encoder"]) != found["encoder_fingerprint"]:
            raise ValueError("the encoder is not the one that its fingerprint is of")
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{path} doesn't say how its embeddings were made ({type(error).__name__}: {error}). Expected the "
            f"provenance that 'affcache export' writes, {EXPORT_FORMAT!r} version {EXPORT_VERSION}. Import what "
            "'affcache export' wrote, unchanged, or use the affcache version that wrote it; of a table of another tool "
            "say with --name what it holds."
        ) from None
    return found


def write_npy(path: Path, store: EmbeddingStore, listener: Listener) -> None:
    """Write a folder as clip-retrieval lays it out, with one part, and provenance.json."""
    import_pyarrow()  # says that it is missing before anything is written
    with whole_file(path / NPY_FILE) as file:
        file.write((json.dumps(provenance_of(store), indent=2) + "\n").encode())
    with whole_file(path / EMBEDDINGS / f"{EMBEDDINGS}_0.npy") as file:
        header = {"descr": "<f2", "fortran_order": False, "shape": store.features.shape}
        np.lib.format.write_array_header_1_0(file, header)
        for rows in blocks_of(len(store)):
            file.write(np.ascontiguousarray(store.features[rows]).data)
            listener.progress(rows.stop, len(store), "row", "writing")
    write_parquet(path / METADATA / f"{METADATA}_0.parquet", store, listener, embeddings=False)


def write_safetensors(path: Path, store: EmbeddingStore, listener: Listener) -> None:
    """Write one safetensors file; its library would need all tensors in memory, so the header is made here."""
    arrays = {name: getattr(store, name) for name in TENSORS}  # in the order by which each begins at a multiple of it
    described = {PROVENANCE_KEY: provenance_of(store), "video_name": store.video_names}
    header: dict[str, Any] = {"__metadata__": {name: json.dumps(value) for name, value in described.items()}}
    offset = 0
    for name, array in arrays.items():
        header[name] = {"dtype": TENSORS[name], "shape": array.shape, "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % SAFETENSORS_ALIGNMENT)
    with whole_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            for rows in blocks_of(len(array)):
                file.write(np.ascontiguousarray(array[rows]).data)
                if array is store.features:
                    listener.progress(rows.stop, len(store), "row", "writing")


def write_parquet(path: Path, store: EmbeddingStore, listener: Listener, *, embeddings: bool = True) -> None:
    """Write one Parquet file of a store's frames with embeddings, or with paths of crops, a row group at a time.

    Embeddings are lists of float32, since few readers know float16 in lists; every float16 value is one of float32.
    Byte stream split puts equal bytes together (half of them are always zero), and zstd packs them.
    """
    pyarrow = import_pyarrow()
    element = pyarrow.field("element", pyarrow.float32(), nullable=False)
    listed = pyarrow.list_(element, store.width)  # a plain list to other readers
    kinds = {"video": pyarrow.string(), "frame_number": pyarrow.int32(), "status": pyarrow.uint8()}
    kinds = {**kinds, "embedding": listed} if embeddings else {"image_path": pyarrow.string(), **kinds}
    fields = [pyarrow.field(name, kind, nullable=False) for name, kind in kinds.items()]
    schema = pyarrow.schema(fields, metadata={PROVENANCE_KEY: json.dumps(provenance_of(store))})
    video_of_rows = store.video_of_rows()
    options: dict[str, Any] = {"use_byte_stream_split": ["embedding.list.element"]} if embeddings else {}
    options |= {"compression": "zstd", "use_dictionary": ["video"]}
    with whole_file(path) as file, pyarrow.parquet.ParquetWriter(file, schema, **options) as writer:
        for rows in blocks_of(len(store)):
            videos = [store.video_names[video] for video in video_of_rows[rows]]
            frames = store.frame_number[rows]
            columns: dict[str, Any] = {"video": videos, "frame_number": frames, "status": store.status[rows]}
            if embeddings:
                values = np.ascontiguousarray(store.features[rows], dtype="<f4").reshape(-1)
                columns["embedding"] = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values), type=listed)
                listener.progress(rows.stop, len(store), "row", "writing")
            else:
                columns["image_path"] = [
                    f"{video}/{frame:05d}.jpg" for video, frame in zip(videos, frames, strict=True)
                ]
            writer.write_table(pyarrow.table(columns, schema=schema))


WRITERS: dict[str, tuple[str, Callable[[Path, EmbeddingStore, Listener], None]]] = {  # ending of the default name
    "npy": ("-npy", write_npy),
    "parquet": (".parquet", write_parquet),
    "safetensors": (".safetensors", write_safetensors),
}


@dataclass(frozen=True)
class ExportResult(Result):
    """What an export wrote."""

    out: str
    format: str
    store: str
    rows: int  # N
    encoded: int  # rows with an embedding
    unreadable: int  # rows of zeros, whose status is 2
    videos: int
    width: int  # D
    bytes: int  # of all files written
    store_fingerprint: str
    seconds: float


@command(ExportSettings)
def export_embeddings(settings: ExportSettings, listener: Listener) -> ExportResult:
    """Write the embeddings of a complete store, with their frames and provenance, for other tools.

    All N rows are written, unreadable ones with status 2 and zeros, without changing a bit of the float16 (N, D).

    Raises:
        StoreError: the store is missing, incomplete or damaged.
        InputError: the output exists already or can't be written.
        ConfigError: a setting is unknown or out of range, or pyarrow isn't installed.
    """
    start = time.perf_counter()
    store = EmbeddingStore.open(settings.store or existing_store(listener))
    ending, write = WRITERS[settings.format]
    out = settings.out or store.path.with_name(store.path.stem + ending)
    _require_new(out)
    store.verify(lambda done, total: listener.progress(done, total, "block", "checking"))
    try:
        with beside(out) as partial:
            write(partial, store, listener)
            _require_new(out)  # somebody may have made it meanwhile
    except OSError as error:
        raise cannot_write(out, error) from None
    return ExportResult(
        out=str(out),
        format=settings.format,
        store=str(store.path),
        **facts_of(store),
        bytes=sum(file.stat().st_size for file in (out, *out.rglob("*")) if file.is_file()),
        store_fingerprint=store.fingerprint(),
        seconds=time.perf_counter() - start,
    )


def _require_new(out: Path) -> None:
    if out.exists():
        raise InputError(
            f"{out} exists already. Expected a new name, since an export never overwrites. Choose another --out, or "
            "delete that one."
        )
