"""Zip archives. Not through zipfile: its objects, one a member, would take 2 GB for three million members."""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from affcache.crops.archives import Archive, Member, UnreadableCropError

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


class ZipArchive(Archive):
    """A zip file, members stored or deflated."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        tail_start = max(0, self._bytes - _END.size - 0xFFFF)
        tail = self._read_at(tail_start, _END.size + 0xFFFF)
        at = _find_end(tail)
        if at < 0:
            raise self.broken("it has no directory at its end, so it is cut short or not a zip")
        end = tail_start + at
        _, *disks, here, self._count, self._length, start, _ = _END.unpack_from(tail, at)
        end64 = max(0, end - _LOCATOR64_BYTES - _END64.size)
        record = self._read_at(end64, end - end64)
        self._zip64 = record[_END64.size :].startswith(b"PK\6\7")
        if self._zip64:
            end = end64  # not where the locator says: that is wrong after prepended data
            sign, *disks, here, self._count, self._length, start = _END64.unpack_from(record)
            if sign != b"PK\6\6":
                raise self.broken("the 64-bit end of its directory is damaged")
        if any(disks) or here != self._count:
            raise self.broken("it is one part of a split zip", "Join its parts with 'zip -s 0 IN.zip --out OUT.zip'.")
        self._directory = end - self._length
        self._shift = self._directory - start  # bytes put before the zip, as in a self-extracting one
        if self._directory < 0 or self._shift < 0:
            raise self.broken("its directory would start before the file does, so its beginning is missing")

    def _members(self) -> Iterator[tuple[int, int, str, Member | None]]:
        buffer, at, read, seen = b"", 0, 0, 0
        while read < self._length:
            chunk = self._read_at(self._directory + read, min(_DIRECTORY_CHUNK, self._length - read))
            if not chunk:
                raise self.broken("it became shorter while it was read")
            buffer, at, read = buffer[at:] + chunk, 0, read + len(chunk)
            while at + _RECORD.size <= len(buffer):
                sign, system, flags, method, crc, stored, size, n, e, c, mode, offset = _RECORD.unpack_from(buffer, at)
                if sign != 0x02014B50:
                    raise self.broken(f"the entry after the first {seen:,} in its directory is damaged")
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
            raise self.broken(
                f"its directory declares {self._count:,} entries, of which {seen:,} are whole, and "
                f"{len(buffer) - at:,} bytes more follow"
            )

    def _unpack(self, member: Member) -> bytes:
        if member.method not in (0, 8):
            raise UnreadableCropError(f"packed with method {member.method}; only stored and deflated files are read")
        # mostly one call to the system: names and extra fields together seldom take more than 256 bytes
        data = self._read_at(member.offset, _LOCAL_HEADER.size + 256 + member.stored)
        if len(data) < _LOCAL_HEADER.size or not data.startswith(b"PK\3\4"):
            raise UnreadableCropError(f"no file starts at byte {member.offset:,} of the archive")
        _, flags, name_bytes, extra_bytes = _LOCAL_HEADER.unpack_from(data)
        if flags & _ENCRYPTED:
            raise UnreadableCropError("encrypted")
        start = _LOCAL_HEADER.size + name_bytes + extra_bytes
        if start + member.stored > len(data):
            data = self._read_at(member.offset, start + member.stored)
        data = data[start : start + member.stored]
        if member.method == 8:
            try:
                data = zlib.decompressobj(-15).decompress(data, member.size + 1)
            except zlib.error as error:
                raise UnreadableCropError(f"damaged: {error}") from None
        if len(data) == member.size and zlib.crc32(data) != member.crc:
            raise UnreadableCropError("damaged: its checksum (CRC-32) does not match")
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
    """Return a member's name: in UTF-8 where it is flagged or reads as such, as zip -r and macOS leave the flag out."""
    try:
        return name.decode("utf-8", "surrogateescape" if flags & _UTF8 else "strict")
    except UnicodeDecodeError:
        return name.decode("cp437")


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
