"""Frames as they are shown: as many as there are, at the container's times, upright, with square pixels."""

import math
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import ExifTags, Image

from affcache.faces.media import FrameCount, Media, read_frames, read_photo
from tests.faces.clips import (
    BRIGHT,
    TICKS,
    VARIABLE,
    Pixels,
    frames_of,
    moving,
    noisy,
    picture,
    write_clip,
    write_photo,
)

FORMATS = [("libx264", "mp4"), ("mpeg4", "avi"), ("libvpx", "webm"), ("mpeg2video", "mpg"), ("libx264", "ts"),
           ("libx264", "mkv"), ("libx265", "mov"), ("libx264", "flv")]  # fmt: skip


def left_edge(pixels: Pixels) -> int:
    """Return the x of the square."""
    return int(np.flatnonzero((pixels[:, :, 0] > BRIGHT).any(axis=0))[0])


def container_times(path: Path) -> list[float]:
    """Return the times of a video's packets, in the order in which they are shown."""
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.pts is not None]
    return sorted(float(packet.pts * packet.time_base) for packet in packets)  # type: ignore[operator]


@pytest.mark.parametrize(("codec", "ending"), FORMATS, ids=[ending for _, ending in FORMATS])
def test_there_are_as_many_rows_as_frames_at_the_containers_times(codec: str, ending: str, tmp_path: Path) -> None:
    path = write_clip(tmp_path / f"clip.{ending}", moving(25), rate=25, codec=codec)
    frames = frames_of(path)
    assert [frame.number for frame in frames] == list(range(1, 26))
    assert [frame.timestamp for frame in frames] == pytest.approx(container_times(path), abs=1e-6)
    steps = np.diff([frame.timestamp for frame in frames])
    np.testing.assert_allclose(steps, 0.04, atol=0.0011)
    assert not any(frame.damaged for frame in frames)
    assert {frame.pixels.shape for frame in frames} == {(96, 128, 3)}
    edges = [left_edge(frame.pixels) for frame in frames]
    np.testing.assert_allclose(edges, 8 + 2 * np.arange(25), atol=1)


@pytest.mark.parametrize("ending", ["mp4", "mov", "mkv", "avi"])
def test_a_variable_frame_rate_keeps_its_times(ending: str, tmp_path: Path) -> None:
    codec = "mpeg4" if ending == "avi" else "libx264"  # an AVI file has a slot for each tick, most of them empty
    frames = frames_of(write_clip(tmp_path / f"clip.{ending}", moving(10), VARIABLE, codec=codec))
    assert [frame.timestamp for frame in frames] == pytest.approx([ticks / TICKS for ticks in VARIABLE], abs=1e-6)


def test_times_begin_where_the_containers_do(tmp_path: Path) -> None:
    later = [ticks + 2_000 for ticks in VARIABLE]
    frames = frames_of(write_clip(tmp_path / "clip.mp4", moving(10), later))
    assert [frame.timestamp for frame in frames] == pytest.approx([ticks / TICKS for ticks in later])


