"""One reading of all embeddings before anything is written: what float16 can't hold, what it changes, and norms."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from affcache.errors import InputError
from affcache.exchange.sources import Matrix, Part, blocks_of
from affcache.progress import Listener
from affcache.store.reading import ENCODED

NORM_TOLERANCE = 0.01  # rounding a unit vector to float16 moves its length by less


@dataclass
class Survey:
    """What was found in the embeddings of encoded rows."""

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


def survey(
    parts: Sequence[Part], matrices: Sequence[Matrix], status: npt.NDArray[np.uint8], listener: Listener
) -> Survey:
    """Read every embedding once.

    Args:
        parts: what names the rows in messages.
        matrices: their embeddings, (n, D) each.
        status: (N,) of the rows of all parts together.
        listener: receives progress.

    Raises:
        InputError: a value is not finite, or too large for float16; or an unreadable row holds values. Names the row.
    """
    found = Survey()
    done = 0
    for part, matrix in zip(parts, matrices, strict=True):
        for rows in blocks_of(part.rows):
            block = np.asarray(matrix[rows])
            with np.errstate(over="ignore"):
                half = block.astype("<f2")
            _require_finite(part, rows.start, block, half)
            encoded = status[done : done + len(block)] == ENCODED
            if half[~encoded].any():
                row = rows.start + int(np.flatnonzero(~encoded & half.any(axis=1))[0])
                raise InputError(
                    f"{part.place(row)} is marked unreadable and holds an embedding. Expected zeros there, as "
                    "'affcache export' writes them. Export the store again."
                )
            found.add(block[encoded] if not encoded.all() else block, half[encoded] if not encoded.all() else half)
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
