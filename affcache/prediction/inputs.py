"""What a prediction is asked of: photos and videos, crops, or stores; and the embeddings of all but the first."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from affcache.crops.archives import UnreadableCropError
from affcache.crops.crop_list import IMAGE_SUFFIXES, CropList, split_name
from affcache.crops.folders import find_crops, is_archive
from affcache.crops.images import decode_crop
from affcache.crops.names import canonical
from affcache.encoders.side_by_side import AnyEncoder
from affcache.errors import InputError, first_line
from affcache.extraction.pipeline import Pipeline, default_workers, is_large
from affcache.faces.find import TABLE
from affcache.faces.media import VIDEO_SUFFIXES, Media, find_media
from affcache.faces.table import KEYS
from affcache.files import read_bytes
from affcache.prediction.outputs import Embeddings
from affcache.progress import Listener, counted
from affcache.store.frames import ENCODED, FrameIndex

STORES = (".h5", ".hdf5")
LOOKED_AT = 16  # subfolders, to tell crops from photos
LARGEST_CROP = 2**24  # bytes, of a picture that is looked at for it
CROPS_OF = "crops"  # column of the video among the crops that a row is of; in no table that is written


@dataclass(frozen=True)
class Inputs:
    """What was given, by kind, each in the order given."""

    stores: tuple[Path, ...]
    crops: tuple[Path, ...]  # folders and archives
    media: tuple[Media, ...]
    others: Counter[str]  # files in folders that are none of these, by suffix


def sort_inputs(inputs: Sequence[Path]) -> Inputs:
    """Tell stores, crops, and photos and videos apart.

    Raises:
        InputError: one isn't there, or a folder holds none of these.
    """
    inputs = [path.parent if path.name == TABLE else path for path in inputs]
    inputs = list({path.resolve(): path for path in reversed(inputs)}.values())[::-1]  # each once
    stores = [path for path in inputs if path.suffix.lower() in STORES and not path.is_dir()]
    crops = [path for path in inputs if path not in stores and (is_archive(path) or holds_crops(path))]
    rest = [path for path in inputs if path not in stores and path not in crops]
    for path in (*stores, *crops):
        if not path.exists():
            raise InputError(f"{path} does not exist. Expected a store, or an archive of crops. Check the path.")
    for path in rest:
        if path.is_dir() and _holds_frames(path):
            raise InputError(
                f"{path} looks like the crops of one video: small pictures with numbers for names. Expected photos, "
                f"videos, or a folder with a folder of crops for each video. Name the folder above, {path.parent}; if "
                "these are photos, give them other names."
            )
    media, others = find_media(rest) if rest else ([], Counter())
    return Inputs(tuple(stores), tuple(crops), tuple(media), others)


def holds_crops(folder: Path) -> bool:
    """Say whether a folder is one of crops: made by ``affcache faces``, or holding folders of small numbered pictures.

    A folder that holds videos or pictures itself is none.
    """
    if not folder.is_dir():
        return False
    if (folder / TABLE).is_file():
        return True
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    if any(entry.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES for entry in entries if entry.is_file()):
        return False
    if any(is_archive(entry) for entry in entries):
        return True
    said = map(_holds_frames, islice(_folders_below(folder), LOOKED_AT))
    return next((one for one in said if one is not None), False)


def _folders_below(folder: Path) -> Iterator[Path]:
    """Yield the folders below one by name, each before those in it, which are listed only if another is asked for."""
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            yield entry
            yield from _folders_below(entry)


def _holds_frames(folder: Path) -> bool | None:
    """Say whether a folder's pictures are small and have numbers for names, and no videos are among them.

    None where there is none that can be read.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in IMAGE_SUFFIXES | VIDEO_SUFFIXES or path.name.startswith("."):
            continue
        parts = split_name(path.name)
        if parts is None or parts[0]:
            return False
        try:
            return not is_large(decode_crop(read_bytes(path, LARGEST_CROP)).pixels)
        except (OSError, UnreadableCropError):  # damaged: the next may say
            continue
    return None


Part = tuple[npt.NDArray[np.int64], Embeddings]  # rows (k,) of the table, and their embeddings (k, D)


@dataclass(frozen=True)
class EmbeddedRows:
    """Rows of a table whose faces are cut out already, and their embeddings, which come in parts.

    ``parts`` leaves out rows without an embedding.
    """

    name: str  # of what was given
    keys: pa.Table  # n rows of ``KEYS``, success being whether a face was found, and of crops ``CROPS_OF``
    persons: npt.NDArray[np.int64]  # (n,) whose face it is, for each input on its own; smoothing keeps them apart
    parts: Iterator[Part]
    total: int  # embeddings to come, at most


