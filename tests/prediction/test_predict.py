"""affcache predict: stores, crops, photos and videos in, a table with a row for every face out."""

import csv
import shutil
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import pytest
from PIL import Image

import affcache
from affcache.errors import ConfigError, InputError, StoreError
from affcache.faces.table import KEYS
from affcache.prediction import predict as module
from affcache.prediction.inputs import holds_crops
from affcache.scoring.rule import smooth
from affcache.store.reading import EmbeddingStore
from affcache.tasks.tasks import TASKS
from tests.conftest import Heard, MakeData, write_crops, write_tiny_encoder
from tests.faces.clips import VARIABLE, moving, picture, write_clip, write_photo
from tests.prediction.conftest import QUICK

EXPR = [f"expr_{name}" for name in TASKS["expr"].classes]


def table_of(path: Path) -> pa.Table:
    return pq.read_table(path)


def probabilities(table: pa.Table, columns: list[str] = EXPR) -> np.ndarray[Any, Any]:
    return np.column_stack([table[name].to_numpy(zero_copy_only=False) for name in columns])


@pytest.fixture
def clip(tmp_path: Path, square_faces: None) -> Path:
    """Ten frames at no steady rate with one face that moves; none in frames 4 and 5."""
    pictures = moving(10)
    pictures[3] = pictures[4] = picture()
    return write_clip(tmp_path / "clip.mp4", pictures, VARIABLE)


def test_a_store_gives_the_probabilities_of_score_to_the_bit(encoded: Path, tmp_path: Path) -> None:
    affcache.score(run=encoded, device="cpu")
    result = affcache.predict(inputs=tmp_path / "faces.h5", run=encoded, out=tmp_path / "p.parquet", device="cpu")
    assert (result.rows, result.faces, result.inputs, result.tasks) == (16, 16, 1, ("expr",))
    table = table_of(tmp_path / "p.parquet")
    assert table.column_names == [*KEYS.names, *EXPR, "expr"]
    with h5py.File(encoded / "predictions.h5") as file:
        assert np.array_equal(probabilities(table)[file["rows"][:]], file["probabilities"][:])
        decided = np.asarray(TASKS["expr"].classes)[file["decided"][:]]
        assert [table["expr"][int(row)].as_py() for row in file["rows"][:]] == decided.tolist()
    assert table["input"].to_pylist() == ["a"] * 8 + ["b"] * 8
    assert table["frame"].to_pylist() == [*range(1, 9)] * 2
    assert table["timestamp"].null_count == table["box_x"].null_count == table["confidence"].null_count == 16


def test_its_crops_in_a_folder_or_an_archive_give_the_same(encoded: Path, tmp_path: Path) -> None:
    shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "crops")
    (tmp_path / "crops" / "a" / "00004.jpg").write_bytes(b"no picture")
    out = tmp_path / "p.parquet"
    affcache.predict(inputs=tmp_path / "faces.h5", run=encoded, out=out, device="cpu")
    expected = probabilities(table_of(out))
    affcache.predict(inputs=tmp_path / "packed.zip", run=encoded, out=out, device="cpu")
    assert np.array_equal(probabilities(table_of(out)), expected)
    heard = Heard()
    result = affcache.predict(
        inputs=tmp_path / "crops", run=encoded, out=out, device="cpu", batch_size=3, listener=heard
    )
    table = table_of(out)
    assert (result.rows, result.faces) == (16, 15)
    assert table["success"].to_pylist() == [row != 3 for row in range(16)]
    # other batches: embeddings differ in their last bits
    np.testing.assert_allclose(np.delete(probabilities(table), 3, axis=0), np.delete(expected, 3, axis=0), atol=1e-3)
    assert table["expr"][3].as_py() is None
    assert set(table["input"].to_pylist()) == {str(tmp_path / "crops" / name) for name in "ab"}
    assert any("1 crop of" in text and "00004.jpg: not an image" in text for text in heard.warnings)


