"""What every export says about itself: the encoder, the store it is of, and how many rows it holds."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import affcache
from affcache.errors import InputError
from affcache.store.reading import EmbeddingStore

EXPORT_FORMAT, EXPORT_VERSION = "affcache-export", 1
PARQUET_KEY = b"affcache"  # of the schema metadata
SAFETENSORS_KEY = "affcache"  # of the header's metadata
NPY_FILE = "provenance.json"


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
    """Parse the provenance that was found in ``path``.

    Raises:
        InputError: there is none, it is damaged, or a later affcache wrote it.
    """
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
