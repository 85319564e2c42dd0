"""Reading face crops in place from uncompressed .tar and from .zip files, of millions of members if need be."""

import os
import re
import shlex
import struct
import tarfile
import threading
import weakref
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple, cast

import numpy as np

from affcache.errors import InputError

ARCHIVE_SUFFIXES = frozenset({".zip", ".tar"})
LARGEST_FILE = 64 * 2**20  # bytes; no face crop is larger, and a damaged size must not ask for gigabytes
MEMBER_DTYPE = np.dtype([("offset", "<i8"), ("stored", "<i8"), ("size", "<i8"), ("crc", "<u4"), ("method", "u1")])

_REPORT_EVERY = 20_000  # members
_DIRECTORY_CHUNK = 2**20  # bytes; more than the longest record of a zip's directory, 46 + 3 * 65,535
_RECORD = struct.Struct("<LxB2xHH4xLLLHHH4xLL")  # of one member in a zip's directory
_LOCAL_HEADER = struct.Struct("<4s2xH18xHH")
_END = struct.Struct("<4s4H2LH")
_END64, _LOCATOR64_BYTES = struct.Struct("<4s12x2L4Q"), 20
_IN_64_BITS = 0xFFFFFFFF  # stands for a number that a zip keeps in 64 bits elsewhere
_LARGEST_NUMBER = 2**63 - 1  # what MEMBER_DTYPE can keep; reading says that it is beyond the file
_UTF8, _ENCRYPTED = 0x800, 0x41  # a zip's flag bits
_UNIX = (3, 19)  # a zip's numbers of the systems whose file modes can be trusted
_REGULAR, _FOLDER = (0, 8), 4  # top four bits of a file mode; 0 where none was kept
_LARGEST_TAR_HEADER = 2**17  # bytes; even many attributes and long names take less
_DRIVE = re.compile("[A-Za-z]:")
_COMPRESSED = (  # the program that undoes it, the first bytes, the suffixes
    ("gunzip", b"\x1f\x8b", (".tar.gz", ".tgz")),
    ("unxz", b"\xfd7zXZ\0", (".tar.xz", ".txz")),
    ("bunzip2", b"BZh", (".tar.bz2", ".tbz", ".tbz2")),
    ("unzstd", b"\x28\xb5\x2f\xfd", (".tar.zst", ".tzst")),
)


class DamagedMemberError(Exception):
    """One member of an archive cannot be read; says why in one line. Its crop is marked unreadable."""


class Member(NamedTuple):
    """Where one file lies in its archive; fits a row of MEMBER_DTYPE."""

    offset: int  # byte at which the data starts, or in a zip the local header before it
    stored: int  # bytes in the archive
    size: int  # bytes once read
    crc: int  # CRC-32 of the bytes once read; 0 in a tar, which keeps none
    method: int  # in a zip 0 for stored and 8 for deflated, at most 255; 0 in a tar


class Archive(ABC):
    """An open archive; InputError where it can't be opened. ``read`` may be called from many threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unsafe = 0  # members the last listing left out for their name: absolute, with "..", ...
        self.links = 0  # links, sparse and special files the last listing left out
        self._lock = threading.Lock()
        try:
            if not path.is_file():  # also keeps from waiting for a pipe
                raise FileNotFoundError("it does not exist or is not a file")
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            self._finalizer = weakref.finalize(self, os.close, self._descriptor)
            self._bytes = os.fstat(self._descriptor).st_size
        except OSError as error:
            raise InputError(
                f"The archive {path} can't be opened: {error.strerror or error}. Expected a .zip or .tar file of "
                "crops. Check the path and its permissions, then run the same command again."
            ) from None

    def entries(self, on_bytes: Callable[[int, int], None] | None = None) -> Iterator[tuple[str, Member]]:
        """List the regular files in the archive's order, by names like ``video/00001.jpg``.

        A name comes as often as the archive has it. Bytes of a name that are no UTF-8 become surrogates, as
        ``os.fsdecode`` makes them. ``unsafe`` and ``links`` start from 0 and are final once the listing ends.

        Args:
            on_bytes: called with (bytes done, bytes in all) every 20,000 members and at the end.

        Raises:
            InputError: the archive is damaged or cut short.
            OSError: the file can't be read.
        """
        self.unsafe = self.links = total = 0
        for seen, (done, total, name, member) in enumerate(self._members(), start=1):
            if on_bytes is not None and seen % _REPORT_EVERY == 0:
                on_bytes(done, total)
            if member is None:
                self.links += 1
            elif (plain := _safe_name(name)) is None:
                self.unsafe += 1
            else:
                yield plain, member
        if on_bytes is not None:
            on_bytes(total, total)

    @abstractmethod
    def _members(self) -> Iterator[tuple[int, int, str, Member | None]]:
        """Yield (bytes done, bytes in all, name, place or None for a link) of all but folders; raises as entries."""

    def read(self, member: Member) -> bytes:
        """Return the ``member.size`` bytes of one file.

        Raises:
            DamagedMemberError: they are damaged, encrypted, cut short, over LARGEST_FILE or packed in another way.
            OSError: the file can't be read.
        """
        if max(member.stored, member.size) > LARGEST_FILE:
            raise DamagedMemberError(f"{max(member.stored, member.size):,} bytes; at most {LARGEST_FILE:,} are read")
        data = self._unpack(member)
        if len(data) != member.size:
            more = "more" if len(data) > member.size else "fewer"
            raise DamagedMemberError(f"damaged or cut short: {more} than the {member.size:,} bytes declared")
        return data

    @abstractmethod
    def _unpack(self, member: Member) -> bytes:
        """Return a file's bytes, of any number up to size + 1 where they are damaged; raises as read."""

    def close(self) -> None:
        """Close the file; reading raises OSError from then on. Happens by itself once the archive is dropped."""
        self._descriptor = -1  # the system soon gives the old number to another file
        self._finalizer()

    def _read_at(self, offset: int, count: int) -> bytes:
        """Return ``count`` bytes, fewer where the file ends. No memory map: a lost network file would be fatal."""
        count = min(count, self._bytes - offset)
        parts = []
        while count > 0:
            if hasattr(os, "pread"):
                part = os.pread(self._descriptor, count, offset)
            else:
                with self._lock:
                    os.lseek(self._descriptor, offset, os.SEEK_SET)
                    part = os.read(self._descriptor, count)
            if not part:
                break
            parts.append(part)
            offset, count = offset + len(part), count - len(part)
        return b"".join(parts)

    def _broken(self, what: str, remedy: str = "Copy or download it again, then run the same command.") -> InputError:
        kind = self.path.suffix.lower()
        return InputError(f"The archive {self.path} can't be read: {what}. Expected a whole {kind} file. {remedy}")


