"""Finding face crops on disk: one folder per video, one file per frame, as Aff-Wild2 lays them out."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from affcache.errors import InputError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
LARGEST_FRAME_NUMBER = 2**31 - 1  # the store keeps frame numbers as int32
_FRAME_NUMBER = re.compile(r"\d+$", re.ASCII)


@dataclass(frozen=True)
class CropList:
    """Every crop found, in the order in which a store keeps them: by video name, then by frame number.

    The rows of video v are ``video_start[v]:video_start[v + 1]``.
    """

    folders: tuple[Path, ...]  # (V,) where the crops of each video lie
    video_names: tuple[str, ...]  # (V,)
    video_start: npt.NDArray[np.int64]  # (V + 1,)
    frame_number: npt.NDArray[np.int32]  # (N,) the number in the file name
    unusual_names: Mapping[int, str] = field(default_factory=dict)  # row -> file name, where it is not NNNNN.jpg
    ignored_files: int = 0  # files in video folders that are no crops: other suffixes, names without a number
    shadowed_folders: tuple[Path, ...] = ()  # folders of a video that an earlier root already has

    def __len__(self) -> int:
        return len(self.frame_number)

    def path(self, row: int) -> Path:
        """Return the file of one row, 0 <= row < N."""
        video = int(np.searchsorted(self.video_start, row, side="right")) - 1
        name = self.unusual_names.get(row) or f"{self.frame_number[row]:05d}.jpg"
        return self.folders[video] / name


def find_crops(roots: Sequence[Path], on_video: Callable[[int, int], None] | None = None) -> CropList:
    """List the crops below one or several root folders, each ``<root>/<video>/NNNNN.jpg``.

    The frame number is the run of digits that ends the file name's stem; gaps are kept as they are. Hidden entries
    are skipped; other files that are no crops are counted. A video that stands under two roots is taken from the
    first one.

    Args:
        roots: folders that hold one folder per video.
        on_video: called with (videos listed, videos in all) after each video.

    Raises:
        InputError: a root is missing, no crop was found, or two files of a video have the same frame number.
    """
    folders, shadowed = _video_folders(roots)
    kept_folders: list[Path] = []
    numbers: list[npt.NDArray[np.int32]] = []
    unusual_names: dict[int, str] = {}
    ignored = row = 0
    for done, name in enumerate(sorted(folders), start=1):
        files, ignored_here = _frames_of_video(folders[name])
        ignored += ignored_here
        if on_video is not None:
            on_video(done, len(folders))
        if not files:
            continue
        kept_folders.append(folders[name])
        numbers.append(np.fromiter((number for number, _ in files), dtype=np.int32, count=len(files)))
        unusual_names.update({row + i: file for i, (number, file) in enumerate(files) if file != f"{number:05d}.jpg"})
        row += len(files)
    if row == 0:
        raise InputError(_nothing_found(roots))
    return CropList(
        folders=tuple(kept_folders),
        video_names=tuple(folder.name for folder in kept_folders),
        video_start=np.cumsum([0, *(len(n) for n in numbers)], dtype=np.int64),
        frame_number=np.concatenate(numbers),
        unusual_names=unusual_names,
        ignored_files=ignored,
        shadowed_folders=tuple(shadowed),
    )


def _video_folders(roots: Sequence[Path]) -> tuple[dict[str, Path], list[Path]]:
    """Map each video's name to its folder, and list the folders hidden by an earlier root."""
    folders: dict[str, Path] = {}
    shadowed: list[Path] = []
    for root in roots:
        if not root.is_dir():
            raise InputError(
                f"The crops folder {root} does not exist or is not a folder. Expected a folder that holds one folder "
                "of crops per video. Say where it is with --crops DIR, or with crops = [...] in affcache.toml."
            )
        with os.scandir(root) as entries:
            found = sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
        for name in found:
            _require_unicode(root, name)
            if name in folders:
                shadowed.append(root / name)
            else:
                folders[name] = root / name
    return folders, shadowed


def _require_unicode(root: Path, name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"The name of the folder {os.fsencode(name)!r} in {root} is not valid UTF-8, so a store can't keep it. "
            "Expected a name in UTF-8. Rename the folder and its label file, then run the same command again."
        ) from None


def _frames_of_video(folder: Path) -> tuple[list[tuple[int, str]], int]:
    """List (frame number, file name) of one video in frame order, and count the files that are no crops."""
    frames: dict[int, str] = {}
    ignored = 0
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".")]
    for name in names:
        stem, suffix = os.path.splitext(name)
        match = _FRAME_NUMBER.search(stem)
        if suffix.lower() not in IMAGE_SUFFIXES or match is None or int(match.group()) > LARGEST_FRAME_NUMBER:
            ignored += 1
            continue
        number = int(match.group())
        if number in frames:
            first, second = sorted((frames[number], name))
            raise InputError(
                f"Two crops of frame {number} in {folder}: {first} and {second}. Expected one file per frame. "
                "Remove or rename one of them, then run the same command again."
            )
        frames[number] = name
    return sorted(frames.items()), ignored


def _nothing_found(roots: Sequence[Path]) -> str:
    """Say where crops were looked for, and guess what was meant."""
    looked = ", ".join(str(root) for root in roots)
    for root in roots:
        if any(file.suffix.lower() in IMAGE_SUFFIXES for file in root.iterdir()):
            hint = f"{root} itself holds images: pass its parent folder, which holds one folder per video."
            break
        if (root / "cropped_aligned").is_dir():
            hint = f"Did you mean --crops {root / 'cropped_aligned'}?"
            break
    else:
        hint = "Say where the crops are with --crops DIR, or with crops = [...] in affcache.toml."
    return f"No crops found in {looked}. Expected files like <folder>/<video>/00001.jpg. {hint}"
