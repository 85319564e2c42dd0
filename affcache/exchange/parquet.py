"""pyarrow, which a few commands need and loading takes long, and columns of Parquet files read with it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from affcache.errors import ConfigError, InputError
from affcache.exchange.sources import cannot_read


def pyarrow_parquet() -> Any:
    """Return the module ``pyarrow.parquet``.

    Raises:
        ConfigError: pyarrow isn't installed.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise ConfigError("Parquet files need pyarrow, which isn't here: pip install pyarrow") from None
    return pyarrow.parquet


@contextmanager
def parquet_file(path: Path) -> Iterator[Any]:
    """Open a Parquet file, a ``pyarrow.parquet.ParquetFile``; what fails while it is open counts as damage.

    Raises:
        ConfigError: pyarrow isn't installed.
        InputError: missing, damaged, or no Parquet file.
    """
    parquet = pyarrow_parquet()
    import pyarrow

    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except (OSError, pyarrow.ArrowException) as error:
        raise cannot_read(path, error) from None


def require_columns(path: Path, file: Any, columns: tuple[str, ...]) -> None:
    """Refuse a Parquet file that lacks one of the columns.

    Raises:
        InputError: names the missing ones and those that are there.
    """
    missing = [name for name in columns if name not in file.schema_arrow.names]
    if missing:
        raise InputError(
            f"{path} has no column {', '.join(missing)}; it has {', '.join(file.schema_arrow.names)}. Expected the "
            f"columns {', '.join(columns)}. Write it again with image paths, or name another file."
        )


def rows_of(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[Any, ...]]:
    """Yield the values of some columns row by row, a row group in memory at a time.

    Raises:
        ConfigError: pyarrow isn't installed.
        InputError: missing, damaged, or without one of the columns.
    """
    with parquet_file(path) as file:
        require_columns(path, file, columns)
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=list(columns))
            yield from zip(*(table.column(name).to_pylist() for name in columns), strict=True)