def open_archive(path: Path) -> Archive:
    """Open a .zip or .tar file, by its suffix.

    Raises:
        InputError: missing, another format, a compressed tar, one part of a split zip, or a zip cut short.
    """
    for program, _, suffixes in _COMPRESSED:
        if path.name.lower().endswith(suffixes):
            raise _compressed(path, program)
    suffix = path.suffix.lower()
    if suffix not in ARCHIVE_SUFFIXES:
        raise InputError(
            f"{path} is not an archive that affcache reads. Expected a name that ends in .zip or .tar. Unpack it, or "
            "pack the crops as .zip or uncompressed .tar, then run the same command again."
        )
    return ZipArchive(path) if suffix == ".zip" else TarArchive(path)


def _compressed(path: Path, program: str) -> InputError:
    unpacked = path.with_name(re.sub(r"(\.tar)?\.\w+$", "", path.name) + ".unpacked.tar")
    return InputError(
        f"{path} is a compressed tar, in which a crop can't be found without unpacking all before it. Expected an "
        f"uncompressed .tar, or a .zip. Unpack it once with "
        f"'{program} < {shlex.quote(str(path))} > {shlex.quote(str(unpacked))}', then use the new file."
    )


def _safe_name(name: str) -> str | None:
    """Return a member's name in its plain form, or None where it may lead out of its folder."""
    if not ("/." in name or "//" in name or "\\" in name or ":" in name or "\0" in name or name[:1] in "./"):
        return name  # nearly all; these tests take a tenth of the time of what follows
    name = name.replace("\\", "/")  # as some packers on Windows write it
    parts = [part for part in name.split("/") if part not in ("", ".")]
    plain = "/".join(parts)
    if not parts or ".." in parts or "\0" in name or name.startswith("/") or _DRIVE.match(plain):
        return None
    return plain


