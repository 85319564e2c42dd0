"""Reading Parquet files, within bounds; errors are those of sources.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from affcache.errors import ConfigError, InputError
from affcache.exchange.sources import cannot_read, reading
from affcache.files import open_regular

LARGEST_GROUP = 2**24  # rows of a Parquet file that are read at once
PARQUET_BUFFER = 2**16  # bytes of a column that are read ahead


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
