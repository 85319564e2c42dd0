"""The structure of a store, read without libhdf5, which follows a damaged or hostile file wherever it leads.

Only what ``create_store`` writes is understood: one group of contiguous datasets behind hard links, its attributes, and
texts in global heaps. External, virtual, chunked and filtered datasets and other links are refused, and every offset
and size is held against the file before anything is read. The names are those of HDF5's file format specification.
"""

import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from io import RawIOBase

import numpy as np

MAGIC = b"\x89HDF\r\n\x1a\n"
NOWHERE = 2**64 - 1  # an address that isn't set
MOST_BLOCKS, MOST_HEADER = 16, 2**20  # blocks of one object's header, and bytes of each; a store's has one or two
MOST_TEXT = 2**28  # bytes of all heaps, and of all texts
DATASPACE, LINK_INFO, DATATYPE, LINK, LAYOUT, ATTRIBUTE, CONTINUATION, ATTRIBUTE_INFO = 1, 2, 3, 6, 8, 12, 16, 21
IGNORED = (0, 5, 10, 18)  # nothing, fill value, group info, time of change; any other message is refused
CONTIGUOUS = 1
TEXT, OTHER = "text", "another type"
TYPES = {  # a datatype message but for its version, the upper half of its first byte
    "01200f0002000000000010000a05000a0f000000": "<f2",
    "000000000100000000000800": "u1",
    "000800000400000000002000": "<i4",
    "000800000800000000004000": "<i8",
    "000000000400000000002000": "<u4",
    "0901010010000000" + "100000000100000000000800": TEXT,
}
TEXT_PLACE = np.dtype([("length", "<u4"), ("heap", "<u8"), ("index", "<u4")])
_SUPERBLOCK = struct.Struct("<8s4B4QL")
_HEAP = struct.Struct("<4sB3xQ")
_HEAP_OBJECT = struct.Struct("<HH4xQ")


@dataclass(frozen=True)
class Dataset:
    """Where the values of a dataset lie in the file, all of them within it."""

    kind: str  # numpy's name of the dtype, or TEXT
    shape: tuple[int, ...]
    offset: int


