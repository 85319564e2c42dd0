"""Tables in CSV: pyarrow reads them; where it gives up, the line at fault is looked for."""

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import BufferedReader, TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from affcache.errors import InputError
from affcache.exchange.parquet import import_pyarrow
from affcache.exchange.sources import cannot_read, reading
from affcache.exchange.table_files import (
    FRAME,
    IMAGE,
    NUMBER,
    TEXT,
    Batch,
    TableFile,
    arrow_kind,
    key_of,
    no_rows,
    require_once,
    stacked,
)
from affcache.files import open_regular

DELIMITERS = (",", ";", "\t")
LARGEST_HEADER = 2**22  # bytes of the first line
BLOCK_BYTES, CELL_BYTES = 2**20, 64  # parsed at once: a row is shorter, or has that much a cell
_NOTHING = r"|[+-]?nan|null|#?n/?a|"
_NUMBER = re.compile(rf"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?inf(inity)?{_NOTHING}", re.ASCII | re.IGNORECASE)
_BOOLEAN = re.compile(rf"true|false|0|1{_NOTHING}", re.IGNORECASE)
NAMELESS = "\0"  # begins what stands for the name of a column without one, as pandas' index


class CsvTable(TableFile):
    """Text in UTF-8, a line a row, whose first line names the columns; separated by comma, semicolon or tab."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._delimiter, names = _csv_header(path)
        self._names = [name or f"{NAMELESS}{position}" for position, name in enumerate(names)]
        with self._read({}) as reader:
            found = dict(zip(self._names, reader.schema.types, strict=True))
        self._booleans = {name for name, kind in found.items() if str(kind) == "bool"}
        kinds = {name: arrow_kind(kind) for name, kind in found.items() if not name.startswith(NAMELESS)}
        self.kinds = {name: kind if kind == NUMBER else TEXT for name, kind in kinds.items()}  # it may look like a date

    @contextmanager
    def _read(self, types: Mapping[str, Any]) -> Iterator[Any]:
        """Open pyarrow's reader of some columns in the types given, or of all columns in those of the first block."""
        pyarrow = import_pyarrow()
        import pyarrow.csv as arrow

        nothing = arrow.ConvertOptions().null_values
        convert = arrow.ConvertOptions(
            column_types=types,
            include_columns=list(types),
            null_values=[*nothing, *(f" {word}" for word in nothing)],
            true_values=["true", "True", "TRUE", " true", " True", " TRUE", "1", " 1"],
            false_values=["false", "False", "FALSE", " false", " False", " FALSE", "0", " 0"],
        )
        parse = arrow.ParseOptions(delimiter=self._delimiter, newlines_in_values=True)
        block = max(BLOCK_BYTES, CELL_BYTES * len(self._names))
        read = arrow.ReadOptions(block_size=block, column_names=self._names, skip_rows=1, use_threads=False)
        try:
            with open_regular(self.path) as file, arrow.open_csv(file, read, parse, convert) as reader:
                yield reader
        except (OSError, pyarrow.ArrowException) as error:
            raise self._explained(error, types) from None

    def batches(self, keys: Sequence[str], columns: Sequence[str]) -> Iterator[Batch]:
        """Read some columns; values are float64."""
        pyarrow = import_pyarrow()
        number, text = pyarrow.float64(), pyarrow.string()
        types = {name: pyarrow.bool_() if name in self._booleans else number for name in columns}
        types |= {name: number if name in FRAME else text for name in keys}
        with self._read(types) as reader:
            for batch in reader:
                texts = [key_of(batch.column(name), name) for name in keys]
                stripped = [[v.strip() if isinstance(v, str) else v for v in values] for values in texts]
                yield Batch(stripped, stacked([batch.column(name) for name in columns], np.dtype("f8")))

    def place(self, row: int) -> str:
        """Name the line of a row, which is looked for."""
        line = next(islice(self._lines(), row, None), (0, []))[0]
        return f"{self.path}, line {line}" if line else super().place(row)

    def described(self, column: str) -> str:
        """Name a column, with the first of its cells that is no number."""
        position = self._names.index(column)
        for line, cells in self._lines():
            if len(cells) > position and not _is_number(cells[position]):
                return f"{column} ({cells[position].strip()[:20]!r} in line {line})"
        return super().described(column)

    def _lines(self) -> Iterator[tuple[int, list[str]]]:
        """Yield the line on which each row ends, and its cells, as far as that can be said."""
        with open_regular(self.path) as raw, TextIOWrapper(raw, "utf-8-sig", "replace", newline="") as file:
            rows = csv.reader(file, delimiter=self._delimiter)
            try:
                yield from islice(((rows.line_num, cells) for cells in rows if cells), 1, None)
            except csv.Error:
                return

    def _explained(self, error: Exception, types: Mapping[str, Any]) -> InputError:
        """Say which line pyarrow couldn't read."""
        if isinstance(error, OSError):
            return cannot_read(self.path, error)
        if "Empty CSV" in str(error):
            return no_rows(self.path)
        kinds = [(position, name, str(types.get(name))) for position, name in enumerate(self._names)]
        expected = "Expected numbers with a point, or nothing, in a column of numbers. Correct the line"
        for line, cells in self._lines():
            if len(cells) != len(self._names):
                return InputError(
                    f"{self.path}, line {line} has {len(cells)} cells, and the first line {len(self._names)}. Expected "
                    "as many in each. Correct the line, or write the table again."
                )
            for position, name, kind in kinds:
                if kind in ("double", "bool") and not _is_number(cells[position], boolean=kind == "bool"):
                    return InputError(
                        f"{self.path}, line {line}: the column {name} holds {cells[position].strip()[:40]!r}, where it "
                        f"held numbers before. {expected}, or leave the column out: --columns names those to take."
                    )
        return cannot_read(self.path, error)


def _csv_header(path: Path) -> tuple[str, list[str]]:
    """Return the delimiter of a CSV file and the names of its columns, without spaces around them."""
    with reading(path, UnicodeDecodeError), open_regular(path) as raw, BufferedReader(raw) as file:
        start = file.readline(LARGEST_HEADER)
        line = start.decode("utf-8-sig").rstrip("\r\n")
    found = {}
    for delimiter in DELIMITERS:
        with suppress(csv.Error):
            names = [name.strip() for cells in csv.reader([line], delimiter=delimiter) for name in cells]
            if {*FRAME, *IMAGE}.intersection(names):
                found[delimiter] = names
    if len(found) != 1:
        raise InputError(
            f"{path} begins with {line[:60]!r}, which doesn't name a column {', '.join((*FRAME, *IMAGE))} once it is "
            "split at commas, semicolons or tabs. Expected a first line such as video,frame,AU01,AU02. Name the "
            "columns there, or check the path."
        )
    ((delimiter, names),) = found.items()
    require_once(path, [name for name in names if name])
    return delimiter, names


def _is_number(cell: str, *, boolean: bool = False) -> bool:
    """Say whether pyarrow takes a cell for a number, a boolean or nothing; it is called after one was refused."""
    return (_BOOLEAN if boolean else _NUMBER).fullmatch(cell.strip()) is not None
