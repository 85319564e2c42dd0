"""The form that every source is brought into: frame keys, statuses, and matrices that are read block by block."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from affcache.errors import InputError
from affcache.exchange.keys import FrameKeys

BLOCK = 4 * 4096  # rows read at once: whole blocks of the store's checksums
FLOATS = ("float16", "float32", "float64")

Matrix = npt.NDArray[Any]
OpenMatrix = Callable[[Path], Matrix]  # (folder for a temporary file) -> (n, D)


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
