"""Frames decoded, looked at by several threads, and tracked: in order, with their own numbers, a few ahead."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from affcache.faces import scan as scan_module
from affcache.faces.align import SIDE
from affcache.faces.detector import Face
from affcache.faces.media import DamagedMediaError, Frame, FrameCount, Media
from affcache.faces.scan import AHEAD, ScannedFrame, Scanner
from affcache.faces.settings import DetectionSettings
from affcache.faces.tracks import Tracker
from tests.faces.clips import Pixels, Squares, frames_of, picture, squares, write_clip, write_photo


def scanned(path: Path, **settings: Any) -> list[ScannedFrame]:
    scanner = Scanner(DetectionSettings(**{"workers": 2, **settings}), squares())
    return list(scanner.scan(Media(path, path.stem), Tracker()))


def said(frames: list[ScannedFrame]) -> list[tuple[Any, ...]]:
    """Return all that is said of frames, to compare."""
    return [
        (
            frame.number,
            frame.timestamp,
            frame.tracks,
            [(face.box.tolist(), face.landmarks.tolist(), face.confidence) for face in frame.faces],
            [crop.tobytes() for crop in frame.crops],
        )
        for frame in frames
    ]


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A clip of 30 frames at 10 a second: one square all along, a larger one from frame 11 on."""
    pictures = [picture((4 + index, 8)) for index in range(10)]
    for index in range(10, 30):
        pixels = picture((4 + index, 8))
        pixels[50:90, 70:110] = 235
        pictures.append(pixels)
    return write_clip(tmp_path / "clip.mp4", pictures)


def test_every_frame_comes_in_order_with_its_faces_crops_and_tracks(clip: Path) -> None:
    frames = scanned(clip)
    assert [frame.number for frame in frames] == list(range(1, 31))
    assert [frame.timestamp for frame in frames] == pytest.approx(np.arange(30) / 10)
    assert [frame.tracks for frame in frames] == [[0]] * 10 + [[1, 0]] * 20
    for index, frame in enumerate(frames):
        assert len(frame.faces) == len(frame.crops) == len(frame.tracks)
        assert frame.faces[-1].box.tolist() == pytest.approx([4 + index, 8, 32, 32], abs=1)
        assert {crop.shape for crop in frame.crops} == {(SIDE, SIDE, 3)}
        assert all(crop[8:-8, 8:-8].min() > 200 for crop in frame.crops), "the square fills the crop"


def test_any_number_of_threads_gives_the_same(clip: Path) -> None:
    one = said(scanned(clip, workers=1))
    for workers in (2, 3, 7):
        assert said(scanned(clip, workers=workers)) == one


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [
        ({"every": 7}, [1, 8, 15, 22, 29]),
        ({"every": 100}, [1]),
        ({"from_": 1.0}, list(range(11, 31))),
        ({"to": 1.0}, list(range(1, 11))),
        ({"from_": 0.95, "to": 1.25}, [11, 12, 13]),
        ({"from_": 0.95, "to": 2.0, "every": 5}, [11, 16]),
        ({"from_": 9.0}, []),
    ],
)
def test_what_is_asked_for_keeps_its_numbers_and_times(
    settings: dict[str, Any], numbers: list[int], clip: Path
) -> None:
    frames = scanned(clip, **settings)
    assert [frame.number for frame in frames] == numbers
    assert [frame.timestamp for frame in frames] == pytest.approx([(number - 1) / 10 for number in numbers])
    for frame in frames:
        assert frame.faces[-1].box[0] == pytest.approx(3 + frame.number, abs=1)


def test_nothing_is_decoded_beyond_the_end_that_was_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def frames(media: Media, count: FrameCount | None) -> Iterator[Frame]:
        for index in range(10):
            assert index <= 5, "beyond --to"
            yield Frame(index + 1, float(index), picture((8, 8)))

    monkeypatch.setattr(scan_module, "read_frames", frames)
    assert [frame.number for frame in scanned(tmp_path / "x.mp4", to=5.0)] == [1, 2, 3, 4, 5]


def test_the_largest_face_alone_can_count(clip: Path) -> None:
    frames = scanned(clip, faces="largest")
    assert [len(frame.faces) for frame in frames] == [1] * 30
    assert [float(frame.faces[0].box[2]) for frame in frames] == pytest.approx([32] * 10 + [40] * 20, abs=1)
    assert [frame.tracks for frame in frames] == [[0]] * 10 + [[1]] * 20