class ZipArchive(Archive):
    """A zip. Not through zipfile: its objects, one a member, would take 2 GB for three million members."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        tail_start = max(0, self._bytes - _END.size - 0xFFFF)
        tail = self._read_at(tail_start, _END.size + 0xFFFF)
        at = _find_end(tail)
        if at < 0:
            raise self._broken("it has no directory at its end, so it is cut short or not a zip")
        end = tail_start + at
        _, *disks, here, self._count, self._length, start, _ = _END.unpack_from(tail, at)
        end64 = max(0, end - _LOCATOR64_BYTES - _END64.size)
        record = self._read_at(end64, end - end64)
        self._zip64 = record[_END64.size :].startswith(b"PK\6\7")
        if self._zip64:
            end = end64  # not where the locator says: that is wrong after prepended data
            sign, *disks, here, self._count, self._length, start = _END64.unpack_from(record)
            if sign != b"PK\6\6":
                raise self._broken("the 64-bit end of its directory is damaged")
        if any(disks) or here != self._count:
            raise self._broken("it is one part of a split zip", "Join its parts with 'zip -s 0 IN.zip --out OUT.zip'.")
        self._directory = end - self._length
        self._shift = self._directory - start  # bytes put before the zip, as in a self-extracting one
        if self._directory < 0 or self._shift < 0:
            raise self._broken("its directory would start before the file does, so its beginning is missing")

    def _members(self) -> Iterator[tuple[int, int, str, Member | None]]:
        buffer, at, read, seen = b"", 0, 0, 0
        while read < self._length:
            chunk = self._read_at(self._directory + read, min(_DIRECTORY_CHUNK, self._length - read))
            if not chunk:
                raise self._broken("it became shorter while it was read")
            buffer, at, read = buffer[at:] + chunk, 0, read + len(chunk)
            while at + _RECORD.size <= len(buffer):
                sign, system, flags, method, crc, stored, size, n, e, c, mode, offset = _RECORD.unpack_from(buffer, at)
                if sign != 0x02014B50:
                    raise self._broken(f"the entry after the first {seen:,} in its directory is damaged")
                name_end = at + _RECORD.size + n
                if name_end + e + c > len(buffer):
                    break  # the rest comes with the next chunk
                name = _decode(buffer[name_end - n : name_end], flags)
                if size == _IN_64_BITS or stored == _IN_64_BITS or offset == _IN_64_BITS:
                    size, stored, offset = _from_64_bits(buffer[name_end : name_end + e], size, stored, offset)
                at = name_end + e + c
                seen += 1
                kind = mode >> 28 if system in _UNIX else 0
                if kind == _FOLDER or name.endswith(("/", "\\")):
                    continue
                offset = min(offset + self._shift, _LARGEST_NUMBER)
                member = Member(offset, stored, size, crc, min(method, 255)) if kind in _REGULAR else None
                yield read - len(buffer) + at, self._length, name, member
        # older packers count modulo 65,536
        if at < len(buffer) or (seen if self._zip64 else seen % 2**16) != self._count:
            raise self._broken(
                f"its directory declares {self._count:,} entries, of which {seen:,} are whole, and "
                f"{len(buffer) - at:,} bytes more follow"
            )

    def _unpack(self, member: Member) -> bytes:
        if member.method not in (0, 8):
            raise DamagedMemberError(f"packed with method {member.method}; only stored and deflated files are read")
        # mostly one call to the system: names and extra fields together seldom take more than 256 bytes
        data = self._read_at(member.offset, _LOCAL_HEADER.size + 256 + member.stored)
        if len(data) < _LOCAL_HEADER.size or not data.startswith(b"PK\3\4"):
            raise DamagedMemberError(f"no file starts at byte {member.offset:,} of the archive")
        _, flags, name_bytes, extra_bytes = _LOCAL_HEADER.unpack_from(data)
        if flags & _ENCRYPTED:
            raise DamagedMemberError("encrypted")
        start = _LOCAL_HEADER.size + name_bytes + extra_bytes
        if start + member.stored > len(data):
            data = self._read_at(member.offset, start + member.stored)
        data = data[start : start + member.stored]
        if member.method == 8:
            try:
                data = zlib.decompressobj(-15).decompress(data, member.size + 1)
            except zlib.error as error:
                raise DamagedMemberError(f"damaged: {error}") from None
        if len(data) == member.size and zlib.crc32(data) != member.crc:
            raise DamagedMemberError("damaged: its checksum (CRC-32) does not match")
        return data


def _find_end(tail: bytes) -> int:
    """Return where the end record starts in a zip's last bytes, or -1; best one that ends where the file does."""
    found, at = -1, len(tail)
    while (at := tail.rfind(b"PK\5\6", 0, at)) >= 0:
        end = at + _END.size + int.from_bytes(tail[at + 20 : at + 22], "little")
        if end == len(tail):
            return at
        if found < 0 and end < len(tail):  # something was appended to the zip
            found = at
    return found


def _decode(name: bytes, flags: int) -> str:
    utf8 = flags & _UTF8 or name.isascii()
    return name.decode("utf-8", "surrogateescape") if utf8 else name.decode("cp437")


def _from_64_bits(extra: bytes, *numbers: int) -> list[int]:
    """Replace those of a member's (size, stored, offset) that its extra field keeps in 64 bits."""
    found, at = list(numbers), 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        field = extra[at + 4 : at + 4 + length]
        at += 4 + length
        if kind == 1:
            values = struct.iter_unpack("<Q", field[: len(field) // 8 * 8])
            return [min(next(values, (n,))[0], _LARGEST_NUMBER) if n == _IN_64_BITS else n for n in found]
    return found


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
            raise self._broken(f"no tar header at byte 0 ({error})") from None

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
            raise self._broken(f"damaged or cut short at byte {end:,} ({error})") from None
        if info is None:  # where tarfile also stops, and says nothing, for a damaged header
            if self._read_at(end, 2 * tarfile.BLOCKSIZE).strip(b"\0"):
                raise self._broken(f"damaged or cut short at byte {end:,}, where a file's header should be")
        elif tar.offset <= end or info.size < 0:  # tarfile would go round in circles
            raise self._broken(f"damaged at byte {end:,}: a file of a negative size")
        elif tar.offset > self._bytes and (not info.isreg() or info.offset_data + info.size > self._bytes):
            raise self._broken(
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
