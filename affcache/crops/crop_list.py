"""The list of crops that a store is made of: which video, which frame by its path, and where its bytes lie."""

import os
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from affcache.crops.archives import LARGEST_FILE, Archive, Member
from affcache.crops.names import VideoNames, canonical
from affcache.errors import InputError
from affcache.files import read_bytes, read_lines

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
LARGEST_FRAME_NUMBER = 2**31 - 1  # the store keeps frame numbers as int32
MOST_KINDS = 5  # of ignored files are said
LARGEST_LIST = 2**30  # bytes; three million crops take a tenth of it
_MOST_DIGITS = 18  # of a number in 64 bits
ArchivedFrames = tuple[Archive, npt.NDArray[Any]]  # of one video; (its frames,) of MEMBER_DTYPE, in frame order


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


@dataclass
class IgnoredFiles:
    """Files that are no crops, counted by what their names lack, with an example of each."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, why: str = "") -> None:
        """Take a file that ``split_name`` refused, or whose number is too large, or that is ignored for a reason."""
        stem, dot, ending = name.rpartition(".")
        if not dot or f".{ending.lower()}" not in IMAGE_SUFFIXES:
            lacks = f"with the suffix .{ending.lower()}" if dot else "without a suffix"
        elif stem.rstrip("0123456789") == stem:
            lacks = "without digits at the end of the name"
        else:
            lacks = f"with a number above {LARGEST_FRAME_NUMBER:,}"
        self.counts[why or lacks] += 1
        self.examples.setdefault(why or lacks, name)

    def take(self, other: "IgnoredFiles") -> None:
        """Add others."""
        self.counts.update(other.counts)
        self.examples = {**other.examples, **self.examples}

    def __len__(self) -> int:
        return self.counts.total()

    def __str__(self) -> str:
        kinds = self.counts.most_common(MOST_KINDS)
        words = [f"{count:,} {why} ({self.examples[why]})" for why, count in kinds]
        return "; ".join(words) + "; ..." * (len(self.counts) > MOST_KINDS)


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
    if (frame := int(parts[1])) > LARGEST_FRAME_NUMBER:
        raise ValueError(f"has the frame number {frame}, outside 0 to {LARGEST_FRAME_NUMBER}")
    return folder, video, frame


@dataclass(frozen=True)
class CropList:
    """Every crop found, in the order in which a store keeps them: by video name, then by frame number.

    The rows of video v are ``video_start[v]:video_start[v + 1]``.
    """

    folders: tuple[Path, ...]  # (V,) where the crops of each video lie; below the archive's path for archived ones
    video_names: tuple[str, ...]  # (V,)
    video_start: npt.NDArray[np.int64]  # (V + 1,)
    frame_number: npt.NDArray[np.int32]  # (N,) the number in the file name
    namings: Mapping[int, Naming] = field(default_factory=dict)  # video -> naming, where it is not NNNNN.jpg
    archived: Mapping[int, ArchivedFrames] = field(default_factory=dict)  # video -> its place in an archive
    ignored_files: IgnoredFiles = field(default_factory=IgnoredFiles)  # other suffixes, names without a number
    unsafe_members: int = 0  # of archives: links, and names that lead out; never followed
    shadowed_folders: tuple[Path, ...] = ()  # folders of a video that an earlier root already has
    lost_links: tuple[Path, ...] = ()  # links beside the videos that lead nowhere

    def __len__(self) -> int:
        return len(self.frame_number)

    def video(self, row: int) -> int:
        """Return the index of the video that a row belongs to."""
        return int(np.searchsorted(self.video_start, row, side="right")) - 1

    def path(self, row: int) -> Path:
        """Return the file of one row, 0 <= row < N; for an archived one, the archive's path and the name in it."""
        return self.folders[self.video(row)] / self._file_name(row, self.video(row))

    def read(self, row: int) -> bytes:
        """Read the file of one row. Safe to call from several threads.

        Raises:
            OSError: the file can't be read, is no file, or is larger than any crop.
            UnreadableCropError: the archive's member is damaged.
        """
        video = self.video(row)
        if video in self.archived:
            archive, members = self.archived[video]
            return archive.read(Member(*members[row - int(self.video_start[video])].tolist()))
        path = os.path.join(self.folders[video], self._file_name(row, video))  # noqa: PTH118  # a Path takes as long
        return read_bytes(path, LARGEST_FILE)

    def _file_name(self, row: int, video: int) -> str:
        return self.namings.get(video, USUAL_NAMING).file_name(int(self.frame_number[row]))

    def container(self, row: int) -> Path:
        """Return what must be there for the crops of a row's video to be read: its folder, or the archive."""
        video = self.video(row)
        return self.archived[video][0].path if video in self.archived else self.folders[video]

    def absolute(self) -> "CropList":
        """Return the list with paths that hold in any working folder, for other processes."""
        return replace(self, folders=tuple(folder.absolute() for folder in self.folders))

    def as_in(self, names: Sequence[str]) -> "CropList":
        """Return the list with the videos' names and order in a store; as it is where they aren't the same, one by one.

        A store may have other names than are found now: of an archive, it had the last folders once.
        """
        if set(map(canonical, names)) == set(map(canonical, self.video_names)):
            return self
        try:
            known = VideoNames(names).match(self.video_names, Path())
        except InputError:
            return self
        video_at = {known[name]: video for video, name in enumerate(self.video_names) if name in known}
        if not len(video_at) == len(names) == len(self.video_names):
            return self
        order = [video_at[index] for index in range(len(names))]
        rows = np.split(self.frame_number, self.video_start[1:-1])
        return replace(
            self,
            folders=tuple(self.folders[video] for video in order),
            video_names=tuple(names),
            video_start=np.cumsum([0, *(len(rows[video]) for video in order)], dtype=np.int64),
            frame_number=np.concatenate([rows[video] for video in order]),
            namings={known[self.video_names[video]]: naming for video, naming in self.namings.items()},
            archived={known[self.video_names[video]]: place for video, place in self.archived.items()},
        )

    def only(self, kept: npt.NDArray[np.bool_]) -> "CropList":
        """Return the list of the rows where ``kept``, bool (N,), is true; videos without a row are dropped."""
        counts = np.add.reduceat(kept, self.video_start[:-1], dtype=np.int64)
        videos = np.flatnonzero(counts)
        new_index = {int(video): index for index, video in enumerate(videos)}
        kept_of = np.split(kept, self.video_start[1:-1])  # by video
        return replace(
            self,
            folders=tuple(self.folders[v] for v in videos),
            video_names=tuple(self.video_names[v] for v in videos),
            video_start=np.cumsum([0, *counts[videos]], dtype=np.int64),
            frame_number=self.frame_number[kept],
            namings={new_index[v]: naming for v, naming in self.namings.items() if v in new_index},
            archived={
                new_index[v]: (archive, members[kept_of[v]])
                for v, (archive, members) in self.archived.items()
                if v in new_index
            },
        )


