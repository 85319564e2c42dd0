"""Boxes, ids and the leading outputs drawn into a video or a photo, to check by eye."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from affcache.errors import ConfigError, InputError, first_line
from affcache.faces.media import Frame, Media, read_frames
from affcache.faces.table import BOX
from affcache.files import beside, cannot_write, discard_partials
from affcache.prediction.outputs import TaskHeads

COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (213, 94, 0), (204, 121, 167))  # Okabe, Ito
CODECS = ("libx264", "h264", "mpeg4")  # the first that this FFmpeg has
TICKS = Fraction(1, 90_000)  # seconds; frames keep their own times
MOST_UNITS = 4  # that are named on a face


def overlay_path(asked: Path, media: Media, *, alone: bool) -> Path:
    """Return where an input's overlay goes: the path that was asked for, or below it where there are several.

    Raises:
        ConfigError: the name asked for is of another kind.
    """
    suffix = asked.suffix.lower()
    if not suffix:
        return asked / f"{media.name}{'.jpg' if media.is_photo else '.mp4'}"
    if not alone or media.is_photo == (suffix == ".mp4"):
        expected = "a picture's name" if media.is_photo else "FILE.mp4"
        raise ConfigError(
            f"--overlay is {asked}; expected {expected if alone else 'a folder, as there are several inputs'}."
        )
    return asked


def draw_overlay(path: Path, media: Media, table: pa.Table, heads: Sequence[TaskHeads], naming: str) -> None:
    """Write an input again with what was predicted drawn in: those of its frames that the table has.

    Args:
        path: .mp4 for a video, or a picture's name for a photo.
        media: the photo or video.
        table: its rows.
        heads: of all tasks.
        naming: of the columns.

    Raises:
        InputError: it can't be written, or the input can't be read any more.
    """
    notes: dict[int, list[tuple[npt.NDArray[np.float64], int, str]]] = defaultdict(list)
    for row in table.to_pylist():
        notes[row["frame"]]  # a frame without a face is shown too
        if row["success"]:
            box = np.array([row[name] for name in BOX])
            notes[row["frame"]].append((box, row["face_id"], words_of(row, heads, naming)))
    discard_partials(path)
    try:
        with beside(path) as partial:
            # beside's name has no suffix that PyAV and Pillow would know
            if media.is_photo:
                (frame,) = read_frames(media)
                kind = "PNG" if path.suffix.lower() == ".png" else "JPEG"
                Image.fromarray(_drawn(frame, notes[1])).save(partial, kind)
            else:
                _write_video(partial, media, notes)
    except OSError as error:
        raise cannot_write(path, error) from None


def words_of(row: dict[str, Any], heads: Sequence[TaskHeads], naming: str) -> str:
    """Return the leading outputs of a row of the table, in few words."""
    words = []
    for one in heads:
        names = [name for name, _ in one.columns(naming)]
        said = {output: row[name] for output, name in zip(one.task.classes, names, strict=False)}
        if any(value is None for value in said.values()):
            continue
        if one.task.exclusive:
            decided = row[names[-1]]
            words.append(f"{decided} {said[decided]:.0%}")
        elif one.task.has_classes:
            present = [out for out, name in zip(one.task.classes, names[len(said) :], strict=True) if row[name]]
            leading = sorted(present, key=lambda output: -said[output])[:MOST_UNITS]
            words.append(" ".join(leading) or f"no {one.task.name}")
        else:
            words.append(" ".join(f"{output[:7]} {value:+.2f}" for output, value in said.items()))
    return " | ".join(words)


def _drawn(frame: Frame, notes: Sequence[tuple[npt.NDArray[np.float64], int, str]]) -> npt.NDArray[np.uint8]:
    """Return a frame (height, width, 3) with boxes, and words in plates above or below them."""
    import cv2

    pixels = np.ascontiguousarray(frame.pixels).copy()
    height, width = pixels.shape[:2]
    scale = max(min(height, width) / 600, 0.7)
    thick = max(round(2 * scale), 1)
    for box, person, words in notes:
        colour = COLOURS[(person - 1) % len(COLOURS)]
        x, y, right, bottom = np.rint([box[0], box[1], box[0] + box[2], box[1] + box[3]]).astype(int).tolist()
        cv2.rectangle(pixels, (x, y), (right, bottom), colour, thick)
        text = f"{person}: {words}".encode("ascii", "replace").decode()  # OpenCV's font has no more
        (wide, high), below = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.6 * scale, thick)
        high += below + 4
        left = int(np.clip(x, 0, max(width - wide, 0)))
        top = y - high if y >= high else min(bottom, height - high)
        cv2.rectangle(pixels, (left, top), (left + wide, top + high), colour, -1)
        place = (left, top + high - below - 1)
        cv2.putText(
            pixels, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.6 * scale, (0, 0, 0), max(thick // 2, 1), cv2.LINE_AA
        )
    return pixels


def _until(media: Media, last: int) -> Iterator[Frame]:
    """Yield a video's frames up to a number; what comes after may be damaged."""
    for frame in read_frames(media):
        yield frame
        if frame.number >= last:
            return


def _write_video(path: Path, media: Media, notes: dict[int, Any]) -> None:
    import av

    codec = next((name for name in CODECS if name in av.codecs_available), CODECS[-1])
    try:
        with av.open(str(path), "w", format="mp4") as container:
            stream: Any = None
            last = -1
            for frame in _until(media, max(notes, default=0)):
                if frame.number not in notes:
                    continue
                pixels = _drawn(frame, notes[frame.number])
                odd = [(0, size % 2) for size in pixels.shape[:2]]
                pixels = np.pad(pixels, (*odd, (0, 0)), mode="edge")  # colours come in pairs of pixels
                if stream is None:
                    stream = container.add_stream(codec, rate=Fraction(30))
                    stream.height, stream.width = pixels.shape[:2]
                    stream.pix_fmt, stream.time_base = "yuv420p", TICKS
                    stream.codec_context.time_base = TICKS
                shown = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                last = max(round(Fraction(frame.timestamp) / TICKS), last + 1)
                shown.pts, shown.time_base = last, TICKS
                container.mux(stream.encode(shown))
            container.mux(stream.encode())
    except (av.FFmpegError, ValueError) as error:
        raise InputError(
            f"The overlay of {media.path} can't be written ({first_line(error)}). Expected room, and a video that "
            "FFmpeg's MP4 takes. Free some, or leave --overlay out."
        ) from None