def test_faces_of_equal_confidence_and_size_are_one_where_the_largest_counts(tmp_path: Path) -> None:
    path = write_photo(tmp_path / "a.png", picture((4, 4), (60, 40)))
    assert len(scanned(path, faces="largest")[0].faces) == 1
    assert len(scanned(path)[0].faces) == 2


def test_loose_crops_have_their_margin(tmp_path: Path) -> None:
    path = write_photo(tmp_path / "a.png", picture((40, 30)))
    ((crop,),) = (frame.crops for frame in scanned(path, align="none", margin=0.5))
    white = crop[:, :, 0] > 128
    assert white.mean() == pytest.approx(0.25, abs=0.02), "a box of half the side"
    assert white[SIDE // 4 + 2 : -SIDE // 4 - 2, SIDE // 4 + 2 : -SIDE // 4 - 2].all()


def test_a_detector_gets_the_confidence_and_the_side_and_there_is_one_for_each_thread() -> None:
    made = []

    def make(confidence: float, side: int) -> Squares:
        made.append((confidence, side))
        return Squares()

    Scanner(DetectionSettings(workers=3, confidence=0.4, detection_side=333), make)
    assert made == [(0.4, 333)] * 3


class Slow(Squares):
    """Says how many look at a frame at once, each of which waits for the others."""

    def __init__(self, together: threading.Barrier) -> None:
        self.together, self.busy = together, threading.Lock()

    def detect(self, pixels: Pixels) -> list[Face]:
        assert self.busy.acquire(blocking=False), "one is used by one thread at a time"
        try:
            self.together.wait(timeout=60)
            return super().detect(pixels)
        finally:
            self.busy.release()


def test_as_many_frames_are_looked_at_at_once_as_there_are_threads(clip: Path) -> None:
    together = threading.Barrier(3)  # breaks where fewer come
    scanner = Scanner(DetectionSettings(workers=3), lambda confidence, side: Slow(together))
    assert len(list(scanner.scan(Media(clip, "clip"), Tracker()))) == 30


class Decoded:
    """Frames without end; how many were decoded, and whether the reader was closed."""

    def __init__(self) -> None:
        self.number, self.closed = 0, False

    def __call__(self, media: Media, count: FrameCount | None) -> Iterator[Frame]:
        try:
            while True:
                self.number += 1
                yield Frame(self.number, self.number / 10, picture((8, 8)))
        finally:
            self.closed = True


def detecting_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("decode", "detect"))]


