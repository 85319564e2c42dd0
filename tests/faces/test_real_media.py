"""affcache faces on real photos and videos, with the real detector."""

from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import affcache
from affcache.faces.find import FacesResult
from affcache.faces.media import read_photo
from tests.conftest import REAL, Heard
from tests.faces.clips import picture, write_photo
from tests.faces.test_find import crops_in
from tests.faces.test_find_again import content
from tests.test_cli import call, json_of

pytestmark = pytest.mark.real


def find(*inputs: Path, out: Path, weights: Path, **settings: Any) -> FacesResult:
    return affcache.find_faces(inputs=inputs, out=out, detector=str(weights), workers=2, listener=Heard(), **settings)


@pytest.fixture(scope="module")
def found(media: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The faces of all real photos and videos."""
    out = tmp_path_factory.mktemp("real") / "out"
    find(media, out=out, weights=weights)
    return out


def shown_times(path: Path) -> list[float]:
    """Return the times of a video's frames, as its container has them, but for those that it says aren't shown."""
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.pts is not None and not packet.is_discard]
        base = container.streams.video[0].time_base
    return sorted(float(packet.pts * base) for packet in packets)  # type: ignore[operator]


@pytest.mark.parametrize("name", ["single_face.mp4", "face_noface.mov", "no_face.mp4"])
def test_there_are_as_many_rows_as_frames_at_the_containers_times(name: str, media: Path, found: Path) -> None:
    table = pq.read_table(found / "faces.parquet")
    table = table.filter(pc.equal(table["input"], str(media / name)))
    rows = dict(zip(table["frame"].to_pylist(), table["timestamp"].to_pylist(), strict=True))
    times = shown_times(media / name)
    assert len(table) == len(rows) == len(times)
    assert list(rows) == list(range(1, len(times) + 1))
    assert list(rows.values()) == pytest.approx(times, abs=1e-9)


def test_who_is_seen_is_one_person_and_where_nobody_is_there_is_no_success(media: Path, found: Path) -> None:
    table = pq.read_table(found / "faces.parquet")
    by_input = {
        path.name: table.filter(pc.equal(table["input"], str(path))).to_pylist() for path in sorted(media.iterdir())
    }
    assert {row["face_id"] for row in by_input["single_face.mp4"]} == {1}
    assert all(row["success"] for row in by_input["single_face.mp4"])
    assert not any(row["success"] for row in by_input["no_face.mp4"])
    both = by_input["face_noface.mov"]
    assert {row["face_id"] for row in both} == {None, 1}
    there = np.array([row["success"] for row in both])
    assert 0.2 < there.mean() < 0.9
    assert there[:20].all()
    assert sorted(row["face_id"] for row in by_input["multi_face.jpg"]) == [1, 2, 3, 4, 5]
    assert [row["success"] for row in by_input["single_face.jpg"]] == [True]


def test_crops_are_faces(media: Path, found: Path, weights: Path) -> None:
    assert crops_in(found).keys() == {
        "face_noface", *(f"multi_face_{person}" for person in range(1, 6)), "single_face-jpg", "single_face-mp4"
    }  # fmt: skip
    from affcache.faces.detector import load_detector

    detector = load_detector(str(weights))(0.5, 1024)
    for folder in sorted(found.iterdir()):
        if folder.name.startswith(".") or not folder.is_dir():
            continue
        for path in sorted(folder.iterdir())[::20]:
            crop = read_photo(path)
            assert crop.shape == (112, 112, 3)
            assert len(detector.detect(np.pad(crop, ((40, 40), (40, 40), (0, 0))))) == 1, path


def test_any_number_of_threads_gives_the_same_files(media: Path, weights: Path, tmp_path: Path) -> None:
    inputs = [media / "single_face.mp4", media / "multi_face.jpg"]
    outputs = []
    for workers in (1, 3):
        out = tmp_path / str(workers)
        affcache.find_faces(inputs=inputs, out=out, detector=str(weights), workers=workers, listener=Heard())
        outputs.append(content(out))
    assert outputs[0] == outputs[1]


def test_a_turned_photo_gives_the_row_of_the_upright_one(media: Path, weights: Path, tmp_path: Path) -> None:
    from PIL import ExifTags, Image

    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 8
    upright = read_photo(media / "single_face.jpg")
    write_photo(tmp_path / "in" / "a.png", upright)
    write_photo(tmp_path / "in" / "b.png", np.ascontiguousarray(np.rot90(upright, 3)), exif=exif)
    find(tmp_path / "in", out=tmp_path / "out", weights=weights)
    one, other = pq.read_table(tmp_path / "out" / "faces.parquet").to_pylist()
    assert {name for name in one if one[name] != other[name]} == {"input", "crops"}
    assert (tmp_path / "out/a/00001.jpg").read_bytes() == (tmp_path / "out/b/00001.jpg").read_bytes()


def test_a_real_encoder_keeps_one_person_one_across_a_gap(media: Path, weights: Path, tmp_path: Path) -> None:
    model = f"local-dir:{REAL / 'encoder'}"
    result = find(media / "face_noface.mov", out=tmp_path, weights=weights, model=model, device="cpu", every=4)
    assert result.persons == 1


def test_the_command_on_a_photo_of_five(media: Path, weights: Path, tmp_path: Path) -> None:
    write_photo(tmp_path / "in" / "dark.png", picture())
    (tmp_path / "in" / "group.jpg").symlink_to(media / "multi_face.jpg")
    result = call("faces", tmp_path / "in", "--out", tmp_path / "out", "--detector", weights, "--json")
    assert {key: json_of(result)[key] for key in ("inputs", "frames", "faces", "persons", "frames_without_faces")} == {
        "inputs": 2, "frames": 2, "faces": 5, "persons": 5, "frames_without_faces": 1
    }  # fmt: skip
    message = call("faces", tmp_path / "in/dark.png", "--out", tmp_path / "o", "--detector", weights, code=2).stderr
    assert "No face was found in 1 frame of 1 input." in message
