"""Tar archives, through Python's tarfile; only uncompressed ones can be read in place."""

import re
import shlex
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, cast

from affcache.crops.archive import Archive, Member
from affcache.errors import InputError

_LARGEST_TAR_HEADER = 2**17  # bytes; even many attributes and long names take less
_COMPRESSED = (  # the program that undoes it, the first bytes, the suffixes
    ("gunzip", b"\x1f\x8b", (".tar.gz", ".tgz")),
    ("unxz", b"\xfd7zXZ\0", (".tar.xz", ".txz")),
    ("bunzip2", b"BZh", (".tar.bz2", ".tbz", ".tbz2")),
    ("unzstd", b"\x28\xb5\x2f\xfd", (".tar.zst", ".tzst")),
)


class TarArchive(Archive):
    """An uncompressed tar of any dialect that Python's tarfile reads: ustar, GNU, pax."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        for program, magic, _ in _COMPRESSED:
            if self._read_at(0, len(magic)) == magic:
                raise _compressed(path, program)
        self._open()

    def _open(self) -> tarfile.TarFile:
        headers = cast("IO[bytes]", _Headers(self._read_at))
        try:
            return tarfile.open(fileobj=headers, mode="r:", encoding="utf-8", errors="surrogateescape")
        except (OSError, MemoryError):
            raise
        except Exception as error:  # damaged bytes make tarfile raise nearly anything
            raise self.broken(f"no tar header at byte 0 ({error})") from None

    def _members(self) -> Iterator[tuple[int, int, str, Member | None]]:
        tar, end = self._open(), 0
        while end < self._bytes and (info := self._next(tar, end)) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # else all of them stay in memory
            end = tar.offset
            if not info.isdir():
                plain = info.isreg() and not info.issparse()
                member = Member(info.offset_data, info.size, info.size, 0, 0) if plain else None
                yield end, self._bytes, info.name, member

    def _next(self, tar: tarfile.TarFile, end: int) -> tarfile.TarInfo | None:
        """Return the member after the one that ends at byte ``end``, or None where the archive ends."""
        try:
            info = tar.next()
        except (OSError, MemoryError):
            raise
        except Exception as error:
            raise self.broken(f"damaged or cut short at byte {end:,} ({error})") from None
        if info is None:  # where tarfile also stops, and says nothing, for a damaged header
            if self._read_at(end, 2 * tarfile.BLOCKSIZE).strip(b"\0"):
                raise self.broken(f"damaged or cut short at byte {end:,}, where a file's header should be")
        elif tar.offset <= end or info.size < 0:  # tarfile would go round in circles
            raise self.broken(f"damaged at byte {end:,}: a file of a negative size")
        elif tar.offset > self._bytes and (not info.isreg() or info.offset_data + info.size > self._bytes):
            raise self.broken(
                f"cut short: the file at byte {end:,} would end after the archive's {self._bytes:,} bytes"
            )
        return info

    def _unpack(self, member: Member) -> bytes:
        return self._read_at(member.offset, member.size)


class _Headers:
    """The file that tarfile sees. It refuses what only a damaged header asks for."""

    def __init__(self, read_at: Callable[[int, int], bytes]) -> None:
        self._read_at = read_at
        self._position = 0

    def read(self, count: int) -> bytes:
        if not 0 <= count <= _LARGEST_TAR_HEADER:
            raise tarfile.ReadError(f"a header of {count:,} bytes")
        data = self._read_at(self._position, count)
        self._position += len(data)
        return data

    def seek(self, position: int) -> None:
        self._position = position

    def tell(self) -> int:
        return self._position


def refuse_compressed(path: Path) -> None:
    """Raise InputError when a name says that it is a compressed tar; says how to unpack it once."""
    for program, _, suffixes in _COMPRESSED:
        if path.name.lower().endswith(suffixes):
            raise _compressed(path, program)


def _compressed(path: Path, program: str) -> InputError:
    unpacked = path.with_name(re.sub(r"(\.tar)?\.\w+$", "", path.name) + ".unpacked.tar")
    return InputError(
        f"{path} is a compressed tar, in which a crop can't be found without unpacking all before it. Expected an "
        f"uncompressed .tar, or a .zip. Unpack it once with "
        f"'{program} < {shlex.quote(str(path))} > {shlex.quote(str(unpacked))}', then use the new file."
    )