def test_a_row_for_every_frame_of_a_video_with_its_time(encoded: Path, clip: Path, tmp_path: Path) -> None:
    result = affcache.predict(inputs=clip, run=encoded, out=tmp_path / "p.parquet", device="cpu")
    table = table_of(tmp_path / "p.parquet")
    assert (result.rows, result.faces) == (10, 8)
    assert table["frame"].to_pylist() == [*range(1, 11)]
    assert table["timestamp"].to_pylist() == pytest.approx([ticks / 1000 for ticks in VARIABLE])
    assert table["success"].to_pylist() == [frame not in (4, 5) for frame in range(1, 11)]
    for name in ("face_id", "box_x", "confidence", *EXPR, "expr"):
        assert table[name].null_count == 2, name
    assert set(table["face_id"].drop_null().to_pylist()) == {1}
    np.testing.assert_allclose(probabilities(table.filter(table["success"])).sum(axis=1), 1, rtol=1e-5)
    assert not list(tmp_path.glob(".p.parquet*")), "nothing is left beside the table"


def test_what_is_said_of_a_frame_is_what_the_model_says_of_its_face(encoded: Path, clip: Path, tmp_path: Path) -> None:
    from affcache.faces.detector import DETECTORS
    from affcache.faces.media import Media
    from affcache.faces.scan import Scanner
    from affcache.faces.settings import DetectionSettings
    from affcache.faces.tracks import Tracker

    affcache.predict(inputs=clip, run=encoded, out=tmp_path / "p.parquet", device="cpu", batch_size=4)
    scanner = Scanner(DetectionSettings(), next(iter(DETECTORS.values()))(None))
    crops = [crop for frame in scanner.scan(Media(clip, "clip"), Tracker()) for crop in frame.crops]
    table = table_of(tmp_path / "p.parquet")
    said = affcache.load(encoded, device="cpu").predict_proba(crops)
    np.testing.assert_allclose(probabilities(table.filter(table["success"])), said, atol=2e-4)


def test_each_row_says_what_the_model_says_of_its_own_face(encoded: Path, square_faces: None, tmp_path: Path) -> None:
    from affcache.faces.media import Media
    from affcache.faces.scan import Scanner
    from affcache.faces.settings import DetectionSettings
    from affcache.faces.tracks import Tracker
    from tests.faces.clips import squares

    random = np.random.default_rng(0)
    pictures = []
    for index in range(7):
        pixels = picture((10, 20), (80, 30), (50, 60), side=24)
        faces = pixels[:, :, 0] > 160
        pixels[faces] = random.integers(170 + 10 * index, 255, (int(faces.sum()), 3))
        pictures.append(pixels)
    path = write_clip(tmp_path / "three.mp4", pictures)
    affcache.predict(inputs=path, run=encoded, out=tmp_path / "p.parquet", device="cpu")
    table = table_of(tmp_path / "p.parquet")
    assert len(table) == 21
    scanner = Scanner(DetectionSettings(), squares())
    rows = [
        (frame.number, track + 1, crop)
        for frame in scanner.scan(Media(path, "three"), Tracker())
        for track, crop in zip(frame.tracks, frame.crops, strict=True)
    ]
    assert [row[:2] for row in rows] == list(zip(table["frame"].to_pylist(), table["face_id"].to_pylist(), strict=True))
    said = affcache.load(encoded, device="cpu").predict_proba([crop for *_, crop in rows])
    np.testing.assert_allclose(probabilities(table), said, atol=2e-4)
    assert np.median(np.abs(said - said[[*range(1, 21), 0]]).max(axis=1)) > 1e-3, "faces that differ"


def test_a_photo_turned_by_its_camera_gives_the_row_of_the_upright_one(
    encoded: Path, square_faces: None, tmp_path: Path
) -> None:
    upright = picture((20, 30), (90, 10), side=24)
    upright[34:40, 24:30] = 200  # so that it matters which way it stands
    turned = Image.Exif()
    turned[274] = 6  # a quarter to the right makes it upright
    write_photo(tmp_path / "in" / "a.png", upright)
    write_photo(tmp_path / "in" / "b.png", np.rot90(upright), exif=turned)
    affcache.predict(inputs=tmp_path / "in", run=encoded, out=tmp_path / "p.parquet", device="cpu")
    rows = [table_of(tmp_path / "p.parquet").filter(pa.compute.field("input") == str(p)) for p in
            sorted((tmp_path / "in").iterdir())]  # fmt: skip
    assert [len(one) for one in rows] == [2, 2]
    assert rows[0].drop(["input"]).equals(rows[1].drop(["input"]))