@pytest.mark.parametrize("workers", [1, 3])
def test_few_frames_are_decoded_ahead_however_long_one_waits(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = Decoded()
    monkeypatch.setattr(scan_module, "read_frames", decoded)
    scanner = Scanner(DetectionSettings(workers=workers), squares())
    frames = scanner.scan(Media(Path("x.mp4"), "x"), Tracker())
    for done in range(1, 40):
        assert next(frames).number == done
        assert decoded.number <= done + workers + AHEAD
    frames.close()  # type: ignore[attr-defined]
    assert decoded.number <= 39 + workers + AHEAD
    assert detecting_threads() == []
    del frames
    assert decoded.closed


def test_closing_early_leaves_no_thread_and_opencv_as_it_was(clip: Path) -> None:
    before = cv2.getNumThreads()
    cv2.setNumThreads(2)
    scanner = Scanner(DetectionSettings(workers=3), squares())
    frames = scanner.scan(Media(clip, "clip"), Tracker())
    next(frames)
    assert detecting_threads()
    assert cv2.getNumThreads() == 1
    frames.close()  # type: ignore[attr-defined]
    assert detecting_threads() == []
    assert cv2.getNumThreads() == 2
    cv2.setNumThreads(before)
    assert len(list(scanner.scan(Media(clip, "clip"), Tracker()))) == 30, "the same scanner goes on"


class Broken(Squares):
    def detect(self, pixels: Pixels) -> list[Face]:
        if (pixels[60, 90] > 200).all():  # the larger square, from frame 11 on
            raise ZeroDivisionError("a bug in the detector")
        return super().detect(pixels)


def test_a_detector_that_raises_is_heard_after_the_frames_before(clip: Path) -> None:
    scanner = Scanner(DetectionSettings(workers=2), lambda confidence, side: Broken())
    frames = []
    with pytest.raises(ZeroDivisionError, match="a bug in the detector"):
        frames.extend(scanner.scan(Media(clip, "clip"), Tracker()))
    assert [frame.number for frame in frames] == list(range(1, 11))
    assert detecting_threads() == []
    assert scanner._idle.qsize() == 2, "its detectors are all there still"


def test_damage_is_heard_after_the_frames_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def frames(media: Media, count: FrameCount | None) -> Iterator[Frame]:
        for index in range(3):
            yield Frame(index + 1, float(index), picture((8, 8)))
        raise DamagedMediaError("it ends here")

    monkeypatch.setattr(scan_module, "read_frames", frames)
    scanner, found = Scanner(DetectionSettings(workers=3), squares()), []
    with pytest.raises(DamagedMediaError, match="it ends here"):
        found.extend(scanner.scan(Media(tmp_path / "x.mp4", "x"), Tracker()))
    assert [frame.number for frame in found] == [1, 2, 3]


def test_a_damaged_frame_has_no_face_and_ends_no_track(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    grey = np.full((96, 128, 3), 200, np.uint8)  # what a decoder puts where it knows nothing, which looks like a cut

    def frames(media: Media, count: FrameCount | None) -> Iterator[Frame]:
        for index in range(6):
            damaged = index in (2, 3)
            yield Frame(index + 1, index / 10, grey if damaged else picture((8, 8)), damaged)

    monkeypatch.setattr(scan_module, "read_frames", frames)
    found = scanned(tmp_path / "x.mp4")
    assert [frame.damaged for frame in found] == [False, False, True, True, False, False]
    assert [frame.tracks for frame in found] == [[0], [0], [], [], [0], [0]]


def test_how_many_frames_there_are_is_told(clip: Path) -> None:
    count = FrameCount()
    next(Scanner(DetectionSettings(workers=1), squares()).scan(Media(clip, "clip"), Tracker(), count))
    assert count.frames == 30


def test_a_photo_is_one_frame_whatever_the_times(tmp_path: Path) -> None:
    path = write_photo(tmp_path / "a.png", picture((8, 8), (70, 40)))
    (frame,) = scanned(path, from_=3.0, to=4.0, every=9)
    assert (frame.number, frame.tracks) == (1, [0, 1])
    assert np.isnan(frame.timestamp)
    np.testing.assert_array_equal(frames_of(path)[0].pixels, picture((8, 8), (70, 40)))


def test_photos_and_videos_come_in_order_and_photos_several_at_a_time(clip: Path, tmp_path: Path) -> None:
    photos = [write_photo(tmp_path / f"{n}.png", picture((n, 8), (70, n), side=24)) for n in (8, 12, 16, 20, 24, 28)]
    photos[4].write_bytes(b"")
    media = [Media(path, path.stem) for path in (*photos[:2], clip, *photos[2:])]
    met, first = threading.Barrier(2), iter([True, True])

    class Watched(Squares):
        def detect(self, pixels: Pixels) -> list[Face]:
            if next(first, False):
                met.wait(10)  # the other one comes, or this fails
            return super().detect(pixels)

    scanner = Scanner(DetectionSettings(workers=2), lambda confidence, side: Watched())
    found: list[tuple[str, Any]] = []
    for one in scanner.scans(media):
        try:
            found.append((one.media.name, said(list(one.frames))))
        except DamagedMediaError as error:
            found.append((one.media.name, str(error)))
    assert [name for name, _ in found] == ["8", "12", "clip", "16", "20", "24", "28"]
    assert "the file is empty" in found[5][1]
    assert found[2][1] == said(scanned(clip))
    for (_, frames), path in zip(found[:2] + found[3:5] + found[6:], photos[:4] + photos[5:], strict=True):
        assert frames[0][2:] == said(scanned(path))[0][2:], path  # a photo's time is nan
        assert frames[0][2] == [0, 1], "two persons of its own"


def test_few_photos_are_looked_at_ahead(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    photo, read = write_photo(tmp_path / "a.png", picture((8, 8))), []

    def counted(media: Media) -> Iterator[Frame]:
        read.append(media.name)
        yield Frame(1, float("nan"), picture((8, 8)))

    monkeypatch.setattr(scan_module, "read_frames", counted)
    scans = Scanner(DetectionSettings(workers=2), squares()).scans([Media(photo, str(n)) for n in range(50)])
    for _ in range(5):
        assert len(list(next(scans).frames)) == 1
    scans.close()
    assert len(read) <= 5 + 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("photo")]
