"""Photos and videos: which ones are meant, and their frames, upright, with the container's own times."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from affcache.crops.archives import UnreadableCropError
from affcache.crops.crop_list import IMAGE_SUFFIXES
from affcache.crops.images import decode_crop
from affcache.errors import ConfigError, InputError, first_line
from affcache.files import open_regular, read_bytes

if TYPE_CHECKING:
    import av

VIDEO_SUFFIXES = frozenset(
    {
        ".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts",
        ".vob", ".webm", ".wmv",
    }
)  # fmt: skip
LARGEST_PHOTO = 2**28  # bytes
PHOTO_SIDE = 16_384  # pixels, of videos too; cameras of 200 megapixels stay below
EXTRA = "pip install 'affcache[video]'"
MOST_NAMED = 3  # in a message


class DamagedMediaError(InputError):
    """One photo or video can't be read; others may be."""


@dataclass(frozen=True)
class Media:
    """One photo or video."""

    path: Path
    name: str  # of the folder that its crops go to

    @property
    def is_photo(self) -> bool:
        """Whether it is a photo, of one frame without a time."""
        return self.path.suffix.lower() in IMAGE_SUFFIXES


@dataclass(frozen=True)
class Frame:
    """One frame as it is shown."""

    number: int  # from 1, in the order in which they are shown
    timestamp: float  # seconds, as the container has it; nan for a photo
    pixels: npt.NDArray[np.uint8]  # (height, width, 3) RGB, upright
    damaged: bool = False  # the decoder made up a part of it


@dataclass
class FrameCount:
    """How many frames a video has, as far as its container says; 0 where it doesn't."""

    frames: int = 0


def require_video_extra(media: Sequence[Media] = ()) -> None:
    """Refuse to go on without the packages that decode videos and detect faces.

    Args:
        media: what is asked for; photos alone need nothing to decode videos.

    Raises:
        ConfigError: one isn't installed.
    """
    for package in ("cv2",) if media and all(one.is_photo for one in media) else ("av", "cv2"):
        try:
            __import__(package)
        except ImportError as error:
            raise ConfigError(
                f"Photos and videos need the packages av and opencv-python-headless, and {package} can't be imported "
                f"({first_line(error)}). Expected the extra 'video'. Install it with {EXTRA}."
            ) from None


def find_media(inputs: Sequence[Path], out: Path | None = None) -> tuple[list[Media], Counter[str]]:
    """List the photos and videos that paths name: files, or folders, in which they may lie at any depth.

    A name is that of the file without its suffix, after those of the folders below the one that was given; where two
    would have the same, the suffix is a part of it.

    Args:
        inputs: files and folders.
        out: a folder of crops, which are no photos where it lies in one of these.

    Returns:
        The media in the order given, those of a folder by name; and how many other files folders hold, by suffix.

    Raises:
        InputError: a path isn't there, no photo or video was found, or two have the same name.
    """
    found: list[tuple[Path, str]] = []
    others: Counter[str] = Counter()
    for given in inputs:
        if not given.exists():
            raise InputError(f"{given} does not exist. Expected a photo, a video, or a folder of them. Check the path.")
        if not given.is_dir():
            found.append((given, given.stem.lstrip(".") or given.name.lstrip(".")))
            continue
        own = out.resolve() if out is not None and given.resolve() in out.resolve().parents else None
        for path in sorted(given.rglob("*")):
            within = path.relative_to(given)
            if any(part.startswith(".") for part in within.parts) or path.is_dir():
                continue
            if own is not None and own in path.resolve().parents:
                continue
            if path.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
                found.append((path, "-".join(within.with_suffix("").parts)))
            else:
                others[path.suffix.lower() or path.name] += 1
    found = list({path.resolve(): (path, name) for path, name in reversed(found)}.values())[::-1]  # each file once
    if not found:
        rest = f" It holds {others.total():,} other files: {', '.join(sorted(others)[:MOST_NAMED])}." if others else ""
        raise InputError(
            f"There is no photo or video in {', '.join(map(str, inputs))}.{rest} Expected files that end in "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}, or in {', '.join(sorted(VIDEO_SUFFIXES))}. A file with another "
            "ending can be named itself."
        )
    return _named(found), others


def _named(found: Sequence[tuple[Path, str]]) -> list[Media]:
    """Give each file a name of its own, whatever a disk makes of capitals."""
    twice = Counter(name.casefold() for _, name in found)
    media = [Media(path, f"{name}-{path.suffix[1:]}" if twice[name.casefold()] > 1 else name) for path, name in found]
    of_name: dict[str, Path] = {}
    for one in media:
        other = of_name.setdefault(one.name.casefold(), one.path)
        if other != one.path:
            raise InputError(
                f"{other} and {one.path} would both be called {one.name}. Expected inputs of different names. Rename "
                "one of them, or name the folder above both."
            )
    return media


def read_frames(media: Media, count: FrameCount | None = None) -> Iterator[Frame]:
    """Yield all frames of a photo or video, in the order in which they are shown.

    Args:
        media: which one.
        count: is told how many frames there are, before the first comes.

    Raises:
        DamagedMediaError: it can't be read to its end; the frames before that were sound.
    """
    try:
        str(media.path).encode()
    except UnicodeEncodeError:
        raise DamagedMediaError(
            f"The name of {os.fsencode(media.path)!r} is not valid UTF-8, so a table can't keep it. Expected a name in "
            "UTF-8. Rename it."
        ) from None
    if media.is_photo:
        if count:
            count.frames = 1
        yield Frame(1, float("nan"), read_photo(media.path))
        return
    yield from _read_video(media.path, count or FrameCount())


