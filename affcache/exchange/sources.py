"""The form that every source is brought into: frame keys, statuses, and matrices that are read block by block.

Here and in the readers, whatever is missing, damaged, of another kind or of unequal length raises InputError, which
names the file, and the row or line at fault; what needs Parquet raises ConfigError where pyarrow isn't installed.
"""

import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from affcache.crops.crop_list import LARGEST_FRAME_NUMBER, CropList, parse_path
from affcache.crops.names import canonical, plain_path
from affcache.errors import InputError
from affcache.progress import Listener
from affcache.store.frames import ENCODED, Rows
from affcache.store.reading import EmbeddingStore

BLOCK = 4 * 4096  # rows read at once: whole blocks of the store's checksums
FLOATS = ("float16", "float32", "float64")
WIDEST = 2**16  # values of an embedding
NORM_TOLERANCE = 0.01  # rounding a unit vector to float16 moves its length by less
Matrix = npt.NDArray[Any]
OpenMatrix = Callable[[Path], Matrix]  # (folder for a temporary file) -> (n, D)


class FrameKeys:
    """The video, the frame number and the status of n rows, in any order; gathered row after row, in little memory."""

    def __init__(self) -> None:
        self.index: dict[str, int] = {}  # of a video, each used by at least one row
        self.are_paths = False  # whether ``index`` has the folders of crops, not the names of videos
        self.called: Mapping[str, str] = {}  # the name of the video, by folder
        self.video, self.frame, self.status = array("q"), array("q"), bytearray()

    def __len__(self) -> int:
        return len(self.video)

    def add(self, video: str, frame: int, status: int = ENCODED) -> None:
        """Take the key of the next row.

        Raises:
            ValueError: says what is wrong with it, as a part of a sentence.
        """
        if not video or "\0" in video:  # HDF5 ends a text at a zero byte
            raise ValueError(f"has the video name {video!r}, which a store can't keep")
        if not 0 <= frame <= LARGEST_FRAME_NUMBER:
            raise ValueError(f"has the frame number {frame}, outside 0 to {LARGEST_FRAME_NUMBER}")
        self.video.append(self.index.setdefault(video, len(self.index)))
        self.frame.append(frame)
        self.status.append(status)

    def add_path(self, path: object) -> None:
        """Take the key of the next row from the path of its crop; raises as ``add``."""
        if not isinstance(path, str):  # a column may hold anything
            raise ValueError(f"has the path {path!r}, which is no text")
        folder, _, frame = parse_path(path)
        self.add(plain_path(folder), frame)
        self.are_paths = True

    @property
    def names(self) -> list[str]:
        """The names of the videos in ``index``, in its order."""
        return [self.called.get(name, name) for name in self.index]


def gather(path: Path, rows: Iterable[tuple[Any, ...]], add: Callable[..., None], expected: str) -> FrameKeys:
    """Take the keys of a table's rows by ``add(keys, *row)``; where it raises ValueError, say what was expected."""
    keys = FrameKeys()
    for row in rows:
        try:
            add(keys, *row)
        except ValueError as error:
            raise InputError(f"{path}, row {len(keys)} (counted from 0) {error}. Expected {expected}") from None
    return keys


@dataclass(frozen=True)
class Part:
    """A matrix of embeddings in one file, and what names its rows."""

    file: Path
    keys: FrameKeys  # of its n rows
    width: int  # D
    open: OpenMatrix  # maps it into memory; what can't be mapped is first unpacked into a temporary file
    named_by: Path | None = None  # the list whose lines name the rows, counted from 1; else rows are counted from 0
    remedy = "Make them again, in float32, or remove the row from both files."  # where float16 can't hold a value

    def __len__(self) -> int:
        return len(self.keys)

    def place(self, row: int) -> str:
        """Name one of the part's rows for a message."""
        return f"{self.named_by}, line {row + 1}" if self.named_by else f"{self.file}, row {row} (counted from 0)"

    def value(self, column: int) -> str:
        """Name one of the values of an embedding for a message."""
        return f"value {column} (counted from 0)"


@dataclass(frozen=True)
class ImportSource:
    """What one source holds, with nothing read of its matrices yet."""

    path: Path
    parts: Sequence[Part]  # their rows follow one another; at least one
    imported_from: str
    provenance: Mapping[str, Any] = field(default_factory=dict)  # of an export of affcache
    labels: int = 0  # labels met on the way, which are not used
    features: Mapping[str, Any] = field(default_factory=dict)  # of a table: what its store says of them
    left_out: int = 0  # rows of a table in which a value is missing


def require_floats(file: Path, what: str, dtype: str, shape: Sequence[int]) -> None:
    """Refuse what isn't a matrix of floating-point numbers with at least one row and one column."""
    if dtype not in FLOATS or len(shape) != 2 or 0 in shape or shape[1] > WIDEST:
        raise InputError(
            f"{what} of {file} is {dtype} of shape {tuple(shape)}. Expected one row of {', '.join(FLOATS)} per "
            "frame, shape (n, D). Name the file that holds the image embeddings."
        )


