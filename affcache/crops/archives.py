"""Reading face crops in place from uncompressed .tar and from .zip files, of millions of members if need be."""

from pathlib import Path

from affcache.crops.archive import LARGEST_FILE, MEMBER_DTYPE, Archive, DamagedMemberError, Member
from affcache.crops.tar_archive import TarArchive, refuse_compressed
from affcache.crops.zip_archive import ZipArchive
from affcache.errors import InputError

__all__ = [
    "ARCHIVE_SUFFIXES",
    "LARGEST_FILE",
    "MEMBER_DTYPE",
    "Archive",
    "DamagedMemberError",
    "Member",
    "open_archive",
]

ARCHIVE_SUFFIXES = frozenset({".zip", ".tar"})


def open_archive(path: Path) -> Archive:
    """Open a .zip or .tar file, by its suffix.

    Raises:
        InputError: missing, another format, a compressed tar, one part of a split zip, or a zip cut short.
    """
    refuse_compressed(path)
    suffix = path.suffix.lower()
    if suffix not in ARCHIVE_SUFFIXES:
        raise InputError(
            f"{path} is not an archive that affcache reads. Expected a name that ends in .zip or .tar. Unpack it, or "
            "pack the crops as .zip or uncompressed .tar, then run the same command again."
        )
    return ZipArchive(path) if suffix == ".zip" else TarArchive(path)
