"""affcache faces: the folders of crops, the table, and what is said where there is nothing to find."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg

import affcache
from affcache.crops.folders import find_crops
from affcache.errors import ConfigError, InputError
from affcache.faces.detector import LANDMARKS
from affcache.faces.find import SCHEMA
from affcache.store.reading import EmbeddingStore
from tests.conftest import Heard
from tests.faces.clips import VARIABLE, moving, picture, write_clip, write_photo, write_sound
from tests.test_cli import call, json_of

pytestmark = pytest.mark.usefixtures("square_faces")
POINTS = [f"{name}_{axis}" for name in LANDMARKS for axis in "xy"]


def find(*inputs: Path, out: Path, listener: Heard | None = None, **settings: Any) -> Any:
    return affcache.find_faces(inputs=inputs, out=out, workers=2, listener=listener or Heard(), **settings)


def rows_of(out: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(out / "faces.parquet").to_pylist())


def crops_in(out: Path) -> dict[str, list[str]]:
    """Return the names of the crops in each visible folder."""
    return {
        folder.name: sorted(path.name for path in folder.iterdir())
        for folder in sorted(out.iterdir())
        if folder.is_dir() and not folder.name.startswith(".")
    }


def numbered(*frames: int) -> list[str]:
    return [f"{frame:05d}.jpg" for frame in frames]


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """A folder of a clip with one person, one with two of whom one comes late, one of nobody, and a photo."""
    folder = tmp_path / "in"
    one = [picture((8 + index, 8)) for index in range(6)]
    write_clip(folder / "one.mp4", [*one[:3], picture(), *one[4:]], VARIABLE[:6])
    write_clip(folder / "two.mp4", [picture((8, 8))] * 3 + [picture((8, 8), (70, 50))] * 2)
    write_clip(folder / "none.mp4", [picture()] * 4)
    write_photo(folder / "photo.png", picture((40, 30)))
    return folder


def test_crops_lie_as_aff_wild2s_do_and_persons_have_folders(clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = find(clips, out=out)
    assert crops_in(out) == {
        "one": numbered(1, 2, 3, 5, 6),
        "two_1": numbered(1, 2, 3, 4, 5),
        "two_2": numbered(4, 5),
        "photo": numbered(1),
    }
    crop = simplejpeg.decode_jpeg((out / "one" / "00001.jpg").read_bytes())
    assert crop.shape == (112, 112, 3)
    assert crop[8:-8, 8:-8].min() > 200
    assert sorted(path.name for path in out.iterdir()) == [".faces", "faces.parquet", "one", "photo", "two_1", "two_2"]
    assert (result.inputs, result.frames, result.faces) == (4, 6 + 5 + 4 + 1, 5 + 7 + 1)
    assert (result.frames_without_faces, result.persons) == (1 + 4, 1 + 2 + 1)
    assert (result.unreadable, result.unreadable_list) == ((), None)
    assert result.table == str(out / "faces.parquet")


def test_every_frame_has_a_row_and_those_without_a_face_say_so(clips: Path, tmp_path: Path) -> None:
    find(clips, out=tmp_path / "out")
    table = pq.read_table(tmp_path / "out" / "faces.parquet")
    assert table.schema.equals(SCHEMA)
    assert {name: str(kind) for name, kind in zip(SCHEMA.names, SCHEMA.types, strict=True)} == {
        "input": "string", "frame": "int32", "timestamp": "double", "face_id": "int32",
        **dict.fromkeys(["box_x", "box_y", "box_width", "box_height", "confidence"], "float"),
        "success": "bool", "crops": "string", **dict.fromkeys(POINTS, "float"),
    }  # fmt: skip
    rows = table.to_pylist()
    of = {name: [row for row in rows if row["input"] == str(clips / name)] for name in ("one.mp4", "none.mp4")}
    assert [row["frame"] for row in of["one.mp4"]] == [1, 2, 3, 4, 5, 6]
    assert [row["timestamp"] for row in of["one.mp4"]] == pytest.approx([ticks / 1000 for ticks in VARIABLE[:6]])
    assert [row["face_id"] for row in of["one.mp4"]] == [1, 1, 1, None, 1, 1], "one person has one id"
    assert [row["success"] for row in of["one.mp4"]] == [True, True, True, False, True, True]
    for row in [of["one.mp4"][3], *of["none.mp4"]]:
        said = {name for name, value in row.items() if value is not None}
        assert said == {"input", "frame", "timestamp", "success"}
    face = of["one.mp4"][0]
    assert [face[name] for name in SCHEMA.names[4:8]] == pytest.approx([8, 8, 32, 32], abs=1)
    assert face["confidence"] == pytest.approx(0.9)
    assert face["nose_x"] == pytest.approx(8 + 32 * 56.5 / 112, abs=1)
    assert face["left_eye_x"] > face["right_eye_x"], "a person's left is on the right of the picture"
    assert face["crops"] == "one"


def test_several_persons_of_a_frame_have_a_row_each(clips: Path, tmp_path: Path) -> None:
    find(clips / "two.mp4", clips / "photo.png", out=tmp_path)
    found = [(row["frame"], row["face_id"], row["crops"]) for row in rows_of(tmp_path)]
    assert sorted(found, key=str) == sorted(
        [(1, 1, "photo"), (1, 1, "two_1"), (2, 1, "two_1"), (3, 1, "two_1"), (4, 1, "two_1"), (4, 2, "two_2"),
         (5, 1, "two_1"), (5, 2, "two_2")], key=str)  # fmt: skip
    (photo,) = [row for row in rows_of(tmp_path) if row["crops"] == "photo"]
    assert photo["timestamp"] is None


def test_crops_are_found_and_encoded_as_any_others(clips: Path, tmp_path: Path, tiny_encoder: str) -> None:
    find(clips, out=tmp_path / "out")
    assert list(find_crops([tmp_path / "out"]).video_names) == ["one", "photo", "two_1", "two_2"]
    extracted = affcache.extract(
        crops=tmp_path / "out", store=tmp_path / "s.h5", model=tiny_encoder, device="cpu", workers=1
    )
    assert (extracted.rows, extracted.encoded, extracted.unreadable) == (13, 13, 0)
    store = EmbeddingStore.open(tmp_path / "s.h5")
    at = {(row["crops"], row["frame"]) for row in rows_of(tmp_path / "out") if row["success"]}
    names = [store.video_names[video] for video in store.video_of_rows()]
    assert set(zip(names, store.frame_number.tolist(), strict=True)) == at


def test_an_encoder_joins_the_tracks_of_a_person(tmp_path: Path, tiny_encoder: str) -> None:
    pictures = [picture((4, 4))] * 3 + [picture((90, 60))] * 3  # too far to be one track
    path = write_clip(tmp_path / "a.mp4", pictures)
    assert find(path, out=tmp_path / "without").persons == 2
    joined = find(path, out=tmp_path / "with", model=tiny_encoder, device="cpu", same_person=0.9)
    assert joined.persons == 1
    assert crops_in(tmp_path / "with") == {"a": numbered(1, 2, 3, 4, 5, 6)}
    photo = write_photo(tmp_path / "b.png", picture((4, 4), (90, 60)))
    result = find(photo, out=tmp_path / "photo", model=tiny_encoder, device="cpu", same_person=0.9)
    assert (result.faces, result.persons) == (2, 2), "faces of one photo are never one person's"
    assert crops_in(tmp_path / "photo") == {"b_1": numbered(1), "b_2": numbered(1)}


def test_which_frames_and_how_large_crops_are_can_be_said(clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    find(clips / "one.mp4", out=out, every=2, from_=0.05, faces="largest", size=64)
    assert crops_in(out) == {"one": numbered(3, 5)}
    assert simplejpeg.decode_jpeg((out / "one" / "00003.jpg").read_bytes()).shape == (64, 64, 3)
    assert [(row["frame"], row["timestamp"]) for row in rows_of(out)] == [(3, 0.09), (5, 0.31)]


def test_a_turned_photo_gives_the_row_of_the_upright_one(tmp_path: Path) -> None:
    from PIL import ExifTags, Image

    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    upright = picture((8, 40), size=(160, 90))
    write_photo(tmp_path / "in" / "a.png", upright)
    write_photo(tmp_path / "in" / "b.png", np.ascontiguousarray(np.rot90(upright)), exif=exif)
    find(tmp_path / "in", out=tmp_path / "out")
    one, other = rows_of(tmp_path / "out")
    differing = {name for name in one if one[name] != other[name]}
    assert differing == {"input", "crops"}
    assert (tmp_path / "out/a/00001.jpg").read_bytes() == (tmp_path / "out/b/00001.jpg").read_bytes()


# What can't be read, or shows nobody


def test_a_damaged_input_is_listed_and_the_others_go_on(clips: Path, tmp_path: Path) -> None:
    write_sound(clips / "a-sound.mp4", "aac")
    (clips / "empty.jpg").touch()
    heard = Heard()
    out = tmp_path / "out"
    result = find(clips, out=out, listener=heard)
    assert sorted(result.unreadable) == [str(clips / "a-sound.mp4"), str(clips / "empty.jpg")]
    assert result.unreadable_list == str(out / "unreadable.txt")
    listed = [line.split("\t") for line in (out / "unreadable.txt").read_text().splitlines()]
    assert [line[0] for line in listed] == list(result.unreadable)
    assert "holds no video (only audio)" in listed[0][1]
    assert "the file is empty" in listed[1][1]
    assert [text for text in heard.warnings if text.startswith("left out: ")] == [
        f"left out: {why}" for _, why in listed
    ]
    assert (result.inputs, len(crops_in(out))) == (4, 4)
    (clips / "a-sound.mp4").unlink()
    (clips / "empty.jpg").unlink()
    assert find(clips, out=out).unreadable == ()
    assert not (out / "unreadable.txt").exists(), "there is nothing to list any more"


def test_damaged_frames_are_warned_of_and_have_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from affcache.faces import scan
    from affcache.faces.media import Frame

    frames = [Frame(index + 1, index / 10, picture((8, 8)), damaged=index == 1) for index in range(4)]
    monkeypatch.setattr(scan, "read_frames", lambda media, count: iter(frames))
    path = write_clip(tmp_path / "a.mp4", moving(4))
    heard = Heard()
    result = find(path, out=tmp_path / "out", listener=heard)
    assert [row["success"] for row in rows_of(tmp_path / "out")] == [True, False, True, True]
    assert heard.warnings == [f"{path}: 1 frame damaged; no faces are taken from them"]
    assert (result.frames, result.frames_without_faces, result.persons) == (4, 1, 1)


def test_where_no_face_is_found_it_says_where_and_leaves_no_table(clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    message = call("faces", clips / "none.mp4", "--out", out, code=2).stderr
    assert "No face was found in 4 frames of 1 input. Expected faces that are seen with a confidence of 0.7." in message
    assert "Lower --confidence" in message
    assert not (out / "faces.parquet").exists()


@pytest.mark.parametrize(
    ("settings", "span"), [({"from_": 9.0}, "9 s and the end"), ({"from_": 4, "to": 5}, "4 s and 5 s")]
)
def test_where_no_frame_is_asked_for_it_says_which_times(
    settings: dict[str, float], span: str, clips: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=rf"2 inputs had no frame between {span}\. .* Check --from and --to\."):
        find(clips / "two.mp4", clips / "none.mp4", out=tmp_path / "out", **settings)


def test_where_nothing_can_be_read_the_first_reason_is_given(tmp_path: Path) -> None:
    write_sound(tmp_path / "in" / "a.mp4", "aac")
    assert "a.mp4 holds no video" in call("faces", tmp_path / "in", "--out", tmp_path / "out", code=2).stderr
    for name in ("b.png", "c.png"):
        (tmp_path / "in" / name).touch()
    message = call("faces", tmp_path / "in", "--out", tmp_path / "out", code=2).stderr
    assert "Expected a photo or a video. Nor could 2 other inputs." in message
    assert len((tmp_path / "out" / "unreadable.txt").read_text().splitlines()) == 3


def test_the_command_prints_one_object(clips: Path, tmp_path: Path) -> None:
    (clips / "empty.mp4").touch()
    (clips / "notes.txt").touch()
    result = call("faces", clips, "--out", tmp_path / "out", "--workers", 1, "--json")
    found = json_of(result)
    assert found.keys() >= {
        "out",
        "table",
        "inputs",
        "frames",
        "faces",
        "persons",
        "frames_without_faces",
        "unreadable",
    }
    assert (found["inputs"], found["frames"], found["faces"], found["persons"]) == (4, 16, 13, 4)
    assert found["unreadable"] == [str(clips / "empty.mp4")]
    assert "files left alone: 1 .txt" in result.stderr
    shown = "".join(call("faces", clips, "--out", tmp_path / "other").stdout.split())  # lines are broken anywhere
    assert "13" in shown
    assert "1input,listedin" in shown
    assert "unreadable.txt" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gone.mp4", "--out", "o"], "gone.mp4 does not exist"),
        (["one.mp4"], "Expected photos, videos or folders of them, and --out DIR"),
        (["--out", "o"], "Expected photos, videos or folders of them, and --out DIR"),
        (["empty", "--out", "o"], "There is no photo or video in empty"),
        (["one.mp4", "--out", "o", "--detector", "nobody"], "--detector nobody is neither a file nor a detector"),
        (["one.mp4", "--out", "o", "--detector", "one.mp4"], "is not the expected one: its sha256 is "),
        (["one.mp4", "--out", "o", "--from", "5", "--to", "4"], "--to is 4; expected more than --from, which is 5."),
        (["one.mp4", "--out", "o", "--from", "nan"], "--from is nan; expected at least 0."),
        (["one.mp4", "--out", "o", "--every", "0"], "--every is 0; expected at least 1."),
        (["one.mp4", "--out", "o", "--confidence", "1"], "--confidence is 1.0; expected more than 0 and less than 1."),
        ([".", "--out", "."], "which is an input: the next run would take its crops for photos"),
        (["one.mp4", "--out", "one.mp4"], "is an input"),
        (["one.mp4", "--out", "two.mp4"], "can't be written"),
    ],
)
def test_what_a_user_may_get_wrong_exits_2(
    words: list[str], message: str, clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(clips)
    (clips / "empty").mkdir()
    before = sorted(clips.iterdir())
    result = call("faces", *words, "--json", code=2)
    assert message in " ".join(json.loads(result.stdout)["message"].split())
    assert sorted(clips.iterdir()) == before, "nothing is left behind"


def test_without_the_extra_it_exits_2(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    message = call("faces", clips, "--out", tmp_path / "out", code=2).stderr
    assert "Install it with pip install 'affcache[video]'." in message


def test_names_that_are_those_of_persons_of_another_input_are_refused(tmp_path: Path) -> None:
    for name in ("clip.mp4", "clip_1.mp4"):
        write_clip(tmp_path / "in" / name, moving(2))
    with pytest.raises(InputError, match=r"clip_1\.mp4 is called as the crops of a person in .*clip\.mp4 would be"):
        find(tmp_path / "in", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    result = find(
        tmp_path / "in" / "clip_1.mp4", write_photo(tmp_path / "clip_x.png", picture((8, 8))), out=tmp_path / "o"
    )
    assert result.inputs == 2, "which names of other forms aren't"


def test_one_works_in_a_folder_at_a_time(clips: Path, tmp_path: Path) -> None:
    class Second(Heard):
        """Starts the command again in the middle of it."""

        def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
            with pytest.raises(ConfigError, match="Another 'affcache faces' works in"):
                find(clips, out=tmp_path / "out")
            super().progress(done, total, unit, note)

    heard = Second()
    find(clips, out=tmp_path / "out", listener=heard)
    assert heard.steps


def test_the_table_has_no_more_than_its_columns_and_is_read_without_us(clips: Path, tmp_path: Path) -> None:
    find(clips, out=tmp_path / "out")
    table = pa.parquet.read_table(tmp_path / "out" / "faces.parquet", columns=["input", "success"])
    counts = table.group_by("input").aggregate([("success", "sum")]).to_pylist()
    assert {Path(row["input"]).name: row["success_sum"] for row in counts} == {
        "one.mp4": 5, "two.mp4": 7, "none.mp4": 0, "photo.png": 1
    }  # fmt: skip
