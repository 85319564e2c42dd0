"""What clip-retrieval writes: img_emb/img_emb_<k>.npy, and metadata/metadata_<k>.parquet with paths of images."""

import re
from pathlib import Path

import numpy as np

from affcache.errors import InputError
from affcache.exchange.sources import (
    FrameKeys,
    ImportSource,
    Part,
    cannot_read,
    gather,
    require_floats,
    require_same_length,
    rows_of,
)

EMBEDDINGS, METADATA = "img_emb", "metadata"


def open_clip_retrieval(folder: Path) -> ImportSource:
    """Read which frames a folder of clip-retrieval holds, and where the embeddings lie.

    Args:
        folder: holds img_emb/ and metadata/; part k of one belongs to part k of the other, float (n, D).
    """
    parts = [npy_part(embeddings, metadata, _keys_of(metadata)) for embeddings, metadata in matching_parts(folder)]
    return ImportSource(folder, parts, "clip-retrieval")


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


def npy_part(path: Path, metadata: Path, keys: FrameKeys) -> Part:
    """Return a .npy file of embeddings, float (n, D), whose rows the metadata name."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise cannot_read(path, error) from None
    require_floats(path, "The array", array)
    require_same_length(path, len(array), metadata, len(keys))
    return Part(path, keys, array.shape[1], lambda folder: array)


def _numbered(folder: Path, name: str, suffix: str) -> dict[int, Path]:
    """Map the numbers of files such as img_emb_07.npy to the files."""
    numbered: dict[int, Path] = {}
    pattern = re.compile(rf"{name}_(\d+){re.escape(suffix)}", re.ASCII)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = pattern.fullmatch(path.name)
        if match and (other := numbered.setdefault(int(match[1]), path)) is not path:
            raise InputError(
                f"{path} and {other.name} beside it have the same number. Expected one file per part. Remove the one "
                "of an older run."
            )
    return numbered


def _keys_of(metadata: Path) -> FrameKeys:
    paths = ((path or "",) for (path,) in rows_of(metadata, ("image_path",)))
    expected = (
        "image_path to end in <video>/<frame>.jpg. Encode crops that lie in a folder per video, or mend the column."
    )
    return gather(metadata, paths, FrameKeys.add_path, expected)
