"""Frame features of other tools: a table keyed by video and frame becomes a source that no encoder made."""

import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from affcache.crops.crop_list import IMAGE_SUFFIXES
from affcache.errors import InputError, did_you_mean
from affcache.exchange.csv_table import CsvTable
from affcache.exchange.npz_table import NpzTable
from affcache.exchange.settings import ImportSettings
from affcache.exchange.sources import WIDEST, FrameKeys, ImportSource, Matrix, Part, unpack
from affcache.exchange.table_files import (
    FRAME,
    IMAGE,
    LIST,
    NUMBER,
    OBJECTS,
    TEXT,
    Batch,
    ParquetTable,
    TableFile,
)
from affcache.progress import MOST_LISTED, Listener, counted, listed
from affcache.store.description import TABLE
from affcache.tabular import PARQUET_MAGIC, magic_of, no_rows

VIDEO, INPUT = "video", "input"  # INPUT: as affcache predict and py-feat call it, a path or a name
KEYS = (VIDEO, INPUT, *FRAME, *IMAGE)  # never features
MOST_ROWS = 2**24  # of a table
KINDS = ((PARQUET_MAGIC, ParquetTable), (b"PK", NpzTable))  # by how files begin; what begins otherwise is CSV
OTHER_SUFFIXES = (".parquet", ".npz", ".npy", ".h5", ".hdf5", ".safetensors")  # what has them is no CSV


@dataclass(frozen=True)
class Choice:
    """Which columns of a table are what."""

    keys: tuple[str, ...]  # the image; or the frame, and the video unless the file is one
    columns: tuple[str, ...]  # D of numbers, or a single one of lists


@dataclass(frozen=True, kw_only=True)
class TablePart(Part):
    """The rows of a table that are taken."""

    table: TableFile
    columns: tuple[str, ...] | None  # (D,) their names; None for a list
    rows: "array[int]" = field(default_factory=lambda: array("q"))  # of the table, where some were left out
    remedy = (
        "Correct the value; divide the column by a fixed number, in all tables; or leave it out: --columns names those "
        "to take."
    )

    def place(self, row: int) -> str:
        """Name one of the part's rows for a message."""
        return self.table.place(self.rows[row] if self.rows else row)

    def value(self, column: int) -> str:
        """Name one of the part's columns for a message."""
        return f"the column {self.columns[column]}" if self.columns else super().value(column)


def open_tables(settings: ImportSettings, listener: Listener) -> list[ImportSource]:
    """Read which frames some tables hold, and say what is taken for what.

    Raises:
        InputError: one is no table, is damaged, has no rows, or lacks a key or a value; or their columns differ.
    """
    sources: list[ImportSource] = []
    nameless, columns = [], tuple[str, ...]()
    for path in settings.sources:
        table = open_table(path)
        keys, own = keys_of(table), columns_of(table, settings.columns)
        columns = columns or own
        if different := sorted(set(own).symmetric_difference(columns)):
            raise InputError(
                f"{settings.sources[0]} and {path} have different columns of features: {listed(different)} in one of "
                "them alone. Expected the same. Say which to take with --columns, or import each into a store of its "
                "own."
            )
        if {VIDEO, INPUT, *IMAGE}.isdisjoint(keys):
            nameless.append(path.stem)
        sources.append(_source(table, Choice(keys, columns), settings))
        listener.progress(len(sources), len(settings.sources), "table", "reading")
    names = sources[0].features["columns"]
    if names:
        listener.message(f"features: {counted(len(names), 'column')}, {listed(names)}")
    if nameless:
        listener.message(
            f"{counted(len(nameless), 'table')} without a column video: each is one video, named after its file: "
            f"{listed(nameless)}"
        )
    return sources


def open_table(path: Path) -> TableFile:
    """Open a table by what it begins with, whatever its name.

    Raises:
        InputError: it is missing or damaged, or no table.
    """
    magic = magic_of(path)
    for start, kind in KINDS:
        if magic.startswith(start):
            table: TableFile = kind(path)
            return table
    if path.is_dir() or path.suffix.lower() in OTHER_SUFFIXES:
        raise InputError(
            f"{path} is no table of frame features. Expected, with --name, a .csv, .parquet or .npz file. Check the "
            "path, or copy the file again; embeddings of an encoder are imported without --name."
        )
    return CsvTable(path)