def test_several_tasks_stand_side_by_side_and_runs_of_one_are_averaged(learnable: MakeData, tmp_path: Path) -> None:
    runs = {}
    for name, task, seed in (("e1", "expr", 0), ("e2", "expr", 1), ("u", "au", 0), ("v", "va", 0)):
        store, annotations = learnable(task)
        runs[name] = tmp_path / name
        affcache.fit(task=task, store=store, annotations=annotations, run=runs[name], seed=seed, **QUICK)
    store = tmp_path / "expr.h5"
    out = tmp_path / "p.parquet"
    alone = {}
    for name, run in runs.items():
        affcache.predict(inputs=store, run=run, out=out, device="cpu")
        alone[name] = table_of(out).drop(KEYS.names)
    affcache.predict(inputs=store, run=(*runs.values(),), out=out, device="cpu")
    together = table_of(out).drop(KEYS.names)
    units, values = [f"au_{u}" for u in TASKS["au"].classes], ["va_valence", "va_arousal"]
    assert together.column_names == [*EXPR, "expr", *units, *(f"{u}_present" for u in units), *values]
    mean = (probabilities(alone["e1"]).astype(np.float64) + probabilities(alone["e2"])) / 2
    np.testing.assert_allclose(probabilities(together), mean, atol=1e-6)
    for name in alone["u"].column_names:
        assert together[name].equals(alone["u"][name])
    assert together.select(values).equals(alone["v"])
    present = probabilities(together, [f"{u}_present" for u in units])
    assert np.array_equal(present, probabilities(together, units) >= 0.5)
    affcache.predict(inputs=store, run=runs["u"], out=out, columns="openface", device="cpu")
    names = table_of(out).drop(KEYS.names).column_names
    assert names[:3] == ["AU01_p", "AU02_p", "AU04_p"]
    assert names[-2:] == ["AU25_c", "AU26_c"]
    assert np.array_equal(probabilities(table_of(out), names[12:]), present)


def test_smoothing_keeps_persons_apart_and_goes_by_frame_numbers(encoded: Path, tmp_path: Path) -> None:
    plain, smoothed = tmp_path / "p.parquet", tmp_path / "s.parquet"
    affcache.predict(inputs=tmp_path / "faces.h5", run=encoded, out=plain, device="cpu")
    affcache.predict(
        inputs=tmp_path / "faces.h5", run=encoded, out=smoothed, smooth="mean", smooth_width=3, device="cpu"
    )
    store = EmbeddingStore.open(tmp_path / "faces.h5")
    expected = smooth(probabilities(table_of(plain)), store.video_of_rows(), store.frame_number, 3)
    np.testing.assert_allclose(probabilities(table_of(smoothed)), expected, atol=1e-6)
    assert not np.allclose(expected, probabilities(table_of(plain)))


def test_the_fitted_rule_of_a_run_decides(learnable: MakeData, tmp_path: Path) -> None:
    store, annotations = learnable(videos=9)
    run = tmp_path / "run"
    affcache.fit(store=store, annotations=annotations, run=run, held_out=0.4, **{**QUICK, "epochs": 4})
    asked: dict[str, Any] = {"inputs": store, "run": run, "out": tmp_path / "p.parquet", "device": "cpu"}
    with pytest.raises(ConfigError, match=f"has no rule that was fitted.*affcache score {run} --decide fitted"):
        affcache.predict(**asked, decide="fitted")
    scored = affcache.score(run=run, decide="fitted", smooth="mean", smooth_width=3, device="cpu")
    affcache.predict(**asked, decide="fitted")
    table = table_of(tmp_path / "p.parquet")
    with h5py.File(scored.predictions_file) as file:
        rows = file["rows"][:]
        decided = np.asarray(TASKS["expr"].classes)[file["decided"][:]]
        np.testing.assert_allclose(probabilities(table)[rows], file["probabilities"][:], atol=1e-6)
    assert [table["expr"][int(row)].as_py() for row in rows] == decided.tolist()


