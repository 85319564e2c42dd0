"""What zip and tar archives have in common: safe names, bounded reads from many threads, errors that say what to do."""

import os
import re
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from affcache.errors import InputError

LARGEST_FILE = 64 * 2**20  # bytes; no face crop is larger, and a damaged size must not ask for gigabytes
MEMBER_DTYPE = np.dtype([("offset", "<i8"), ("stored", "<i8"), ("size", "<i8"), ("crc", "<u4"), ("method", "u1")])
_REPORT_EVERY = 20_000  # members
_DRIVE = re.compile("[A-Za-z]:")


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

    def __reduce__(self) -> tuple[type["Archive"], tuple[Path]]:
        """Travel by path: another process opens the archive for itself."""
        return type(self), (self.path.absolute(),)

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

    def broken(self, what: str, remedy: str = "Copy or download it again, then run the same command.") -> InputError:
        """Return the error for an archive that is damaged or cut short."""
        kind = self.path.suffix.lower()
        return InputError(f"The archive {self.path} can't be read: {what}. Expected a whole {kind} file. {remedy}")


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
