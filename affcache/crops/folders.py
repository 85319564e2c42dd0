"""Finding face crops: one folder per video, one file per frame, as Aff-Wild2 lays them out, on disk or in archives."""

import errno
import os
import struct
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from affcache.crops.archives import MEMBER_DTYPE, Archive, Member, TarArchive, refuse_compressed
from affcache.crops.crop_list import (
    IMAGE_SUFFIXES,
    LARGEST_FRAME_NUMBER,
    USUAL_NAMING,
    CropList,
    IgnoredFiles,
    Naming,
    canonical,
    format_of,
    split_name,
)
from affcache.crops.zip_archive import ZipArchive
from affcache.errors import InputError

# by the suffix of its name, what opens a file of crops; a further kind is a subclass of Archive and a line here
SOURCES: Mapping[str, Callable[[Path], Archive]] = {".zip": ZipArchive, ".tar": TarArchive}
OTHER_ARCHIVES = frozenset({".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"})
MOST_LOOKED_AT = 10_000  # files, to guess what was meant
LISTING_THREADS = 8  # hide a network file system's latency
_MEMBER = struct.Struct("<qqqIB")  # one entry of MEMBER_DTYPE
# the machine's fault, or the network's, whatever file they are met at
NEVER_THE_CROP = frozenset(
    {
        errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.ECONNRESET,
        errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EHOSTDOWN,
    }
)  # fmt: skip

OnListed = Callable[[int, int, str], None]  # (done, total, unit)


@dataclass
class FrameFiles:
    """The files of one video as they are met: frame numbers, names in short, and places in an archive."""

    folder: Path
    archive: Archive | None = None
    format: str = ""
    exceptions: dict[int, str] = field(default_factory=dict)
    numbers: "array[int]" = field(default_factory=lambda: array("i"))
    members: bytearray = field(default_factory=bytearray)
    ignored: IgnoredFiles = field(default_factory=IgnoredFiles)
    unsafe: int = 0
    leads_nowhere: bool = False  # a link to what isn't there, or to itself

    def add(self, name: str, member: Member | None = None) -> None:
        """Take one file, or count it as ignored when it is no crop."""
        parts = split_name(name)
        if parts is None or not parts[2] or (number := int(parts[1])) > LARGEST_FRAME_NUMBER:
            self.ignored.add(name)
            return
        if not self.format:
            self.format = format_of(*parts)
        if self.format.format(number) != name:
            if number in self.exceptions:
                raise self._twice(number, self.exceptions[number], name)
            self.exceptions[number] = name
        self.numbers.append(number)
        if member is not None:
            self.members += _MEMBER.pack(*member)

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


def find_crops(roots: Sequence[Path], on_listed: OnListed | None = None) -> CropList:
    """List the crops below one or several roots, each ``<root>/<video>/NNNNN.jpg``.

    A root is a folder, or a .zip or .tar archive that holds such folders (or one video's crops at its top; its own
    name is then the video's). Archives that lie in a root folder are read as roots too. The frame number is the run of
    digits that ends the file name's stem; gaps are kept as they are. Hidden entries are skipped; other files that are
    no crops are counted. A video that stands under two roots is taken from the first one.

    Args:
        roots: folders that hold one folder per video, and archives.
        on_listed: called with (done, in all, unit) on the way, where the unit is "video" or "archived MB".

    Raises:
        InputError: a root is missing, no crop was found, two files of a video have the same frame number, or an
            archive is damaged.
    """
    videos: dict[str, FrameFiles] = {}
    seen: set[str] = set()
    shadowed: list[Path] = []
    lost: list[Path] = []
    ignored, unsafe = IgnoredFiles(), 0
    for root in roots:
        for files in _videos_of(root, on_listed or (lambda done, total, unit: None)):
            ignored.take(files.ignored)
            unsafe += files.unsafe
            name = files.folder.name
            if files.leads_nowhere:
                lost.append(files.folder)
                continue
            if files.archive and files.folder == files.archive.path:  # crops at the top of an archive
                name = files.folder.stem
            if files.archive and not files.numbers:  # a folder above the videos
                continue
            _require_unicode(files.folder.parent, name)
            if canonical(name) in seen:
                shadowed.append(files.folder)
            elif files.numbers:
                videos[name] = files
            seen.add(canonical(name))
    if not videos:
        raise InputError(_nothing_found(roots, ignored, lost))
    names = sorted(videos)
    found = [videos[name] for name in names]
    frames = [files.in_order() for files in found]
    namings = [Naming(files.format, files.exceptions) for files in found]
    return CropList(
        folders=tuple(files.folder for files in found),
        video_names=tuple(names),
        video_start=np.cumsum([0, *(len(numbers) for numbers, _ in frames)], dtype=np.int64),
        frame_number=np.concatenate([numbers for numbers, _ in frames]),
        namings={index: naming for index, naming in enumerate(namings) if naming != USUAL_NAMING},
        archived={v: (f.archive, frames[v][1]) for v, f in enumerate(found) if f.archive is not None},
        ignored_files=ignored,
        unsafe_members=unsafe,
        shadowed_folders=tuple(shadowed),
        lost_links=tuple(lost),
    )


