"""Tables in Parquet and CSV, read by pyarrow within bounds; what is missing or damaged is an InputError with words."""

import csv
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader, TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import Any

from affcache.errors import ConfigError, InputError
from affcache.files import open_regular

HDF5_MAGIC, PARQUET_MAGIC = b"\x89HDF\r\n\x1a\n", b"PAR1"  # how files begin
LARGEST_GROUP = 2**24  # rows of a Parquet file that are read at once
PARQUET_BUFFER = 2**16  # bytes of a column that are read ahead
DELIMITERS = (",", ";", "\t")
LARGEST_HEADER = 2**22  # bytes of the first line
BLOCK_BYTES, CELL_BYTES = 2**20, 64  # parsed at once: a row is shorter, or has that much a cell
INDEX_OF_PANDAS = "__index_level_"  # begins the names of columns that no one meant
NAMELESS = "\0"  # begins what stands for the name of a column without one, as pandas' index


def cannot_read(path: Path, error: Exception) -> InputError:
    """Return the error for a file that is missing, damaged or of another kind."""
    reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
    return InputError(
        f"{path} can't be read: {reason}. Expected a whole file of its kind. Check the path, or copy the file again."
    )


@contextmanager
def reading(path: Path, *damage: type[Exception]) -> Iterator[None]:
    """Say that ``path`` can't be read where an OSError, or an error of those kinds, says so."""
    kinds: tuple[type[Exception], ...] = (OSError, *damage)
    try:
        yield
    except kinds as error:
        raise cannot_read(path, error) from None


def magic_of(path: Path) -> bytes:
    """Return the first bytes of a file, none of a folder."""
    if path.is_dir():
        return b""
    with reading(path), open_regular(path) as file:
        return file.read(len(HDF5_MAGIC)) or b""


def import_pyarrow() -> Any:
    """Return the module ``pyarrow``, with ``pyarrow.parquet``."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ConfigError("Parquet files need pyarrow, which isn't here: pip install pyarrow") from None
    return pyarrow


@contextmanager
def parquet_file(path: Path) -> Iterator[Any]:
    """Open a Parquet file, a ``pyarrow.parquet.ParquetFile``; what fails while it is open counts as damage."""
    pyarrow = import_pyarrow()
    with reading(path, ValueError, pyarrow.ArrowException):
        open_regular(path).close()
        with pyarrow.parquet.ParquetFile(path, buffer_size=PARQUET_BUFFER, pre_buffer=False) as file:
            yield file


def require_columns(path: Path, file: Any, columns: tuple[str, ...]) -> None:
    """Refuse a Parquet file that lacks one of the columns."""
    missing = [name for name in columns if name not in file.schema_arrow.names]
    if missing:
        raise InputError(
            f"{path} has no column {', '.join(missing)}; it has {', '.join(file.schema_arrow.names)}. Expected the "
            f"columns {', '.join(columns)}. Write it again with image paths, or name another file."
        )


def groups_of(path: Path, file: Any, *, streamed: bool = False) -> range:
    """Return the numbers of a Parquet file's row groups; refuse too many rows in one, or bytes unless streamed."""
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        if group.num_rows > LARGEST_GROUP or (group.total_byte_size > LARGEST_GROUP * 128 and not streamed):
            raise cannot_read(path, ValueError(f"row group {number} has {group.num_rows:,} rows in one piece"))
    return range(file.num_row_groups)


def rows_of(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[Any, ...]]:
    """Yield the values of some columns row by row, a row group in memory at a time."""
    with parquet_file(path) as file:
        require_columns(path, file, columns)
        for group in groups_of(path, file):
            table = file.read_row_group(group, columns=list(columns))
            yield from zip(*(table.column(name).to_pylist() for name in columns), strict=True)


