"""What an attack on predict found: outputs over inputs, files that change meanwhile, columns and rows that clash."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import affcache
from affcache.errors import ConfigError, InputError
from affcache.prediction import predict as module
from affcache.tasks.kinds import Units
from affcache.tasks.tasks import TASKS
from tests.conftest import Heard, MakeData
from tests.faces.clips import frames_of, moving, picture, write_clip, write_photo
from tests.prediction.conftest import QUICK
from tests.test_cli import call, json_of


@pytest.fixture
def asked(encoded: Path, square_faces: None, tmp_path: Path) -> dict[str, Any]:
    return {"run": encoded, "out": tmp_path / "p.parquet", "device": "cpu"}


def test_nothing_is_written_over_an_input_or_another_output(asked: dict[str, Any], tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "v" / "clip.mp4", moving(3))
    before = clip.read_bytes()
    (tmp_path / "link").symlink_to(tmp_path / "v")
    affcache.find_faces(inputs=clip, out=tmp_path / "faces")
    for overlay in (tmp_path / "v", tmp_path / "link", clip):
        with pytest.raises(ConfigError, match="would be written over an input, or over another output"):
            affcache.predict(**{**asked, "inputs": clip, "overlay": overlay})
    with pytest.raises(ConfigError, match="would be written over an input"):
        affcache.predict(**{**asked, "inputs": tmp_path / "faces", "out": tmp_path / "faces" / "faces.parquet"})
    assert clip.read_bytes() == before
    assert "crops" in pq.read_schema(tmp_path / "faces" / "faces.parquet").names


def test_what_happens_to_a_file_after_it_was_read_costs_no_row(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = [write_clip(tmp_path / f"{name}.mp4", moving(4)) for name in "abc"]
    keep = module._Prediction._keep

    def meanwhile(self: Any, works: Any, logits: Any) -> None:
        keep(self, works, logits)
        if works[0].media.name == "a":
            os.utime(clips[0], (1, 1))
        if works[0].media.name == "b":
            clips[1].unlink()

    monkeypatch.setattr(module._Prediction, "_keep", meanwhile)
    assert affcache.predict(inputs=tuple(clips), **asked).rows == 12
    assert pq.read_table(tmp_path / "p.parquet")["input"].to_pylist() == [str(c) for c in clips for _ in range(4)]


def test_a_file_that_changes_while_it_is_read_is_read_again(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = [write_clip(tmp_path / f"{name}.mp4", moving(4)) for name in "ab"]
    keep = module._Prediction._keep

    def changed(self: Any, works: Any, logits: Any) -> None:
        os.utime(clips[0], (1, 1))
        keep(self, works, logits)
        raise KeyboardInterrupt

    monkeypatch.setattr(module._Prediction, "_keep", changed)
    with pytest.raises(KeyboardInterrupt):
        affcache.predict(inputs=tuple(clips), **asked)
    monkeypatch.setattr(module._Prediction, "_keep", keep)
    heard = Heard()
    affcache.predict(inputs=tuple(clips), listener=heard, **asked)
    assert not [text for text in heard.messages if "are finished" in text]


def test_what_is_kept_and_damaged_is_made_again(asked: dict[str, Any], tmp_path: Path) -> None:
    clips = (write_clip(tmp_path / "a.mp4", moving(4)), write_clip(tmp_path / "b.mp4", moving(4, step=3)))
    affcache.predict(inputs=clips, **asked)
    whole = (tmp_path / "p.parquet").read_bytes()
    remove = module.FinishedInputs.remove
    module.FinishedInputs.remove = lambda self: None  # type: ignore[method-assign]  # as if it were killed before
    try:
        affcache.predict(inputs=clips, **asked)
        said = np.float32(pq.read_table(tmp_path / "p.parquet")["expr_Fear"][0].as_py()).tobytes()
        parts = [path for path in (tmp_path / ".p.parquet.parts").iterdir() if said in path.read_bytes()]
        assert parts
        for part in parts:
            content = bytearray(part.read_bytes())
            content[content.index(said) + 2] ^= 1  # another number, which nothing but a checksum would notice
            part.write_bytes(bytes(content))
        affcache.predict(inputs=clips, **asked)
        assert (tmp_path / "p.parquet").read_bytes() == whole
    finally:
        module.FinishedInputs.remove = remove  # type: ignore[method-assign]


def test_columns_of_one_name_are_refused(learnable: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, annotations = learnable("au")
    runs = []
    for name in ("one", "two", "frame"):
        task = replace(TASKS["au"], name=name)
        assert isinstance(task, Units)
        monkeypatch.setitem(TASKS, name, task)
        runs.append(tmp_path / name)
        affcache.fit(task=name, store=store, annotations=annotations, run=runs[-1], **QUICK)
    asked: dict[str, Any] = {"inputs": store, "out": tmp_path / "p.parquet", "device": "cpu"}
    affcache.predict(run=tuple(runs[:2]), **asked)
    with pytest.raises(ConfigError, match=r"The column AU01_p of task two would stand twice: task one has it too"):
        affcache.predict(run=tuple(runs[:2]), columns="openface", **asked)
    store, annotations = learnable()
    monkeypatch.setitem(TASKS, "confidence", replace(TASKS["expr"], name="confidence"))
    affcache.fit(task="confidence", store=store, annotations=annotations, run=tmp_path / "own", **QUICK)
    with pytest.raises(ConfigError, match=r"The column confidence .* the table's own has it too"):
        affcache.predict(run=tmp_path / "own", **{**asked, "inputs": store})


def test_every_frame_has_a_row_also_before_the_time_0(asked: dict[str, Any], tmp_path: Path) -> None:
    import av

    path = tmp_path / "early.ts"
    with av.open(str(path), "w", options={"avoid_negative_ts": "disabled", "muxdelay": "0"}) as container:
        stream: Any = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for index, pixels in enumerate(moving(12)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = index - 6
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert frames_of(path)[0].timestamp < 0
    affcache.predict(inputs=path, **asked)
    assert pq.read_table(tmp_path / "p.parquet")["frame"].to_pylist() == [*range(1, 13)]


def test_what_is_given_twice_counts_once(asked: dict[str, Any], tmp_path: Path) -> None:
    photo = write_photo(tmp_path / "in" / "sub" / "p.png", picture((20, 20)))
    (tmp_path / "in" / "link.png").symlink_to(photo)
    result = affcache.predict(inputs=(tmp_path / "in" / "sub", tmp_path / "in"), **asked)
    assert result.rows == 1
    crops = tmp_path / "crops"
    assert affcache.predict(inputs=(crops, Path(f"{crops}/../crops"), crops), **asked).rows == 16
    assert affcache.predict(inputs=(tmp_path / "faces.h5",) * 2, **asked).rows == 16


def test_two_stores_are_told_apart(asked: dict[str, Any], tmp_path: Path) -> None:
    other = tmp_path / "other.h5"
    other.write_bytes((tmp_path / "faces.h5").read_bytes())
    affcache.predict(inputs=(tmp_path / "faces.h5", other), page=tmp_path / "p.html", **asked)
    names = set(pq.read_table(tmp_path / "p.parquet")["input"].to_pylist())
    assert names == {f"{store}/{video}" for store in (tmp_path / "faces.h5", other) for video in "ab"}


def test_crops_that_a_table_of_faces_lacks_are_said(asked: dict[str, Any], tmp_path: Path) -> None:
    affcache.find_faces(inputs=write_clip(tmp_path / "clip.mp4", moving(4)), out=tmp_path / "faces")
    write_photo(tmp_path / "faces" / "more" / "00001.png", picture((2, 2)))
    heard = Heard()
    assert affcache.predict(inputs=tmp_path / "faces", listener=heard, **asked).rows == 4
    assert any("1 crop of" in text and "doesn't have them" in text for text in heard.warnings)


@pytest.mark.parametrize("column", ["frame", "timestamp", "crops"])
def test_a_table_of_faces_of_other_types_is_refused(asked: dict[str, Any], tmp_path: Path, column: str) -> None:
    affcache.find_faces(inputs=write_clip(tmp_path / "clip.mp4", moving(4)), out=tmp_path / "faces")
    path = tmp_path / "faces" / "faces.parquet"
    table = pq.read_table(path)
    index = table.column_names.index(column)
    pq.write_table(table.set_column(index, column, pa.array([[1]] * len(table))), path)
    with pytest.raises(InputError, match="Expected the table that 'affcache faces' wrote"):
        affcache.predict(inputs=tmp_path / "faces", **asked)


def test_an_overlay_needs_no_more_of_a_damaged_video_than_the_table(asked: dict[str, Any], tmp_path: Path) -> None:
    from tests.faces.clips import noisy

    clip = write_clip(tmp_path / "cut.mp4", noisy(30), options={"movflags": "faststart"})
    clip.write_bytes(clip.read_bytes()[: clip.stat().st_size * 2 // 3])
    with pytest.raises(InputError, match="can't be read beyond"):
        affcache.predict(inputs=clip, **asked)
    affcache.predict(inputs=clip, to=0.5, overlay=tmp_path / "o.mp4", confidence=0.1, **asked)
    assert len(frames_of(tmp_path / "o.mp4")) == 5


def test_what_a_killed_drawing_left_is_removed(asked: dict[str, Any], tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", moving(3))
    for name in ("o.mp4", "p.parquet", "p.html"):
        (tmp_path / f"{name}.0123abcd.partial").write_bytes(b"half")
    affcache.predict(inputs=clip, overlay=tmp_path / "o.mp4", page=tmp_path / "p.html", **asked)
    assert not list(tmp_path.glob("*.partial"))


def test_images_and_embeddings_of_odd_kinds(encoded: Path, tmp_path: Path) -> None:
    model = affcache.load(encoded, device="cpu")
    crops = sorted((tmp_path / "crops" / "a").iterdir())
    expected = model.predict_proba(crops)
    assert np.array_equal(model.predict_proba(path for path in crops), expected)  # type: ignore[arg-type]
    embeddings = model.embed(crops)
    for kind in (">f4", "<f8", np.longdouble):
        assert np.array_equal(model.predict_proba(embeddings=embeddings.astype(kind)), expected), kind
    for wrong in (3, np.zeros((0, 0, 3), np.uint8), [np.zeros((0, 0, 3), np.uint8)], ["a\0b.jpg"]):
        with pytest.raises(InputError):
            model.predict_proba(wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="Embeddings can't be read"):
        model.predict_proba(embeddings=[[1.0, 2.0], [3.0]])
    with pytest.raises(ConfigError, match=r"batch_size is 1\.5"):
        model.predict_proba(crops, batch_size=1.5)  # type: ignore[arg-type]


def test_on_the_command_line_bad_input_ends_with_2_and_says_what_to_do(
    asked: dict[str, Any], learnable: MakeData, tmp_path: Path
) -> None:
    store, annotations = learnable()
    affcache.fit(store=store, annotations=annotations, run=tmp_path / "other", **QUICK)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no picture")
    (tmp_path / "text.mp4").write_text("no video")
    write_photo(tmp_path / "dark.png", picture())
    for path in (tmp_path / "crops").rglob("*.jpg"):
        path.write_bytes(b"")
    shutil.make_archive(str(tmp_path / "crops"), "zip", tmp_path / "crops")
    out, cases = tmp_path / "p.csv", [
        ("none.mp4", "does not exist. Expected a photo, a video, or a folder of them"),
        ("texts", "There is no photo or video in"),
        ("text.mp4", "can't be read"),
        ("dark.png", "No face was found in 1 frame of 1 input. Expected faces"),
        ("expr.h5", "embeddings of another encoder"),
        ("crops", "00001.jpg can't be read: the file is empty (0 bytes)"),
        ("crops.zip", "has an embedding, or can be read. Expected some that can."),
    ]  # fmt: skip
    for name, words in cases:
        said = call("predict", tmp_path / name, "--run", asked["run"], "--out", out, "--device", "cpu", code=2).stderr
        assert words in said, name
        assert not out.exists()
    photo = write_photo(tmp_path / "a.png", picture((20, 20)))
    words = ["predict", photo, "--run", tmp_path / "other", "--out", out, "--device", "cpu"]
    assert "what made them isn't known" in call(*words, code=2).stderr
    found = json_of(call("predict", photo, "--run", asked["run"], "--out", out, "--device", "cpu", "--json"))
    assert (found["rows"], found["faces"], found["out"]) == (1, 1, str(out))
