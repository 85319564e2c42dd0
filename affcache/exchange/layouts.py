"""Embeddings as others lay them out: clip-retrieval's folders, and the HDF5 file of arXiv 2403.09915's code."""

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from affcache.crops.crop_list import LARGEST_LIST
from affcache.crops.names import VideoNames, names_below
from affcache.errors import InputError
from affcache.exchange import foreign_hdf5
from affcache.exchange.sources import FrameKeys, ImportSource, Matrix, Part, gather, require_floats, require_same_length
from affcache.files import open_regular, read_lines
from affcache.store.reading import FORMAT
from affcache.tabular import cannot_read, reading, rows_of

EMBEDDINGS, METADATA = "img_emb", "metadata"
DATASETS = ("train_features", "val_features")
_LABEL = re.compile(r"-?\d+(\.\d*)?(,-?\d+(\.\d*)?)*", re.ASCII)  # 4, or 0,1,1,0,...


def name_videos(sources: Sequence[ImportSource]) -> None:
    """Name the videos of rows that came with the paths of their crops: by the last folder of a path.

    Where a source has different folders of that name, neither the end of the other, all go by ``names_below``.
    """
    keys = [[part.keys for part in source.parts if part.keys.are_paths] for source in sources]
    of_sources = [sorted({folder for one in of_source for folder in one.index}) for of_source in keys]
    every = sorted({folder for folders in of_sources for folder in folders})
    called = {folder: folder.rpartition("/")[2] for folder in every}
    last = VideoNames(sorted(set(called.values())))
    try:
        for folders, source in zip(of_sources, sources, strict=True):
            last.match(folders, source.path)
    except InputError:
        called = dict(zip(every, names_below(every), strict=True))
    for of_source in keys:
        for one in of_source:
            one.called = called


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
        open_regular(path).close()
        array = np.lib.format.open_memmap(path, mode="r")
    except MemoryError:
        raise
    except Exception as error:  # a damaged header, which is Python, makes numpy raise nearly anything
        raise cannot_read(path, error) from None
    require_floats(path, "The array", array.dtype.name, array.shape)
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


def open_published_code(features: Path, listing: Path) -> ImportSource:
    """Read which frames a pair of files holds, and where the features lie.

    Args:
        features: HDF5, with the dataset ``train_features`` or ``val_features``, float (n, D).
        listing: text, n lines ``path<TAB>label`` in the order of the features.
    """
    name, dtype, (rows, width), offset = _features_of(features)
    keys = _read_listing(listing)
    require_same_length(features, rows, listing, len(keys))

    def matrix(folder: Path) -> Matrix:
        """Map a contiguous dataset into memory; unpack a chunked or compressed one first."""
        try:
            if offset is not None:
                return np.memmap(features, dtype=dtype, mode="r", offset=offset, shape=(rows, width))
            with tempfile.TemporaryFile(dir=folder) as file:
                foreign_hdf5.unpack(features, name, file)
                return np.memmap(file, dtype=dtype, mode="r", shape=(rows, width))
        except (OSError, ValueError) as error:
            raise cannot_read(features, error) from None

    return ImportSource(features, [Part(features, keys, width, matrix, listing)], "published code", labels=len(keys))


def _read_listing(path: Path) -> FrameKeys:
    """Read the frames of a list. Its labels are checked for their form alone: they show when a line is malformed."""
    keys = FrameKeys()
    blank = 0  # the first of a run of blank lines, which may end the file
    with reading(path, UnicodeDecodeError):
        for number, line in enumerate(read_lines(path, LARGEST_LIST), start=1):
            if not line.strip():
                blank = blank or number
                continue
            if blank:
                raise _malformed(path, blank, "is blank, with more lines after it")
            crop, tab, label = line.rpartition("\t")
            if not tab or not _LABEL.fullmatch(label.strip()):
                raise _malformed(path, number, f"is {line.rstrip()[:80]!r}")
            try:
                keys.add_path(crop.strip())
            except ValueError as error:
                raise _malformed(path, number, str(error)) from None
    return keys


def _malformed(path: Path, number: int, problem: str) -> InputError:
    return InputError(
        f"{path}, line {number} {problem}. Expected <video>/<frame>.jpg, a tab and a label on every line, since line n "
        "names row n of the features. Restore the list that was written with them."
    )


def refuse_store(path: Path) -> None:
    """Raise InputError when an HDF5 file is an embedding store already; what can't be read is judged later."""
    try:
        is_store = foreign_hdf5.described(path)["format"] == FORMAT
    except (OSError, ValueError):
        return
    if is_store:
        raise InputError(
            f"{path} is an embedding store of affcache already. Expected features of the published code. Use it as it "
            f"is, with --store {path}."
        )


def _features_of(path: Path) -> tuple[str, np.dtype[Any], tuple[int, int], int | None]:
    """Return name, dtype, shape and offset of the features in an HDF5 file, without offset where they are packed."""
    with reading(path, ValueError):
        held = foreign_hdf5.described(path)
    found = [name for name in DATASETS if name in held["datasets"]]
    if len(found) != 1:
        raise InputError(
            f"{path} holds {' and '.join(found) or 'neither ' + ' nor '.join(DATASETS)} (it has "
            f"{', '.join(held['names']) or 'nothing'}). Expected one of the datasets {' and '.join(DATASETS)} "
            "in a file. Name the file that holds one of them, or split this one."
        )
    features = held["datasets"][found[0]]
    require_floats(path, f"The dataset {found[0]}", features["dtype"], features["shape"])
    if not features["readable"]:
        raise cannot_read(path, ValueError(f"{found[0]} lies in other files, or in chunks of no sensible size"))
    rows, width = features["shape"]
    return found[0], np.dtype(features["bytes"]), (rows, width), features["offset"]