def test_the_rule_of_an_average_is_the_one_that_was_fitted_for_it(learnable: MakeData, tmp_path: Path) -> None:
    store, annotations = learnable(videos=9)
    runs = []
    for seed in range(3):
        runs.append(tmp_path / f"run{seed}")
        affcache.fit(
            store=store, annotations=annotations, run=runs[-1], held_out=0.4, seed=seed, **{**QUICK, "epochs": 3}
        )
    asked: dict[str, Any] = {"inputs": store, "out": tmp_path / "p.parquet", "device": "cpu", "decide": "fitted"}
    affcache.score(run=runs[0], decide="fitted", device="cpu")
    with pytest.raises(ConfigError, match=f"for their average.*affcache score {runs[0]} {runs[1]} --decide fitted"):
        affcache.predict(run=tuple(runs[:2]), **asked)
    scored = affcache.score(run=tuple(runs[:2]), decide="fitted", device="cpu")
    affcache.predict(run=(runs[1], runs[0]), **asked)
    table = table_of(tmp_path / "p.parquet")
    with h5py.File(scored.predictions_file) as file:
        decided = np.asarray(TASKS["expr"].classes)[file["decided"][:]].tolist()
        assert [table["expr"][int(row)].as_py() for row in file["rows"][:]] == decided
    with pytest.raises(ConfigError, match="for their average"):
        affcache.predict(run=(runs[0], runs[2]), **asked)