def keys_of_frames(frames: FrameIndex, *, named: bool) -> pa.Table:
    """Return a row for each frame of stores: the video is the input, after the store's path where ``named``."""
    of_video = [f"{frames.path}/{name}" if named else name for name in frames.video_names]
    names = np.asarray(of_video, dtype=object)[frames.video_of_rows()]
    return _keys(names, np.asarray(frames.frame_number), np.asarray(frames.status) == ENCODED)


def rows_of_crops(root: Path, encoder: AnyEncoder, batch_size: int, listener: Listener) -> EmbeddedRows:
    """Return the rows of crops in a folder or an archive, by video and frame, which are encoded as they are asked for.

    In a folder that ``affcache faces`` made, the rows are those of its table.

    Raises:
        InputError: there is none, or two crops are of one frame.
    """
    crops = find_crops([root])
    pipeline = Pipeline(crops, encoder, listener, batch_size, default_workers())
    if (root / TABLE).is_file():
        keys, persons, row_of = _rows_of_faces(root / TABLE, crops)
        if unknown := int((row_of < 0).sum()):
            listener.warning(f"{counted(unknown, 'crop')} of {root} left out: {TABLE} there doesn't have them.")
    else:
        videos = np.repeat(np.arange(len(crops.video_names)), np.diff(crops.video_start))
        names = np.asarray([str(folder) for folder in crops.folders], dtype=object)[videos]
        keys, persons = _keys(names, crops.frame_number, np.ones(len(crops), dtype=bool)), videos
        keys = keys.append_column(CROPS_OF, pa.array(np.asarray(crops.video_names, dtype=object)[videos], pa.string()))
        row_of = np.arange(len(crops))

    def parts() -> Iterator[Part]:
        for rows, (features, status) in pipeline.run(np.flatnonzero(row_of >= 0)):
            there = status == ENCODED
            yield row_of[rows[there]], features[there]
        if unreadable := pipeline.stats.unreadable:
            first = min(unreadable)
            listener.warning(
                f"{counted(len(unreadable), 'crop')} of {root} can't be read, and are left empty; the first is "
                f"{crops.path(first)}: {unreadable[first]}"
            )

    return EmbeddedRows(str(root), keys, persons, parts(), int((row_of >= 0).sum()))


def _keys(names: npt.NDArray[np.object_], frames: npt.NDArray[np.int32], success: npt.NDArray[np.bool_]) -> pa.Table:
    """Return rows of which nothing else is known: one person in each video."""
    nothing = pa.nulls(len(names), pa.float32())
    columns = [
        pa.array(names, pa.string()), pa.array(frames), pa.nulls(len(names), pa.float64()),
        pa.array(np.ones(len(names), np.int32), mask=~success), *[nothing] * 5, pa.array(success),
    ]  # fmt: skip
    return pa.table(columns, schema=KEYS)


def _rows_of_faces(path: Path, crops: CropList) -> tuple[pa.Table, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the rows of a table of faces, whose they are, and for each crop its row, -1 where it has none.

    Raises:
        InputError: it is no table that ``affcache faces`` wrote.
    """
    try:
        table = pq.read_table(path)
        keys = table.select(KEYS.names).cast(KEYS).append_column(CROPS_OF, table["crops"])
        places = zip(table["crops"].to_pylist(), table["frame"].to_pylist(), strict=True)
        row_at = {(canonical(name), frame): row for row, (name, frame) in enumerate(places) if name}
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise InputError(
            f"{path} can't be read ({first_line(error)}). Expected the table that 'affcache faces' wrote. Run it "
            "again, or remove that file: its crops then stand for themselves."
        ) from None
    names = [canonical(name) for name in crops.video_names]
    videos = np.repeat(np.arange(len(names)), np.diff(crops.video_start)).tolist()
    numbers = crops.frame_number.tolist()
    row_of = [row_at.get((names[v], frame), -1) for v, frame in zip(videos, numbers, strict=True)]
    whose: dict[tuple[str, int], int] = {}
    both = zip(keys["input"].to_pylist(), keys["face_id"].fill_null(0).to_pylist(), strict=True)
    persons = [whose.setdefault(one, len(whose)) for one in both]
    return keys, np.asarray(persons, np.int64), np.asarray(row_of, np.int64)
