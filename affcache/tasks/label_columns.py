"""The rows of a table of labels, as text, and which of its columns is what."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import numpy.typing as npt

from affcache.crops.names import canonical
from affcache.errors import InputError, did_you_mean
from affcache.files import open_regular
from affcache.tabular import (
    INDEX_OF_PANDAS,
    NAMELESS,
    PARQUET_MAGIC,
    CsvText,
    groups_of,
    import_pyarrow,
    magic_of,
    no_rows,
    parquet_file,
    reading,
    require_once,
)
from affcache.tasks.task import Task

LARGEST_TABLE = 2**31  # bytes; of three million frames with twelve units a tenth of it
HEADERS: Mapping[str, tuple[str, ...]] = {  # the obvious ones of each column that isn't a label; capitals don't matter
    "video": ("video",),
    "frame": ("frame", "frame_number"),
    "path": ("path", "image", "file", "image_path"),
    "split": ("split",),
    "fold": ("fold",),
}
CLASS_HEADERS = ("label", "class")


@dataclass(frozen=True)
class Rows:
    """Some rows of a table, as text."""

    path: Path
    cells: Mapping[str, Any]  # by column: Arrow strings (n,), "" where there is nothing
    number: npt.NDArray[np.int64]  # (n,) of each row in the table, counted from 0
    line_of: Callable[[int], int]  # the line of a row in the file; 0 where it has none

    def __len__(self) -> int:
        return len(self.number)

    def only(self, kept: npt.NDArray[np.bool_]) -> "Rows":
        """Return the rows where ``kept`` (n,) is true."""
        mask = import_pyarrow().array(kept)
        return replace(self, cells={k: v.filter(mask) for k, v in self.cells.items()}, number=self.number[kept])

    def line(self, row: int) -> str:
        """Name the line of one of the rows, or its number where the file has no lines."""
        number = int(self.number[row])
        line = self.line_of(number)
        return f"line {line}" if line else f"row {number} (counted from 0)"

    def decoded(self, column: str, convert: Callable[[str], Any]) -> list[Any]:
        """Convert the cells of a column (n,), each different one once.

        Raises:
            InputError: one can't be, of which ``convert`` raises ValueError saying what was expected.
        """
        coded = self.cells[column].dictionary_encode()
        codes, found = coded.indices.to_numpy(), []
        for code, cell in enumerate(coded.dictionary.to_pylist()):
            try:
                found.append(convert(cell))
            except ValueError as error:
                row = int(np.flatnonzero(codes == code)[0])
                raise InputError(
                    f"{self.path}, {self.line(row)}: the column {column} holds {cell[:80]!r}; expected {error}. "
                    "Correct that cell."
                ) from None
        return [found[code] for code in codes.tolist()]


class CsvLabels(CsvText):
    """Text in UTF-8."""

    @property
    def named(self) -> list[str]:
        """The names of the columns that have one."""
        return [name for name in self.names if not name.startswith(NAMELESS)]

    def rows(self, columns: Collection[str]) -> Rows:
        """Read some columns, whole."""
        pyarrow = import_pyarrow()
        types = dict.fromkeys(columns, pyarrow.string())
        with self.read(column_types=types, include_columns=list(types)) as reader:
            return _as_text(self.path, reader.read_all(), self.line_of)


class ParquetLabels:
    """Columns of any type, taken as text."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with parquet_file(path) as file:
            self.names = list(file.schema_arrow.names)
        require_once(path, self.names)

    @property
    def named(self) -> list[str]:
        """The names of the columns that somebody meant."""
        return [name for name in self.names if not name.startswith(INDEX_OF_PANDAS)]

    def rows(self, columns: Collection[str]) -> Rows:
        """Read some columns, whole."""
        with parquet_file(self.path) as file:
            found = file.read_row_groups(list(groups_of(self.path, file)), columns=list(columns), use_threads=False)
            return _as_text(self.path, found, lambda row: 0)


def _as_text(path: Path, table: Any, line_of: Callable[[int], int]) -> Rows:
    """Turn the columns of an Arrow table into text."""
    pyarrow = import_pyarrow()
    import pyarrow.compute as compute

    cells = {}
    for name in table.column_names:
        text = compute.utf8_trim_whitespace(table.column(name).cast(pyarrow.string())).fill_null("")
        cells[name] = text.combine_chunks() if text.num_chunks != 1 else text.chunk(0)
    if not table.num_rows:
        raise no_rows(path)
    return Rows(path, cells, np.arange(table.num_rows), line_of)


def open_labels(path: Path, task: Task) -> CsvLabels | ParquetLabels:
    """Open a table by what it begins with; raises InputError where it can't be read, or has no column for the split."""
    with reading(path):
        open_regular(path, LARGEST_TABLE).close()
    if magic_of(path).startswith(PARQUET_MAGIC):
        return ParquetLabels(path)
    split = dict(task.columns).get("split", "split")
    forms = dict.fromkeys([split, *(normalize(form, split) for form in ("NFC", "NFD"))])
    return CsvLabels(path, forms, "video,frame,split,label")


