"""Export as a whole: a complete, sound store written for other tools, to a temporary name first."""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from affcache.errors import InputError
from affcache.exchange.clip_retrieval import EMBEDDINGS, METADATA
from affcache.exchange.exports import NPY_FILE, PARQUET_KEY, SAFETENSORS_KEY, TENSORS, provenance_of
from affcache.exchange.settings import ExportSettings
from affcache.exchange.sources import blocks_of, facts_of, pyarrow_parquet
from affcache.progress import Listener, Result
from affcache.settings import command, default_store
from affcache.store.reading import EmbeddingStore

SAFETENSORS_ALIGNMENT = 8  # bytes; the header is padded with spaces up to it


def write_npy(path: Path, store: EmbeddingStore, listener: Listener) -> None:
    """Write a folder as clip-retrieval lays it out, with one part, and provenance.json."""
    pyarrow_parquet()  # says that it is missing before anything is written
    (path / EMBEDDINGS).mkdir(parents=True)
    (path / METADATA).mkdir()
    (path / NPY_FILE).write_text(json.dumps(provenance_of(store), indent=2) + "\n", encoding="utf-8")
    with (path / EMBEDDINGS / f"{EMBEDDINGS}_0.npy").open("wb") as file:
        header = {"descr": "<f2", "fortran_order": False, "shape": store.features.shape}
        np.lib.format.write_array_header_1_0(file, header)
        for rows in blocks_of(len(store)):
            file.write(np.ascontiguousarray(store.features[rows]).data)
            listener.progress(rows.stop, len(store), "row", "writing")
    _write_table(path / METADATA / f"{METADATA}_0.parquet", store, listener, embeddings=False)


def write_parquet(path: Path, store: EmbeddingStore, listener: Listener) -> None:
    """Write one Parquet file, a row group at a time.

    Embeddings are lists of float32, since few readers know float16 in lists; every float16 value is one of float32.
    Byte stream split puts equal bytes together (half of them are always zero), and zstd packs them.
    """
    _write_table(path, store, listener, embeddings=True)


def write_safetensors(path: Path, store: EmbeddingStore, listener: Listener) -> None:
    """Write one safetensors file; its library would need all tensors in memory, so the header is made here."""
    arrays = {name: getattr(store, name) for name in TENSORS}  # in the order by which each begins at a multiple of it
    described = {
        SAFETENSORS_KEY: json.dumps(provenance_of(store)),
        "video_name": json.dumps(store.video_names),
    }
    header: dict[str, Any] = {"__metadata__": described}
    offset = 0
    for name, array in arrays.items():
        header[name] = {"dtype": TENSORS[name], "shape": array.shape, "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % SAFETENSORS_ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            for rows in blocks_of(len(array)):
                file.write(np.ascontiguousarray(array[rows]).data)
                if array is store.features:
                    listener.progress(rows.stop, len(store), "row", "writing")


def _write_table(path: Path, store: EmbeddingStore, listener: Listener, *, embeddings: bool) -> None:
    """Write the frames of a store as Parquet, with the paths of the crops or with their embeddings."""
    parquet = pyarrow_parquet()
    import pyarrow

    element = pyarrow.field("element", pyarrow.float32(), nullable=False)
    listed = pyarrow.list_(element, store.width)  # a plain list to other readers
    kinds = {"video": pyarrow.string(), "frame_number": pyarrow.int32(), "status": pyarrow.uint8()}
    kinds = {**kinds, "embedding": listed} if embeddings else {"image_path": pyarrow.string(), **kinds}
    fields = [pyarrow.field(name, kind, nullable=False) for name, kind in kinds.items()]
    schema = pyarrow.schema(fields, metadata={PARQUET_KEY: json.dumps(provenance_of(store))})
    video_of_rows = store.video_of_rows()
    options = {"use_byte_stream_split": ["embedding.list.element"]} if embeddings else {}
    with parquet.ParquetWriter(path, schema, compression="zstd", use_dictionary=["video"], **options) as writer:
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
    store = EmbeddingStore.open(settings.store or default_store())
    ending, write = WRITERS[settings.format]
    out = settings.out or store.path.with_name(store.path.stem + ending)
    _require_new(out)
    store.verify(lambda done, total: listener.progress(done, total, "block", "checking"))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=out.name + ".partial-", dir=out.parent) as folder:
            partial = Path(folder) / out.name
            write(partial, store, listener)
            _require_new(out)  # somebody may have made it meanwhile
            partial.replace(out)
    except OSError as error:
        raise InputError(
            f"{out} can't be written: {error.strerror or error}. Expected a folder that can be written, with room for "
            f"about {store.features.nbytes / 1e9:.3f} GB. Free some space, or choose another --out."
        ) from None
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
