"""Which layout a source has, and whether several of them belong into one store."""

from collections.abc import Sequence
from pathlib import Path

from affcache.errors import ConfigError, InputError, StoreError
from affcache.exchange.clip_retrieval import open_clip_retrieval
from affcache.exchange.exports import open_npy_export, open_parquet_export, open_safetensors_export
from affcache.exchange.provenance import NPY_FILE
from affcache.exchange.published_code import open_published_code, refuse_store
from affcache.exchange.sources import Source, cannot_read
from affcache.store.layout import differing_fields

HDF5_MAGIC, PARQUET_MAGIC = b"\x89HDF\r\n\x1a\n", b"PAR1"
EXPECTED = (
    "an HDF5 file of the published code, a folder of clip-retrieval (img_emb/ and metadata/), or a folder, .parquet or "
    ".safetensors file that 'affcache export' wrote"
)


def open_sources(paths: Sequence[Path], lists: Sequence[Path]) -> list[Source]:
    """Open every source and check that they may go into one store.

    Args:
        paths: at least one.
        lists: of the HDF5 files among them, in their order.

    Raises:
        ConfigError: no source, or another number of lists than of HDF5 files.
        InputError: a source is missing, damaged, or of an unknown layout; or their widths differ.
        StoreError: they were made with two encoders.
    """
    if not paths:
        raise ConfigError(f"No source is given. Expected {EXPECTED}: affcache import SOURCE --store FILE.")
    magics = [_magic(path) for path in paths]
    for path, magic in zip(paths, magics, strict=True):
        if magic == HDF5_MAGIC:
            refuse_store(path)
    files = magics.count(HDF5_MAGIC)
    if files != len(lists):
        raise ConfigError(
            f"{files} HDF5 files and {len(lists)} lists are given. Expected a list for each, in the same order, since "
            "it says which row is which frame: affcache import train.h5 val.h5 --list train.txt --list val.txt ..."
        )
    remaining = iter(lists)
    sources = [
        open_published_code(path, next(remaining)) if magic == HDF5_MAGIC else _open_other(path, magic)
        for path, magic in zip(paths, magics, strict=True)
    ]
    for source in sources[1:]:
        _require_same_encoder(sources[0], source)
    _require_same_width(sources)
    return sources


def _magic(path: Path) -> bytes:
    """Return the first bytes of a file, none of a folder."""
    if path.is_dir():
        return b""
    try:
        with path.open("rb") as file:
            return file.read(len(HDF5_MAGIC))
    except OSError as error:
        raise cannot_read(path, error) from None


def _open_other(path: Path, magic: bytes) -> Source:
    if path.is_dir():
        return open_npy_export(path) if (path / NPY_FILE).exists() else open_clip_retrieval(path)
    if magic.startswith(PARQUET_MAGIC):
        return open_parquet_export(path)
    if path.suffix == ".safetensors":
        return open_safetensors_export(path)
    raise InputError(f"{path} is nothing that can be imported. Expected {EXPECTED}. Check the path.")


def _require_same_encoder(first: Source, other: Source) -> None:
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


def _require_same_width(sources: Sequence[Source]) -> None:
    first, *others = (part for source in sources for part in source.parts)
    for part in others:
        if part.width != first.width:
            raise InputError(
                f"{first.file} has embeddings of {first.width} values, {part.file} of {part.width}. Expected one "
                "encoder, and so one width. Import each into a store of its own."
            )
