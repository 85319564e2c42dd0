"""Tables of frame features in CSV: pyarrow reads them; where it gives up, the line at fault is looked for."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from affcache.errors import InputError
from affcache.exchange.table_files import (
    FRAME,
    IMAGE,
    NUMBER,
    TEXT,
    Batch,
    TableFile,
    arrow_kind,
    key_of,
    stacked,
)
from affcache.tabular import NAMELESS, CsvText, import_pyarrow

_NOTHING = r"|[+-]?nan|null|#?n/?a|"
_NUMBER = re.compile(rf"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?inf(inity)?{_NOTHING}", re.ASCII | re.IGNORECASE)
_BOOLEAN = re.compile(rf"true|false|0|1{_NOTHING}", re.IGNORECASE)


class CsvTable(CsvText, TableFile):
    """Features a line."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, (*FRAME, *IMAGE), "video,frame,AU01,AU02")
        with self.read(**_conversion({})) as reader:
            found = dict(zip(self.names, reader.schema.types, strict=True))
        self._booleans = {name for name, kind in found.items() if str(kind) == "bool"}
        kinds = {name: arrow_kind(kind) for name, kind in found.items() if not name.startswith(NAMELESS)}
        self.kinds = {name: kind if kind == NUMBER else TEXT for name, kind in kinds.items()}  # it may look like a date

    def batches(self, keys: Sequence[str], columns: Sequence[str]) -> Iterator[Batch]:
        """Read some columns; values are float64."""
        pyarrow = import_pyarrow()
        number, text = pyarrow.float64(), pyarrow.string()
        types = {name: pyarrow.bool_() if name in self._booleans else number for name in columns}
        types |= {name: number if name in FRAME else text for name in keys}
        with self.read(**_conversion(types)) as reader:
            for batch in reader:
                texts = [key_of(batch.column(name), name) for name in keys]
                stripped = [[v.strip() if isinstance(v, str) else v for v in values] for values in texts]
                yield Batch(stripped, stacked([batch.column(name) for name in columns], np.dtype("f8")))

    def place(self, row: int) -> str:
        """Name the line of a row, which is looked for."""
        line = self.line_of(row)
        return f"{self.path}, line {line}" if line else super().place(row)

    def described(self, column: str) -> str:
        """Name a column, with the first of its cells that is no number."""
        position = self.names.index(column)
        for line, cells in self.lines():
            if len(cells) > position and not _is_number(cells[position]):
                return f"{column} ({cells[position].strip()[:20]!r} in line {line})"
        return super().described(column)

    def wrong_cell(self, line: int, cells: list[str], types: Any) -> InputError | None:
        expected = "Expected numbers with a point, or nothing, in a column of numbers. Correct the line"
        for name, cell in zip(self.names, cells, strict=True):
            kind = str(types.get(name))
            if kind in ("double", "bool") and not _is_number(cell, boolean=kind == "bool"):
                return InputError(
                    f"{self.path}, line {line}: the column {name} holds {cell.strip()[:40]!r}, where it held numbers "
                    f"before. {expected}, or leave the column out: --columns names those to take."
                )
        return None


def _conversion(types: dict[str, Any]) -> dict[str, Any]:
    """Return what pyarrow is told of some columns in the types given, or of all in those of the first block."""
    import_pyarrow()
    import pyarrow.csv as arrow

    nothing = arrow.ConvertOptions().null_values
    return {
        "column_types": types,
        "include_columns": list(types),
        "null_values": [*nothing, *(f" {word}" for word in nothing)],
        "true_values": ["true", "True", "TRUE", " true", " True", " TRUE", "1", " 1"],
        "false_values": ["false", "False", "FALSE", " false", " False", " FALSE", "0", " 0"],
    }


def _is_number(cell: str, *, boolean: bool = False) -> bool:
    """Say whether pyarrow takes a cell for a number, a boolean or nothing; it is called after one was refused."""
    return (_BOOLEAN if boolean else _NUMBER).fullmatch(cell.strip()) is not None
