"""Tables of faces: a row for every frame and face, kept for each input as it is finished, and written as one file."""

import csv
import hashlib
import io
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from affcache.errors import ConfigError, InputError
from affcache.faces.detector import LANDMARKS
from affcache.faces.media import DamagedMediaError, Media
from affcache.faces.scan import ScannedFrame
from affcache.faces.settings import DetectionSettings
from affcache.files import beside, cannot_write, discard_partials, open_regular, remove, write_bytes, write_text
from affcache.progress import Listener, counted

BOX = ("box_x", "box_y", "box_width", "box_height")  # pixels of the upright frame
POINTS = tuple(f"{name}_{axis}" for name in LANDMARKS for axis in "xy")
KEPT_SUFFIX = ".arrow"  # of the table of one input: ten times as fast to write as Parquet, of which photos have many
ROW_GROUP = 2**16  # rows that a Parquet file has together, at least
DIGITS = 9  # of a float32 in a CSV file: enough to have it back
KEYS = pa.schema(  # what every table begins with
    [
        ("input", pa.string()), ("frame", pa.int32()), ("timestamp", pa.float64()), ("face_id", pa.int32()),
        *((name, pa.float32()) for name in BOX), ("confidence", pa.float32()), ("success", pa.bool_()),
    ]
)  # fmt: skip


class FaceRows:
    """The rows of one input while it is looked at: one for each face of a frame, and one for a frame without any."""

    def __init__(self, name: str) -> None:
        self.name = name  # of the input
        self.frames: list[int] = []
        self.times: list[float] = []
        self.tracks: list[int] = []  # -1 without a face
        self.numbers: list[np.ndarray] = []  # (4 + 10 + 1,) box, landmarks, confidence

    def __len__(self) -> int:
        return len(self.frames)

    def add(self, found: ScannedFrame) -> list[int]:
        """Take a frame; return the rows of its faces."""
        first = len(self)
        if not found.faces:
            self._append(found, -1, np.full(15, np.nan, np.float32))
            return []
        for face, track in zip(found.faces, found.tracks, strict=True):
            self._append(found, track, np.concatenate([face.box, face.landmarks.ravel(), [face.confidence]]))
        return list(range(first, len(self)))

    def _append(self, found: ScannedFrame, track: int, numbers: np.ndarray) -> None:
        self.frames.append(found.number)
        self.times.append(found.timestamp)
        self.tracks.append(track)
        self.numbers.append(numbers.astype(np.float32))

    def persons(self, persons: Sequence[int]) -> np.ndarray:
        """Return the person of each row, int32 (n,), from the person of each track; 0 without a face."""
        return np.asarray([0, *persons], np.int32)[np.asarray(self.tracks, np.int64) + 1]

    def columns(self, persons: Sequence[int]) -> tuple[dict[str, pa.Array], dict[str, pa.Array]]:
        """Return the columns of ``KEYS``, and those of the landmarks."""
        numbers = np.stack(self.numbers) if len(self) else np.empty((0, 15), np.float32)  # (n, 15)
        person = self.persons(persons)
        known = person > 0

        def column(index: int) -> pa.Array:
            return pa.array(numbers[:, index], mask=~known)

        times = np.asarray(self.times, np.float64)
        keys = [
            pa.array([self.name] * len(self), pa.string()),
            pa.array(np.asarray(self.frames, np.int32)),
            pa.array(times, mask=np.isnan(times)),
            pa.array(person, mask=~known),
            *(column(index) for index in range(4)),
            column(14),
            pa.array(known),
        ]
        points = {name: column(4 + index) for index, name in enumerate(POINTS)}
        return dict(zip(KEYS.names, keys, strict=True)), points


Identity = dict[str, Any]  # of a file: where it lies, how long it is, and when it was changed


@dataclass(frozen=True)
class FinishedInput:
    """One input of which all is known, and where its table is kept."""

    name: str  # of its crops
    of: Mapping[str, Any]  # the file that it was
    made: Mapping[str, Any]  # what it was made with
    path: Path  # of the tables of several inputs
    first: int  # row in these
    rows: int


