"""The HDF5 structure of a store, format 1: which datasets it has, and where their bytes lie in the file."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from affcache.errors import StoreError

FORMAT = "affcache-embeddings"
FORMAT_VERSION = 1
NUMERIC_DATASETS: dict[str, np.dtype[Any]] = {
    "features": np.dtype("<f2"),
    "status": np.dtype("u1"),
    "frame_number": np.dtype("<i4"),
    "video_start": np.dtype("<i8"),
    "block_checksum": np.dtype("<u4"),
}
FIELDS_THAT_DO_NOT_CHANGE_NUMBERS = ("model", "pretrained", "versions", "batch_size", "compiled")  # beyond rounding


def mapped_fields(path: Path) -> dict[str, Any]:
    """Read the structure of a store file, check that every byte it promises is there, and map its arrays.

    Returns:
        The fields of an ``EmbeddingStore``, but for its path.

    Raises:
        StoreError: no such file, not a store, of another format version, or cut short.
    """
    if not path.is_file():
        raise StoreError(
            f"There is no embedding store at {path}. Make one with 'affcache extract --store {path}', or say where "
            'it is with --store FILE or with store = "..." in affcache.toml.'
        )
    try:
        # no HDF5 lock: a store may be looked at while it is written
        with h5py.File(path, "r", locking=False) as file:
            _check_format(path, file)
            places = {name: _place(file[name], dtype) for name, dtype in NUMERIC_DATASETS.items()}
            fields = {
                "video_names": tuple(file["video_name"].asstr()[:]),
                "encoder": json.loads(file.attrs["encoder"]),
                "encoder_fingerprint": str(file.attrs["encoder_fingerprint"]),
                "index_sha256": str(file.attrs.get("index_sha256", "")),
            }
    except PermissionError as error:
        raise StoreError(
            f"The store {path} can't be opened: {error.strerror}. Expected a file that may be read. Give yourself the "
            "right to read it, or name another with --store FILE."
        ) from None
    except (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise StoreError(
            f"{path} can't be read as an embedding store: it is cut short, damaged or no HDF5 file at all "
            f"({type(error).__name__}: {error}). Check the path. Restore the store from a sound copy, or delete it and "
            "extract again."
        ) from None
    needed = max(offset + dtype.itemsize * int(np.prod(shape)) for dtype, offset, shape in places.values())
    size = path.stat().st_size
    if size < needed:
        raise StoreError(
            f"{path} is cut short: {size:,} bytes, expected at least {needed:,}. A copy or download broke off. "
            "Copy it again, or delete it and extract again."
        )
    maps = {name: np.memmap(path, dtype, "r", offset, shape) for name, (dtype, offset, shape) in places.items()}
    return {**maps, **fields}


def _check_format(path: Path, file: h5py.File) -> None:
    found, version = file.attrs.get("format"), file.attrs.get("format_version")
    if found != FORMAT:
        raise StoreError(
            f"{path} is an HDF5 file but no embedding store: its attribute 'format' is {found!r}, expected "
            f"{FORMAT!r}. Make a store with 'affcache extract --store FILE'."
        )
    if version != FORMAT_VERSION:
        raise StoreError(
            f"{path} has store format version {version}; this affcache reads version {FORMAT_VERSION}. Use the "
            "affcache version that wrote it, or delete it and extract again."
        )


def _place(dataset: h5py.Dataset, dtype: np.dtype[Any]) -> tuple[np.dtype[Any], int, tuple[int, ...]]:
    """Return the dtype of a dataset, the offset of its bytes in the file, and its shape."""
    offset = dataset.id.get_offset()
    if offset is None or dataset.dtype != dtype:
        raise ValueError(f"{dataset.name} is {dataset.dtype} and not one contiguous {dtype}")
    return dtype, int(offset), tuple(dataset.shape)


def fingerprint(description: Mapping[str, Any]) -> str:
    """Return the sha256 over the fields of an encoder description that change the embeddings, in canonical JSON."""
    deciding = {k: v for k, v in description.items() if k not in FIELDS_THAT_DO_NOT_CHANGE_NUMBERS}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def differing_fields(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Say which number-changing fields of two encoder descriptions differ, a line each, values included."""
    names = [n for n in {**ours, **theirs} if n not in FIELDS_THAT_DO_NOT_CHANGE_NUMBERS]
    return [f"{n}: {ours.get(n)!r} against {theirs.get(n)!r}" for n in names if ours.get(n) != theirs.get(n)]