def keys_of(table: TableFile) -> tuple[str, ...]:
    """Return the columns that say which row is which frame: (video, frame), (image,), (input, frame) or (frame,).

    Raises:
        InputError: there is none, or it holds something else.
    """
    frame = next((name for name in FRAME if name in table.kinds), None)
    image = next((name for name in IMAGE if name in table.kinds), None)
    if frame and VIDEO in table.kinds:
        keys: tuple[str, ...] = (VIDEO, frame)
    elif image:
        keys = (image,)
    elif frame:
        keys = (INPUT, frame) if INPUT in table.kinds else (frame,)
    else:
        raise InputError(
            f"{table.path} doesn't say which row is which frame: it has {listed(list(table.kinds)) or 'no columns'}. "
            "Expected columns video and frame, or image_path with paths that end in <video>/<frame>.jpg. Rename, or "
            "add them."
        )
    for name in keys:
        kind = table.kinds[name]
        if kind == OBJECTS:
            raise InputError(
                f"The array {name} of {table.path} holds Python objects, which aren't read, since that could run any "
                f"code. Expected text or numbers. Save it as np.array({name}, dtype=str), or dtype=int of frames."
            )
        if kind not in ((NUMBER,) if name in FRAME else (TEXT, NUMBER)):
            raise InputError(
                f"The column {name} of {table.path} holds {kind}. Expected "
                f"{'whole numbers' if name in FRAME else 'text'}, which say which row is which frame. Write it so."
            )
    return keys


def columns_of(table: TableFile, wanted: str) -> tuple[str, ...]:
    """Return the columns of features, in the table's order.

    Args:
        wanted: names separated by commas, in which * stands for anything; empty for all.

    Raises:
        InputError: there is none, or a name isn't there; or they aren't numbers, or one list.
    """
    every = [name for name in table.kinds if name not in KEYS]
    asked = [name.strip() for name in wanted.split(",") if name.strip()]
    for name in asked:
        if not any(_matches(one, name) for one in every):
            raise InputError(
                f"{table.path} has no column {name}{did_you_mean(name, every)}; beside the keys it has "
                f"{listed(every)}. Expected names of columns, or parts of them with *. Correct --columns."
            )
    chosen = [name for name in every if not asked or any(_matches(name, one) for one in asked)]
    kinds = {name: table.kinds[name] for name in chosen}
    wrong = [name for name, kind in kinds.items() if kind not in (NUMBER, LIST)]
    if wrong:
        more = ", ..." if len(wrong) > MOST_LISTED else ""
        raise InputError(
            f"{table.path} has columns that are no numbers: "
            f"{', '.join(map(table.described, wrong[:MOST_LISTED]))}{more}. Expected features alone beside video and "
            "frame. Say which columns to take: --columns 'AU*,pose_Rx'."
        )
    lists = [name for name, kind in kinds.items() if kind == LIST]
    if lists and len(chosen) > 1:
        raise InputError(
            f"{table.path} has embeddings in {listed(lists)} beside {counted(len(chosen) - 1, 'other column')}. "
            f"Expected one of embeddings, or columns of numbers. Say which to take: --columns {lists[0]}."
        )
    if not 0 < len(chosen) <= WIDEST:
        raise InputError(
            f"{table.path} has {len(chosen):,} columns of features, beside video and frame. Expected 1 to {WIDEST:,}. "
            "Check the file, or say which to take with --columns."
        )
    return tuple(chosen)


def _matches(name: str, pattern: str) -> bool:
    """Say whether a name is a pattern, in which * stands for anything; brackets are a part of openSMILE's names."""
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), name, re.DOTALL) is not None


