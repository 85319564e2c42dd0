"""Tables that are damaged, ambiguous, or no tables: an error that says where and what to do, and nothing written."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import affcache
from affcache.errors import InputError
from affcache.exchange import npz_table, tables
from tests.exchange.sources import matrix
from tests.exchange.tables import KINDS, write_table

NOTHING = pyarrow.array([[]], pyarrow.list_(pyarrow.float32()))


def refused(tmp_path: Path, *sources: Path, **values: Any) -> str:
    """Import a table, expect an error in three parts, and nothing left; return it without the folder."""
    out = tmp_path / "out"
    with pytest.raises(InputError) as caught:
        affcache.import_embeddings(sources=sources, store=out / "x.h5", **{"name": "own", **values})
    message = str(caught.value)
    assert "Expected" in message
    assert message.endswith(".")
    assert not out.exists() or list(out.iterdir()) == []
    return message.replace(f"{tmp_path}/", "")


def text(tmp_path: Path, content: str | bytes, name: str = "in.csv") -> Path:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return tmp_path / name


def parquet(tmp_path: Path, **columns: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "in.parquet")
    return tmp_path / "in.parquet"


def npz(tmp_path: Path, **arrays: Any) -> Path:
    np.savez(tmp_path / "in.npz", **arrays)
    return tmp_path / "in.npz"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "in.csv begins with '', which doesn't name a column frame"),
        ("\n\n", "in.csv begins with '', which"),
        ("video,x\na,1\n", "in.csv begins with 'video,x', which doesn't name a column frame, frame_number, image,"),
        ("video|frame|x\na|1|2\n", "split at commas, semicolons or tabs"),
        ("frame,x;y;frame\n1,2;3;4\n", "in.csv begins with 'frame,x;y;frame'"),
        ("video,frame,x\n", "in.csv has no rows"),
        ("video,frame,x\n\n\n", "in.csv has no rows"),
        ("video,frame\na,1\n", "in.csv has 0 columns of features, beside video and frame"),
        ("video,frame,x,x\na,1,2,3\n", "in.csv has two columns of one name: x"),
        ("video,frame,x\na,1,2\na,1,3\n", "Frame 1 of the video a occurs twice: in.csv, line 2 and in.csv, line 3"),
        ("video,frame,x\na,1,2\n\n\na,01,3\n", "occurs twice: in.csv, line 2 and in.csv, line 5"),
        ("video,frame,x\na,1,2\nb,-1,3\n", "in.csv, line 3 has the frame number -1, outside 0 to 2147483647"),
        ("video,frame,x\na,2147483648,2\n", "in.csv, line 2 has the frame number 2147483648, outside"),
        ("video,frame,x\na,inf,2\n", "in.csv, line 2 has the frame number inf, which is no whole number"),
        ("video,frame,x\na,1.5,2\n", "in.csv, line 2 has the frame number 1.5, which is no whole number"),
        ("video,frame,x\na,,2\n", "in.csv, line 2 has no frame number"),
        ("video,frame,x\n,1,2\n", "in.csv, line 2 has the video name ''"),
        ("video,frame,x\na\0b,1,2\n", "line 2 has the video name 'a\\x00b', which a store can't keep"),
        ("video,frame,x\na,one,2\n", "The column frame of in.csv holds text. Expected whole numbers"),
        ("video,frame,x,y,z\na,1,2,b,d\na,2,c,3,\n", "are no numbers: x ('c' in line 3), y ('b' in line 2), z ('d' in"),
        ("video,frame,x\na,1,0;5\na,2,3\n", "x ('0;5' in line 2)"),
        ("video;frame;x\na;1;0,5\n", "x ('0,5' in line 2)"),
        ("video,frame,x\na,1,true\na,2,3\n", "x ('true' in line 2)"),
        ("video,frame,x\na,1,2\na,2\n", "in.csv, line 3 has 2 cells, and the first line 3"),
        ("video,frame,x\na,1,2\na,2,3,4\n", "in.csv, line 3 has 4 cells, and the first line 3"),
        ("video,frame,x\na,1,2\n \na,2,3\n", "in.csv, line 3 has 1 cells"),
        ('video,frame,x\na,1,2\n"a,2,3\na,3,4\n', "in.csv, line 4 has 1 cells, and the first line 3"),
        ("video,frame,x\na,1,2\na,2,inf\n", "in.csv, line 3: the column x is inf and is not finite"),
        ("video,frame,ms\na,1,2\na,2,66000\n", "line 3: the column ms is 66000.0 and is too large for float16"),
        ("image,x\n00001.jpg,2\n", "in.csv, line 2 has the path '00001.jpg', in which no folder names the video"),
        ("image,x\na/b.jpg,2\n", "in.csv, line 2 has the path 'a/b.jpg', which doesn't end in a frame number"),
        (b"video,frame,x\na\xff,1,2\n", "in.csv is not text in UTF-8"),
        (b"\xff\xfev\0i\0d\0", "in.csv is not text in UTF-8"),
        (b"\x1f\x8b\x08\0\0\0", "in.csv is not text in UTF-8"),
        (b"video,frame,x\ra,1,2\ra,2,3\r", "which doesn't name a column frame"),
        ("video,frame,x," + "y" * 2**22 + "\na,1,2,3\n", "in.csv begins with"),
        ("video,frame,x\n" + "a" * 2**23 + ",1,2\n", "in.csv can't be read: ArrowInvalid"),
    ],
)  # fmt: skip
def test_text_that_is_no_table(tmp_path: Path, content: str | bytes, said: str) -> None:
    assert said in refused(tmp_path, text(tmp_path, content))


def test_what_goes_wrong_later_in_a_file_names_its_line(tmp_path: Path) -> None:
    lines = [
        "video,frame,x,y",
        *(f"a,{frame},{frame % 7}.25,{'true' if frame % 2 else ''}" for frame in range(400_000)),
    ]
    for line, changed, said in (
        (399_000, "a,398999,ten,", "line 399001: the column x holds 'ten', where it held numbers before"),
        (399_000, "a,398999,1,3", "line 399001: the column y holds '3', where it held numbers before"),
        (399_000, "a,398999,1", "line 399001 has 3 cells, and the first line 4"),
        (399_000, "a,1,1,true", "occurs twice: in.csv, line 3 and in.csv, line 399001"),
        (399_000, "a,x,1,true", "line 399001: the column frame holds 'x', where"),
    ):
        content = [*lines[:line], changed, *lines[line + 1 :]]
        assert said in refused(tmp_path, text(tmp_path, "\n".join(content)), missing="drop")


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"x": [1.0]}, "in.parquet doesn't say which row is which frame: it has x. Expected columns video and frame"),
        ({"video": ["a"], "x": [1.0]}, "doesn't say which row is which frame: it has video, x"),
        ({"video": ["a"], "frame": ["1"], "x": [1.0]}, "The column frame of in.parquet holds text"),
        ({"video": [[1]], "frame": [1], "x": [1.0]}, "The column video of in.parquet holds lists of numbers"),
        ({"video": [None], "frame": [1], "x": [1.0]}, "row 0 (counted from 0) has no video"),
        ({"video": ["a", None], "frame": [1, 2], "x": [1.0, 2.0]}, "row 1 (counted from 0) has no video"),
        ({"video": ["a", "b"], "frame": [1, None], "x": [1.0, 2.0]}, "row 1 (counted from 0) has no frame number"),
        ({"video": ["a"], "frame": [2**40], "x": [1.0]}, "row 0 (counted from 0) has the frame number 1099511627776"),
        ({"video": ["a"], "frame": [1], "x": ["b"], "t": [{"u": 1}]}, "no numbers: x (text), t (struct<u: int64>)"),
        ({"video": ["a"], "frame": [1], "x": [["b"]]}, "are no numbers: x (list<"),
        ({"video": ["a"], "frame": [1], "x": [[1.0]], "y": [2]}, "has embeddings in x beside 1 other column"),
        ({"video": ["a"], "frame": [1], "x": [[1.0]], "y": [[2.0]]}, "has embeddings in x, y beside 1 other column"),
        ({"video": ["a", "a"], "frame": [1, 2], "x": [[1.0, 2.0], [1.0]]}, "row 1 (counted from 0): x has another"),
        ({"video": ["a"], "frame": [1], "x": NOTHING}, "of 0 values in x"),
        ({"video": ["a"], "frame": [1]}, "in.parquet has 0 columns of features"),
        ({"video": ["a"] * 0, "frame": [1] * 0, "x": [1.0] * 0}, "in.parquet has no rows"),
        ({"video": np.array([], str), "frame": np.array([], int), "x": np.array([], float)}, "in.parquet has no rows"),
        ({"video": ["a"], "frame": [1], "x": [2**62]}, "row 0 (counted from 0): the column x is 4.61"),
        ({"video": ["a"], "frame": [1], "x": [[1.0, 1e9]]}, "row 0 (counted from 0): value 1 (counted from 0) is 1000"),
        ({"image_path": [7], "x": [1.0]}, "row 0 (counted from 0) has the path '7', in which no folder names"),
    ],
)  # fmt: skip
def test_parquet_that_is_no_table(tmp_path: Path, columns: dict[str, Any], said: str) -> None:
    assert said in refused(tmp_path, parquet(tmp_path, **columns))


def test_two_columns_of_one_name_in_parquet(tmp_path: Path) -> None:
    table = pyarrow.table([["a"], [1], [2.0], [3.0]], names=["video", "frame", "x", "x"])
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    assert "two columns of one name: x" in refused(tmp_path, tmp_path / "in.parquet")


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({}, "in.npz doesn't say which row is which frame: it has no columns"),
        ({"x": matrix(1)}, "doesn't say which row is which frame: it has x"),
        ({"video": np.array(["a"], object), "frame": [1], "x": matrix(1)}, "np.array(video, dtype=str)"),
        ({"video": ["a"], "frame": np.array([1], object), "x": matrix(1)}, "The array frame of in.npz holds Python"),
        ({"video": ["a"], "frame": [1], "x": np.array([[1]], object)}, "are no numbers: x (Python objects)"),
        ({"video": [b"a"], "frame": [1], "x": matrix(1)}, "The column video of in.npz holds |S1 of shape (1,)"),
        ({"video": "a", "frame": [1], "x": matrix(1)}, "The column video of in.npz holds <U1 of shape ()"),
        ({"video": ["a"], "frame": [[1]], "x": matrix(1)}, "The column frame of in.npz holds lists of numbers"),
        ({"video": ["a"], "frame": [1], "x": matrix(2)}, "arrays of in.npz differ in length: video 1, frame 1, x 2"),
        ({"video": ["a"], "frame": [1], "x": np.ones((1, 2, 3))}, "are no numbers: x (float64 of shape (1, 2, 3))"),
        ({"video": ["a"], "frame": [1], "x": np.ones((1, 2), complex)}, "x (complex128 of shape (1, 2))"),
        ({"video": ["a"], "frame": [1], "x": matrix(1), "ms": [40]}, "embeddings in x beside 1 other column"),
        ({"video": ["a"], "frame": [1], "x": np.ones((1, 0))}, "embeddings of 0 values in x"),
        ({"video": ["a"], "frame": [1], "x": np.ones((1, 2**16 + 1), bool)}, "embeddings of 65,537 values in x"),
        ({"video": np.array([], str), "frame": np.array([], int), "x": np.ones((0, 2))}, "in.npz has no rows"),
        ({"video": ["a", "a"], "frame": [1, 2], "x": [[1, 2], [np.nan, 3]]}, "row 1 (counted from 0): the column x"),
        ({"video": ["a"], "frame": [np.nan], "x": matrix(1)}, "row 0 (counted from 0) has no frame number"),
        ({"video": np.array(["\ud800"]), "frame": [1], "x": matrix(1)}, "in.npz can't be read: UnicodeEncodeError"),
    ],
)  # fmt: skip
def test_arrays_that_are_no_table(tmp_path: Path, arrays: dict[str, Any], said: str) -> None:
    assert said in refused(tmp_path, npz(tmp_path, **arrays))


def test_a_large_array_in_fortran_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npz_table, "LARGEST_TRANSPOSED", 10)
    source = npz(tmp_path, video=["a", "b"], frame=[1, 2], x=np.asfortranarray(matrix(2)))
    assert "Save it as np.ascontiguousarray(x)" in refused(tmp_path, source)


@pytest.mark.parametrize("kind", KINDS)
def test_more_rows_than_there_are_frames(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MOST_ROWS", 3)
    table = write_table(tmp_path / f"in.{kind}", ["a"] * 4, range(4), matrix(4))
    assert "has more than 3 rows" in refused(tmp_path, table)


@pytest.mark.parametrize("kind", ["parquet", "npz"])
def test_a_table_that_is_cut_short(tmp_path: Path, kind: str) -> None:
    whole = write_table(tmp_path / f"in.{kind}", ["a"] * 5, range(5), matrix(5)).read_bytes()
    for length in (4, 8, len(whole) // 2, len(whole) - 1):
        (tmp_path / f"in.{kind}").write_bytes(whole[:length])
        assert f"in.{kind} can't be read" in refused(tmp_path, tmp_path / f"in.{kind}")


def test_arrays_whose_bytes_are_not_what_they_say(tmp_path: Path) -> None:
    source = npz(tmp_path, video=["a", "b"], frame=[1, 2], x=matrix(2))
    with zipfile.ZipFile(source) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    sound = members["x.npy"]
    for damage, said in (
        (sound[:-2], "EOFError"),
        (sound + b"\0\0", "more bytes than its header says"),
        (sound.replace(b"(2, 3)", b"(9, 3)"), "differ in length"),
        (sound[:6] + b"\x03" + sound[7:], "an array of version 3"),
        (sound.replace(b"'<f2'", b"'|O' "), "x (Python objects)"),
        (b"\x80\x04N.", "can't be read: ValueError"),
    ):
        with zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in {**members, "x.npy": damage}.items():
                archive.writestr(name, data)
        assert said in refused(tmp_path, source)
    contents = bytearray(npz(tmp_path, video=["a", "b"], frame=[1, 2], x=matrix(2)).read_bytes())
    at = contents.index(matrix(2).tobytes())
    contents[at] ^= 1
    source.write_bytes(contents)
    assert "in.npz can't be read: BadZipFile: Bad CRC-32" in refused(tmp_path, source)


def test_a_file_is_what_it_begins_with(tmp_path: Path) -> None:
    for kind in ("parquet", "npz"):
        write_table(tmp_path / f"in.{kind}", ["a"], [1], matrix(1)).rename(tmp_path / f"{kind}.csv")
        store = tmp_path / f"{kind}.h5"
        assert affcache.import_embeddings(sources=tmp_path / f"{kind}.csv", store=store, name="own").rows == 1
    for name in ("in.parquet", "in.npz", "in.npy", "in.h5", "in.safetensors"):
        source = text(tmp_path, "video,frame,x\na,1,2\n", name)
        assert f"{name} is no table of frame features" in refused(tmp_path, source)
    np.save(tmp_path / "in.npy", matrix(1))
    assert "in.npy is no table" in refused(tmp_path, tmp_path / "in.npy")
    (tmp_path / "folder").mkdir()
    assert "folder is no table" in refused(tmp_path, tmp_path / "folder")


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    assert "pipe.csv can't be read: not a regular file" in refused(tmp_path, tmp_path / "pipe.csv")
    (tmp_path / "link.csv").symlink_to(tmp_path / "gone.csv")
    assert "link.csv can't be read: No such file" in refused(tmp_path, tmp_path / "link.csv")
    (tmp_path / "link.npz").symlink_to(write_table(tmp_path / "in.npz", ["a"], [1], matrix(1)))
    affcache.import_embeddings(sources=tmp_path / "link.npz", store=tmp_path / "x.h5", name="own")


def test_tables_of_two_widths_or_kinds(tmp_path: Path) -> None:
    one, two = (write_table(tmp_path / f"{width}.npz", [f"{width}"], [1], matrix(1, width)) for width in (2, 3))
    assert "2.npz has embeddings of 2 values, 3.npz of 3" in refused(tmp_path, one, two)
    other = write_table(tmp_path / "in.csv", ["b"], [1], matrix(1))
    assert "have different columns of features: embedding, x0, x1, x2" in refused(tmp_path, two, other)
    twice = write_table(tmp_path / "again.npz", ["3"], [1], matrix(1, 3))
    assert re.search(r"occurs twice: 3\.npz, row 0 .* and again\.npz, row 0 ", refused(tmp_path, two, twice))


def test_a_table_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = text(tmp_path, "video,frame,x\na,1,2\na,2,3\n")
    unpack = tables.unpack

    def changed(*arguments: Any) -> Any:
        source.write_text("video,frame,x\na,1,2\n")
        return unpack(*arguments)

    monkeypatch.setattr(tables, "unpack", changed)
    assert "in.csv changed while it was read" in refused(tmp_path, source)


MEASURED = """
import resource, sys
import pyarrow, torch
import affcache.exchange.importing
pyarrow.set_memory_pool(pyarrow.system_memory_pool())
pages = int(open("/proc/self/statm").read().split()[5])  # of data
most = pages * resource.getpagesize() + 400 * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (most, most))
print(affcache.import_embeddings(sources=sys.argv[1], store=sys.argv[2], name="own").rows)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_memory_stays_bounded(tmp_path: Path, kind: str) -> None:
    rows, width = 300_000, 512 if kind != "csv" else 128
    features = np.zeros((rows, width), np.float32)
    features[:] = np.random.default_rng(0).normal(size=(1000, width)).round(3).repeat(300, axis=0)
    source, keys = tmp_path / f"in.{kind}", {"video": np.full(rows, "a"), "frame": np.arange(rows)}
    if kind == "npz":
        np.savez_compressed(source, **keys, x=features)
    elif kind == "parquet":
        lists = pyarrow.FixedSizeListArray.from_arrays(features.ravel(), width)
        pyarrow.parquet.write_table(pyarrow.table({**keys, "x": lists}), source, use_dictionary=False)
    else:
        from pyarrow.csv import write_csv

        columns = {f"x{column}": features[:, column] for column in range(width)}
        write_csv(pyarrow.table({**keys, **columns}), source)
    command = [sys.executable, "-c", MEASURED, str(source), str(tmp_path / "x.h5")]
    process = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert process.stdout.strip() == str(rows), process.stderr[-2000:]