class FinishedInputs:
    """What is finished of several inputs: their tables, in a hidden folder, so that a kill costs what is under way.

    Args:
        folder: where they are kept.
        made: what all of them are made with, as JSON; a table that was made with something else is refused.
    """

    def __init__(self, folder: Path, made: Mapping[str, Any]) -> None:
        self.folder, self.made = folder, json.loads(json.dumps(made))
        self._found: dict[str, list[FinishedInput]] = {}
        self._last: tuple[Path, pa.Table] | None = None  # inputs of one file follow one another
        for path in sorted(folder.glob(f"*{KEPT_SUFFIX}")):
            self.add(path)

    def path(self, media: Media) -> Path:
        """Return the file of an input that is kept alone."""
        return self.folder / f"{media.name}{KEPT_SUFFIX}"

    def add(self, path: Path) -> None:
        """Take the tables of a file that is in place; a damaged one is none."""
        try:
            said, first = json.loads(read_kept(path).schema.metadata[b"affcache"]), 0
            for of in said["of"]:
                file = {**of["file"], "path": str(of["file"]["path"])}
                one = FinishedInput(str(of["name"]), file, dict(said["made"]), path, first, int(of["rows"]))
                self._found.setdefault(one.name, []).append(one)
                first += one.rows
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
            return

    def drop(self, media: Media) -> None:
        """Forget an input, whose file is removed."""
        self._found.pop(media.name, None)

    def every(self) -> list[FinishedInput]:
        """Return all inputs, by name."""
        return [parts[-1] for _, parts in sorted(self._found.items())]

    def finished(self, media: Media) -> FinishedInput | None:
        """Return an input's entry, where it is of the file as it is now.

        Raises:
            ConfigError: it was made with other settings.
        """
        now = identity(media)
        return next((one for one in self._own(media) if one.of == now), None)

    def require_own(self, media: Sequence[Media]) -> None:
        """Refuse to mix: results of other settings, or of another file under the name of one of these.

        Raises:
            ConfigError: an input, whichever, is finished with other settings.
            InputError: an input has the name of another one that is finished.
        """
        of_path = {str(asked.path.absolute()): asked for asked in media}
        for one in self.every():
            self._require_made_so(one)
            now = of_path.get(one.of["path"])
            if now is not None and now.name != one.name:
                raise InputError(
                    f"{self.folder.parent} has results for {now.path} under the name {one.name}, and now it would be "
                    f"called {now.name}: another file shares that name. Expected it once. Rename the new file, or "
                    "choose another --out."
                )
        for asked in media:
            for found in self._own(asked):
                other = Path(found.of["path"])
                if other.exists() and asked.path.exists() and not other.samefile(asked.path):
                    raise InputError(
                        f"{self.folder.parent} has results for {other}, which is called {asked.name} there as "
                        f"{asked.path} would be. Expected names that keep them apart. Rename one of them, or choose "
                        "another --out."
                    )

    def _own(self, media: Media) -> list[FinishedInput]:
        found = self._found.get(media.name, [])
        for one in found:
            self._require_made_so(one)
        return found

    def _require_made_so(self, one: FinishedInput) -> None:
        if one.made != self.made:
            different = sorted(k for k in {**one.made, **self.made} if one.made.get(k) != self.made.get(k))
            raise ConfigError(
                f"{self.folder.parent} has results for {one.of['path']} that were made with other settings: "
                f"{', '.join(different)}. Expected the same ones, to go on there. Give them as before, or choose "
                "another --out."
            )

    def write(self, inputs: Sequence[tuple[Media, Identity]], table: pa.Table, rows: Sequence[int], path: Path) -> None:
        """Keep the tables of inputs, one after the other in one table, in so many rows each.

        Args:
            inputs: each with what ``identity`` said of it before it was read.
            table: all rows.
            rows: of each input.
            path: the file to write.

        Raises:
            InputError: the disk refuses.
        """
        of = [{"name": one.name, "file": file, "rows": n} for (one, file), n in zip(inputs, rows, strict=True)]
        write_kept(
            path, table.replace_schema_metadata({b"affcache": json.dumps({"made": self.made, "of": of}).encode()})
        )

    def table(self, one: FinishedInput) -> pa.Table:
        """Return the table of an input."""
        if self._last is None or self._last[0] != one.path:
            self._last = one.path, read_kept(one.path).replace_schema_metadata(None)
        return self._last[1].slice(one.first, one.rows)

    def remove(self) -> None:
        """Remove them all."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._found = {}


def write_kept(path: Path, table: pa.Table) -> None:
    """Write what is kept of inputs: an Arrow file and its sha256. Raises InputError where the disk refuses."""
    written = io.BytesIO()
    with pa.ipc.new_file(written, table.schema) as writer:
        writer.write_table(table)
    content = written.getvalue()
    write_bytes(path, content + hashlib.sha256(content).digest())


def read_kept(path: Path) -> pa.Table:
    """Read what is kept of inputs; raises OSError, ValueError or pa.ArrowException where it is damaged."""
    with open_regular(path) as file:
        whole = file.readall()
    content, digest = whole[:-32], whole[-32:]
    if hashlib.sha256(content).digest() != digest:
        raise ValueError("it was changed")
    return pa.ipc.open_file(pa.py_buffer(content)).read_all()


def identity(media: Media) -> Identity:
    """Return what tells a file from what it was before; nothing of one that is gone, which equals no other."""
    try:
        found = media.path.stat()
    except OSError:
        return {"path": str(media.path.absolute())}
    return {"path": str(media.path.absolute()), "bytes": found.st_size, "modified": found.st_mtime_ns}


def write_table(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> int:
    """Write tables of one schema as one file, whole or not at all, as Parquet or CSV by its name; return the rows.

    In CSV, what isn't there is empty, and numbers have as many digits as give them back.

    Raises:
        InputError: the disk refuses.
    """
    rows = 0
    discard_partials(path)
    try:
        with beside(path) as partial:
            if path.suffix.lower() == ".parquet":
                with pq.ParquetWriter(partial, schema) as writer:
                    for table in _gathered(table.select(schema.names).cast(schema) for table in tables):
                        writer.write_table(table)
                        rows += len(table)
            else:
                with partial.open("x", encoding="utf-8", newline="") as file:
                    lines = csv.writer(file, lineterminator="\n")
                    lines.writerow(schema.names)
                    for table in tables:
                        lines.writerows(_texts(table.select(schema.names).cast(schema)))
                        rows += len(table)
    except OSError as error:
        raise cannot_write(path, error) from None
    return rows


def _gathered(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Put small tables together, so that a file of photos isn't one of row groups of a row."""
    waiting, rows = [], 0
    for table in tables:
        waiting.append(table)
        rows += len(table)
        if rows >= ROW_GROUP:
            yield pa.concat_tables(waiting)
            waiting, rows = [], 0
    if waiting:
        yield pa.concat_tables(waiting)