def test_frames_come_as_they_are_shown_not_as_they_are_stored(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", moving(20), bf="3", preset="medium", qp="10")
    with av.open(str(path)) as container:
        stored = [packet.pts for packet in container.demux(video=0) if packet.pts is not None]
    assert stored != sorted(stored), "the clip has to have frames that are stored out of order"
    frames = frames_of(path)
    assert [left_edge(frame.pixels) for frame in frames] == list(range(8, 48, 2))
    assert [frame.timestamp for frame in frames] == pytest.approx(np.arange(20) / 10)


def trimmed(path: Path, start: float, seconds: float) -> Path:
    """Trim an mp4 as phones do: the container says what is shown, and all frames stay in the file."""
    content = bytearray(path.read_bytes())
    (rate,) = struct.unpack_from(">I", content, content.index(b"mdhd") + 16)
    struct.pack_into(">Ii", content, content.index(b"elst") + 12, round(seconds * 1000), round(start * rate))
    to = path.with_name("trimmed.mp4")
    to.write_bytes(content)
    return to


@pytest.mark.parametrize("start", [0.0, 1.0, 1.5])
def test_of_a_trimmed_video_what_is_shown_counts(start: float, tmp_path: Path) -> None:
    path = trimmed(write_clip(tmp_path / "clip.mp4", moving(40), g="10"), start, seconds=2.0)
    frames = frames_of(path)
    assert [frame.timestamp for frame in frames] == pytest.approx(np.arange(20) / 10)
    assert left_edge(frames[0].pixels) == 8 + 20 * start


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_a_video_is_turned_as_its_container_says(degrees: int, mirrored: bool, tmp_path: Path) -> None:
    pictures = noisy(2)
    plain = frames_of(write_clip(tmp_path / "plain.mp4", pictures))[0].pixels
    path = write_clip(tmp_path / "turned.mp4", pictures, turned=(degrees, mirrored))
    content = path.read_bytes()
    # the track's own matrix: (x, y) is shown at (a x + c y, b x + d y)
    a, b, _, c, d = (value / 65536 for value in struct.unpack_from(">5i", content, content.index(b"tkhd") + 44))
    y, x = np.indices(plain.shape[:2])
    to_x, to_y = (a * x + c * y).astype(int), (b * x + d * y).astype(int)
    to_x, to_y = to_x - to_x.min(), to_y - to_y.min()
    expected = np.zeros((to_y.max() + 1, to_x.max() + 1, 3), np.uint8)
    expected[to_y, to_x] = plain
    assert (degrees, mirrored) == (0, False) or not np.array_equal(expected, plain)
    np.testing.assert_array_equal(frames_of(path)[0].pixels, expected)


@pytest.mark.parametrize(("aspect", "width"), [(Fraction(2), 256), (Fraction(16, 15), 137), (Fraction(1, 2), 64)])
def test_pixels_that_are_not_square_are_made_so(aspect: Fraction, width: int, tmp_path: Path) -> None:
    frames = frames_of(write_clip(tmp_path / "clip.mp4", [picture((32, 24))] * 2, aspect=aspect))
    assert frames[0].pixels.shape == (96, width, 3)
    assert left_edge(frames[0].pixels) == pytest.approx(32 * width / 128, abs=1)


def test_a_turned_video_of_oblong_pixels_is_stretched_before_it_is_turned(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", [picture((32, 24))] * 2, aspect=Fraction(2), turned=(90, False))
    assert frames_of(path)[0].pixels.shape == (256, 96, 3)


def test_a_photo_is_one_frame_without_a_time(tmp_path: Path) -> None:
    pixels = picture((8, 24))
    count = FrameCount()
    (frame,) = read_frames(Media(write_photo(tmp_path / "a.PNG", pixels), "a"), count)
    np.testing.assert_array_equal(frame.pixels, pixels)
    assert (frame.number, count.frames, frame.damaged) == (1, 1, False)
    assert math.isnan(frame.timestamp)


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize(("orientation", "turns"), [(3, 2), (6, 1), (8, 3)])
def test_a_photo_that_lies_on_its_side_gives_the_pixels_of_the_upright_one(
    ending: str, orientation: int, turns: int, tmp_path: Path
) -> None:
    upright = picture((8, 24))
    lying = np.ascontiguousarray(np.rot90(upright, turns))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    found = read_photo(write_photo(tmp_path / f"a.{ending}", lying, exif=exif))
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright).mean() < 1.5, "but for the rounding of a lossy format"


def test_how_many_frames_there_are_is_told_before_the_first(tmp_path: Path) -> None:
    count = FrameCount()
    frames = read_frames(Media(write_clip(tmp_path / "clip.mp4", moving(7)), "clip"), count)
    next(frames)
    assert count.frames == 7
