"""Lists that name which crops count: s-Aff-Wild2's label file, or any text file with a path on each line."""

from array import array
from pathlib import Path

import numpy as np

from affcache.crops.crop_list import CropList
from affcache.errors import InputError


def keep_listed(crops: CropList, path: Path) -> tuple[CropList, int]:
    """Keep the crops that a list names, by video and frame number.

    A line is a crop's path, ``<video>/00001.jpg``, with or without folders before it; what follows a comma or a tab is
    left alone, and a header ``image,...`` is skipped, so that s-Aff-Wild2's label files serve as they are.

    Returns:
        The crops that are both found and listed, and how many listed ones were not found.

    Raises:
        InputError: the list can't be read, a line names no frame, or no crop that was found is listed.
    """
    frames = _read_list(path)
    kept = np.zeros(len(crops), dtype=bool)
    asked = 0
    index_of = {name: index for index, name in enumerate(crops.video_names)}
    for video, numbers in frames.items():
        wanted = np.unique(np.frombuffer(numbers, dtype=np.int64))
        asked += len(wanted)
        if video in index_of:
            first, last = crops.video_start[index_of[video] : index_of[video] + 2]
            kept[first:last] = np.isin(crops.frame_number[first:last], wanted, assume_unique=True)
    if not kept.any():
        raise InputError(
            f"None of the {asked:,} crops that {path} lists is among the {len(crops):,} found. Expected lines like "
            f"{crops.video_names[0]}/{crops.frame_number[0]:05d}.jpg. Check --crop-list, or --crops."
        )
    return crops.only(kept), asked - int(kept.sum())


def _read_list(path: Path) -> dict[str, "array[int]"]:
    """Return the frame numbers that a list names, by video."""
    frames: dict[str, array[int]] = {}
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                entry = line.partition(",")[0].partition("\t")[0].strip()
                if not entry or (number == 1 and entry == "image"):
                    continue
                *folders, name = entry.replace("\\", "/").split("/")
                stem = name.rpartition(".")[0] or name
                digits = stem[len(stem.rstrip("0123456789")) :]
                if not folders or not digits or len(digits) > 18:
                    raise InputError(
                        f"{path}, line {number}: {entry!r} names no crop. Expected <video>/00001.jpg. Correct the line."
                    )
                frames.setdefault(folders[-1], array("q")).append(int(digits))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"The list of crops {path} can't be read: {getattr(error, 'strerror', None) or error}. Expected a text "
            "file with a crop's path on each line. Check --crop-list."
        ) from None
    return frames