def _texts(table: pa.Table) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of a table as CSV has them."""
    columns = []
    for column in table.columns:
        values = column.to_pylist()
        if pa.types.is_boolean(column.type):
            values = [None if v is None else int(v) for v in values]
        elif pa.types.is_float32(column.type):
            values = [None if v is None else f"{v:.{DIGITS}g}" for v in values]
        columns.append(values)
    return zip(*columns, strict=True)


class Damaged:
    """Inputs that can't be read: said, and listed in a file beside the result, with the reasons."""

    def __init__(self, path: Path, listener: Listener) -> None:
        self.path, self.listener = path, listener
        self.reasons: dict[Path, str] = {}

    def add(self, media: Media, error: DamagedMediaError) -> None:
        """Take one, and say so."""
        self.reasons[media.path] = str(error)
        self.listener.warning(f"left out: {error}")

    def why_nothing(self, settings: DetectionSettings, inputs: int, frames: int) -> str:
        """Say why no face was found in inputs of which so many frames were looked at."""
        if frames:
            return (
                f"No face was found in {counted(frames, 'frame')} of {counted(inputs, 'input')}. Expected faces that "
                f"are seen with a confidence of {settings.confidence:g}. Lower --confidence, raise --detection-side "
                "where faces are small, or look at what was given."
            )
        if self.reasons:
            more = len(self.reasons) - 1
            return next(iter(self.reasons.values())) + (f" Nor could {counted(more, 'other input')}." if more else "")
        end = "the end" if settings.to is None else f"{settings.to:g} s"
        return (
            f"{counted(inputs, 'input')} had no frame between {settings.from_:g} s and {end}. Expected some. Check "
            "--from and --to."
        )

    def write(self) -> None:
        """Write the list, or remove an old one where there is nothing to list."""
        if not self.reasons:
            with suppress(InputError):
                remove(self.path)
            return
        text = io.StringIO()
        for path, reason in self.reasons.items():
            text.write(f"{path}\t{' '.join(reason.split())}\n")
        write_text(self.path, text.getvalue())
