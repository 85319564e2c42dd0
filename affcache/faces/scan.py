"""Frames of photos and videos with the faces in them: decoded, looked at in several threads, and tracked, in order."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt
import simplejpeg

from affcache.faces.align import SIDE, aligned_crop, loose_crop
from affcache.faces.detector import Detector, Face
from affcache.faces.media import Frame, FrameCount, Media, read_frames
from affcache.faces.settings import DetectionSettings
from affcache.faces.tracks import Tracker, thumbnail_of

AHEAD = 4  # frames that are decoded beside those that are looked at
MOST_WORKERS = 16
QUALITY = 95  # of the crops' JPEG, without subsampling of colours


@dataclass(frozen=True)
class ScannedFrame:
    """A frame, and the faces that count in it, each with its crop and the number of its track."""

    number: int  # from 1, of all frames of the video
    timestamp: float  # seconds; nan for a photo
    faces: list[Face]  # K of them, the surest first
    crops: list[npt.NDArray[np.uint8]]  # (K, side, side, 3) RGB, as ``jpegs`` have them
    tracks: list[int]  # (K,) of ``Scan.tracker``
    damaged: bool
    jpegs: list[bytes] = field(default_factory=list)  # (K,) files of the crops


@dataclass(frozen=True)
class Scan:
    """One photo or video that is looked at."""

    media: Media
    frames: Generator[
        ScannedFrame, None, None
    ]  # which may raise DamagedMediaError; to be closed, for its threads to end
    tracker: Tracker
    count: FrameCount  # of its frames, once the first has come


@dataclass
class Scanner:
    """Finds faces in photos and videos, with as many detectors as threads.

    Args:
        settings: which frames and faces count, and how they are cut out.
        make_detector: makes one, from the least confidence and the longest side.
        side: pixels on a side of the crops.
    """

    settings: DetectionSettings
    make_detector: Callable[[float, int], Detector]
    side: int = SIDE
    _idle: "SimpleQueue[Detector]" = field(default_factory=SimpleQueue)

    def __post_init__(self) -> None:
        self.workers = self.settings.workers or min(os.cpu_count() or 1, MOST_WORKERS)
        for _ in range(self.workers):
            self._idle.put(self.make_detector(self.settings.confidence, self.settings.detection_side))

    def scans(self, media: Sequence[Media]) -> Generator[Scan, None, None]:
        """Yield photos and videos in order; of photos that follow one another, several are looked at at a time."""
        begun: dict[int, Future[ScannedFrame]] = {}
        with _one_thread_a_picture(), ThreadPoolExecutor(self.workers, thread_name_prefix="photo") as pool:
            try:
                for index, one in enumerate(media):
                    tracker, count = Tracker(), FrameCount()
                    if not one.is_photo:
                        yield Scan(one, self.scan(one, tracker, count), tracker, count)
                        continue
                    for ahead in range(index, min(index + self.workers + 1, len(media))):
                        if media[ahead].is_photo and ahead not in begun:
                            begun[ahead] = pool.submit(self._look_at_photo, media[ahead])
                    yield Scan(one, self._tracked_photo(begun.pop(index), tracker), tracker, FrameCount(1))
            finally:
                pool.shutdown(cancel_futures=True)

    def _look_at_photo(self, media: Media) -> ScannedFrame:
        return self._look_at(next(read_frames(media)))[0]

    def _tracked_photo(self, begun: "Future[ScannedFrame]", tracker: Tracker) -> Generator[ScannedFrame, None, None]:
        found = begun.result()
        found.tracks.extend(tracker.update(found.timestamp, np.zeros(1), [face.box for face in found.faces]))
        yield found

    def scan(
        self, media: Media, tracker: Tracker, count: FrameCount | None = None
    ) -> Generator[ScannedFrame, None, None]:
        """Yield the frames of one photo or video that are asked for, in order; a few are looked at ahead.

        Args:
            media: which one.
            tracker: gives the tracks; new for each video.
            count: is told how many frames there are.

        Raises:
            DamagedMediaError: it can't be read to its end.
        """
        frames = self._asked_for(read_frames(media, count))
        with (
            _one_thread_a_picture(),
            ThreadPoolExecutor(1, thread_name_prefix="decode") as reader,
            ThreadPoolExecutor(self.workers, thread_name_prefix="detect") as pool,
        ):

            def begin() -> Future[tuple[ScannedFrame, npt.NDArray[np.float32]]] | None:
                frame = next(frames, None)
                return None if frame is None else pool.submit(self._look_at, frame)

            ahead = deque(reader.submit(begin) for _ in range(self.workers + AHEAD))
            try:
                while (begun := ahead.popleft().result()) is not None:
                    ahead.append(reader.submit(begin))
                    found, thumbnail = begun.result()
                    if not found.damaged:  # what the decoder made up would look like a cut
                        boxes = [face.box for face in found.faces]
                        found.tracks.extend(tracker.update(found.timestamp, thumbnail, boxes))
                    yield found
            finally:
                for one in ahead:
                    one.cancel()
                pool.shutdown(cancel_futures=True)

    def _asked_for(self, frames: Iterator[Frame]) -> Iterator[Frame]:
        """Leave out what the settings leave out; all before it has to be decoded, for frames to have their numbers."""
        settings = self.settings
        for frame in frames:
            if settings.to is not None and frame.timestamp >= settings.to:
                return
            late_enough = not settings.from_ or not frame.timestamp < settings.from_  # times may be below 0
            if (frame.number - 1) % settings.every == 0 and late_enough:
                yield frame

    def _look_at(self, frame: Frame) -> tuple[ScannedFrame, npt.NDArray[np.float32]]:
        detector = self._idle.get()
        try:
            faces = [] if frame.damaged else detector.detect(frame.pixels)
        finally:
            self._idle.put(detector)
        if self.settings.faces == "largest":
            faces = sorted(faces, key=lambda face: float(face.box[2] * face.box[3]))[-1:]
        cut = [cut_out(frame.pixels, face.box, face.landmarks, self.settings, self.side) for face in faces]
        # what is predicted of a video and of its crops is the same: both have been JPEG files, as those of data sets
        jpegs = [simplejpeg.encode_jpeg(crop, quality=QUALITY, colorsubsampling="444") for crop in cut]
        crops = [simplejpeg.decode_jpeg(jpeg, "RGB") for jpeg in jpegs]
        found = ScannedFrame(frame.number, frame.timestamp, faces, crops, [], frame.damaged, jpegs)
        return found, thumbnail_of(frame.pixels)


def cut_out(
    pixels: npt.NDArray[np.uint8],
    box: npt.NDArray[np.floating],
    landmarks: npt.NDArray[np.floating],
    settings: DetectionSettings,
    side: int = SIDE,
) -> npt.NDArray[np.uint8]:
    """Cut a face out of pixels (height, width, 3) as the settings say: uint8 (side, side, 3)."""
    if settings.align == "none":
        return loose_crop(pixels, box, settings.margin, side)
    return aligned_crop(pixels, landmarks, side)


@contextmanager
def _one_thread_a_picture() -> Iterator[None]:
    """Let OpenCV compute with one thread for a while: there are as many pictures at once as cores."""
    import cv2

    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)
