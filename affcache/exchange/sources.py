"""The form that every source is brought into: frame keys, statuses, and matrices that are read block by block."""

import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from affcache.crops.crop_list import CropList
from affcache.crops.frame_paths import parse_path, require_key
from affcache.errors import ConfigError, InputError

BLOCK = 4 * 4096  # rows read at once: whole blocks of the store's checksums
FLOATS = ("float16", "float32", "float64")
Matrix = npt.NDArray[Any]
OpenMatrix = Callable[[Path], Matrix]  # (folder for a temporary file) -> (n, D)


@dataclass(frozen=True)
class FrameKeys:
    """The video and the frame number of n rows, in any order."""

    video_names: tuple[str, ...]  # each used by at least one row
    video: npt.NDArray[np.int64]  # (n,) index into video_names
    frame_number: npt.NDArray[np.int32]  # (n,)

    def __len__(self) -> int:
        return len(self.video)


class KeyCollector:
    """Gathers the keys of one source, row after row, in little memory."""

    def __init__(self) -> None:
        self._index: dict[str, int] = {}
        self._video = array("q")
        self._frame = array("q")

    def __len__(self) -> int:
        return len(self._video)

    def add(self, video: str, frame: int) -> None:
        """Take the key of the next row.

        Raises:
            ValueError: says what is wrong with it, as a part of a sentence.
        """
        require_key(video, frame)
        self._append(video, frame)

    def add_path(self, path: str) -> None:
        """Take the key of the next row from the path of its crop, as ``find_crops`` would.

        Raises:
            ValueError: says what is wrong with the path, as a part of a sentence.
        """
        _, video, number = parse_path(path)
        self._append(video, number)

    def _append(self, video: str, frame: int) -> None:
        self._video.append(self._index.setdefault(video, len(self._index)))
        self._frame.append(frame)

    def keys(self) -> FrameKeys:
        """Return what was gathered."""
        return FrameKeys(
            video_names=tuple(self._index),
            video=np.array(self._video, dtype=np.int64),
            frame_number=np.array(self._frame, dtype=np.int32),
        )


def join_keys(parts: Sequence[FrameKeys]) -> FrameKeys:
    """Return the keys of several sources as those of one, rows in the order given."""
    index: dict[str, int] = {}
    videos = []
    for part in parts:
        of_part = [index.setdefault(name, len(index)) for name in part.video_names]
        videos.append(np.array(of_part, dtype=np.int64)[part.video])
    return FrameKeys(tuple(index), np.concatenate(videos), np.concatenate([part.frame_number for part in parts]))


def stored_order(keys: FrameKeys, place: Callable[[int], str]) -> tuple[CropList, npt.NDArray[np.int64]]:
    """Sort rows as a store keeps them: by video name, then by frame number.

    Args:
        keys: of N rows, at least one.
        place: names a row for messages.

    Returns:
        The list of crops, and int64 (N,): row i of the store is row ``order[i]`` of ``keys``.

    Raises:
        InputError: a frame occurs twice.
    """
    by_name = sorted(range(len(keys.video_names)), key=keys.video_names.__getitem__)
    names = [keys.video_names[index] for index in by_name]
    rank = np.empty(len(names), dtype=np.int64)
    rank[by_name] = np.arange(len(names))
    video = rank[keys.video]
    order = np.lexsort((keys.frame_number, video))
    video, frame_number = video[order], keys.frame_number[order]
    repeated = np.flatnonzero((np.diff(video) == 0) & (np.diff(frame_number) == 0))
    if len(repeated):
        first, second = sorted(int(row) for row in order[repeated[0] : repeated[0] + 2])
        raise InputError(
            f"Frame {frame_number[repeated[0]]} of the video {names[video[repeated[0]]]} occurs twice: {place(first)} "
            f"and {place(second)}. Expected every frame once. Remove one of the two, or import sources that overlap, "
            "such as those of two tasks, into a store each."
        )
    crops = CropList(
        folders=tuple(Path(name) for name in names),
        video_names=tuple(names),
        video_start=np.concatenate([[0], np.cumsum(np.bincount(video, minlength=len(names)))]).astype(np.int64),
        frame_number=frame_number,
    )
    return crops, order.astype(np.int64)


@dataclass(frozen=True)
class Part:
    """A matrix of embeddings in one file, and what names its rows in messages."""

    file: Path
    rows: int  # n
    width: int  # D
    dtype: np.dtype[Any]
    open: OpenMatrix  # maps it into memory; what can't be mapped is first unpacked into a temporary file
    named_by: Path | None = None  # the list whose lines name the rows, counted from 1; else rows are counted from 0

    def place(self, row: int) -> str:
        """Name one of the part's rows for a message."""
        return f"{self.named_by}, line {row + 1}" if self.named_by else f"{self.file}, row {row} (counted from 0)"