class StoreFile:
    """The attributes of a store file, and where its datasets lie. What else was put into the file is left alone.

    Raises:
        ValueError: cut short, damaged, or laid out in another way than ``create_store`` does it.
        OSError: the file can't be read.
    """

    def __init__(self, file: RawIOBase) -> None:
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        self._heaps: dict[int, dict[int, bytes]] = {}
        self._left = 2 * min(self._size, MOST_TEXT)  # bytes of text that may still be read: texts may share a place
        self.attributes: dict[str, str | int | None] = {}
        self._links: dict[str, int] = {}
        for kind, body in self._messages(self._root()):
            if kind == LINK:
                name, address = _link(body)
                self._links[name] = address
            elif kind == ATTRIBUTE:
                name, value = self._attribute(body)
                self.attributes[name] = value
            elif kind in (LINK_INFO, ATTRIBUTE_INFO):
                _require(body[1] & 1 == 0 and body[2:10] == b"\xff" * 8, "more links or attributes than a store has")
            else:
                _require(kind in IGNORED, f"a message of kind {kind} in the group")

    def dataset(self, name: str) -> Dataset:
        """Return where the values of a dataset lie; raises as opening the file, and KeyError where there is none."""
        found: dict[int, bytes] = {}
        for message, body in self._messages(self._links[name]):
            known = message in (DATASPACE, DATATYPE, LAYOUT, ATTRIBUTE, ATTRIBUTE_INFO, *IGNORED)
            _require(known, f"{name} has a message of kind {message}: not laid out as in a store")
            found[message] = body
        kind, shape, layout = _kind(found[DATATYPE]), _shape(found[DATASPACE]), found[LAYOUT]
        _require(layout[0] in (3, 4) and layout[1] == CONTIGUOUS and len(layout) == 18, f"{name} is not contiguous")
        offset, size = struct.unpack("<QQ", layout[2:])
        _require(kind != OTHER, f"the type of {name}")
        width = TEXT_PLACE.itemsize if kind == TEXT else np.dtype(kind).itemsize
        _require(size == math.prod(shape) * width, f"the size of {name}")
        _require(size > 0 and offset + size <= self._size, f"{name} is cut short")
        return Dataset(kind, shape, offset)

    def texts(self, dataset: Dataset) -> tuple[str, ...]:
        """Return the texts of a dataset (V,)."""
        _require(dataset.kind == TEXT and len(dataset.shape) == 1, "no list of texts")
        places = np.frombuffer(self._at(dataset.offset, dataset.shape[0] * TEXT_PLACE.itemsize), TEXT_PLACE)
        return tuple(self._text(*place) for place in places.tolist())

    def _at(self, offset: int, count: int) -> bytes:
        _require(offset + count <= self._size, f"it has {self._size:,} bytes, expected at least {offset + count:,}")
        self._file.seek(offset)
        data = self._file.read(count)
        _require(data is not None and len(data) == count, "it became shorter")
        return bytes(data or b"")

    def _root(self) -> int:
        start = self._at(0, _SUPERBLOCK.size)
        magic, version, of_offsets, of_lengths, _, base, extension, end, root, checksum = _SUPERBLOCK.unpack(start)
        _require(magic == MAGIC, "no HDF5 file")
        _require(version in (2, 3), f"superblock version {version}: not laid out as a store is")
        _require(lookup3(start[:-4]) == checksum, "the checksum of the superblock")
        _require((of_offsets, of_lengths, base, extension) == (8, 8, 0, NOWHERE), "not laid out as a store is")
        _require(end <= self._size, f"it has {self._size:,} bytes, expected {end:,}")
        return int(root)

    def _messages(self, address: int) -> Iterator[tuple[int, bytes]]:
        """Yield kind and body of the messages in the header of the object at an address."""
        sign, version, flags = struct.unpack("<4sBB", self._at(address, 6))
        _require((sign, version) == (b"OHDR", 2), f"no header at byte {address:,}")
        start = 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
        count = 1 << (flags & 3)
        length = int.from_bytes(self._at(address + start, count), "little")
        blocks = [(address, start + count, start + count + length + 4)]
        prefix = 6 if flags & 4 else 4
        for at, first, size in blocks:
            _require(size <= MOST_HEADER, f"the size of the header at byte {at:,}")
            block = self._at(at, size)
            _require(lookup3(block[:-4]) == int.from_bytes(block[-4:], "little"), f"the checksum at byte {at:,}")
            position, end = first, size - 4
            while position + prefix <= end:
                kind, length, shared = struct.unpack_from("<BHB", block, position)
                body = block[position + prefix : position + prefix + length]
                position += prefix + length
                _require(position <= end and not shared & 2, f"a message at byte {at:,}")
                if kind == CONTINUATION:
                    further, length = struct.unpack("<QQ", body)
                    blocks.append((further, 4, length))
                    _require(length >= 8 and len(blocks) <= MOST_BLOCKS, "the continuation of a header")
                    _require(self._at(further, 4) == b"OCHK", "the continuation of a header")
                else:
                    yield kind, body

    def _attribute(self, body: bytes) -> tuple[str, str | int | None]:
        """Return name and value; None for values of other types than a store's own attributes have."""
        version, flags, *lengths = struct.unpack_from("<BBHHH", body)
        _require(version in (1, 3) and not flags, "an attribute")  # 1 is what h5py writes into an older file
        parts, at = [], 8 if version == 1 else 9
        for length in lengths:
            parts.append(body[at : at + length])
            at += -(-length // 8) * 8 if version == 1 else length
        name, kind = parts[0].rstrip(b"\0").decode(), _kind(parts[1])
        if kind == TEXT and not _shape(parts[2]):
            return name, self._text(*struct.unpack("<LQL", body[at:]))
        return name, int.from_bytes(body[at:], "little", signed=True) if kind == "<i8" else None

    def _text(self, length: int, heap: int, index: int) -> str:
        if heap not in self._heaps:
            self._heaps[heap] = self._heap(heap)
        self._spend(length)
        text = self._heaps[heap].get(index, b"")[:length]
        _require(len(text) == length, "a text is longer than its place")
        return text.decode()

    def _heap(self, address: int) -> dict[int, bytes]:
        """Return the objects of a global heap by their index."""
        sign, version, size = _HEAP.unpack(self._at(address, _HEAP.size))
        _require((sign, version) == (b"GCOL", 1), f"no heap at byte {address:,}")
        self._spend(size)
        heap, at = self._at(address, size), _HEAP.size
        objects = {}
        while at + _HEAP_OBJECT.size <= size:
            index, _, length = _HEAP_OBJECT.unpack_from(heap, at)
            at += _HEAP_OBJECT.size
            if index == 0:  # what is free
                break
            objects[index] = heap[at : at + length]
            at += -(-length // 8) * 8
        return objects

    def _spend(self, count: int) -> None:
        self._left -= count
        _require(self._left >= 0, "more text than a store has")


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


def _kind(message: bytes) -> str:
    return TYPES.get((bytes([message[0] & 15]) + message[1:]).hex(), OTHER)


def _shape(message: bytes) -> tuple[int, ...]:
    version, rank, _, form = struct.unpack_from("<4B", message)
    _require(version == 1 or (version == 2 and form == (rank > 0)), "the shape of a dataset or attribute")
    return struct.unpack_from(f"<{rank}Q", message, 8 if version == 1 else 4)


def _link(message: bytes) -> tuple[str, int]:
    version, flags = message[:2]
    if version != 1 or flags & 8:  # soft or external
        return "", NOWHERE
    at = 2 + (8 if flags & 4 else 0) + (1 if flags & 16 else 0)
    count = 1 << (flags & 3)
    length = int.from_bytes(message[at : at + count], "little")
    at += count
    return message[at : at + length].decode(), int.from_bytes(message[at + length :], "little")


def lookup3(data: bytes) -> int:
    """Return Bob Jenkins' hash of some bytes, which HDF5 keeps as the checksum of its structure."""
    words = struct.unpack(f"<{-(-len(data) // 12) * 3}L", data + b"\0" * (-len(data) % 12))
    a = b = c = (0xDEADBEEF + len(data)) & 0xFFFFFFFF
    for at in range(0, len(words), 3):
        a, b, c = a + words[at] & 0xFFFFFFFF, b + words[at + 1] & 0xFFFFFFFF, c + words[at + 2] & 0xFFFFFFFF
        if at < len(words) - 3:
            for by in (4, 6, 8, 16, 19, 4):  # the three take turns
                a, b, c = b, c + b & 0xFFFFFFFF, (a - c & 0xFFFFFFFF) ^ _turned(c, by)
    for by in (14, 11, 25, 16, 4, 14, 24):
        a, b, c = b, (c ^ b) - _turned(b, by) & 0xFFFFFFFF, a
    return b


def _turned(value: int, by: int) -> int:
    return (value << by | value >> (32 - by)) & 0xFFFFFFFF
