"""Archives read in place: what all kinds have in common, safe names and bounded reads from many threads, and tar."""

import errno
import os
import re
import shlex
import tarfile
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple, cast

import numpy as np

from affcache.errors import InputError
from affcache.files import open_descriptor, open_regular

LARGEST_FILE = 64 * 2**20  # bytes; no face crop is larger, and a damaged size must not ask for gigabytes
MEMBER_DTYPE = np.dtype([("offset", "<i8"), ("stored", "<i8"), ("size", "<i8"), ("crc", "<u4"), ("method", "u1")])
_REPORT_EVERY = 20_000  # members
_KEPT_OPEN = threading.BoundedSemaphore(64)  # archives; of more, each read opens its own for itself
_DRIVE = re.compile("[A-Za-z]:")
_LARGEST_TAR_HEADER = 2**17  # bytes; even many attributes and long names take less
_COMPRESSED = (  # the program that undoes it, the first bytes, the suffixes
    ("gunzip", b"\x1f\x8b", (".tar.gz", ".tgz")),
    ("unxz", b"\xfd7zXZ\0", (".tar.xz", ".txz")),
    ("bunzip2", b"BZh", (".tar.bz2", ".tbz", ".tbz2")),
    ("unzstd", b"\x28\xb5\x2f\xfd", (".tar.zst", ".tzst")),
)


class UnreadableCropError(Exception):
    """One crop cannot be read, or turned into pixels; says why in one line. Never stops a run: its row is marked."""


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
        self.left_out = 0  # members the last listing left out: names absolute or with "..", links, special files, ...
        self._lock = threading.Lock()
        self._resting = False
        try:
            if not path.is_file():
                raise FileNotFoundError("it does not exist or is not a file")
            self._descriptor = open_descriptor(path)
            self._finalizer = weakref.finalize(self, os.close, self._descriptor)
            self._opened = os.fstat(self._descriptor)
            self._bytes = self._opened.st_size
        except OSError as error:
            raise InputError(
                f"The archive {path} can't be opened: {error.strerror or error}. Expected a .zip or .tar file of "
                "crops. Check the path and its permissions, then run the same command again."
            ) from None

    def __reduce__(self) -> tuple[Callable[..., "Archive"], tuple[type["Archive"], Path]]:
        """Travel by path: another process opens the archive for itself."""
        return _arrived, (type(self), self.path.absolute())

    def rest(self) -> "Archive":
        """Leave the file open only where few archives are; else each read opens it for itself. Return the archive."""
        if not self._resting and _KEPT_OPEN.acquire(blocking=False):
            weakref.finalize(self, _KEPT_OPEN.release)
        else:
            self._resting = True
            self._finalizer()
        return self

    def entries(self, on_bytes: Callable[[int, int], None] | None = None) -> Iterator[tuple[str, Member]]:
        """List the regular files in the archive's order, by names like ``video/00001.jpg``.

        A name comes as often as the archive has it. Bytes of a name that are no UTF-8 become surrogates, as
        ``os.fsdecode`` makes them. ``left_out`` starts from 0 and is final once the listing ends.

        Args:
            on_bytes: called with (bytes done, bytes in all) every 20,000 members and at the end.

        Raises:
            InputError: the archive is damaged or cut short.
            OSError: the file can't be read.
        """
        self.left_out = total = 0
        for seen, (done, total, name, member) in enumerate(self._members(), start=1):
            if on_bytes is not None and seen % _REPORT_EVERY == 0:
                on_bytes(done, total)
            if member is None or (plain := _safe_name(name)) is None:
                self.left_out += 1
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
            UnreadableCropError: they are damaged, encrypted, cut short, over LARGEST_FILE or packed in another way.
            OSError: the file can't be read.
        """
        if max(member.stored, member.size) > LARGEST_FILE:
            raise UnreadableCropError(f"{max(member.stored, member.size):,} bytes; at most {LARGEST_FILE:,} are read")
        data = self._unpack(member)
        if len(data) != member.size:
            more = "more" if len(data) > member.size else "fewer"
            raise UnreadableCropError(f"damaged or cut short: {more} than the {member.size:,} bytes declared")
        return data

    @abstractmethod
    def _unpack(self, member: Member) -> bytes:
        """Return a file's bytes, of any number up to size + 1 where they are damaged; raises as read."""

    def close(self) -> None:
        """Close the file; reading raises OSError from then on. Happens by itself once the archive is dropped."""
        self._descriptor, self._resting = -1, False  # the system soon gives the old number to another file
        self._finalizer()

    @contextmanager
    def _held(self) -> Iterator[int]:
        """Give a descriptor of the file, the one that is kept or one for this read."""
        if not self._resting:
            yield self._descriptor
            return
        with open_regular(self.path) as file:
            if not os.path.samestat(os.fstat(file.fileno()), self._opened):
                raise OSError(errno.ESTALE, "another file has its name now")
            yield file.fileno()

    def _read_at(self, offset: int, count: int) -> bytes:
        """Return ``count`` bytes, fewer where the file ends. No memory map: a lost network file would be fatal."""
        count = min(count, self._bytes - offset)
        parts = []
        with self._held() as descriptor:
            while count > 0:
                if hasattr(os, "pread"):
                    part = os.pread(descriptor, count, offset)
                else:
                    with self._lock:
                        os.lseek(descriptor, offset, os.SEEK_SET)
                        part = os.read(descriptor, count)
                if not part:
                    break
                parts.append(part)
                offset, count = offset + len(part), count - len(part)
        return b"".join(parts)

    def broken(self, what: str, remedy: str = "Copy or download it again, then run the same command.") -> InputError:
        """Return the error for an archive that is damaged or cut short."""
        kind = self.path.suffix.lower()
        return InputError(f"The archive {self.path} can't be read: {what}. Expected a whole {kind} file. {remedy}")


def _arrived(kind: type[Archive], path: Path) -> Archive:
    return kind(path).rest()


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


class TarArchive(Archive):
    """An uncompressed tar of any dialect that Python's tarfile reads: ustar, GNU, pax."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        if not self._bytes:  # Python 3.10's tarfile raises OSError
            raise self.broken("no tar header at byte 0 (it is empty)")
        refuse_compressed(path, self._read_at(0, 8))
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


def refuse_compressed(path: Path, start: bytes = b"") -> None:
    """Raise InputError when a name, or a file's first bytes, say that it is a compressed tar; says how to unpack it."""
    for program, magic, suffixes in _COMPRESSED:
        if start.startswith(magic) or path.name.lower().endswith(suffixes):
            unpacked = path.with_name(re.sub(r"(\.tar)?\.\w+$", "", path.name) + ".unpacked.tar")
            raise InputError(
                f"{path} is a compressed tar, in which a crop can't be found without unpacking all before it. Expected "
                f"an uncompressed .tar, or a .zip. Unpack it once with "
                f"'{program} < {shlex.quote(str(path))} > {shlex.quote(str(unpacked))}', then use the new file."
            )
