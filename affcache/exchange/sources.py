"""The form that every source is brought into: frame keys, statuses, and matrices that are read block by block.

Here and in the readers, whatever is missing, damaged, of another kind or of unequal length raises InputError, which
names the file, and the row or line at fault; what needs Parquet raises ConfigError where pyarrow isn't installed.
"""

import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from affcache.crops.crop_list import CropList
from affcache.crops.frame_paths import LARGEST_FRAME_NUMBER, parse_path
from affcache.errors import ConfigError, InputError
from affcache.progress import Listener
from affcache.store.reading import ENCODED, Rows

BLOCK = 4 * 4096  # rows read at once: whole blocks of the store's checksums
FLOATS = ("float16", "float32", "float64")
NORM_TOLERANCE = 0.01  # rounding a unit vector to float16 moves its length by less
Matrix = npt.NDArray[Any]
OpenMatrix = Callable[[Path], Matrix]  # (folder for a temporary file) -> (n, D)


class FrameKeys:
    """The video and the frame number of n rows, in any order; gathered row after row, in little memory."""

    def __init__(self) -> None:
        self._index: dict[str, int] = {}  # of a video, each used by at least one row
        self._video = array("q")
        self._frame = array("q")

    def __len__(self) -> int:
        return len(self._video)

    def add(self, video: str, frame: int) -> None:
        """Take the key of the next row.

        Raises:
            ValueError: says what is wrong with it, as a part of a sentence.
        """
        if not video or "\0" in video:  # HDF5 ends a text at a zero byte
            raise ValueError(f"has the video name {video!r}, which a store can't keep")
        if not 0 <= frame <= LARGEST_FRAME_NUMBER:
            raise ValueError(f"has the frame number {frame}, outside 0 to {LARGEST_FRAME_NUMBER}")
        self._video.append(self._index.setdefault(video, len(self._index)))
        self._frame.append(frame)

    def add_path(self, path: str) -> None:
        """Take the key of the next row from the path of its crop; raises as ``add``."""
        _, video, number = parse_path(path)
        self.add(video, number)

    def extend(self, other: "FrameKeys") -> None:
        """Take the keys of another source as those of the next rows."""
        index = np.array([self._index.setdefault(name, len(self._index)) for name in other._index], dtype=np.int64)
        self._video.frombytes(index[np.array(other._video, dtype=np.int64)].tobytes())
        self._frame.extend(other._frame)

    def stored_order(self, place: Callable[[int], str]) -> tuple[CropList, Rows]:
        """Sort the rows, at least one, as a store keeps them: by video name, then by frame number.

        Args:
            place: names a row for messages.

        Returns:
            The list of crops, and int64 (N,): row i of the store is row ``order[i]`` of these.

        Raises:
            InputError: a frame occurs twice.
        """
        names = sorted(self._index)
        rank = np.empty(len(names), dtype=np.int64)
        rank[[self._index[name] for name in names]] = np.arange(len(names))
        video, frame_number = rank[np.array(self._video)], np.array(self._frame, dtype=np.int32)
        order = np.lexsort((frame_number, video)).astype(np.int64)
        video, frame_number = video[order], frame_number[order]
        repeated = np.flatnonzero((np.diff(video) == 0) & (np.diff(frame_number) == 0))
        if len(repeated):
            first, second = sorted(int(row) for row in order[repeated[0] : repeated[0] + 2])
            raise InputError(
                f"Frame {frame_number[repeated[0]]} of the video {names[video[repeated[0]]]} occurs twice: "
                f"{place(first)} and {place(second)}. Expected every frame once. Remove one of the two, or import "
                "sources that overlap, such as those of two tasks, into a store each."
            )
        crops = CropList(
            folders=tuple(Path(name) for name in names),
            video_names=tuple(names),
            video_start=np.cumsum([0, *np.bincount(video, minlength=len(names))], dtype=np.int64),
            frame_number=frame_number,
        )
        return crops, order


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
class ImportSource:
    """What one source holds, with nothing read of its matrices yet."""

    path: Path
    parts: tuple[Part, ...]  # their rows follow one another; at least one
    keys: FrameKeys  # of all n rows
    status: npt.NDArray[np.uint8]  # (n,) 1 encoded, 2 unreadable
    imported_from: str
    provenance: Mapping[str, Any] = field(default_factory=dict)  # of an export of affcache
    labels: int = 0  # labels met on the way, which are not used


def require_floats(file: Path, what: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    """Refuse what isn't a matrix of floating-point numbers with at least one row and one column."""
    if dtype.name not in FLOATS or len(shape) != 2 or 0 in shape:
        raise InputError(
            f"{what} of {file} is {dtype} of shape {shape}. Expected one row of {', '.join(FLOATS)} per frame, shape "
            "(n, D). Name the file that holds the image embeddings."
        )


def require_same_length(file: Path, rows: int, names: Path, named: int) -> None:
    """Refuse a matrix and its list of frames when one is longer."""
    if rows != named:
        raise InputError(
            f"{file} holds {rows:,} embeddings, {names} names {named:,} frames. Expected one frame per embedding, in "
            "the same order. Name the two that belong together, or copy the shorter one again."
        )


def map_bytes(path: Path, offset: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Matrix:
    """Return a read-only memory map of an array that lies in a file as plain bytes."""
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


@dataclass(frozen=True)
class SourceRows:
    """All embeddings of all sources, and the order in which the store keeps them."""

    parts: tuple[Part, ...]
    matrices: list[Matrix]  # (n, D) each
    order: Rows  # (N,) the row of the sources, counted over all parts together, that each row of the store is
    status: npt.NDArray[np.uint8]  # (N,) in the order of the sources

    def read(self, block: slice) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.uint8]]:
        """Gather rows of the store: float16 features (n, D) and status (n,)."""
        rows = self.order[block]
        starts = np.cumsum([0, *(part.rows for part in self.parts)])
        part_of_row = np.searchsorted(starts, rows, side="right") - 1
        features = np.empty((len(rows), self.parts[0].width), dtype="<f2")
        for index in np.unique(part_of_row):
            chosen = part_of_row == index
            features[chosen] = self.matrices[index][rows[chosen] - starts[index]]
        return features, self.status[rows]