def _said(path: Path, names: Sequence[str], task: Task) -> dict[str, str]:
    """Return the columns that the task itself names, as the table writes them."""
    said = {}
    for role, header in task.columns:
        if (column := matching(header, names)) is None:
            raise InputError(
                f"{path} has no column {header!r}{did_you_mean(header, names)}, which columns of task {task.name} "
                f"names; it has {', '.join(names)}. Correct the task's columns, or the table."
            )
        said[role] = column
    return said


def roles_of(path: Path, names: Sequence[str], task: Task) -> dict[str, str]:
    """Return which column is the video, the frame or the path, the split and the fold."""
    said = _said(path, names, task)
    free = [name for name in names if name not in said.values()]
    found = {role: alike for role, usual in HEADERS.items() if (alike := _first_alike(usual, free))}
    found |= {role: [column] for role, column in said.items() if role != "label"}
    frame = {"video", "frame"}
    by_path = "path" in found and not frame & said.keys() and ("path" in said or not frame <= found.keys())
    needed = ("video",) if task.level == "video" else ("path",) if by_path else ("video", "frame")
    if lacking := [role for role in (*needed, "split") if role not in found]:
        raise _lacks(path, names, task, lacking)
    used = {role: found[role] for role in (*needed, "split", "fold") if role in found}
    for role, alike in used.items():
        if len(alike) > 1:
            raise InputError(
                f"{path} has the columns {' and '.join(alike)}, and each may be the {role}. Expected one. Rename the "
                f"others, or say in columns of task {task.name} which is {role}."
            )
    return {role: alike[0] for role, alike in used.items()}


def _first_alike(headers: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the names that may be the first of the headers that any may be."""
    return next(filter(None, (alike_names(header, names) for header in headers)), [])


def _lacks(path: Path, names: Sequence[str], task: Task, lacking: Sequence[str]) -> InputError:
    """Return the error for a table without the columns of some roles."""
    expected, instead = "video, frame and split (train or validation), or path and split", ""
    if task.level == "video":
        expected = f'video and split (train or validation), since task {task.name} says level = "video"'
    elif "frame" in lacking and "video" not in lacking:
        instead = 'If a row is of a whole video, write level = "video" into the task. Else rename'
    return InputError(
        f"{path} has no column {' and no column '.join(lacking)}; it has {', '.join(names)}. Expected {expected}. "
        f"{instead or 'Rename'} the columns, or say in columns of task {task.name} what they are called."
    )


def label_columns(path: Path, names: Sequence[str], task: Task, roles: Mapping[str, str]) -> list[str]:
    """Return the column of classes, or that of each unit or value."""
    said, usual = _said(path, names, task), {header for headers in HEADERS.values() for header in headers}
    taken = {*roles.values(), *(column for role, column in said.items() if role != "label")}
    free = [name for name in names if name not in taken]
    if not task.exclusive:
        return _columns_of_each(path, free, task, roles)
    others = [name for name in free if name.casefold() not in usual]
    headers = (*CLASS_HEADERS, task.name)
    obvious = list(dict.fromkeys(name for header in headers for name in alike_names(header, others)))
    found = [said["label"]] if "label" in said else obvious or others
    if not found or (len(found) > 1 and not obvious):
        raise InputError(
            f"{path} has no column label, class or {task.name}; beside the keys it has {', '.join(others) or 'none'}. "
            f"Expected one with the names of classes. Rename it, or say in columns of task {task.name} which is label."
        )
    if len(found) > 1:
        raise InputError(
            f"{path} has the columns {' and '.join(found)}, and each may hold the classes. Expected one. Rename the "
            f"others, or say in columns of task {task.name} which is label."
        )
    return found


def _columns_of_each(path: Path, free: Sequence[str], task: Task, roles: Mapping[str, str]) -> list[str]:
    """Return the column (C,) of each unit or value, of those that are no keys."""
    found = {name: matching(name, free) for name in task.classes}
    uses = Counter(found.values())
    columns = {k: v for k, v in found.items() if v is not None and (uses[v] == 1 or canonical(v) == canonical(k))}
    if missing := [name for name in task.classes if name not in columns]:
        raise InputError(
            f"{path} has no column {', '.join(missing)}; beside the keys {', '.join(roles.values())} it has "
            f"{', '.join(free) or 'none'}. Expected one for each of {', '.join(task.classes)}. Rename the columns, or "
            "the task's names."
        )
    return list(columns.values())


def alike_names(name: str, names: Sequence[str]) -> list[str]:
    """Return the names that may be meant: the same, else those of other accents' forms, else of other capitals."""
    for form in (str, canonical, _folded):
        if alike := [other for other in names if form(other) == form(name)]:
            return alike
    return []


def _folded(name: str) -> str:
    return canonical(name).casefold()


def matching(name: str, names: Sequence[str]) -> str | None:
    """Return the one of the names that is meant; None where none is, or several may be."""
    alike = alike_names(name, names)
    return alike[0] if len(alike) == 1 else None


def number_of(text: str) -> float:
    """Return a number; nan where there is none. Python reads 1_0 and other scripts' digits, labels don't."""
    try:
        return float(text) if text.isascii() and "_" not in text else np.nan
    except ValueError:
        return np.nan
