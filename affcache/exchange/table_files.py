"""Tables of frame features, read in batches of rows with their keys: what all kinds have in common, and Parquet."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from affcache.errors import InputError
from affcache.exchange.exporting import EXPORT_FORMAT, PROVENANCE_KEY
from affcache.exchange.sources import BLOCK, Matrix
from affcache.tabular import INDEX_OF_PANDAS, groups_of, import_pyarrow, parquet_file, require_once

FRAME, IMAGE = ("frame", "frame_number"), ("image", "image_path")  # each of them says which frame
NUMBER, LIST, TEXT, OBJECTS = "numbers", "lists of numbers", "text", "Python objects"
BATCH_BYTES = 2**24  # of a batch of rows, about


@dataclass(frozen=True)
class Batch:
    """Some rows of a table, in its order."""

    keys: Sequence[Sequence[Any]]  # of each key column n values: float of ``FRAME``, else text, or None
    values: Matrix  # float (n, D), NaN where something is missing


class TableFile(ABC):
    """A table, of which nothing but its columns is read yet."""

    path: Path
    kinds: Mapping[str, str]  # of every column, by name: NUMBER, LIST (an embedding a row), TEXT, or what else it holds

    @abstractmethod
    def batches(self, keys: Sequence[str], columns: Sequence[str]) -> Iterator[Batch]:
        """Read some columns from the first row on: keys, and either numbers or a single list.

        Raises:
            InputError: the file is damaged, or a value isn't what its column holds; says where.
        """

    def place(self, row: int) -> str:
        """Name one of the rows for a message."""
        return f"{self.path}, row {row} (counted from 0)"

    def described(self, column: str) -> str:
        """Name a column for a message, with what it holds."""
        return f"{column} ({self.kinds[column]})"


class ParquetTable(TableFile):
    """Columns of numbers, or one of lists."""

    def __init__(self, path: Path) -> None:
        with parquet_file(path) as file:
            schema = file.schema_arrow
        if f'"{EXPORT_FORMAT}"'.encode() in (schema.metadata or {}).get(PROVENANCE_KEY.encode(), b""):
            raise InputError(
                f"{path} is what 'affcache export' wrote. Expected, with --name, a table of another tool. Import it "
                "without --name: it knows what its rows are."
            )
        require_once(path, schema.names)
        self._types = dict(zip(schema.names, schema.types, strict=True))
        meant = {name: kind for name, kind in self._types.items() if not name.startswith(INDEX_OF_PANDAS)}
        self.path, self.kinds = path, {name: arrow_kind(kind) for name, kind in meant.items()}

    def batches(self, keys: Sequence[str], columns: Sequence[str]) -> Iterator[Batch]:
        """Read some columns; values are float32 where no column has more, else float64."""
        kinds = {str(getattr(self._types[name], "value_type", self._types[name])) for name in columns}
        dtype = np.dtype("f4" if kinds <= {"float", "halffloat"} else "f8")
        listed = self.kinds[columns[0]] == LIST
        width = self._width(columns[0]) if listed else 0
        row = 0
        for batch in self._read([*keys, *columns], BATCH_BYTES // (8 * (width or len(columns)))):
            found = [batch.column(name) for name in columns]
            values = _unlisted(found[0], width, dtype) if listed else stacked(found, dtype)
            if isinstance(values, int):
                raise InputError(
                    f"{self.place(row + values)}: {columns[0]} has another length than the {width} of the rows before. "
                    "Expected embeddings of one width. Write the table again, or leave such rows out."
                )
            yield Batch([key_of(batch.column(name), name) for name in keys], values)
            row += len(batch)

    def _read(self, columns: Sequence[str], rows: int) -> Iterator[Any]:
        with parquet_file(self.path) as file:
            groups = list(groups_of(self.path, file, streamed=True))
            yield from file.iter_batches(min(BLOCK, max(1, rows)), groups, list(columns), use_threads=False)

    def _width(self, column: str) -> int:
        """Return the length of the first list that is there; 0 without any."""
        kind = self._types[column]
        if getattr(kind, "list_size", 0):
            return kind.list_size
        for batch in self._read([column], 64):
            lengths = batch.column(column).value_lengths().drop_null()
            if len(lengths):
                return lengths[0].as_py()
        return 0


def arrow_kind(kind: Any) -> str:
    """Return what a column of an Arrow type holds."""
    types = import_pyarrow().types
    if types.is_dictionary(kind):
        kind = kind.value_type
    numeric = (types.is_null, types.is_boolean, types.is_integer, types.is_floating, types.is_decimal)
    if any(one(kind) for one in numeric):  # null: nothing is there
        return NUMBER
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return LIST if arrow_kind(kind.value_type) == NUMBER else str(kind)
    return TEXT if types.is_string(kind) or types.is_large_string(kind) else str(kind)


def key_of(column: Any, name: str) -> list[Any]:
    """Return the values of a key column of an Arrow batch: float of a frame's number, else text."""
    pyarrow = import_pyarrow()
    kind = pyarrow.float64() if name in FRAME else pyarrow.string()
    return column.cast(kind, safe=False).to_pylist()


def stacked(columns: Sequence[Any], dtype: np.dtype[Any]) -> Matrix:
    """Return Arrow columns of numbers as (n, D)."""
    kind = import_pyarrow().from_numpy_dtype(dtype)
    values = np.empty((len(columns[0]), len(columns)), dtype)
    for position, column in enumerate(columns):
        values[:, position] = column.cast(kind, safe=False).to_numpy(zero_copy_only=False)
    return values


def _unlisted(column: Any, width: int, dtype: np.dtype[Any]) -> Matrix | int:
    """Return an Arrow column of lists as (n, D), NaN where a list is missing; or the first row of another length."""
    lengths = column.value_lengths().to_numpy(zero_copy_only=False)
    there = column.is_valid().to_numpy(zero_copy_only=False)
    wrong = np.flatnonzero(there & (lengths != width))
    if len(wrong):
        return int(wrong[0])
    values = np.full((len(column), width), np.nan, dtype)
    kind = import_pyarrow().from_numpy_dtype(dtype)
    flat = column.flatten().cast(kind, safe=False).to_numpy(zero_copy_only=False)  # without the missing ones
    values[there] = flat.reshape(int(there.sum()), width)
    return values
