"""Finding face crops: one folder per video, one file per frame, at any depth, on disk or in archives."""

import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np

from affcache.crops.archives import Archive, TarArchive, refuse_compressed
from affcache.crops.crop_list import (
    IMAGE_SUFFIXES,
    USUAL_NAMING,
    CropList,
    IgnoredFiles,
    Naming,
)
from affcache.crops.listing import DEEPEST, MACOS, TOO_DEEP, Folder, FrameFiles, list_folder
from affcache.crops.names import RELEASE, canonical, names_below
from affcache.crops.zip_archive import ZipArchive
from affcache.errors import InputError

# by the suffix of its name, what opens a file of crops; a further kind is a subclass of Archive and a line here
SOURCES: Mapping[str, Callable[[Path], Archive]] = {".zip": ZipArchive, ".tar": TarArchive}
OTHER_ARCHIVES = frozenset({".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"})
LISTING_THREADS = 8  # hide a network file system's latency
# the machine's fault, or the network's, whatever file they are met at
NEVER_THE_CROP = frozenset(
    {
        errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.ECONNRESET,
        errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EHOSTDOWN,
    }
)  # fmt: skip

OnListed = Callable[[int, int, str], None]  # (done, total, unit)


def find_crops(roots: Sequence[Path], on_listed: OnListed | None = None) -> CropList:
    """List the crops below one or several roots, each ``<root>/<video>/NNNNN.jpg``, where a video's name may have "/".

    A root is a folder, or a .zip or .tar archive of one (or of one video's crops at its top; its own name is then the
    video's). Archives that lie in a root folder are read as roots too. A video's name is its path below the root; in an
    archive, below what ``names_below`` leaves out. The frame number is the run of digits that ends the file name's
    stem; gaps are kept as they are. Hidden entries are skipped; other files that are no crops are counted. A video
    that is there twice is taken from the first root, in an archive from the first folder.

    Args:
        roots: folders and archives.
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
            lost += files.lost
            if files.above and not files.numbers:
                continue
            _require_unicode(files.archive.path if files.archive else root, files.name)
            if canonical(files.name) in seen:
                _require_not_of_others(files, videos.get(files.name), root)
                shadowed.append(files.folder)
            elif files.numbers:
                videos[files.name] = files
            seen.add(canonical(files.name))
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


def _require_not_of_others(files: FrameFiles, first: FrameFiles | None, root: Path) -> None:
    """Refuse two archives in one folder that have a video of one name: of two people, say, each packed by itself.

    Raises:
        InputError: they have.
    """
    archives = [one.archive.path for one in (first, files) if one and one.archive]
    if len(set(archives)) == 2 and all(path.parent == root for path in archives):
        raise InputError(
            f"{archives[0]} and {archives[1].name} beside it both have a video {files.name}. Expected every video "
            "once: are they of two people? Pack them into one archive, or unpack them, with a folder for each; or move "
            "away the one that is a copy."
        )


def _videos_of(root: Path, on_listed: OnListed) -> Iterator[FrameFiles]:
    """Yield the videos of one root: those of a folder level by level, by name, then those of archives."""
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
    top = list_folder(Folder(root, "", frozenset()))
    yield top.files
    level, done, total = top.folders, 0, 0
    with ThreadPoolExecutor(LISTING_THREADS, thread_name_prefix="list") as pool:
        while level:
            total += len(level)
            crops, deeper = False, list[Folder]()
            for listed in pool.map(list_folder, level):
                done += 1
                on_listed(done, total, "video")
                crops |= len(listed.files.numbers) > 0
                deeper += listed.folders
                yield listed.files
            if level is top.folders and not crops and (root / RELEASE).is_dir():
                raise InputError(_nothing_found([root], IgnoredFiles(), []))  # else its name would be in all names
            level = deeper
    for name in top.others:
        if is_archive(root / name):
            yield from _videos_of_archive(root / name, on_listed)


def _videos_of_archive(path: Path, on_listed: OnListed) -> list[FrameFiles]:
    archive = open_archive(path)
    folders: dict[str, FrameFiles] = {}
    entries = archive.entries(lambda done, total: on_listed(done >> 20, max(total >> 20, 1), "archived MB"))
    for entry, member in entries:
        folder, _, name = entry.rpartition("/")
        if any(part.startswith(".") or part == MACOS for part in (*folder.split("/"), name) if part):
            continue
        files = folders.get(folder)
        if files is None:
            place = path / PurePosixPath(folder) if folder else path
            files = folders[folder] = FrameFiles(place, path.stem, archive, above=True)
        if folder.count("/") >= DEEPEST:
            files.ignored.add(name, TOO_DEEP)
        elif not files.add(name, member):
            files.ignored.add(name)
    archive.rest()
    inside = [folder for folder, files in folders.items() if folder and files.numbers]
    for folder, video in zip(inside, names_below(inside), strict=True):
        folders[folder].name = video
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
        if (root / RELEASE).is_dir():
            hint = f"Did you mean --crops {root / RELEASE}?"
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
