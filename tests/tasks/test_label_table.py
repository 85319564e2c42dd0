"""Tables of labels: what is written is read, whatever the order and the format; bad rows are named with their lines."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from affcache.errors import InputError
from affcache.tasks.annotations import join_labels
from affcache.tasks.kinds import Classes, Units, Values
from affcache.tasks.label_files import VideoLabels
from affcache.tasks.label_sources import find_labels
from affcache.tasks.label_table import read_label_table
from affcache.tasks.task import Task
from affcache.tasks.tasks import TASKS
from tests.conftest import write_store

MOOD = Classes("mood", ("calm", "engaged", "bored"))
UNITS = Units("units", ("smile", "frown"))
PAIN = Values("pain", ("pain", "Effort"), low=0, high=10)
NAMES = st.text("ab é;,\t\n\"'", min_size=1, max_size=4).filter(lambda name: name.strip() == name)
FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(
    path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]], delimiter: str = ",", bom: str = ""
) -> Path:
    """Write a CSV file, or a Parquet file where the name says so; "" is nothing."""
    if path.suffix == ".parquet":
        columns = [[None if value == "" else value for value in column] for column in zip(*rows, strict=True)]
        pq.write_table(pa.table(dict(zip(header, columns, strict=True))), path)
        return path
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(bom)
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return path


def of(path: Path, task: Task, split: str = "train") -> dict[str, VideoLabels]:
    """What a table says of each video of a split."""
    source = find_labels(path, task, split)
    return {video: source.read(video) for video in source.videos}


def test_classes_by_video_and_frame(tmp_path: Path) -> None:
    rows = [
        ("a", 3, "train", "bored"), ("a", 1, "Train", "CALM"), ("a", 2, "training", ""), ("b", 10, "VAL", "1"),
        ("c", 5, "dev", "engaged"), ("d", 1, "valid", "calm"), ("e", 1, "test", "whatever"),
    ]  # fmt: skip
    path = write(tmp_path / "x.csv", ("video", "frame", "split", "label"), rows)
    train = find_labels(path, MOOD, "train")
    assert (list(train.videos), train.test_rows, train.where) == (["a"], 1, path)
    found = train.read("a")
    assert found.frame_numbers is not None
    assert found.frame_numbers.tolist() == [1, 2, 3]
    assert (found.labels.tolist(), found.valid.tolist()) == ([0, -1, 2], [True, False, True])
    assert found.labels.dtype == np.int64
    assert {video: labels.labels.tolist() for video, labels in of(path, MOOD, "validation").items()} == {
        "b": [1], "c": [1], "d": [0],
    }  # fmt: skip


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_units_and_values_may_lack_some(suffix: str, tmp_path: Path) -> None:
    header = ("Video", "Frame_number", "SPLIT", "note", "frown", "Smile")
    rows = [("a", 1, "train", "x", True, 1), ("a", 2, "train", "y", False, ""), ("a", 3, "train", "z", "", "")]
    found = of(write(tmp_path / f"units{suffix}", header, rows), UNITS)["a"]
    assert found.labels.tolist() == [[1, 1], [-1, 0], [-1, -1]]
    assert found.valid.tolist() == [True, True, False]

    header = ("video", "frame", "split", "effort", "pain")
    rows = [("a", 1.0, "train", 0.1, 3), ("a", 2.0, "train", "", 10), ("a", 3.0, "train", "", "")]
    found = of(write(tmp_path / f"values{suffix}", header, rows), PAIN)["a"]
    np.testing.assert_array_equal(found.labels, np.float32([[3, 0.1], [10, np.nan], [np.nan, np.nan]]))
    assert found.labels.dtype == np.float32
    assert found.valid.tolist() == [True, True, False]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_separators_and_byte_order_marks(delimiter: str, bom: str, tmp_path: Path) -> None:
    rows = [("crops/ä b/00007.jpg", "train", "calm"), ("crops\\c\\1.PNG", "val", "bored")]
    path = write(tmp_path / "x.tsv", ("image", "split", "how it is"), rows, delimiter, bom)
    (found,) = of(path, MOOD).items()
    assert (found[0], found[1].frame_numbers, found[1].labels) == ("crops/ä b", [7], [0])
    assert list(of(path, MOOD, "validation")) == ["crops/c"]


def test_columns_may_be_called_anything(tmp_path: Path) -> None:
    header = ("clip", "n", "set", "part", "label", "state", "video", "frame")
    rows = [("a", 1, "train", "f1", "x", "calm", "", ""), ("b", 2, "val", "", "x", "bored", "", "")]
    path = write(tmp_path / "x.csv", header, rows)
    columns = {"video": "clip", "frame": "n", "split": "set", "fold": "part", "label": "state"}
    task = replace(MOOD, columns=tuple(columns.items()))
    assert {video: labels.labels.tolist() for video, labels in of(path, task).items()} == {"a": [0]}
    assert read_label_table(path, task).of_split("train").folds == {"a": "f1"}
    assert read_label_table(path, task).of_split("validation").folds == {}
    assert read_label_table(path, replace(task, columns=task.columns[:3] + task.columns[4:])).folds is None
    with pytest.raises(InputError, match=r"has no column 'clop' \(did you mean 'clip'\?\), which columns of task mood"):
        read_label_table(path, replace(MOOD, columns=(("split", "set"), ("video", "clop"))))


def test_videos_keep_their_split_and_fold_in_any_order(tmp_path: Path) -> None:
    whose = {"a": ("train", "f"), "b": ("val", "g"), "c": ("train", ""), "d": ("val", "f")}
    rows = [(video, frame, *whose[video], "calm") for frame in (2, 1) for video in "dacb"]
    table = read_label_table(write(tmp_path / "x.csv", ("video", "frame", "split", "fold", "label"), rows), MOOD)
    train, validation = table.of_split("train"), table.of_split("validation")
    assert ({*train.videos}, {*validation.videos}) == ({"a", "c"}, {"b", "d"})
    assert (train.folds, validation.folds) == ({"a": "f"}, {"b": "g", "d": "f"})
    mixed = [("c", 1, "train", "f", ""), ("d", 1, "train", "f", ""), ("c", 2, "train", "g", "")]
    path = write(tmp_path / "x.csv", ("video", "frame", "split", "fold", "label"), mixed)
    with pytest.raises(InputError, match=r"the video c is in the fold f in line 2 and in g in line 4\. Expected all"):
        read_label_table(path, MOOD)


def test_the_index_of_pandas_is_no_label(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", ("", "video", "frame", "split", "how"), [(0, "a", 1, "train", "calm")])
    assert of(path, MOOD)["a"].labels.tolist() == [0]
    header = ("video", "frame", "split", "how", "__index_level_0__")
    path = write(tmp_path / "x.parquet", header, [("a", 1, "train", "bored", 0)])
    assert of(path, MOOD)["a"].labels.tolist() == [2]
    header = ("video", "frame", "split", "Label", "how", "mood")
    path = write(tmp_path / "x.csv", header, [("a", 1, "train", "calm", "x", "bored")])
    with pytest.raises(InputError, match=r"has the columns Label and mood, and each may hold the classes\. Expected"):
        of(path, MOOD)
    assert of(path, replace(MOOD, columns=(("label", "mood"),)))["a"].labels.tolist() == [2]


@pytest.mark.parametrize(
    ("header", "wrong"),
    [
        ("video,frame,Split,split,Label,label", ""),
        ("VIDEO,video,FRAME,frame,Class,CLASS", "has no column split"),
        ("video,frame,Split,SPLIT,label,x", "has the columns Split and SPLIT, and each may be the split. Expected one"),
        ("Video,VIDEO,frame,split,label,x", "has the columns Video and VIDEO, and each may be the video"),
        ("video,frame,split,Fold,FOLD,label", "has the columns Fold and FOLD, and each may be the fold"),
        ("video,frame,split,Label,LABEL,x", "has the columns Label and LABEL, and each may hold the classes"),
        ("video,frame,split,class,label,x", "has the columns label and class, and each may hold the classes"),
        ("video,frame,split,Path,PATH,label", ""),
    ],
)
def test_of_columns_that_differ_in_capitals_the_exact_one_counts(header: str, wrong: str, tmp_path: Path) -> None:
    cells = {"video": "v", "frame": 1, "split": "train", "label": "bored"}
    path = write(tmp_path / "x.parquet", header.split(","), [[cells.get(name, "?") for name in header.split(",")]])
    if not wrong:
        assert of(path, MOOD)["v"].labels.tolist() == [2]
    else:
        with pytest.raises(InputError) as caught:
            of(path, MOOD)
        assert wrong in str(caught.value)


def test_no_two_units_are_one_column_nor_is_a_key_one(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", ("video", "frame", "split", "smile"), [("a", 1, "train", 1)])
    with pytest.raises(InputError, match="has no column Smile; beside"):
        of(path, Units("units", ("smile", "Smile")))
    with pytest.raises(InputError, match="has no column frame; beside the keys video, frame, split it has smile"):
        of(path, Units("units", ("smile", "frame")))
    with pytest.raises(InputError, match="has no column Smile, SMILE; beside"):
        of(path, Units("units", ("Smile", "SMILE")))


@pytest.mark.parametrize("said", [{"video": "clip"}, {"frame": "n"}, {"video": "clip", "frame": "n"}])
def test_no_path_counts_where_the_task_names_video_or_frame(said: dict[str, str], tmp_path: Path) -> None:
    task = replace(MOOD, columns=tuple(said.items()))
    header = ["path", "split", "label", said.get("video", "video"), said.get("frame", "frame")]
    found = of(write(tmp_path / "x.csv", header, [("p/1.png", "train", "calm", "v", 7)]), task)
    assert {video: labels.frame_numbers for video, labels in found.items()} == {"v": [7]}
    header[3 if "video" not in said else 4] = "x"
    if len(said) == 1:
        path = write(tmp_path / "x.csv", header, [("p/1.png", "train", "calm", "v", 7)])
        with pytest.raises(InputError, match=f"has no column {'frame' if 'video' in said else 'video'}; it has"):
            of(path, task)


@pytest.mark.parametrize("name", ["Train_Set/a.txt", "training_set_annotations.txt"])
def test_files_of_frames_hold_no_labels_of_whole_videos(name: str, tmp_path: Path) -> None:
    (tmp_path / "Train_Set").mkdir()
    (tmp_path / name).write_text("calm,engaged,bored\n0\n1\n")
    for path in (tmp_path, tmp_path / name) if "annotations" in name else (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match=r"mood are of whole videos, and .* is no table\. Expected one in CSV or"):
            find_labels(path, replace(MOOD, level="video"), "train")


def test_labels_of_whole_videos(tmp_path: Path) -> None:
    task = replace(MOOD, level="video")
    path = write(tmp_path / "x.csv", ("video", "split", "mood"), [("b", "train", "calm"), ("a", "train", "")])
    found = of(path, task)
    assert found["b"].frame_numbers is None
    assert (found["b"].labels.tolist(), found["b"].valid.tolist(), found["a"].valid.tolist()) == ([0], [True], [False])
    with pytest.raises(
        InputError, match=r"no column frame; .* If a row is of a whole video, write level = \"video\" into the task"
    ):
        read_label_table(path, MOOD)
    path = write(path, ("video", "split", "mood"), [("b", "train", "calm"), ("a", "val", ""), ("b", "train", "calm")])
    with pytest.raises(InputError, match="line 2 and line 4 both are of the video b"):
        read_label_table(path, task)


def test_tables_are_for_known_tasks_too(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", ("video", "frame", "split", "expr"), [("a", 1, "train", "happiness")])
    assert of(path, TASKS["expr"])["a"].labels.tolist() == [4]
    header = ("video", "frame", "split", *TASKS["va"].classes)
    path = write(tmp_path / "va.csv", header, [("a", 1, "train", "-0.5", "1")])
    assert of(path, TASKS["va"])["a"].labels.tolist() == [[-0.5, 1]]


def line(*cells: Any) -> str:
    return ",".join(map(str, ("video,frame,split,label\na,1,train,calm\nb,1,val,bored\n", *cells))).replace("\n,", "\n")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (line("a", 2, "train", "clam"), "x.csv, line 4: the column label holds 'clam'; expected a class (did you"),
        (line("a", 2, "train", 3), "line 4: the column label holds '3'; expected a class: calm, engaged, bored, a"),
        (line("a", 2, "train", -1), "line 4: the column label holds '-1'; expected a class"),
        (line("a", 2, "train", "nan"), "line 4: the column label holds 'nan'"),
        (line("a", 1, "train", "calm"), "x.csv: line 2 and line 4 both are of frame 1 of the video a. Expected"),
        (line("a", 1, "train", "bored"), "x.csv: line 2 and line 4 both are of frame 1 of the video a"),
        (line("a", 2, "trian", "calm"), "line 4: the column split holds 'trian'; expected train, validation or test"),
        (line("a", 2, "", "calm"), "line 4: the column split holds ''; expected train"),
        (line("a", 2, "val", "calm"), "the video a is in the split train in line 2 and in validation in line 4."),
        (line("", 2, "train", "calm"), "line 4: the column video holds ''; expected the name of a video"),
        (line("a", 1.5, "train", "calm"), "line 4: the column frame holds '1.5'; expected the whole number of a frame"),
        (line("a", -1, "train", "calm"), "line 4: the column frame holds '-1'"),
        (line("a", "1_0", "train", "calm"), "line 4: the column frame holds '1_0'"),
        (line("a", 2**31, "train", "calm"), "line 4: the column frame holds '2147483648'"),
        (line("a", "", "train", "calm"), "line 4: the column frame holds ''"),
        (line("a", 2, "train"), "line 4 has 3 cells, and the first line 4"),
        ("video,frame,split,label\n", "x.csv has no rows"),
        ("video,frame,split,label\na,1,test,calm\n", "x.csv has no rows"),
        ("video,frame,split,label\na,1,train,calm\n", "x.csv has no row of the split validation"),
        ("video,frame,label\na,1,calm\n", "which doesn't name a column split"),
        ("split;a,b\ntrain;c\n", "x.csv has no column video and no column frame; it has split, a,b. Expected"),
        ("split,frame\ntrain,1\n", "x.csv has no column video; it has split, frame"),
        ("path,split,label\ncover.jpg,train,calm\n", "line 2: the column path holds 'cover.jpg'; expected the path of"),
        ("video,frame,split,a,b\nv,1,train,calm,x\n", "x.csv has no column label, class or mood; beside"),
        ("video,frame,split,split\nv,1,train,calm\n", "x.csv has two columns of one name: split"),
        ("", "which doesn't name a column split"),
    ],
)  # fmt: skip
def test_bad_rows_and_columns(content: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(content)
    with pytest.raises(InputError) as caught:
        find_labels(tmp_path / "x.csv", MOOD, "validation")
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("task", "cells", "expected"),
    [
        (PAIN, "3,10.5", "line 2: the column Effort holds '10.5'; expected a number from 0 to 10, with a point"),
        (PAIN, "nan,1", "line 2: the column pain holds 'nan'; expected a number from 0 to 10"),
        (PAIN, "inf,1", "line 2: the column pain holds 'inf'"),
        (PAIN, '"0,5",1', "line 2: the column pain holds '0,5'; expected a number from 0 to 10, with a point"),
        (UNITS, "2,1", "line 2: the column smile holds '2'; expected 0, 1, false or true, or nothing for no label"),
        (UNITS, "-1,1", "line 2: the column smile holds '-1'"),
        (
            replace(PAIN, classes=("pain", "strain")),
            "1,1",
            "has no column strain; beside the keys video, frame, split it has pain, Effort.",
        ),
    ],
)
def test_bad_units_and_values(task: Task, cells: str, expected: str, tmp_path: Path) -> None:
    names = ("pain", "Effort") if isinstance(task, Values) else task.classes
    (tmp_path / "x.csv").write_text(f"video,frame,split,{','.join(names)}\na,1,train,{cells}\n")
    with pytest.raises(InputError) as caught:
        find_labels(tmp_path / "x.csv", task, "train")
    assert expected in str(caught.value)


def test_nan_in_parquet_is_no_label_left_out(tmp_path: Path) -> None:
    columns = {
        "video": ["a", "a"],
        "frame": [1, 2],
        "split": ["train"] * 2,
        "pain": [1.0, float("nan")],
        "effort": [1, 2],
    }
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(
        InputError,
        match=r"x.parquet, row 1 \(counted from 0\): the column pain holds 'nan'; expected a .*, in Parquet ",
    ):
        find_labels(tmp_path / "x.parquet", PAIN, "train")
    for task in (MOOD, UNITS):
        columns = {name: [1.0, float("nan")] for name in ("label", *UNITS.classes)}
        table = {"video": ["a", "a"], "frame": [1, 2], "split": ["train"] * 2, **columns}
        pq.write_table(pa.table(table), tmp_path / "x.parquet")
        with pytest.raises(
            InputError, match=r"holds 'nan'; expected .* \(an empty cell, in Parquet null, which nan isn't"
        ):
            find_labels(tmp_path / "x.parquet", task, "train")


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
@pytest.mark.parametrize("where", ["header", "row"])
def test_another_encoding_is_told_how_to_convert(encoding: str, where: str, tmp_path: Path) -> None:
    names = ("é" if where == "header" else "x", "é" if where == "row" else "x")
    path = tmp_path / "x.csv"
    path.write_bytes(
        f"video,frame,split,label,{names[0]}\na,1,train,calm,b\n{names[1]},1,val,calm,b\n".encode(encoding)
    )
    with pytest.raises(InputError, match=r"is not text in UTF-8. .* iconv -f WINDOWS-1252 -t UTF-8"):
        find_labels(path, MOOD, "train")


def test_a_file_that_is_missing_or_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no.csv can't be read: No such file"):
        find_labels(tmp_path / "no.csv", MOOD, "train")
    with pytest.raises(InputError, match=r"No train labels of task mood found: looked for <video>.txt in .*Train_Set"):
        find_labels(tmp_path / "none", MOOD, "train")
    for long in ("x" * 5000, "x" * 5000 + ".csv", "x/" * 5000):
        for task in (MOOD, replace(MOOD, level="video"), TASKS["expr"]):
            with pytest.raises(
                InputError, match=r"x can't be read: File name too long|csv can't be read: File name too"
            ):
                find_labels(long, task, "train")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match=r"x.parquet can't be read"):
        find_labels(tmp_path / "x.parquet", MOOD, "train")


def test_classes_that_are_numbers_are_names(tmp_path: Path) -> None:
    stars = Classes("stars", ("1", "2", "3"))
    path = write(tmp_path / "x.csv", ("video", "frame", "split", "stars"), [("a", 1, "train", 1), ("a", 2, "train", 3)])
    assert of(path, stars)["a"].labels.tolist() == [0, 2]
    path = write(path, ("video", "frame", "split", "stars"), [("a", 1, "train", 0)])
    with pytest.raises(InputError, match="the column stars holds '0'; expected a class: 1, 2, 3, or nothing"):
        of(path, stars)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize(
    ("names", "cells", "expected"),
    [
        (("0.0", "0.5", "1.0"), (0.0, 0.5, 1.0), [0, 1, 2]),
        (("2.0", "1.0", "0.0"), (2.0, 1.0, 0.0), [0, 1, 2]),
        (("+1", "-1"), (1, -1), [0, 1]),
        (("01", "02"), (1, 2), [0, 1]),
        (("none", "1.5"), ("none", "1.50"), [0, 1]),
        (("a", "b"), (Decimal("0.00"), Decimal("1.00")), [0, 1]),
    ],
)
def test_names_that_are_numbers_are_matched_by_value(
    names: tuple[str, ...], cells: Sequence[Any], expected: list[int], suffix: str, tmp_path: Path
) -> None:
    rows = [("a", frame, "train", cell) for frame, cell in enumerate(cells)]
    path = write(tmp_path / f"x{suffix}", ("video", "frame", "split", "label"), rows)
    assert of(path, Classes("levels", names))["a"].labels.tolist() == expected


@pytest.mark.parametrize("cell", ["1", "2", "0.25", "nan", "inf", "half"])
def test_of_names_that_are_numbers_no_cell_is_a_place(cell: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", ("video", "frame", "split", "label"), [("a", 1, "train", cell)])
    with pytest.raises(InputError, match=f"holds '{cell}'; expected a class.*: 0.0, 0.5, none, or nothing"):
        of(path, Classes("levels", ("0.0", "0.5", "none")))


def test_units_may_be_decimals(tmp_path: Path) -> None:
    columns = {"video": ["a"] * 3, "frame": [1, 2, 3], "split": ["train"] * 3}
    smile, frown = [Decimal("1.00"), Decimal("0.00"), None], [1.0, 0.0, None]
    pq.write_table(pa.table({**columns, "smile": smile, "frown": frown}), tmp_path / "x.parquet")
    assert of(tmp_path / "x.parquet", UNITS)["a"].labels.tolist() == [[1, 1], [0, 0], [-1, -1]]
    path = write(tmp_path / "x.csv", ("video", "frame", "split", *UNITS.classes), [("a", 1, "train", "1.00", "0.5")])
    with pytest.raises(InputError, match=r"the column frown holds '0\.5'; expected 0, 1"):
        of(path, UNITS)


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_forms_of_accents_do_not_matter(forms: tuple[str, str], tmp_path: Path) -> None:
    ours, theirs = (partial(normalize, form) for form in forms)
    task = Classes("mood", (ours("müde"), "wach"), columns=(("split", ours("Hälfte")), ("label", ours("Gefühl"))))
    header = ("video", "frame", *map(theirs, ("Hälfte", "Gefühl")), "fold")
    rows = [("a", 1, "train", theirs("Müde"), theirs("é")), ("a", 2, "train", ours("müde"), ours("é"))]
    path = write(tmp_path / "x.csv", header, rows)
    assert of(path, replace(task, columns=(*task.columns, ("fold", "fold"))))["a"].labels.tolist() == [0, 0]
    path = write(tmp_path / "y.csv", ("video", "frame", "split", theirs("müde")), [("a", 1, "train", 1)])
    assert of(path, Units("units", (ours("müde"),)))["a"].labels.tolist() == [[1]]
    (tmp_path / "Train_Set").mkdir()
    (tmp_path / "Train_Set" / "a.txt").write_text(theirs("müde,wach\n1\n"))
    assert of(tmp_path, task)["a"].labels.tolist() == [1]


def test_names_that_differ_in_capitals_alone_are_meant_exactly(tmp_path: Path) -> None:
    task = Classes("case", ("a", "A", "b"))
    path = write(
        tmp_path / "x.csv", ("video", "frame", "split", "case"), [("v", 1, "train", "A"), ("v", 2, "train", "B")]
    )
    assert of(path, task)["v"].labels.tolist() == [1, 2]


@FEW
@given(
    labels=st.dictionaries(st.tuples(NAMES, st.integers(0, 99)), st.integers(-1, 2), min_size=1, max_size=20),
    seed=st.integers(0, 9),
    suffix=st.sampled_from([".csv", ".parquet"]),
    delimiter=st.sampled_from([",", ";", "\t"]),
    as_numbers=st.booleans(),
)
def test_what_is_written_is_read_in_any_order(
    labels: Mapping[tuple[str, int], int], seed: int, suffix: str, delimiter: str, as_numbers: bool, tmp_path: Path
) -> None:
    form = {index: index if as_numbers else name for index, name in enumerate(MOOD.classes)} | {-1: ""}
    rows = [(video, frame, "train", form[label]) for (video, frame), label in labels.items()]
    np.random.default_rng(seed).shuffle(rows)
    found = of(write(tmp_path / f"x{suffix}", ("video", "frame", "split", "label"), rows, delimiter), MOOD)
    read = {}
    for video, own in found.items():
        assert own.frame_numbers is not None
        assert (np.diff(own.frame_numbers) > 0).all()
        of_video = zip(own.frame_numbers.tolist(), own.labels.tolist(), own.valid.tolist(), strict=True)
        read |= {(video, frame): (label, valid) for frame, label, valid in of_video}
    assert read == {key: (label, label >= 0) for key, label in labels.items()}


@FEW
@given(
    values=st.lists(st.floats(0, 10, width=32), min_size=4, max_size=4),
    order=st.permutations(range(12)),
    suffix=st.sampled_from([".csv", ".parquet"]),
)
def test_any_order_gives_the_same_join(values: list[float], order: list[int], suffix: str, tmp_path: Path) -> None:
    store = write_store(tmp_path / "s.h5", {"v": range(1, 9), "w": range(3, 5)}, np.zeros((10, 4), np.float16))
    rows = [("v", frame, "train", values[frame % 4], "") for frame in range(10)]
    rows += [("x/w", frame, "test" if frame < 1 else "train", values[frame], 1) for frame in range(2)]
    header = ("video", "frame", "split", "pain", "effort")
    path = write(tmp_path / f"x{suffix}", header, [tuple(map(str, rows[place])) for place in order])
    joined = join_labels(store, path, PAIN, "train")
    assert joined.rows.tolist() == list(range(8))
    expected = np.full((8, 2), np.nan, np.float32)
    expected[:, 0] = [values[frame % 4] for frame in range(1, 9)]
    np.testing.assert_array_equal(joined.labels, expected)
    account = joined.account
    assert (account.used, account.no_crop, account.no_label, account.test_rows) == (8, 3, 2, 1)
    assert "1 test row" in account.sentence("train")
    assert account.to_json()["test_rows"] == 1