def keep_listed(crops: CropList, path: Path) -> tuple[CropList, int]:
    """Keep the crops that a list names, by video and frame number.

    A line is a crop's path, ``<video>/00001.jpg``, whose video is found as ``VideoNames`` does, with or without folders
    before it; what follows a comma or a tab is left alone, and a header ``image,...`` is skipped, so that s-Aff-Wild2's
    label files serve as they are.

    Returns:
        The crops that are both found and listed, and how many listed ones were not found.

    Raises:
        InputError: the list can't be read, a line names no frame, or one of several videos, or no crop that was found
            is listed.
    """
    listed = _read_frame_list(path)
    index_of = VideoNames(crops.video_names).match(listed, path)
    frames: dict[int | str, array[int]] = {}  # by video, or by the name of one that wasn't found
    for name, numbers in listed.items():
        frames.setdefault(index_of.get(name, name), array("q")).extend(numbers)
    kept = np.zeros(len(crops), dtype=bool)
    asked = 0
    for video, numbers in frames.items():
        wanted = np.unique(np.frombuffer(numbers, dtype=np.int64))
        asked += len(wanted)
        if isinstance(video, int):
            first, last = crops.video_start[video : video + 2]
            kept[first:last] = np.isin(crops.frame_number[first:last], wanted, assume_unique=True)
    if not kept.any():
        raise InputError(
            f"None of the {asked:,} crops that {path} lists is among the {len(crops):,} found. Expected lines like "
            f"{crops.video_names[0]}/{crops.frame_number[0]:05d}.jpg. Check --crop-list, or --crops."
        )
    return crops.only(kept), asked - int(kept.sum())


def keep_each(crops: CropList, every: int) -> CropList:
    """Keep the frames 1, 1 + K, 1 + 2 K, ... of each video.

    By their numbers, not by their places: stores of other crops of the same videos then have the same frames.

    Raises:
        InputError: no crop has such a number.
    """
    kept = (crops.frame_number - 1) % every == 0
    if not kept.any():
        raise InputError(
            f"None of the {len(crops):,} crops is of a frame 1, {1 + every}, {1 + 2 * every}, ... Expected frame "
            "numbers that count the frames of a video. Leave out --every."
        )
    return crops.only(kept)


def _read_frame_list(path: Path) -> dict[str, "array[int]"]:
    """Return the frame numbers that a list names, by the folders that its lines have before the file's name."""
    frames: dict[str, array[int]] = {}
    try:
        for number, line in enumerate(read_lines(path, LARGEST_LIST), start=1):
            entry = line.partition(",")[0].partition("\t")[0].strip()
            if not entry or (number == 1 and entry == "image"):
                continue
            try:
                video, _, frame = parse_path(entry)
            except ValueError:
                raise InputError(
                    f"{path}, line {number}: {entry[:80]!r} names no crop. Expected <video>/00001.jpg. Correct the "
                    "line."
                ) from None
            frames.setdefault(video, array("q")).append(frame)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"The list of crops {path} can't be read: {getattr(error, 'strerror', None) or error}. Expected a text "
            "file with a crop's path on each line. Check --crop-list."
        ) from None
    return frames