def require_same_length(file: Path, rows: int, names: Path, named: int) -> None:
    """Refuse a matrix and its list of frames when one is longer."""
    if rows != named:
        raise InputError(
            f"{file} holds {rows:,} embeddings, {names} names {named:,} frames. Expected one frame per embedding, in "
            "the same order. Name the two that belong together, or copy the shorter one again."
        )


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


class SourceRows:
    """All rows of some parts, at least one, in the order in which a store keeps them: by video name, then by frame.

    Raises:
        InputError: a frame occurs twice.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts, self.width = parts, parts[0].width
        self.status = np.frombuffer(b"".join(part.keys.status for part in parts), dtype=np.uint8)  # (N,) as they come
        self.matrices: Sequence[Matrix] = ()  # (n, D) each, once they are open
        self._starts = np.cumsum([0, *map(len, parts)])
        every = {name for part in parts for name in part.keys.names}
        names = sorted({canonical(name): name for name in sorted(every)}.values())  # one form of each
        found = {canonical(name): position for position, name in enumerate(names)}
        rank = {name: found[canonical(name)] for name in every}
        ranks = [np.fromiter(map(rank.__getitem__, p.keys.names), np.int64)[np.array(p.keys.video)] for p in parts]
        video, frame = np.concatenate(ranks), np.concatenate([part.keys.frame for part in parts]).astype(np.int32)
        self.order: Rows = np.lexsort((frame, video)).astype(np.int64)  # (N,) which of these a row of the store is
        video, frame = video[self.order], frame[self.order]
        self._require_once(names, video, frame)
        self.crops = CropList(
            folders=tuple(Path(name) for name in names),
            video_names=tuple(names),
            video_start=np.cumsum([0, *np.bincount(video, minlength=len(names))], dtype=np.int64),
            frame_number=frame,
        )

    def _require_once(self, names: Sequence[str], video: Rows, frame: npt.NDArray[np.int32]) -> None:
        repeated = np.flatnonzero((np.diff(video) == 0) & (np.diff(frame) == 0))
        if len(repeated):
            at = repeated[0]
            first, second = (self._place(row) for row in sorted(self.order[at : at + 2]))
            raise InputError(
                f"Frame {frame[at]} of the video {names[video[at]]} occurs twice: {first} and {second}. Expected every "
                "frame once. Remove one of the two, as of two faces in a frame, or import sources that overlap, such "
                "as those of two tasks, into a store each."
            )

    def _place(self, row: int) -> str:
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self.parts[part].place(row - int(self._starts[part]))

    def read(self, block: slice) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.uint8]]:
        """Gather rows of the store: float16 features (n, D) and status (n,)."""
        rows = self.order[block]
        part_of_row = np.searchsorted(self._starts, rows, side="right") - 1
        features = np.empty((len(rows), self.width), dtype="<f2")
        for index in np.unique(part_of_row):
            chosen = part_of_row == index
            features[chosen] = self.matrices[index][rows[chosen] - self._starts[index]]
        return features, self.status[rows]

    def check_float16(self, listener: Listener) -> "Rounding":
        """Read every embedding once, before anything is written: what float16 can't hold, and what it changes.

        Raises:
            InputError: a value is not finite, or too large for float16; or an unreadable row holds values. Names it.
        """
        found = Rounding()
        for part, matrix, start in zip(self.parts, self.matrices, self._starts[:-1].tolist(), strict=True):
            for of_block in blocks_of(len(part)):
                block = np.asarray(matrix[of_block])
                encoded = self.status[start:][of_block] == ENCODED
                found.add(block[encoded], _halved(part, of_block.start, block, encoded)[encoded])
                listener.progress(start + of_block.stop, len(self.status), "row", "checking")
        return found


def facts_of(store: EmbeddingStore) -> dict[str, Any]:
    """Return what imports and exports alike say of the store: rows, encoded, unreadable, videos, width."""
    summary = store.summary()
    return {name: summary[name] for name in ("rows", "encoded", "unreadable", "videos", "width")}


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


def _halved(part: Part, first: int, block: Matrix, encoded: npt.NDArray[np.bool_]) -> npt.NDArray[np.float16]:
    """Return a block of a part, from a row on, as float16; refuse what that can't hold, or what shouldn't be there."""
    with np.errstate(over="ignore"):
        half = block.astype("<f2")
    wrong = ~np.isfinite(half)
    if wrong.any():
        row, column = (int(index) for index in np.argwhere(wrong)[0])
        value = block[row, column]
        problem = "is not finite" if not np.isfinite(value) else "is too large for float16, which ends at 65504"
        raise InputError(
            f"{part.place(first + row)}: {part.value(column)} is {value} and {problem}. Expected numbers that float16 "
            f"can hold. {part.remedy}"
        )
    unexpected = np.flatnonzero(~encoded & half.any(axis=1))
    if len(unexpected):
        raise InputError(
            f"{part.place(first + int(unexpected[0]))} is marked unreadable and holds an embedding. Expected zeros "
            "there, as 'affcache export' writes them. Export the store again."
        )
    return half