@dataclass(frozen=True)
class Source:
    """What one source holds, with nothing read of its matrices yet."""

    path: Path
    parts: tuple[Part, ...]  # their rows follow one another; at least one
    keys: FrameKeys  # of all n rows
    status: npt.NDArray[np.uint8]  # (n,) 1 encoded, 2 unreadable
    imported_from: str
    provenance: Mapping[str, Any] = field(default_factory=dict)  # of an export of affcache
    labels: int = 0  # labels met on the way, which are not used


def require_floats(file: Path, what: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    """Refuse what isn't a matrix of floating-point numbers with at least one row and one column.

    Raises:
        InputError: names the file.
    """
    if dtype.name not in FLOATS or len(shape) != 2 or 0 in shape:
        raise InputError(
            f"{what} of {file} is {dtype} of shape {shape}. Expected one row of {', '.join(FLOATS)} per frame, shape "
            "(n, D). Name the file that holds the image embeddings."
        )


def require_same_length(file: Path, rows: int, names: Path, named: int) -> None:
    """Refuse a matrix and its list of frames when one is longer.

    Raises:
        InputError: names both files and both lengths.
    """
    if rows != named:
        raise InputError(
            f"{file} holds {rows:,} embeddings, {names} names {named:,} frames. Expected one frame per embedding, in "
            "the same order. Name the two that belong together, or copy the shorter one again."
        )


def map_bytes(path: Path, offset: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Matrix:
    """Return a read-only memory map of an array that lies in a file as plain bytes.

    Raises:
        InputError: the file is cut short or can't be read.
    """
    try:
        return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)
    except (OSError, ValueError) as error:
        raise cannot_read(path, error) from None


def unpack(folder: Path, blocks: Iterable[Matrix], dtype: np.dtype[Any], shape: tuple[int, int]) -> Matrix:
    """Write blocks of rows one after another into a nameless file, which goes away by itself, and map it.

    Args:
        folder: on the disk that has room for it.
        blocks: (n, D) each; together they have ``shape``.
        dtype: of the values written.
        shape: (rows, D).
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        for block in blocks:
            file.write(np.ascontiguousarray(block, dtype=dtype).data)
        file.flush()
        return np.memmap(file, dtype=dtype, mode="r", shape=shape)


def cannot_read(path: Path, error: Exception) -> InputError:
    """Return the error for a file that is missing, damaged or of another kind."""
    reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
    return InputError(
        f"{path} can't be read: {reason}. Expected a whole file of its kind. Check the path, or copy the file again."
    )


def read_rows(parts: tuple[Part, ...], matrices: list[Matrix], rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float16]:
    """Gather rows, counted over all parts together, as float16 (n, D)."""
    starts = np.cumsum([0, *(part.rows for part in parts)])
    part_of_row = np.searchsorted(starts, rows, side="right") - 1
    features = np.empty((len(rows), parts[0].width), dtype="<f2")
    for index in np.unique(part_of_row):
        chosen = part_of_row == index
        features[chosen] = matrices[index][rows[chosen] - starts[index]]
    return features


def blocks_of(rows: int) -> Iterator[slice]:
    """Yield slices of at most ``BLOCK`` rows that cover all of them."""
    for first in range(0, rows, BLOCK):
        yield slice(first, min(first + BLOCK, rows))


def pyarrow_parquet() -> Any:
    """Return the module ``pyarrow.parquet``.

    Raises:
        ConfigError: pyarrow isn't installed.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise ConfigError("Parquet files need pyarrow, which isn't here: pip install pyarrow") from None
    return pyarrow.parquet


@contextmanager
def parquet_file(path: Path) -> Iterator[Any]:
    """Open a Parquet file, a ``pyarrow.parquet.ParquetFile``; what fails while it is open counts as damage.

    Raises:
        ConfigError: pyarrow isn't installed.
        InputError: missing, damaged, or no Parquet file.
    """
    parquet = pyarrow_parquet()
    import pyarrow

    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except (OSError, pyarrow.ArrowException) as error:
        raise cannot_read(path, error) from None


def require_columns(path: Path, file: Any, columns: tuple[str, ...]) -> None:
    """Refuse a Parquet file that lacks one of the columns.

    Raises:
        InputError: names the missing ones and those that are there.
    """
    missing = [name for name in columns if name not in file.schema_arrow.names]
    if missing:
        raise InputError(
            f"{path} has no column {', '.join(missing)}; it has {', '.join(file.schema_arrow.names)}. Expected the "
            f"columns {', '.join(columns)}. Write it again with image paths, or name another file."
        )


def rows_of(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[Any, ...]]:
    """Yield the values of some columns row by row, a row group in memory at a time.

    Raises:
        ConfigError: pyarrow isn't installed.
        InputError: missing, damaged, or without one of the columns.
    """
    with parquet_file(path) as file:
        require_columns(path, file, columns)
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=list(columns))
            yield from zip(*(table.column(name).to_pylist() for name in columns), strict=True)
