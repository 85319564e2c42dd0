"""One folder, or one archive's, as it is listed: the crops in it, further folders, and links that lead nowhere."""

import os
import struct
from array import array
from collections.abc import Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from affcache.crops.archives import MEMBER_DTYPE, Archive, Member
from affcache.crops.crop_list import LARGEST_FRAME_NUMBER, IgnoredFiles, format_of, split_name
from affcache.errors import InputError

DEEPEST = 16  # folders below a root
TOO_DEEP = f"that lie more than {DEEPEST} folders deep"
MACOS = "__MACOSX"  # what its packer adds to archives
_MEMBER = struct.Struct("<qqqIB")  # one entry of MEMBER_DTYPE


@dataclass
class FrameFiles:
    """The files of one video as they are met: frame numbers, names in short, and places in an archive."""

    folder: Path
    name: str  # the video's
    archive: Archive | None = None
    format: str = ""
    exceptions: dict[int, str] = field(default_factory=dict)
    numbers: "array[int]" = field(default_factory=lambda: array("i"))
    members: bytearray = field(default_factory=bytearray)
    ignored: IgnoredFiles = field(default_factory=IgnoredFiles)
    unsafe: int = 0
    lost: list[Path] = field(default_factory=list)  # links beside them to what isn't there, or to themselves
    above: bool = False  # nothing but a folder above videos, as long as no crop is met

    def add(self, name: str, member: Member | None = None) -> bool:
        """Take one file; say whether it is a crop, else it isn't taken."""
        parts = split_name(name)
        if parts is None or not parts[2] or (number := int(parts[1])) > LARGEST_FRAME_NUMBER:
            return False
        if not self.format:
            self.format = format_of(*parts)
        if self.format.format(number) != name:
            if number in self.exceptions:
                raise self._twice(number, self.exceptions[number], name)
            self.exceptions[number] = name
        self.numbers.append(number)
        if member is not None:
            self.members += _MEMBER.pack(*member)
        return True

    def in_order(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.void]]:
        """Return frame numbers (n,), rising, and archive members (n,) in that order.

        Raises:
            InputError: two files have the same frame number.
        """
        numbers = np.frombuffer(self.numbers, dtype=np.intc).astype(np.int32)
        order = np.argsort(numbers, kind="stable")
        numbers = numbers[order]
        repeated = np.flatnonzero(np.diff(numbers) == 0)
        if len(repeated):
            number = int(numbers[repeated[0]])
            usual = self.format.format(number)
            raise self._twice(number, usual, self.exceptions.get(number, usual))
        if self.archive is None:
            return numbers, np.empty(0, MEMBER_DTYPE)
        return numbers, np.frombuffer(bytes(self.members), dtype=MEMBER_DTYPE)[order]

    def _twice(self, number: int, one: str, other: str) -> InputError:
        first, second = sorted((one, other))
        return InputError(
            f"Two crops of frame {number} in {self.folder}: {first} and {second}. Expected one file per frame. "
            "Remove or rename one of them, then run the same command again."
        )


class Folder(NamedTuple):
    """A folder to list."""

    path: Path
    name: str  # its path below the root, "" for the root itself
    above: frozenset[tuple[int, int]]  # device and number of the folders that it lies in


class Listed(NamedTuple):
    """What a folder holds."""

    files: FrameFiles
    folders: list[Folder]  # in it, by name
    others: list[str]  # names that are no crops, no folders and no lost links, sorted


def list_folder(folder: Folder) -> Listed:
    """List one folder. No file is looked at that has a crop's name: on a network disk each look takes its time."""
    path, files = folder.path, FrameFiles(folder.path, folder.name)
    try:
        status = path.stat()
        identity = status.st_dev, status.st_ino
        if status.st_ino and identity in folder.above:  # some network disks number nothing
            files.above = True
            files.ignored.add(path.name, "that lead back to a folder above")
            return Listed(files, [], [])
        names = os.listdir(path)  # noqa: PTH208  # a Path for each of millions of names takes minutes
        is_crop = files.add if folder.name else (lambda name: False)  # in the root itself, nothing is
        rest = {name for name in names if not name.startswith(".") and not is_crop(name)}
        inside, others = _told_apart(path, rest, files) if rest else ([], [])
    except OSError as error:
        raise _can_not_list(path, error) from None
    files.above = bool(inside) or not folder.name
    if folder.name:
        for name in others:
            files.ignored.add(name)
    if folder.name.count("/") + 1 == DEEPEST:
        for name in inside:
            files.ignored.add(name, TOO_DEEP)
        inside = []
    below = f"{folder.name}/" if folder.name else ""
    above = folder.above | {identity}
    return Listed(files, [Folder(path / name, below + name, above) for name in inside], others)


def _told_apart(path: Path, names: Set[str], files: FrameFiles) -> tuple[list[str], list[str]]:
    """Return which names in a folder are folders, or links to some, and which aren't; keep links to nothing apart."""
    folders, others = [], []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name not in names or entry.name == MACOS:
                continue
            if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path)):  # noqa: PTH112
                folders.append(entry.name)
            elif entry.is_symlink() and not os.path.exists(entry.path):  # noqa: PTH110
                files.lost.append(path / entry.name)
            else:
                others.append(entry.name)
    files.lost.sort()
    return sorted(folders), sorted(others)


def _can_not_list(folder: Path, error: OSError) -> InputError:
    return InputError(
        f"The folder {folder} can't be listed: {error.strerror}. Expected a folder of crops that may be read. Give "
        "yourself the right to read it, or reconnect its disk, then run the same command again."
    )
