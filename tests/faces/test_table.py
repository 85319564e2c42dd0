"""Tables of faces as files: Parquet, and CSV that gives every number back."""

import csv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from affcache.errors import InputError
from affcache.faces.detector import Face
from affcache.faces.scan import ScannedFrame
from affcache.faces.table import KEYS, POINTS, FaceRows, write_table

FACE = Face(np.arange(4, dtype=np.float32), np.arange(10, 20, dtype=np.float32).reshape(5, 2), 0.75)


def frame(number: int, faces: int, time: float = 0.5) -> ScannedFrame:
    return ScannedFrame(number, time, [FACE] * faces, [], list(range(faces)), False)


def some_rows() -> FaceRows:
    rows = FaceRows('clip, "the" first.mp4')
    assert [rows.add(frame(1, 2)), rows.add(frame(2, 0)), rows.add(frame(3, 1))] == [[0, 1], [], [3]]
    return rows


def test_rows_have_the_persons_of_their_tracks() -> None:
    keys, points = some_rows().columns([5, 2])
    table = pa.table(keys)
    assert table.schema.equals(KEYS)
    assert table["face_id"].to_pylist() == [5, 2, None, 5]
    assert table["success"].to_pylist() == [True, True, False, True]
    assert table["box_height"].to_pylist() == [3, 3, None, 3]
    assert table["confidence"].to_pylist() == [0.75, 0.75, None, 0.75]
    assert list(points) == list(POINTS)
    assert [points[name].to_pylist() for name in POINTS] == [[i, i, None, i] for i in range(10, 20)]


def test_a_time_that_is_none_is_empty_and_no_rows_are_a_table_too() -> None:
    rows = FaceRows("photo.jpg")
    rows.add(frame(1, 1, time=float("nan")))
    assert rows.columns([1])[0]["timestamp"].to_pylist() == [None]
    assert len(pa.table(FaceRows("none").columns([])[0], schema=KEYS)) == 0


@pytest.mark.parametrize("name", ["t.parquet", "t.csv", "T.CSV"])
def test_tables_of_several_inputs_become_one_file(name: str, tmp_path: Path) -> None:
    table = pa.table(some_rows().columns([5, 2])[0])
    assert write_table(tmp_path / name, KEYS, [table, table.slice(0, 0), table.slice(1)]) == 7
    if name.endswith("parquet"):
        assert pq.read_table(tmp_path / name).equals(pa.concat_tables([table, table.slice(1)]))
        return
    with (tmp_path / name).open(newline="", encoding="utf-8") as file:
        header, *lines = list(csv.reader(file))
    assert header == KEYS.names
    assert lines[0] == ['clip, "the" first.mp4', "1", "0.5", "5", "0", "1", "2", "3", "0.75", "1"]
    assert lines[2] == ['clip, "the" first.mp4', "2", "0.5", "", "", "", "", "", "", "0"]
    assert len(lines) == 7


@settings(max_examples=50, deadline=None)
@given(numbers=st.lists(st.tuples(st.floats(width=32, allow_nan=False), st.floats(allow_nan=False)), min_size=1))
def test_csv_gives_every_number_back(
    numbers: list[tuple[float, float]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    schema = pa.schema([("small", pa.float32()), ("large", pa.float64())])
    small, large = (pa.array([pair[k] for pair in numbers], kind) for k, kind in enumerate(schema.types))
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    write_table(path, schema, [pa.table([small, large], schema=schema)])
    with path.open(newline="", encoding="utf-8") as file:
        found = [(np.float32(row["small"]), float(row["large"])) for row in csv.DictReader(file)]
    assert found == [(np.float32(one), other) for one, other in numbers]


def test_a_table_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    table = pa.table(some_rows().columns([1, 2])[0])

    def tables():  # type: ignore[no-untyped-def]
        yield table
        raise RuntimeError("in the middle")

    for name in ("t.parquet", "t.csv"):
        write_table(tmp_path / name, KEYS, [table])
        before = (tmp_path / name).read_bytes()
        with pytest.raises(RuntimeError):
            write_table(tmp_path / name, KEYS, tables())
        assert (tmp_path / name).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.csv", "t.parquet"]
    with pytest.raises(InputError, match=r"t\.csv.x\.csv can't be written"):
        write_table(tmp_path / "t.csv" / "x.csv", KEYS, [table])
