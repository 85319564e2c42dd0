"""Clips and photos made in tests, with white squares for faces, and a detector that finds those."""

from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from affcache.faces.align import SIDE, TEMPLATE
from affcache.faces.detector import Detector, Face
from affcache.faces.media import Frame, Media, read_frames

Pixels = npt.NDArray[np.uint8]
HEIGHT, WIDTH = 96, 128
BRIGHT = 160  # grey level from which on a pixel belongs to a face
TICKS = 1000  # of a clip's time base, a second
VARIABLE = (0, 40, 90, 300, 310, 1000, 1100, 1500, 1501, 3000)  # ticks of ten frames at no steady rate
NEARLY_LOSSLESS = {"libx264": {"qp": "0", "preset": "ultrafast"}, "mpeg4": {"qscale": "1"}}


def picture(*corners: tuple[int, int], side: int = 32, size: tuple[int, int] = (HEIGHT, WIDTH)) -> Pixels:
    """Return a dark picture (height, width, 3) with a white square at each upper left corner (x, y)."""
    pixels = np.full((*size, 3), 40, np.uint8)
    for x, y in corners:
        pixels[max(y, 0) : y + side, max(x, 0) : x + side] = 235
    return pixels


def moving(frames: int, *, step: int = 2, start: tuple[int, int] = (8, 24)) -> list[Pixels]:
    """Return pictures of one square that moves to the right."""
    return [picture((start[0] + step * index, start[1])) for index in range(frames)]


def noisy(frames: int) -> list[Pixels]:
    """Return pictures that take many bytes, so that damage in the middle of a file hits one."""
    random = np.random.default_rng(0)
    return [pixels // 2 + random.integers(0, 100, pixels.shape, np.uint8) for pixels in moving(frames)]


def write_clip(
    path: Path,
    pictures: Iterable[Pixels],
    times: Sequence[int] | None = None,
    *,
    rate: int = 10,
    codec: str = "libx264",
    turned: tuple[int, bool] | None = None,
    aspect: Fraction | None = None,
    options: dict[str, str] | None = None,
    **of_codec: str,
) -> Path:
    """Write a video.

    Args:
        path: the file, whose ending says the container.
        pictures: its frames, all of one size.
        times: of the frames, in ticks of 1/1000 s; without them they follow at ``rate`` a second.
        rate: frames a second.
        codec: FFmpeg's name.
        turned: degrees against the clock by which it has to be turned to be shown, and whether then mirrored.
        aspect: of a pixel, width to height.
        options: of the container.
        of_codec: options of the codec.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options or {}) as container:
        stream: Any = container.add_stream(codec, rate=rate, options=NEARLY_LOSSLESS.get(codec, {}) | of_codec)
        stream.pix_fmt, stream.height, stream.width = "yuv420p", HEIGHT, WIDTH
        if times is not None:
            stream.codec_context.time_base = stream.time_base = Fraction(1, TICKS)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if turned is not None:
            stream.set_display_rotation(turned[0], hflip=turned[1])
        for index, pixels in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[index], Fraction(1, TICKS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_sound(path: Path, codec: str) -> Path:
    """Write half a second of silence."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8_000), np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts = 16_000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_photo(path: Path, pixels: Pixels, **options: Any) -> Path:
    """Write a photo."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def frames_of(path: Path) -> list[Frame]:
    """Return all frames of a photo or video."""
    return list(read_frames(Media(path, path.stem)))


class Squares:
    """Finds white squares, the largest first, with landmarks where the template has them in their box."""

    def detect(self, pixels: Pixels) -> list[Face]:
        marks, _ = ndimage.label(pixels[:, :, 0] > BRIGHT)
        faces = [_face_in(rows, columns) for rows, columns in ndimage.find_objects(marks)]
        return sorted((face for face in faces if face.box[2:].min() >= 8), key=lambda face: -float(face.box[2]))


def _face_in(rows: slice, columns: slice) -> Face:
    corner = np.array([columns.start, rows.start], np.float32)
    size = np.array([columns.stop, rows.stop], np.float32) - corner
    landmarks = corner - 0.5 + (TEMPLATE + 0.5) / SIDE * size
    return Face(np.concatenate([corner, size]), landmarks.astype(np.float32), 0.9)


def squares(file: Path | None = None) -> Callable[[float, int], Detector]:
    """Take the place of ``detector.yunet``."""
    return lambda confidence, side: Squares()
