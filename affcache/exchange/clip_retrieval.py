"""What clip-retrieval writes: img_emb/img_emb_<k>.npy, and metadata/metadata_<k>.parquet with paths of images."""

import re
from pathlib import Path

import numpy as np

from affcache.errors import InputError
from affcache.exchange.sources import (
    FrameKeys,
    ImportSource,
    Matrix,
    Part,
    cannot_read,
    require_floats,
    require_same_length,
    rows_of,
)
from affcache.store.reading import ENCODED

IMPORTED_FROM = "clip-retrieval"
EMBEDDINGS, METADATA = "img_emb", "metadata"


def open_clip_retrieval(folder: Path) -> ImportSource:
    """Read which frames a folder of clip-retrieval holds, and where the embeddings lie.

    Args:
        folder: holds img_emb/ and metadata/; part k of one belongs to part k of the other, float (n, D).
    """
    parts, keys = [], FrameKeys()
    for embeddings, metadata in matching_parts(folder):
        part = open_npy(embeddings)
        of_part = _keys_of(metadata)
        require_same_length(embeddings, part.rows, metadata, len(of_part))
        parts.append(part)
        keys.extend(of_part)
    return ImportSource(folder, tuple(parts), keys, np.full(len(keys), ENCODED, dtype=np.uint8), IMPORTED_FROM)


def matching_parts(folder: Path) -> list[tuple[Path, Path]]:
    """List the pairs of embeddings and metadata, in the order of their numbers."""
    embeddings = _numbered(folder / EMBEDDINGS, EMBEDDINGS, ".npy")
    metadata = _numbered(folder / METADATA, METADATA, ".parquet")
    if not embeddings or embeddings.keys() != metadata.keys():
        alone = sorted(embeddings.keys() ^ metadata.keys())
        found = f"part {alone[0]} of one has no counterpart" if alone else "there are none"
        raise InputError(
            f"{folder} doesn't hold embeddings with the paths of their images: {found}. Expected "
            f"{EMBEDDINGS}/{EMBEDDINGS}_<k>.npy and {METADATA}/{METADATA}_<k>.parquet for every k, as clip-retrieval "
            "writes them. Name the folder that holds both, and copy what is missing."
        )
    return [(embeddings[number], metadata[number]) for number in sorted(embeddings)]


def open_npy(path: Path) -> Part:
    """Return a .npy file of embeddings, float (n, D), as a part of a source."""

    def matrix(folder: Path | None = None) -> Matrix:
        try:
            return np.lib.format.open_memmap(path, mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise cannot_read(path, error) from None

    array = matrix()
    require_floats(path, "The array", array.dtype, array.shape)
    rows, width = array.shape
    return Part(path, rows, width, array.dtype, matrix)


def _numbered(folder: Path, name: str, suffix: str) -> dict[int, Path]:
    """Map the numbers of files such as img_emb_07.npy to the files."""
    numbered: dict[int, Path] = {}
    pattern = re.compile(rf"{name}_(\d+){re.escape(suffix)}", re.ASCII)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = pattern.fullmatch(path.name)
        if match and int(match.group(1)) in numbered:
            raise InputError(
                f"{path} and {numbered[int(match.group(1))].name} beside it have the same number. Expected one file "
                "per part. Remove the one of an older run."
            )
        if match:
            numbered[int(match.group(1))] = path
    return numbered


def _keys_of(metadata: Path) -> FrameKeys:
    keys = FrameKeys()
    for (path,) in rows_of(metadata, ("image_path",)):
        try:
            keys.add_path(path or "")
        except ValueError as error:
            raise InputError(
                f"{metadata}, row {len(keys)} (counted from 0) {error}. Expected image_path to end in "
                "<video>/<frame>.jpg. Encode crops that lie in a folder per video, or mend the column."
            ) from None
    return keys