class CsvText:
    """Text in UTF-8, a line a row, whose first line names the columns; separated by comma, semicolon or tab.

    Args:
        path: the file.
        wanted: names, of which the first line has at least one; capitals don't matter.
        example: a first line as it may be, for messages.

    Raises:
        InputError: it can't be read, is in another encoding, or its first line has none of the names, or has one
            whichever way it is split.
    """

    def __init__(self, path: Path, wanted: Collection[str], example: str) -> None:
        self.path = path
        with reading(path), open_regular(path) as raw, BufferedReader(raw) as file:
            start = file.readline(LARGEST_HEADER)
        try:
            line = start.decode("utf-8-sig").rstrip("\r\n")
        except UnicodeDecodeError:
            raise not_utf8(path) from None
        found = {}
        for delimiter in DELIMITERS:
            with suppress(csv.Error):
                names = [name.strip() for cells in csv.reader([line], delimiter=delimiter) for name in cells]
                if not {name.casefold() for name in wanted}.isdisjoint(name.casefold() for name in names):
                    found[delimiter] = names
        if len(found) != 1:
            raise InputError(
                f"{path} begins with {line[:60]!r}, which doesn't name a column {', '.join(wanted)} once it is split "
                f"at commas, semicolons or tabs. Expected a first line such as {example}. Name the columns there, or "
                "check the path."
            )
        ((self.delimiter, names),) = found.items()
        require_once(path, [name for name in names if name])
        self.names = [name or f"{NAMELESS}{position}" for position, name in enumerate(names)]

    @contextmanager
    def read(self, **conversion: Any) -> Iterator[Any]:
        """Open pyarrow's reader of batches of rows; ``conversion`` is what its ConvertOptions take.

        Raises:
            InputError: a line can't be read; says which.
        """
        pyarrow = import_pyarrow()
        import pyarrow.csv as arrow

        parse = arrow.ParseOptions(delimiter=self.delimiter, newlines_in_values=True)
        block = max(BLOCK_BYTES, CELL_BYTES * len(self.names))
        read = arrow.ReadOptions(block_size=block, column_names=self.names, skip_rows=1, use_threads=False)
        convert = arrow.ConvertOptions(**conversion)
        try:
            with open_regular(self.path) as file, arrow.open_csv(file, read, parse, convert) as reader:
                yield reader
        except (OSError, pyarrow.ArrowException) as error:
            raise self._explained(error, conversion.get("column_types", {})) from None

    def line_of(self, row: int) -> int:
        """Return the line on which a row ends, which is looked for; 0 where it isn't found."""
        return next(islice(self.lines(), row, None), (0, []))[0]

    def lines(self) -> Iterator[tuple[int, list[str]]]:
        """Yield the line on which each row ends, and its cells, as far as that can be said."""
        with open_regular(self.path) as raw, TextIOWrapper(raw, "utf-8-sig", "replace", newline="") as file:
            rows = csv.reader(file, delimiter=self.delimiter)
            try:
                yield from islice(((rows.line_num, cells) for cells in rows if cells), 1, None)
            except csv.Error:
                return

    def _explained(self, error: Exception, types: Any) -> InputError:
        """Say which line pyarrow couldn't read."""
        if isinstance(error, OSError):
            return cannot_read(self.path, error)
        if "Empty CSV" in str(error):
            return no_rows(self.path)
        if "UTF8" in str(error):
            return not_utf8(self.path)
        for line, cells in self.lines():
            if len(cells) != len(self.names):
                return InputError(
                    f"{self.path}, line {line} has {len(cells)} cells, and the first line {len(self.names)}. Expected "
                    "as many in each. Correct the line, or write the table again."
                )
            if wrong := self.wrong_cell(line, cells, types):
                return wrong
        return cannot_read(self.path, error)

    def wrong_cell(self, line: int, cells: list[str], types: Any) -> InputError | None:
        """Return the error for a line whose cells aren't of the types that pyarrow was told, if one isn't."""
        return None


def no_rows(path: Path) -> InputError:
    """Return the error for a table that is empty."""
    return InputError(f"{path} has no rows. Expected one for each frame. Check the path, or write the table again.")


def not_utf8(path: Path) -> InputError:
    """Return the error for text in another encoding."""
    return InputError(
        f"{path} is not text in UTF-8. Expected that encoding, with or without a byte order mark. Save it as 'CSV "
        f"UTF-8' from the spreadsheet, or convert it: iconv -f WINDOWS-1252 -t UTF-8 {path} > NEW.csv (-f UTF-16 where "
        "a spreadsheet called it Unicode text)."
    )


def require_once(path: Path, names: Collection[str]) -> None:
    """Refuse a table in which two columns have one name."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(
            f"{path} has two columns of one name: {', '.join(twice[:5])}. Expected each name once. Rename one of them."
        )
