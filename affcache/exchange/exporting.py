"""Export as a whole: a complete, sound store written for other tools, to a temporary name first."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from affcache.errors import InputError
from affcache.exchange.settings import ExportSettings
from affcache.exchange.writers import write_npy, write_parquet, write_safetensors
from affcache.progress import Listener
from affcache.settings import build, default_store
from affcache.store.reading import EmbeddingStore

WRITERS: dict[str, tuple[str, Callable[[Path, EmbeddingStore, Listener], None]]] = {  # ending of the default name
    "npy": ("-npy", write_npy),
    "parquet": (".parquet", write_parquet),
    "safetensors": (".safetensors", write_safetensors),
}


@dataclass(frozen=True)
class ExportResult:
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

    def to_json(self) -> dict[str, Any]:
        """Return the result as one JSON object."""
        return asdict(self)


def export_embeddings(
    settings: ExportSettings | None = None, /, *, listener: Listener | None = None, **values: Any
) -> ExportResult:
    """Write the embeddings of a complete store, with their frames and provenance, for other tools.

    All N rows are written, unreadable ones with status 2 and zeros, without changing a bit of the float16 (N, D).

    Args:
        settings: all settings, or none and single ones by name, such as ``export_embeddings(store=..., format="npy")``.
        listener: receives messages and progress.

    Raises:
        StoreError: the store is missing, incomplete or damaged.
        InputError: the output exists already or can't be written.
        ConfigError: a setting is unknown or out of range, or pyarrow isn't installed.
    """
    settings = build(ExportSettings, values, over=settings)
    listener = listener or Listener()
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
        rows=len(store),
        encoded=store.counts["encoded"],
        unreadable=store.counts["unreadable"],
        videos=len(store.video_names),
        width=store.width,
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