def _source(table: TableFile, choice: Choice, settings: ImportSettings) -> ImportSource:
    """Read a table once, for its keys, and see that no value is missing."""
    keys, rows, read, width, dtype = FrameKeys(), array("q"), 0, 0, np.dtype("f8")
    for batch in table.batches(choice.keys, choice.columns):
        missing = np.isnan(batch.values)
        if missing.any() and settings.missing == "refuse":
            row, column = (int(index) for index in np.argwhere(missing)[0])
            raise _missing(table, read + row, choice.columns[min(column, len(choice.columns) - 1)])
        whole = np.flatnonzero(~missing.any(axis=1))
        _add_keys(keys, table, choice, batch, whole, read)
        rows.extend((read + whole).tolist())
        read, width, dtype = read + len(missing), batch.values.shape[1], batch.values.dtype
        if read > MOST_ROWS:
            raise InputError(
                f"{table.path} has more than {MOST_ROWS:,} rows. Expected a row for each frame. Check the file, or "
                "split it into several, which go into one store together."
            )
    if not keys:
        raise _nothing_left(table.path, read) if read else no_rows(table.path)
    if not 0 < width <= WIDEST:
        raise InputError(
            f"{table.path} has embeddings of {width:,} values in {choice.columns[0]}. Expected 1 to {WIDEST:,}. Check "
            "the file."
        )

    def matrix(folder: Path) -> Matrix:
        return unpack(folder, _values(table, choice, len(keys)), dtype, (len(keys), width))

    columns = None if table.kinds[choice.columns[0]] == LIST else choice.columns
    part = TablePart(
        table.path, keys, width, matrix, table=table, columns=columns, rows=rows if len(rows) < read else array("q")
    )
    features = {"features": settings.name, "columns": list(columns) if columns else None}
    return ImportSource(table.path, [part], TABLE, features=features, left_out=read - len(rows))


def _add_keys(
    keys: FrameKeys, table: TableFile, choice: Choice, batch: Batch, rows: npt.NDArray[np.int64], first: int
) -> None:
    """Take the keys of some rows of a batch, whose first one is that row of the table."""
    one_video = table.path.stem if len(choice.keys) == 1 and choice.keys[0] in FRAME else None
    for row in rows.tolist():
        try:
            if choice.keys[0] in IMAGE:
                keys.add_path(batch.keys[0][row])
            else:
                video = one_video if one_video is not None else batch.keys[0][row]
                keys.add(_name_of(video, path=choice.keys[0] == INPUT), _whole(batch.keys[-1][row]))
        except ValueError as error:
            raise InputError(
                f"{table.place(first + row)} {error}. Expected a video's name and the number of one of its frames. "
                "Correct the row, or remove it."
            ) from None


def _name_of(video: Any, *, path: bool) -> str:
    """Return a video's name; of the path of a video or photo what ``affcache faces`` calls it."""
    if not isinstance(video, str):
        raise ValueError("has no video")
    if path:
        from affcache.faces.media import VIDEO_SUFFIXES  # it brings torch

        file = PurePosixPath(video.replace("\\", "/"))
        return file.stem if file.suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES else video
    return video


def _whole(frame: Any) -> int:
    if frame is None or frame != frame:
        raise ValueError("has no frame number")
    if not float(frame).is_integer():
        raise ValueError(f"has the frame number {frame:g}, which is no whole number")
    return int(frame)


def _missing(table: TableFile, row: int, column: str) -> InputError:
    return InputError(
        f"{table.place(row)}: the column {column} holds nothing, or NaN. Expected a number in every row. Leave such "
        "rows out with --missing drop, or leave the column out: --columns names those to take."
    )


def _nothing_left(path: Path, read: int) -> InputError:
    return InputError(
        f"Each of the {read:,} rows of {path} lacks a value, so that --missing drop leaves none. Expected some whole "
        "ones. Name columns that are filled, with --columns."
    )


def _values(table: TableFile, choice: Choice, rows: int) -> Iterator[Matrix]:
    """Read a table again, for its values."""
    read = 0
    for batch in table.batches(choice.keys, choice.columns):
        values = batch.values[~np.isnan(batch.values).any(axis=1)]
        read += len(values)
        yield values
    if read != rows:
        raise InputError(f"{table.path} changed while it was read. Expected it to stay. Run the same command again.")