def _videos_of(root: Path, on_listed: OnListed) -> Iterator[FrameFiles]:
    """Yield the videos of one root: those of a folder by name, then those of archives."""
    if is_archive(root):
        yield from _videos_of_archive(root, on_listed)
        return
    if root.is_file() and root.suffix.lower() in OTHER_ARCHIVES:
        open_archive(root)  # says why it can't be read in place
    if not root.is_dir():
        what = "is a file" if root.is_file() else "does not exist or is not a folder"
        raise InputError(
            f"The crops folder {root} {what}. Expected a folder that holds one folder "
            "of crops per video, or a .zip or .tar archive of one. Say where it is with --crops DIR, or with "
            "crops = [...] in affcache.toml."
        )
    try:
        visible = sorted((name, (root / name).is_dir()) for name in os.listdir(root) if not name.startswith("."))  # noqa: PTH208  # as below
    except OSError as error:
        raise _can_not_list(root, error) from None
    folders = [root / name for name, is_folder in visible if is_folder]
    with ThreadPoolExecutor(LISTING_THREADS, thread_name_prefix="list") as pool:
        for done, files in enumerate(pool.map(_video_of_folder, folders), start=1):
            on_listed(done, len(folders), "video")
            yield files
    for name, is_folder in visible:
        if not is_folder and not (root / name).exists():
            yield FrameFiles(root / name, leads_nowhere=True)
        elif not is_folder and is_archive(root / name):
            yield from _videos_of_archive(root / name, on_listed)


def _video_of_folder(folder: Path) -> FrameFiles:
    files = FrameFiles(folder)
    try:
        names = os.listdir(folder)  # noqa: PTH208  # a Path for each of millions of names takes minutes
    except OSError as error:
        raise _can_not_list(folder, error) from None
    for name in names:
        if not name.startswith("."):
            files.add(name)
    return files


def _can_not_list(folder: Path, error: OSError) -> InputError:
    return InputError(
        f"The folder {folder} can't be listed: {error.strerror}. Expected a folder of crops that may be read. Give "
        "yourself the right to read it, or reconnect its disk, then run the same command again."
    )


def _videos_of_archive(path: Path, on_listed: OnListed) -> list[FrameFiles]:
    archive = open_archive(path)
    folders: dict[str, FrameFiles] = {}
    entries = archive.entries(lambda done, total: on_listed(done >> 20, max(total >> 20, 1), "archived MB"))
    for entry, member in entries:
        folder, _, name = entry.rpartition("/")
        if any(part.startswith(".") or part == "__MACOSX" for part in (*folder.split("/"), name) if part):
            continue
        files = folders.get(folder)
        if files is None:
            files = folders[folder] = FrameFiles(path / PurePosixPath(folder) if folder else path, archive)
        files.add(name, member)
    archive.rest()
    videos = [folders[folder] for folder in sorted(folders)]
    if videos:
        videos[0].unsafe = archive.left_out
    return videos


def _require_unicode(root: Path, name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"The name of the folder {os.fsencode(name)!r} in {root} is not valid UTF-8, so a store can't keep it. "
            "Expected a name in UTF-8. Rename the folder and its label file, then run the same command again."
        ) from None


def _nothing_found(roots: Sequence[Path], ignored: IgnoredFiles, lost: Sequence[Path]) -> str:
    """Say where crops were looked for and what was passed over, and guess what was meant."""
    if lost:
        return f"No crops found: {lost[0]} is a link that leads nowhere. Connect the disk that it leads to, or mend it."
    looked = ", ".join(str(root) for root in roots)
    for root in roots:
        if root.is_dir() and any(file.suffix.lower() in IMAGE_SUFFIXES for file in root.iterdir()):
            hint = f"{root} itself holds images: pass its parent folder, which holds one folder per video."
            break
        if (root / "cropped_aligned").is_dir():
            hint = f"Did you mean --crops {root / 'cropped_aligned'}?"
            break
        deeper = (path for path in islice(root.glob("*/*/*"), MOST_LOOKED_AT) if path.suffix.lower() in IMAGE_SUFFIXES)
        if root.is_dir() and (found := next(deeper, None)):
            hint = f"{found} lies one folder too deep: pass the folder above its video, {found.parents[1]}."
            break
    else:
        hint = "Say where the crops are with --crops DIR, or with crops = [...] in affcache.toml."
    passed = f" Ignored: {ignored}." if len(ignored) else ""
    return f"No crops found in {looked}.{passed} Expected files like <folder>/<video>/00001.jpg. {hint}"


def is_archive(path: Path) -> bool:
    """Say whether a path names a file of crops that is read in place; it need not be there."""
    return path.suffix.lower() in SOURCES and not path.is_dir()


def open_archive(path: Path) -> Archive:
    """Open a file of crops, by its suffix.

    Raises:
        InputError: missing, another format, a compressed tar, one part of a split zip, or a zip cut short.
    """
    refuse_compressed(path)
    opener = SOURCES.get(path.suffix.lower())
    if opener is None:
        raise InputError(
            f"{path} is not an archive that affcache reads. Expected a name that ends in {' or '.join(SOURCES)}. "
            "Unpack it, or pack the crops as .zip or uncompressed .tar, then run the same command again."
        )
    return opener(path)


def require_source(container: Path, error: OSError) -> None:
    """Raise unless an error may be one crop's own: its folder is still there, and so is the connection to it.

    Args:
        container: the folder, or the archive, that holds the crop.
        error: what reading the crop raised.

    Raises:
        InputError: the crop can't be blamed. Nothing is lost, and the run can be continued.
    """
    try:
        if error.errno in NEVER_THE_CROP:
            raise error
        if is_archive(container):
            with container.open("rb", buffering=0) as file:
                file.read(1)
        else:
            with os.scandir(container):
                pass
    except OSError as reason:
        kind = "archive" if is_archive(container) else "folder"
        raise InputError(
            f"The crops {kind} {container} can't be read any more ({reason.strerror or reason}). Expected it to stay "
            "while crops are encoded. Reconnect it and run the same command again: it continues at the last committed "
            "row."
        ) from None