def test_csv_says_what_parquet_says(encoded: Path, clip: Path, tmp_path: Path) -> None:
    for out in ("p.parquet", "p.csv"):
        affcache.predict(inputs=clip, run=encoded, out=tmp_path / out, device="cpu")
    table = table_of(tmp_path / "p.parquet")
    with (tmp_path / "p.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == table.column_names
    assert len(rows) == len(table) == 10
    for name in (*EXPR, "box_x", "confidence"):
        texts = [np.float32(row[name]) if row[name] else None for row in rows]
        assert texts == [None if v is None else np.float32(v) for v in table[name].to_pylist()], name
    assert [row["success"] for row in rows] == [str(int(v)) for v in table["success"].to_pylist()]
    assert [row["face_id"] for row in rows] == ["" if v is None else str(v) for v in table["face_id"].to_pylist()]


def test_faces_are_found_once_and_predicted_often(encoded: Path, clip: Path, tmp_path: Path) -> None:
    affcache.find_faces(inputs=clip, out=tmp_path / "faces")
    affcache.predict(inputs=clip, run=encoded, out=tmp_path / "direct.parquet", device="cpu")
    result = affcache.predict(inputs=tmp_path / "faces", run=encoded, out=tmp_path / "p.parquet", device="cpu")
    direct, table = table_of(tmp_path / "direct.parquet"), table_of(tmp_path / "p.parquet")
    assert (result.rows, result.faces) == (10, 8)
    assert table.select(KEYS.names).equals(direct.select(KEYS.names)), "frames without a face too"
    known = table["success"].to_numpy()
    np.testing.assert_allclose(probabilities(table)[known], probabilities(direct)[known], atol=1e-5)


def test_a_kill_costs_the_input_under_way(
    encoded: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    for name in "abc":
        (clips / f"{name}.mp4").write_bytes(clip.read_bytes())
    asked: dict[str, Any] = {"inputs": clips, "run": encoded, "out": tmp_path / "p.csv", "device": "cpu"}
    affcache.predict(**asked)
    whole = (tmp_path / "p.csv").read_bytes()
    (tmp_path / "p.csv").unlink()
    seen: list[str] = []
    scan = module._Prediction._scan

    def stopped(self: Any, one: Any, batches: Any, *rest: Any) -> None:
        seen.append(one.media.name)
        if len(seen) == 3:
            raise KeyboardInterrupt
        scan(self, one, batches, *rest)
        batches.finish()  # what is under way in the encoder comes back

    monkeypatch.setattr(module._Prediction, "_scan", stopped)
    with pytest.raises(KeyboardInterrupt):
        affcache.predict(**asked)
    assert not (tmp_path / "p.csv").exists()
    heard = Heard()
    affcache.predict(**asked, listener=heard)
    assert seen == ["a", "b", "c", "c"]
    assert "continuing: 2 of 3 are finished" in heard.messages
    assert (tmp_path / "p.csv").read_bytes() == whole
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        affcache.predict(**asked, smooth="mean", smooth_width=3)
    seen.append("")
    heard = Heard()
    affcache.predict(**asked, listener=heard)
    assert seen == ["a", "b", "c", "", "a", "b", "c"], "what was kept of another rule is of no use"
    assert any("made with other settings" in text for text in heard.messages)
    assert (tmp_path / "p.csv").read_bytes() == whole


def test_a_damaged_input_is_listed_and_the_others_go_on(encoded: Path, clip: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(clip.read_bytes()[:600])
    heard = Heard()
    result = affcache.predict(inputs=(broken, clip), run=encoded, out=tmp_path / "p.csv", device="cpu", listener=heard)
    assert result.unreadable == (str(broken),)
    listed = Path(result.unreadable_list or "").read_text()
    assert listed.startswith(f"{broken}\t{broken} can't be read")
    assert any(text.startswith(f"left out: {broken}") for text in heard.warnings)
    assert result.rows == 10
    affcache.predict(inputs=clip, run=encoded, out=tmp_path / "p.csv", device="cpu")
    assert not Path(result.unreadable_list or "").exists()


def test_nothing_is_written_where_nothing_is_found(encoded: Path, square_faces: None, tmp_path: Path) -> None:
    out = tmp_path / "p.csv"
    dark = write_clip(tmp_path / "dark.mp4", [picture()] * 3)
    with pytest.raises(InputError, match=r"No face was found in 3 frames of 1 input\. .*Lower --confidence"):
        affcache.predict(inputs=dark, run=encoded, out=out, device="cpu")
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"")
    with pytest.raises(InputError, match=r"broken\.jpg can't be read: the file is empty"):
        affcache.predict(inputs=broken, run=encoded, out=out, device="cpu")
    assert not out.exists()


def test_what_does_not_fit_is_refused(
    encoded: Path, clip: Path, learnable: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"run": encoded, "out": tmp_path / "p.csv", "device": "cpu"}
    store, annotations = learnable()
    with pytest.raises(StoreError, match="another encoder"):
        affcache.predict(inputs=store, **asked)
    other = tmp_path / "other"
    affcache.fit(store=store, annotations=annotations, run=other, **QUICK)
    with pytest.raises(StoreError, match=r"other was trained on embeddings of another encoder than .*faces\.h5"):
        affcache.predict(inputs=tmp_path / "faces.h5", **{**asked, "run": (encoded, other)})
    with pytest.raises(InputError, match="does not exist"):
        affcache.predict(inputs=tmp_path / "none.mp4", **asked)
    with pytest.raises(ConfigError, match="--overlay draws into photos and videos"):
        affcache.predict(inputs=tmp_path / "faces.h5", overlay=tmp_path / "o.mp4", **asked)
    with pytest.raises(ConfigError, match=r"ends in \.csv or \.parquet"):
        affcache.predict(inputs=clip, **{**asked, "out": tmp_path / "p.txt"})
    with pytest.raises(ConfigError, match="--smooth and --smooth-width go together"):
        affcache.predict(inputs=clip, smooth="mean", **asked)
    with pytest.raises(ConfigError, match="in which no other of each 5th frame lies; expected at least 11"):
        affcache.predict(inputs=clip, smooth="mean", smooth_width=9, every=5, **asked)
    for overlay in ("o.avi", "o.jpg"):
        with pytest.raises(ConfigError, match=r"--overlay is .*; expected FILE\.mp4"):
            affcache.predict(inputs=clip, overlay=tmp_path / overlay, **asked)
    with pytest.raises(ConfigError, match=r"expected a folder, as there are several inputs"):
        affcache.predict(inputs=(clip, tmp_path), overlay=tmp_path / "o.mp4", **asked)
    with pytest.raises(InputError, match=f"Name the folder above, {tmp_path / 'crops'}"):
        affcache.predict(inputs=tmp_path / "crops" / "a", **asked)
    with pytest.raises(InputError, match=r"had no frame between 50 s and the end.*Check --from"):
        affcache.predict(inputs=clip, from_=50, **asked)
    with pytest.raises(ConfigError, match="and --out FILE"):
        affcache.predict(inputs=clip, run=encoded)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with pytest.raises(StoreError, match="another encoder"):
        affcache.predict(inputs=clip, model=write_tiny_encoder(elsewhere, seed=1), **asked)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ConfigError, match=r"pip install 'affcache\[video\]'"):
        affcache.predict(inputs=clip, **asked)
    assert affcache.predict(inputs=tmp_path / "faces.h5", **asked).rows == 16, "which needs no such package"


def test_crops_are_told_from_photos(tmp_path: Path) -> None:
    assert holds_crops(write_crops(tmp_path / "crops", {"a": [1, 2]}))
    assert not holds_crops(write_photo(tmp_path / "photos" / "IMG_0001.jpg", picture()).parent)
    assert not holds_crops(write_photo(tmp_path / "albums" / "rome" / "IMG_0001.jpg", picture()).parents[1])
    large = write_photo(tmp_path / "numbered" / "rome" / "0001.jpg", picture(size=(700, 600)))
    assert not holds_crops(large.parents[1])
    assert not holds_crops(tmp_path / "crops" / "a" / "00001.jpg")
    (tmp_path / "zips").mkdir()
    (tmp_path / "zips" / "a.zip").touch()
    assert holds_crops(tmp_path / "zips")


def test_photos_that_are_kept_together_are_told_apart(
    encoded: Path, square_faces: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faces = [1, 0, 2, 0, 0, 1, 2, 1, 0]
    for index, count in enumerate(faces):
        corners = [(8 + 50 * k, 20 + 3 * index) for k in range(count)]
        write_photo(tmp_path / "in" / f"p{index}.png", picture(*corners, side=20 + 2 * index))
    asked: dict[str, Any] = {"inputs": tmp_path / "in", "run": encoded, "out": tmp_path / "p.parquet", "device": "cpu"}
    asked["batch_size"] = 2  # a photo without a face is known before those whose faces are still in the encoder
    alone = []
    for path in sorted((tmp_path / "in").iterdir()):
        write_photo(tmp_path / "plain.png", picture((4, 4)))  # so that something has a face
        affcache.predict(**{**asked, "inputs": (path, tmp_path / "plain.png")})
        alone.append(table_of(tmp_path / "p.parquet").slice(0, max(faces[int(path.stem[1:])], 1)))
    expected = pa.concat_tables(alone)
    keep = module._Prediction._keep
    groups: list[int] = []

    def counted(self: Any, works: Any, logits: Any) -> None:
        groups.append(len(works))
        keep(self, works, logits)

    monkeypatch.setattr(module._Prediction, "_keep", counted)
    monkeypatch.setattr("affcache.prediction.media_faces.PHOTOS", 4)
    affcache.predict(**asked)
    together = table_of(tmp_path / "p.parquet")
    assert groups == [4, 4, 1]
    assert together.select(KEYS.names).equals(expected.select(KEYS.names))
    known = together["success"].to_numpy()
    np.testing.assert_allclose(probabilities(together)[known], probabilities(expected)[known], atol=1e-3)

    def stopped(self: Any, works: Any, logits: Any) -> None:
        keep(self, works, logits)
        raise KeyboardInterrupt

    monkeypatch.setattr(module._Prediction, "_keep", stopped)
    with pytest.raises(KeyboardInterrupt):
        affcache.predict(**asked)
    write_photo(tmp_path / "in" / "p1.png", picture((30, 30)))  # another one now, of those that were kept
    monkeypatch.setattr(module._Prediction, "_keep", counted)
    groups.clear()
    heard = Heard()
    affcache.predict(**asked, listener=heard)
    assert any(text.startswith("continuing: 3 of 9") for text in heard.messages)
    assert groups == [4, 2]
    again = table_of(tmp_path / "p.parquet")
    assert again["input"].to_pylist() == together["input"].to_pylist()
    assert again["success"][1].as_py()
    rest = [row for row in range(len(again)) if row != 1]
    assert again.select(KEYS.names).take(rest).equals(together.select(KEYS.names).take(rest))
