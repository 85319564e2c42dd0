"""Paths of crops, ``<video>/00001.jpg``: the one place that says which frame a name stands for, and names a frame."""

from collections.abc import Mapping
from dataclasses import dataclass, field

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
LARGEST_FRAME_NUMBER = 2**31 - 1  # the store keeps frame numbers as int32
_MOST_DIGITS = 18  # of a number in 64 bits


@dataclass(frozen=True)
class Naming:
    """How the files of one video are called; one format for nearly all keeps three million names small."""

    format: str = "{:05d}.jpg"
    exceptions: Mapping[int, str] = field(default_factory=dict)  # frame number -> file name

    def file_name(self, frame: int) -> str:
        """Return the name of one frame's file."""
        return self.exceptions.get(frame) or self.format.format(frame)


USUAL_NAMING = Naming()


def split_name(name: str) -> tuple[str, str, str] | None:
    """Split a crop's file name into what stands before the frame number, its digits, and the suffix.

    The frame number is the run of ASCII digits that ends the name's stem. Without regular expressions, which would
    take longer: millions of names come by here.

    Returns:
        The three parts, the suffix "" where there is none; None for what has no number, or no suffix of an image.
    """
    stem, dot, ending = name.rpartition(".")
    suffix = dot + ending if dot else ""
    if dot and suffix not in IMAGE_SUFFIXES and suffix.lower() not in IMAGE_SUFFIXES:
        return None
    stem = stem if dot else name
    before = stem.rstrip("0123456789")
    digits = stem[len(before) :]
    return (before, digits, suffix) if 0 < len(digits) <= _MOST_DIGITS else None


def format_of(before: str, digits: str, suffix: str) -> str:
    """Return the format of names such as one that ``split_name`` took apart."""
    before, suffix = (text.replace("{", "{{").replace("}", "}}") for text in (before, suffix))
    padded = digits[0] == "0" or len(digits) >= 5  # 12.jpg may be one of 1.jpg to 99.jpg
    return f"{before}{{:0{len(digits) if padded else 1}d}}{suffix}"


def parse_path(path: str) -> tuple[str, str, int]:
    """Say which frame of which video the path of a crop names: ``crops/video/00001.jpg``, ``video/1.png``, ``video/1``.

    Returns:
        All that stands before the file's name, with "/" between its parts; the last part, the video; the frame number.

    Raises:
        ValueError: says what is wrong with the path, as a part of a sentence.
    """
    folder, _, name = path.replace("\\", "/").rpartition("/")  # lists made on Windows mix both
    video = folder.rpartition("/")[2]
    if video in ("", ".", ".."):
        raise ValueError(f"has the path {path!r}, in which no folder names the video")
    parts = split_name(name)
    if parts is None:
        raise ValueError(f"has the path {path!r}, which doesn't end in a frame number and the suffix of an image")
    return folder, video, int(parts[1])