def blocks_of(rows: int) -> Iterator[slice]:
    """Yield slices of at most ``BLOCK`` rows that cover all of them."""
    for first in range(0, rows, BLOCK):
        yield slice(first, min(first + BLOCK, rows))


@dataclass
class Rounding:
    """What float16 makes of the embeddings of encoded rows."""

    values: int = 0
    changed_values: int = 0  # values that float16 can't hold exactly
    largest_relative_change: float = 0.0  # of a value that isn't 0, as a fraction of it
    largest_change: float = 0.0
    normalised: bool = True  # every embedding has length 1

    def add(self, block: Matrix, half: npt.NDArray[np.float16]) -> None:
        """Take a block of embeddings, (n, D), and its float16 values; all are finite."""
        self.values += block.size
        lengths = np.linalg.norm(half.astype(np.float32), axis=1)
        self.normalised = self.normalised and bool((np.abs(lengths - 1) <= NORM_TOLERANCE).all())
        if block.dtype == half.dtype:
            return
        change = np.abs(half.astype(block.dtype) - block)
        changed = change > 0  # then the value isn't 0 either
        count = int(np.count_nonzero(changed))
        if count:
            self.changed_values += count
            self.largest_change = max(self.largest_change, float(change.max()))
            relative = change[changed] / np.abs(block[changed])
            self.largest_relative_change = max(self.largest_relative_change, float(relative.max()))


def check_float16(rows: SourceRows, listener: Listener) -> Rounding:
    """Read every embedding once, before anything is written: what float16 can't hold, and what it changes.

    Raises:
        InputError: a value is not finite, or too large for float16; or an unreadable row holds values. Names the row.
    """
    found, status, done = Rounding(), rows.status, 0
    for part, matrix in zip(rows.parts, rows.matrices, strict=True):
        for of_block in blocks_of(part.rows):
            block = np.asarray(matrix[of_block])
            with np.errstate(over="ignore"):
                half = block.astype("<f2")
            _require_finite(part, of_block.start, block, half)
            encoded = status[done : done + len(block)] == ENCODED
            if half[~encoded].any():
                row = of_block.start + int(np.flatnonzero(~encoded & half.any(axis=1))[0])
                raise InputError(
                    f"{part.place(row)} is marked unreadable and holds an embedding. Expected zeros there, as "
                    "'affcache export' writes them. Export the store again."
                )
            found.add(*((block, half) if encoded.all() else (block[encoded], half[encoded])))
            done += len(block)
            listener.progress(done, len(status), "row", "checking")
    return found


def _require_finite(part: Part, first: int, block: Matrix, half: npt.NDArray[Any]) -> None:
    wrong = ~np.isfinite(half)
    if not wrong.any():
        return
    row, column = (int(index) for index in np.argwhere(wrong)[0])
    value = block[row, column]
    problem = "is not finite" if not np.isfinite(value) else "is too large for float16, which ends at 65504"
    raise InputError(
        f"{part.place(first + row)}: value {column} (counted from 0) is {value} and {problem}. Expected embeddings "
        "that float16 can hold. Make them again, in float32, or remove the row from both files."
    )


def pyarrow_parquet() -> Any:
    """Return the module ``pyarrow.parquet``."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ConfigError("Parquet files need pyarrow, which isn't here: pip install pyarrow") from None
    return pyarrow.parquet


@contextmanager
def parquet_file(path: Path) -> Iterator[Any]:
    """Open a Parquet file, a ``pyarrow.parquet.ParquetFile``; what fails while it is open counts as damage."""
    parquet = pyarrow_parquet()
    import pyarrow

    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except (OSError, pyarrow.ArrowException) as error:
        raise cannot_read(path, error) from None


def require_columns(path: Path, file: Any, columns: tuple[str, ...]) -> None:
    """Refuse a Parquet file that lacks one of the columns."""
    missing = [name for name in columns if name not in file.schema_arrow.names]
    if missing:
        raise InputError(
            f"{path} has no column {', '.join(missing)}; it has {', '.join(file.schema_arrow.names)}. Expected the "
            f"columns {', '.join(columns)}. Write it again with image paths, or name another file."
        )


def rows_of(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[Any, ...]]:
    """Yield the values of some columns row by row, a row group in memory at a time."""
    with parquet_file(path) as file:
        require_columns(path, file, columns)
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=list(columns))
            yield from zip(*(table.column(name).to_pylist() for name in columns), strict=True)