def read_photo(path: Path) -> npt.NDArray[np.uint8]:
    """Return a photo's pixels, uint8 (height, width, 3), turned as its EXIF orientation says.

    Raises:
        DamagedMediaError: it can't be read.
    """
    try:
        return decode_crop(read_bytes(path, LARGEST_PHOTO), largest=PHOTO_SIDE).pixels
    except (OSError, UnreadableCropError) as error:
        reason = str(getattr(error, "strerror", None) or error).rstrip(".")
        raise DamagedMediaError(f"{path} can't be read: {reason}. Expected a photo.") from None


def _read_video(path: Path, count: FrameCount) -> Iterator[Frame]:
    import av

    try:
        # no protocol: a playlist in a video's clothes can't name other files, or hosts
        options = {"protocol_whitelist": "none"}
        with open_regular(path) as file, av.open(file, "r", metadata_errors="ignore", options=options) as container:
            stream = _video_stream(container, path)
            count.frames = stream.frames
            number = 0
            for frame in _decoded(container, stream, path):
                number += 1
                pixels = _upright(frame, stream, path)
                yield Frame(number, _seconds(frame, number, stream), pixels, bool(frame.is_corrupt))
    except (OSError, ValueError, av.FFmpegError) as error:  # FFmpeg's are of many kinds
        reason = getattr(error, "strerror", None) or first_line(error)
        raise DamagedMediaError(
            f"{path} can't be read: {reason}. Expected a photo, or a video that FFmpeg decodes."
        ) from None
    if not number:
        raise DamagedMediaError(f"{path} has no frame. Expected a video with at least one.")


def _video_stream(container: "av.container.InputContainer", path: Path) -> "av.VideoStream":
    """Return the stream of moving pictures; the cover of an album is none."""
    for stream in container.streams.video:
        if not stream.disposition & type(stream.disposition).attached_pic:
            if stream.codec_context is None:  # PyAV before 18.1 would end the process
                raise DamagedMediaError(
                    f"{path} can't be read: FFmpeg has no decoder for its pictures. Expected a photo, or a video that "
                    "FFmpeg decodes. Convert it."
                )
            stream.thread_type = "AUTO"
            return stream
    kinds = ", ".join(sorted({"a picture" if s.type == "video" else s.type for s in container.streams}))
    raise DamagedMediaError(f"{path} holds no video{f' (only {kinds})' if kinds else ''}. Expected a photo or a video.")


def _decoded(
    container: "av.container.InputContainer", stream: "av.VideoStream", path: Path
) -> Iterator["av.VideoFrame"]:
    """Yield a stream's frames; raises DamagedMediaError where a part is missing, which would shift all that follow."""
    import av

    last, packets, first, end = 0.0, 0, 0, 0
    try:
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise ValueError("it is cut short")
            packets += packet.size > 0
            if (ticks := packet.dts if packet.pts is None else packet.pts) is not None:
                first = ticks if packets == 1 else min(first, ticks)
                end = max(end, ticks + (packet.duration or 0))
            for frame in packet.decode():
                yield frame
                last = float(frame.time or 0)
        if packets < stream.frames and _ends_early(stream, packets, end - first):
            raise ValueError(f"it is cut short: {packets:,} of {stream.frames:,} frames are there")
    except (OSError, ValueError, av.FFmpegError) as error:
        until = int(last * 100) / 100
        before = f"; what comes before can be had with --to {until:g}" if until > 0 else ""
        raise DamagedMediaError(
            f"{path} can't be read beyond {last:.2f} s: {getattr(error, 'strerror', None) or error}. Expected a whole "
            f"video. Mend or convert it{before}."
        ) from None


def _ends_early(stream: "av.VideoStream", packets: int, ticks: int) -> bool:
    """Say whether a stream of fewer packets than its container promises lacks a part at its end.

    It doesn't where a phone has trimmed it, which leaves frames in the file that aren't shown, or in an AVI file, which
    counts frames that were dropped: there the time is all there.
    """
    return not packets or stream.duration is None or stream.duration - ticks > 0.9 * ticks / packets


def _seconds(frame: Any, number: int, stream: "av.VideoStream") -> float:
    """Return when a frame is shown; from the frame rate where the container gives frames no times."""
    if frame.time is not None:
        return float(frame.time)
    rate = stream.average_rate or stream.base_rate or Fraction(25)
    return float((number - 1) / rate)


def _upright(frame: "av.VideoFrame", stream: "av.VideoStream", path: Path) -> npt.NDArray[np.uint8]:
    """Return a frame's pixels as they are meant to be shown: square, and turned as the container says."""
    aspect = float(stream.sample_aspect_ratio or 1)
    width = max(round(frame.width * aspect), 1) if aspect > 0 else frame.width
    if max(width, frame.height) > PHOTO_SIDE:
        raise DamagedMediaError(
            f"{path} has frames of {width}x{frame.height} pixels. Expected at most {PHOTO_SIDE} on a side."
        )
    pixels = np.asarray(frame.to_ndarray(format="rgb24", width=width, height=frame.height), np.uint8)
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    # a column (x, y) of the stored picture is shown at (a x + c y, b x + d y), by right angles
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    if abs(b) > abs(a):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])
