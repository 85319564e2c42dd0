"""The frames that a submission is of, in its order: an organisers' template, or videos with their frame counts."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from affcache.crops.crop_list import parse_path
from affcache.crops.names import VideoNames, canonical, plain_path
from affcache.errors import InputError
from affcache.files import read_lines

LOCATION = "image_location"
Frame = tuple[str, str, int]  # where it lies, its video, and its number there
LARGEST_TEMPLATE = 2**27  # bytes
MOST_FRAMES, MOST_DIGITS = 5_000_000, 9  # of a template: two days of video


@dataclass(frozen=True)
class Template:
    """The frames that a submission is of, in its order."""

    locations: list[str]  # as the organisers write them, such as 14-30-1920x1080/00001.jpg
    videos: list[str]  # (n,) canonical, with all folders before it until ``named_as`` knows better
    frame_numbers: npt.NDArray[np.int64]  # (n,)
    columns: tuple[str, ...] = ()  # what its header names after the location, if it has one that does

    def __len__(self) -> int:
        return len(self.locations)

    def named_as(self, names: Sequence[str], path: Path) -> "Template":
        """Return the template with the canonical names of known videos, found as ``VideoNames`` does.

        Raises:
            InputError: a line may be of several videos, or a frame comes twice; ``path`` is its file.
        """
        called = VideoNames(names).match(dict.fromkeys(self.videos), path)
        videos = [canonical(names[called[video]]) if video in called else video for video in self.videos]
        _require_once(path, videos, self.frame_numbers.tolist())
        return replace(self, videos=videos)


def read_template(path: Path) -> Template:
    """Read an organisers' template: the part of each line before its first comma; a header is skipped.

    Raises:
        InputError: the file can't be read, has no frame, a line is none, or a frame comes twice.
    """
    frames, columns = list[Frame](), tuple[str, ...]()
    for position, line in enumerate(_lines(path), start=1):
        location = line.partition(",")[0].strip()
        if position == 1 and (location == LOCATION or "/" not in location):
            columns = tuple(name.strip() for name in line.split(",")[1:] if name.strip())
            continue
        try:
            folder, _, number = parse_path(location)
        except ValueError:
            raise InputError(
                f"{path}, line {position}: {line[:80]!r} names no frame. Expected <video>/<frame number>.jpg before "
                "the first comma, as in the organisers' templates. Correct that line."
            ) from None
        frames.append((location, canonical(plain_path(folder)), number))
    return _template(path, frames, columns)


def read_frame_counts(path: Path) -> Template:
    """Read a list of videos with their frame counts, ``video,count`` a line, as a template of all their frames.

    Raises:
        InputError: the file can't be read, has no video, or a line isn't of that form.
    """
    frames = list[Frame]()
    for position, line in enumerate(_lines(path), start=1):
        video, _, count = (part.strip() for part in line.replace("\t", ",").rpartition(","))
        if not video or "," in video or not (count.isascii() and count.isdigit()):
            if position == 1 and video and not any(letter.isdigit() for letter in count):
                continue  # a header
            raise InputError(
                f"{path}, line {position}: {line[:80]!r} is no video with its frame count. Expected video,count. "
                "Correct that line."
            )
        if len(count) > MOST_DIGITS or (every := range(1, int(count) + 1)).stop + len(frames) > MOST_FRAMES:
            raise InputError(
                f"{path}, line {position}: {line[:80]!r} makes more than {MOST_FRAMES:,} frames. Expected the "
                "number of frames that the video has. Correct that line."
            )
        frames += [(f"{video}/{number:05d}.jpg", canonical(video), number) for number in every]
    return _template(path, frames)


def _lines(path: Path) -> list[str]:
    try:
        lines = list(read_lines(path, LARGEST_TEMPLATE))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} can't be read: {reason}. Expected a text file, a frame or a video a line.") from None
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def _template(path: Path, frames: Sequence[Frame], columns: tuple[str, ...] = ()) -> Template:
    if not frames:
        raise InputError(f"{path} names no frame. Expected a line for each, such as 14-30-1920x1080/00001.jpg,")
    locations, videos, numbers = map(list, zip(*frames, strict=True))
    _require_once(path, videos, numbers)
    return Template(locations, videos, np.array(numbers, dtype=np.int64), columns)


def _require_once(path: Path, videos: Sequence[str], numbers: Sequence[int]) -> None:
    (video, number), times = Counter(zip(videos, numbers, strict=True)).most_common(1)[0]
    if times > 1:
        raise InputError(
            f"{path} names frame {number} of {video} twice. Expected every frame once. Remove the second line."
        )
