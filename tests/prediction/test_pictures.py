"""What is drawn of predictions: overlays that are the input again, and a page with a timeline of every person."""

import base64
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

import affcache
from tests.faces.clips import VARIABLE, frames_of, moving, picture, write_clip, write_photo
from tests.prediction.conftest import QUICK
from tests.reporting.test_reporting import Elements, frames_in


@pytest.fixture
def clip(tmp_path: Path, square_faces: None) -> Path:
    pictures = [np.maximum(one, other) for one, other in zip(moving(10), [picture((90, 60))] * 10, strict=True)]
    pictures[3] = picture()
    return write_clip(tmp_path / "clip.mp4", pictures, VARIABLE)


def test_an_overlay_has_the_frames_and_times_of_its_video(encoded: Path, clip: Path, tmp_path: Path) -> None:
    out, overlay = tmp_path / "p.parquet", tmp_path / "o.mp4"
    result = affcache.predict(inputs=clip, run=encoded, out=out, overlay=overlay, device="cpu")
    assert result.overlays == (str(overlay),)
    before, after = frames_of(clip), frames_of(overlay)
    assert [frame.timestamp for frame in after] == pytest.approx([frame.timestamp for frame in before], abs=1e-4)
    changed = [np.abs(a.pixels.astype(int) - b.pixels).max(axis=2) > 60 for a, b in zip(after, before, strict=True)]
    assert [bool(one.any()) for one in changed] == [number != 3 for number in range(10)], "not where nobody is"
    assert changed[0][22:26, 6:42].any(), "the upper line of the box"
    affcache.predict(inputs=clip, run=encoded, out=out, overlay=overlay, every=4, device="cpu")
    assert [round(frame.timestamp, 3) for frame in frames_of(overlay)] == [VARIABLE[i] / 1000 for i in (0, 4, 8)]


def test_overlays_of_several_inputs_go_into_a_folder(encoded: Path, clip: Path, tmp_path: Path) -> None:
    photo = write_photo(tmp_path / "photo.png", picture((20, 30), (80, 30), side=28))
    asked = {"run": encoded, "out": tmp_path / "p.csv", "device": "cpu"}
    result = affcache.predict(inputs=(clip, photo), overlay=tmp_path / "drawn", **asked)
    assert result.overlays == (str(tmp_path / "drawn" / "clip.mp4"), str(tmp_path / "drawn" / "photo.jpg"))
    with Image.open(tmp_path / "drawn" / "photo.jpg") as image:
        assert image.size == (128, 96)
        assert np.ptp(np.asarray(image).astype(int), axis=2).max() > 60, "colours, where the photo had none"
    affcache.predict(inputs=photo, overlay=tmp_path / "one.png", **asked)
    with Image.open(tmp_path / "one.png") as image:
        assert image.format == "PNG"


def test_odd_sizes_are_drawn_too(encoded: Path, square_faces: None, tmp_path: Path) -> None:
    path = tmp_path / "odd.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=Fraction(10))
        stream.width, stream.height, stream.pix_fmt = 127, 95, "bgr0"
        for pixels in moving(2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels[:95, :127].copy(), format="rgb24")))
        container.mux(stream.encode())
    result = affcache.predict(
        inputs=path, run=encoded, out=tmp_path / "p.csv", overlay=tmp_path / "o.mp4", device="cpu"
    )
    assert [frame.pixels.shape for frame in frames_of(Path(result.overlays[0]))] == [(96, 128, 3)] * 2


def test_a_page_holds_every_face_of_every_person(encoded: Path, clip: Path, tmp_path: Path) -> None:
    page = tmp_path / "p.html"
    result = affcache.predict(inputs=clip, run=encoded, out=tmp_path / "p.csv", page=page, device="cpu")
    assert result.page == str(page)
    text = page.read_text()
    frames = frames_in(text)
    assert [(video["name"], video["start"], video["count"]) for video in frames["videos"]] == [
        ("clip.mp4, person 1", 0, 9),
        ("clip.mp4, person 2", 9, 9),
    ]
    numbers = np.frombuffer(base64.b64decode(frames["numbers"]), "<i4")
    assert numbers.tolist() == [number for number in range(1, 11) if number != 4] * 2
    seconds = np.frombuffer(base64.b64decode(frames["seconds"]), "<f8")
    assert seconds[:9].tolist() == pytest.approx([ticks / 1000 for i, ticks in enumerate(VARIABLE) if i != 3])
    (task,) = frames["tasks"]
    assert task["labels"] is None
    assert task["name"] == "expr"
    said = np.frombuffer(base64.b64decode(task["probabilities"]), np.uint8).reshape(18, 8)
    decided = np.frombuffer(base64.b64decode(task["decided"]), np.uint8)
    assert (said[np.arange(18), decided] == said.max(axis=1)).all()
    elements = Elements(text)
    positions = [int(str(one["data-position"])) for one in elements.of("button") if "data-position" in one]
    assert positions
    assert max(positions) < 18
    assert len(elements.of("img")) == len(positions), "each with a picture"
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    assert policy in [one.get("content") for one in elements.of("meta")]


def test_a_page_of_crops_and_stores(encoded: Path, tmp_path: Path) -> None:
    page = tmp_path / "p.html"
    inputs = (tmp_path / "crops", tmp_path / "faces.h5")
    affcache.predict(inputs=inputs, run=encoded, out=tmp_path / "p.csv", page=page, device="cpu")
    text = page.read_text()
    frames = frames_in(text)
    assert [video["count"] for video in frames["videos"]] == [8] * 4
    assert [Path(video["name"]).name for video in frames["videos"]] == ["a", "b", "a", "b"]
    assert 0 < len(Elements(text).of("img")) < len(Elements(text).of("button")), "a store has no pictures"


def test_names_can_not_break_the_page(encoded: Path, clip: Path, tmp_path: Path) -> None:
    named = tmp_path / "<script>alert(1)</script>&.mp4".replace("/", "")
    named.write_bytes(clip.read_bytes())
    affcache.predict(inputs=named, run=encoded, out=tmp_path / "p.csv", page=tmp_path / "p.html", device="cpu")
    elements = Elements((tmp_path / "p.html").read_text())
    assert len(elements.of("script")) == 2, "the data's and the page's own"


@pytest.mark.parametrize("task", ["au", "va"])
def test_units_and_values_have_a_page(task: str, tmp_path: Path, learnable: object) -> None:
    store, annotations = learnable(task)  # type: ignore[operator]
    affcache.fit(task=task, store=store, annotations=annotations, run=tmp_path / "run", **QUICK)
    page = tmp_path / "p.html"
    affcache.predict(inputs=store, run=tmp_path / "run", out=tmp_path / "p.csv", page=page, device="cpu")
    elements = Elements(page.read_text())
    words = [str(one["data-classes"]) for one in elements.of("button") if one.get("data-classes")]
    if task == "va":
        assert set(words) == {f"va: {name} {end}" for name in ("valence", "arousal") for end in ("high", "low")}
    else:
        assert words
        assert all(word.startswith("au: AU") for word in words)
