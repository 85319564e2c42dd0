"""Where crops may lie: in folders, or in files that are read in place, of millions of members if need be."""

from collections.abc import Callable, Mapping
from pathlib import Path

from affcache.crops.archives import Archive, TarArchive, refuse_compressed
from affcache.crops.zip_archive import ZipArchive
from affcache.errors import InputError

# by the suffix of its name, what opens a file of crops; a further kind is a subclass of Archive and a line here
SOURCES: Mapping[str, Callable[[Path], Archive]] = {".zip": ZipArchive, ".tar": TarArchive}


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
