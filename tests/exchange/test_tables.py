"""Tables of frame features: rows on their frames, columns as asked, and a store that says what it is."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import affcache
from affcache.crops.names import canonical
from affcache.errors import ConfigError, InputError, StoreError
from affcache.exchange.importing import ImportResult
from affcache.exchange.tables import _matches
from affcache.store.description import fingerprint, is_table
from affcache.store.reading import EmbeddingStore
from tests.conftest import Heard, MakeData, write_store
from tests.exchange.sources import matrix
from tests.exchange.tables import KINDS, write_table

OPENFACE = """frame, face_id, timestamp, confidence, success, pose_Tx, AU01_r, AU02_r, AU01_c
1, 0, 0.000, 0.98, 1, -12.4, 0.50, 1.25, 1.00
2, 0, 0.033, 0.98, 1, -12.5, 0.75, 0.00, 0.00
"""


def imported(
    tmp_path: Path, *sources: Path, heard: Heard | None = None, **values: Any
) -> tuple[EmbeddingStore, ImportResult]:
    """Import tables as "own" into a new store."""
    store = tmp_path / f"store{len(list(tmp_path.glob('store*.h5')))}.h5"
    values.setdefault("name", "own")
    result = affcache.import_embeddings(sources=sources, store=store, listener=heard or Heard(), **values)
    opened = EmbeddingStore.open(store)
    opened.verify()
    return opened, result


def text(tmp_path: Path, content: str | bytes, name: str = "in.csv") -> Path:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return tmp_path / name


NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1, max_size=5).filter(
    lambda name: name == name.strip()
)
FRAMES = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4, unique=True).map(sorted)


@st.composite
def rows(draw: st.DrawFn) -> dict[str, Any]:
    """Videos with frames, and as many embeddings, any finite float16."""
    videos = draw(st.lists(st.tuples(NAMES, FRAMES), min_size=1, max_size=4, unique_by=lambda v: canonical(v[0])))
    count, width = sum(len(frames) for _, frames in videos), draw(st.integers(1, 5))
    finite = st.integers(0, 2**16 - 1).filter(lambda bits: bits & 0x7C00 != 0x7C00)
    bits = draw(st.lists(finite, min_size=count * width, max_size=count * width))
    features = np.array(bits, dtype=np.uint16).view(np.float16).reshape(count, width)
    return {"videos": dict(videos), "features": features, "order": draw(st.permutations(range(count)))}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [False, True])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows())
def test_rows_in_any_order_become_the_store_made_by_hand(kind: str, columns: bool, made: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, order = Path(name), made["order"]
        expected = write_store(folder / "hand.h5", made["videos"], made["features"])
        videos = [expected.video_names[video] for video in expected.video_of_rows()]
        names = [f"c{column}" for column in range(expected.width)] if columns else ()
        path = write_table(
            folder / f"in.{kind}",
            [videos[row] for row in order],
            expected.frame_number[order].tolist(),
            np.array(expected.features)[order],
            names,
        )
        store, result = imported(folder, path)
        assert store.video_names == expected.video_names
        for part in ("video_start", "frame_number", "status", "block_checksum"):
            np.testing.assert_array_equal(getattr(store, part), getattr(expected, part))
        np.testing.assert_array_equal(store.features.view(np.uint16), expected.features.view(np.uint16))
        assert (result.rows, result.changed_values, result.rows_left_out) == (len(expected), 0, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_come_in_their_places(tmp_path: Path, kind: str) -> None:
    rows = 40_001
    order = np.random.default_rng(0).permutation(rows)
    features = (np.arange(rows * 2, dtype=np.float32).reshape(rows, 2) % 2048)[order]
    videos = [f"v{frame % 3}" for frame in order]
    store, _ = imported(tmp_path, write_table(tmp_path / f"in.{kind}", videos, order.tolist(), features))
    np.testing.assert_array_equal(store.features[:, 0], store.frame_number.astype(int) * 2 % 2048)
    assert np.diff(store.video_start).tolist() == [13_334, 13_334, 13_333]


def test_a_store_of_a_table_says_what_it_is(tmp_path: Path) -> None:
    heard = Heard()
    one, result = imported(tmp_path, text(tmp_path, "video,frame,x,y\na,1,1,2\n"), heard=heard, name="audio")
    assert one.encoder == {
        "model": "audio", "pretrained": "", "features": "audio", "columns": ["x", "y"], "weights_sha256": None,
        "imported_from": "table", "normalised": None, "width": 2,
    }  # fmt: skip
    assert is_table(one.encoder)
    assert not is_table(write_store(tmp_path / "faces.h5", {"a": [1]}, matrix(1)).encoder)
    assert one.encoder_fingerprint == fingerprint(one.encoder) == result.encoder_fingerprint
    assert result.imported_from == "table"
    assert heard.messages == ["features: 2 columns, x, y", "1 frame in 1 video, from table"]
    assert heard.warnings == []
    listed, _ = imported(tmp_path, write_table(tmp_path / "in.npz", ["a"], [1], matrix(1, 2)), name="audio")
    assert listed.encoder["columns"] is None
    others = [
        imported(tmp_path, text(tmp_path, "video,frame,x,z\na,1,1,2\n"), name="audio"),
        imported(tmp_path, text(tmp_path, "video,frame,x,y\na,1,1,2\n"), name="pose"),
    ]
    prints = {store.encoder_fingerprint for store in (one, listed, *(store for store, _ in others))}
    assert len(prints) == 4, "names and columns tell tables apart"


def test_the_store_is_named_after_the_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = text(tmp_path, "video,frame,x\na,1,1\n")
    heard = Heard()
    result = affcache.import_embeddings(sources=source, name="audio", model="ViT-L-14", listener=heard)
    assert result.store == "data/features/audio.h5"
    assert any("--model and --pretrained are not looked at" in said for said in heard.messages)


@pytest.mark.parametrize("form", ["npy", "parquet", "safetensors"])
def test_an_export_of_it_comes_back(tmp_path: Path, form: str) -> None:
    store, _ = imported(tmp_path, write_table(tmp_path / "in.npz", ["b", "a"], [3, 1], matrix(2)))
    out = affcache.export_embeddings(store=store.path, format=form).out
    result = affcache.import_embeddings(sources=out, store=tmp_path / "back.h5")
    assert result.same_as_exported is True
    assert (tmp_path / "back.h5").read_bytes() == store.path.read_bytes()
    if form == "parquet":
        with pytest.raises(InputError, match=r"is what 'affcache export' wrote\..*without --name"):
            affcache.import_embeddings(sources=out, store=tmp_path / "again.h5", name="own")


def test_a_head_trains_on_it_as_on_any_store(learnable: MakeData, tmp_path: Path) -> None:
    path, annotations = learnable("expr", videos=3)
    original = EmbeddingStore.open(path)
    videos = [original.video_names[video] for video in original.video_of_rows()]
    order = np.random.default_rng(0).permutation(len(original))
    table = write_table(
        tmp_path / "in.parquet",
        [videos[row] for row in order],
        original.frame_number[order].tolist(),
        np.array(original.features)[order],
    )
    store, _ = imported(tmp_path, table)
    values = [
        affcache.fit(
            store=one, run=tmp_path / f"run{number}", annotations=annotations, head="ridge", device="cpu"
        ).value
        for number, one in enumerate((path, store.path))
    ]
    assert values[0] == values[1]
    assert affcache.score(run=tmp_path / "run1", device="cpu").frames == 40


# Which columns


def test_openface_writes_a_file_a_video(tmp_path: Path) -> None:
    heard = Heard()
    first, second = text(tmp_path, OPENFACE, "b.csv"), text(tmp_path, OPENFACE.replace("1.25", "2.5"), "a.csv")
    store, _ = imported(tmp_path, first, second, columns="AU*_r", heard=heard)
    assert (store.video_names, store.frame_number.tolist()) == (("a", "b"), [1, 2, 1, 2])
    assert store.features.tolist() == [[0.5, 2.5], [0.75, 0], [0.5, 1.25], [0.75, 0]]
    assert store.encoder["columns"] == ["AU01_r", "AU02_r"]
    assert "2 tables without a column video: each is one video, named after its file: b, a" in heard.messages
    assert "features: 2 columns, AU01_r, AU02_r" in heard.messages


def test_tables_of_predict_and_of_py_feat(tmp_path: Path) -> None:
    table = text(
        tmp_path,
        "input,frame,timestamp,face_id,success,expr_Neutral,expr_Fear,expr\n"
        "clips/one.mp4,1,0.0,1,1,0.75,0.25,Neutral\n"
        "clips/one.mp4,2,0.1,,0,,,\n"
        "C:\\clips\\two.MOV,1,0.0,1,1,0.5,0.5,Fear\n"
        "82557/Visit1/Q3,7,,1,1,1,0,Neutral\n",
    )
    store, result = imported(tmp_path, table, columns="expr_*", missing="drop")
    assert store.video_names == ("82557/Visit1/Q3", "one", "two")
    assert (store.features[:, 0].tolist(), result.rows_left_out) == ([1, 0.75, 0.5], 1)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("AU01", "AU01"), ("AU*", "AU01 AU02"), ("*1", "AU01"), ("*1*", "AU01 b[1]"),
        ("b[1]", "b[1]"), ("b[*", "b[1] b[2]"), ("*", "*"),
        ("A*1,b[1]", "AU01 b[1]"), (" AU01 , b[2]", "AU01 b[2]"), ("b[2],AU01", "AU01 b[2]"), ("", "*"),
        ("A*U*0*2", "AU02"), ("AU*AU01", ""), ("video", ""), ("au*", ""), ("AU01*1", ""),
    ],
)  # fmt: skip
def test_columns_are_named_with_stars(tmp_path: Path, pattern: str, names: str) -> None:
    table = text(tmp_path, "video,frame,AU01,AU02,b[1],b[2]\na,1,1,2,3,4\n")
    if not names:
        with pytest.raises(InputError, match=r"has no column .*; beside the keys it has AU01, AU02, b\[1\], b\[2\]"):
            imported(tmp_path, table, columns=pattern)
        return
    store, _ = imported(tmp_path, table, columns=pattern)
    assert store.encoder["columns"] == (["AU01", "AU02", "b[1]", "b[2]"] if names == "*" else names.split())


@given(st.text("ab*", max_size=6), st.text("ab", max_size=6))
def test_a_star_stands_for_anything(pattern: str, name: str) -> None:
    import re

    assert _matches(name, pattern) == bool(re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), name))


def test_columns_of_several_tables_go_by_name(tmp_path: Path) -> None:
    first = text(tmp_path, "video,frame,x,y\na,1,1,2\n", "1.csv")
    store, _ = imported(tmp_path, first, text(tmp_path, "frame,y,x,video\n1,4,3,b\n", "2.csv"))
    assert store.features.tolist() == [[1, 2], [3, 4]]
    other = text(tmp_path, "video,frame,x,z\nb,1,1,2\n", "3.csv")
    with pytest.raises(InputError, match=r"1\.csv and .*3\.csv have different columns of features: y, z in one of"):
        imported(tmp_path, first, other)
    store, _ = imported(tmp_path, first, other, columns="x")
    assert store.width == 1


@pytest.mark.parametrize("suffix", KINDS)
def test_whole_numbers_and_booleans_are_numbers(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"in.{suffix}"
    columns = {"video": np.array(["a", "a"]), "frame": np.array([1, 2]), "n": np.array([-3, 7]), "b": [True, False]}
    if suffix == "npz":
        np.savez(path, **columns)
    elif suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    else:
        path.write_text("video,frame,n,b\na,1,-3,True\na,2,7,False\n")
    store, _ = imported(tmp_path, path)
    assert store.features.tolist() == [[-3, 1], [7, 0]]


def test_whatever_arrow_calls_a_number_or_a_text(tmp_path: Path) -> None:
    columns = {
        "video": pyarrow.array(["a", "a"]).dictionary_encode(),
        "frame": pyarrow.array([1.0, 2.0]),
        "half": pyarrow.array([0.5, 1.5], pyarrow.float16()),
        "money": pyarrow.array([1, 2]).cast(pyarrow.decimal128(30, 2)),
        "F0.sma3[1]": pyarrow.array([0, 255], pyarrow.uint8()),
        "__index_level_0__": pyarrow.array([9, 9]),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "in.parquet")
    store, _ = imported(tmp_path, tmp_path / "in.parquet")
    assert store.features.tolist() == [[0.5, 1, 0], [1.5, 2, 255]]


@pytest.mark.parametrize("kind", [pyarrow.list_(pyarrow.float64()), pyarrow.list_(pyarrow.float32(), 2)])
def test_lists_of_both_kinds_and_missing_ones(tmp_path: Path, kind: Any) -> None:
    lists = pyarrow.array([None, [1, 2], None, [3, None], [5, 6]], kind)
    table = pyarrow.table({"video": ["a"] * 5, "frame": range(1, 6), "e": lists, "seconds": [0.1] * 5})
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet", row_group_size=2)
    with pytest.raises(InputError, match=r"row 0 .counted from 0.: the column e holds nothing, or NaN"):
        imported(tmp_path, tmp_path / "in.parquet", columns="e")
    store, result = imported(tmp_path, tmp_path / "in.parquet", columns="e", missing="drop")
    assert (store.frame_number.tolist(), store.features.tolist()) == ([2, 5], [[1, 2], [5, 6]])
    assert result.rows_left_out == 3


def test_an_array_in_fortran_order_is_turned(tmp_path: Path) -> None:
    features = matrix(20_000, dtype="float32")
    np.savez_compressed(
        tmp_path / "in.npz", video=np.full(20_000, "a"), frame=np.arange(20_000), x=np.asfortranarray(features)
    )
    store, _ = imported(tmp_path, tmp_path / "in.npz")
    np.testing.assert_array_equal(store.features, features.astype(np.float16))


def test_a_path_of_an_image_says_video_and_frame(tmp_path: Path) -> None:
    store, _ = imported(tmp_path, text(tmp_path, "image_path,x\ncrops/a/00002.jpg,1\nb\\7.png,2\n"))
    assert (store.video_names, store.frame_number.tolist()) == (("a", "b"), [2, 7])
    np.savez(tmp_path / "in.npz", image=np.array(["a/1.jpg"]), e=matrix(1))
    store, _ = imported(tmp_path, tmp_path / "in.npz")
    assert (store.video_names, store.width) == (("a",), 3)


# How text is written


@pytest.mark.parametrize(
    "content",
    [
        "video,frame,x,y\na,1,0.5,2\nb,2,1e-1,\n", "video;frame;x;y\na;1;0.5;2\nb;2;1e-1;\n",
        "video\tframe\tx\ty\na\t1\t0.5\t2\nb\t2\t1e-1\t\n", "\ufeffvideo,frame,x,y\r\na,1,0.5,2\r\nb,2,1e-1,\r\n",
        "video, frame, x, y\na, 1, 0.5, 2\n\nb, 2, 1e-1, nan",
        '"video","frame","x","y"\n"a","1","0.5","2"\n"b",2,.1,NA\n',
        ",video,frame,x,y\n0,a,1,+0.5,2\n1,b,2,0.1,NaN\n\n\n", "y,x,frame_number,video\n2,0.5,1.0,a\nnull,0.1,2,b\n",
    ],
)  # fmt: skip
def test_ways_to_write_one_table(tmp_path: Path, content: str) -> None:
    store, result = imported(tmp_path, text(tmp_path, content), missing="drop", columns="x,y")
    assert (store.video_names, store.frame_number.tolist(), result.rows_left_out) == (("a",), [1], 1)
    assert sorted(store.features[0].tolist()) == [0.5, 2]


def test_names_of_videos_stay_as_they_are(tmp_path: Path) -> None:
    store, _ = imported(tmp_path, text(tmp_path, 'video,frame,x\n"a, b",1,1\nNA,1,1\n007,1,1\ntrue,1,1\n"a\nb",1,1\n'))
    assert store.video_names == ("007", "NA", "a\nb", "a, b", "true")


def test_frames_from_0_are_warned_of(tmp_path: Path) -> None:
    heard = Heard()
    imported(tmp_path, text(tmp_path, "video,frame,x\na,0,1\na,1,1\nb,0,1\n"), heard=heard)
    (warning,) = heard.warnings
    assert warning.startswith(
        "the frames of 2 of 2 videos begin at 0. Labels, and the crops of Aff-Wild2, count frames"
    )
    heard = Heard()
    imported(tmp_path, text(tmp_path, "video,frame,x\na,0,1\nb,1,1\n"), heard=heard)
    assert heard.warnings[0].startswith("the frames of 1 of 2 videos begin at 0.")
    heard = Heard()
    imported(tmp_path, text(tmp_path, "video,frame,x\na,3,1\nb,1,1\n"), heard=heard)
    assert heard.warnings == []


def test_what_is_missing_is_left_out_when_asked(tmp_path: Path) -> None:
    table = text(tmp_path, "video,frame,x,y\na,1,1,\na,2,2,2\n,,,\na,4,nan,4\na,5,5,99999\n")
    with pytest.raises(InputError, match=r"in\.csv, line 2: the column y holds nothing, or NaN.*--missing drop"):
        imported(tmp_path, table)
    with pytest.raises(InputError, match=r"in\.csv, line 6: the column y is 99999.0 and is too large for float16"):
        imported(tmp_path, table, missing="drop")
    heard = Heard()
    store, result = imported(tmp_path, table, columns="x", missing="drop", heard=heard)
    assert (store.frame_number.tolist(), result.rows_left_out) == ([1, 2, 5], 2)
    assert "2 rows left out, since a value is missing there" in heard.messages
    with pytest.raises(InputError, match=r"Each of the 2 rows of .* lacks a value, so that --missing drop leaves none"):
        imported(tmp_path, text(tmp_path, "video,frame,x\na,1,\na,2,nan\n"), missing="drop")


# The settings


def test_settings_that_do_not_go_together(tmp_path: Path) -> None:
    source = text(tmp_path, "video,frame,x\na,1,1\n")
    for values, said in (
        ({"name": "timm:x"}, "--name is 'timm:x'; expected letters, digits"),
        ({"name": ""}, "--name is ''"),
        ({"name": "a/b"}, "--name is 'a/b'"),
        ({"columns": "x"}, "--columns and --missing are of tables. Give --name too"),
        ({"missing": "drop"}, "--columns and --missing are of tables"),
        ({"name": "own", "list": "a.txt"}, "--list is of HDF5 files, --name of tables"),
        ({"name": "own", "missing": "keep"}, "--missing is 'keep'; expected one of refuse, drop"),
    ):
        with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
            affcache.import_embeddings(sources=source, store=tmp_path / "x.h5", **values)
    with pytest.raises(InputError, match=r"with --name, a \.csv, \.parquet or .npz table of frame features"):
        affcache.import_embeddings(sources=source, store=tmp_path / "x.h5")
    table = write_table(tmp_path / "in.parquet", ["a"], [1], matrix(1))
    with pytest.raises(InputError, match="of a table of another tool say with --name what it holds"):
        affcache.import_embeddings(sources=table, store=tmp_path / "x.h5")
    with pytest.raises(ConfigError, match="No source is given"):
        affcache.import_embeddings(name="own", store=tmp_path / "x.h5")
    with pytest.raises(StoreError, match="exists already"):
        affcache.import_embeddings(
            sources=source, name="own", store=write_store(tmp_path / "s.h5", {"a": [1]}, matrix(1)).path
        )


def test_the_command_says_what_it_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.test_cli import call, json_of

    monkeypatch.chdir(tmp_path)
    text(tmp_path, OPENFACE, "clip.csv")
    said = call("import", "clip.csv", "--name", "units", "--columns", "AU*_r", "--store", "x.h5")
    assert "clip" in said.stderr
    assert "2: 2 encoded" in said.stdout
    found = json_of(call("import", "clip.csv", "--name", "units", "--columns", "AU*_r", "--store", "y.h5", "--json"))
    assert (found["imported_from"], found["rows_left_out"], found["width"]) == ("table", 0, 2)
    shown = call("info", "x.h5").stdout.split()
    assert shown[shown.index("columns") + 1 :][:2] == ["AU01_r,", "AU02_r"]
    assert json_of(call("verify", "x.h5", "--json"))["sound"] is True
    result = call("import", "clip.csv", "--name", "units", "--columns", "AU*x", "--store", "z.h5", "--json", code=2)
    assert "has no column AU*x" in json.loads(result.stdout)["message"]
