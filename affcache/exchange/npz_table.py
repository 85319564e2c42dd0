"""Tables in .npz: arrays of one length in a zip file, read as streams. Nothing is unpickled."""

import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from affcache.errors import InputError
from affcache.exchange.sources import BLOCK, WIDEST, Matrix
from affcache.exchange.table_files import BATCH_BYTES, FRAME, LIST, NUMBER, OBJECTS, TEXT, Batch, TableFile
from affcache.files import open_regular
from affcache.tabular import cannot_read

LARGEST_TRANSPOSED = 2**28  # bytes of an array in Fortran order, which is read as a whole


@dataclass(frozen=True)
class Array:
    """What the header of an array says."""

    member: zipfile.ZipInfo
    shape: tuple[int, ...]
    transposed: bool  # in Fortran order
    dtype: np.dtype[Any]

    @property
    def row_bytes(self) -> int:
        """The bytes of an entry along the first axis."""
        return self.dtype.itemsize * (self.shape[1] if len(self.shape) > 1 else 1)


class NpzTable(TableFile):
    """One-dimensional arrays of numbers or texts, and two-dimensional ones of embeddings."""

    def __init__(self, path: Path) -> None:
        with _damage(path), open_regular(path) as file, zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if len(members) > WIDEST:
                raise ValueError(f"it has {len(members):,} arrays")
            self._arrays = {one.filename.removesuffix(".npy"): _array(archive, one) for one in members}
        self.path, self.kinds = path, {name: _kind(array) for name, array in self._arrays.items()}

    def batches(self, keys: Sequence[str], columns: Sequence[str]) -> Iterator[Batch]:
        """Read some arrays; values are of their type where they are all of one floating-point type, else float64."""
        arrays = [self._arrays[name] for name in (*keys, *columns)]
        lengths = {name: self._arrays[name].shape[0] for name in (*keys, *columns)}
        if len({*lengths.values()}) > 1:
            raise InputError(
                f"The arrays of {self.path} differ in length: {', '.join(f'{n} {c:,}' for n, c in lengths.items())}. "
                "Expected an entry for each frame in all of them. Save them again from the same rows."
            )
        self._require_readable((*keys, *columns))
        kinds = {array.dtype.newbyteorder("<") for array in arrays[len(keys) :]}
        dtype = kinds.pop() if len(kinds) == 1 else np.dtype("f8")
        dtype = dtype if dtype in (np.float16, np.float32) else np.dtype("f8")
        rows = max(1, min(BLOCK, BATCH_BYTES // max(1, sum(array.row_bytes for array in arrays))))
        with _damage(self.path), ExitStack() as stack:
            file = stack.enter_context(open_regular(self.path))
            archive = stack.enter_context(zipfile.ZipFile(file))
            streams = [_blocks(archive, array, rows) for array in arrays]
            for blocks in zip(*streams, strict=True):
                texts = [_key(block, name) for block, name in zip(blocks, keys, strict=False)]
                values = [block.reshape(len(block), -1).astype(dtype) for block in blocks[len(keys) :]]
                yield Batch(texts, np.concatenate(values, axis=1))

    def _require_readable(self, names: Sequence[str]) -> None:
        for name in names:
            array = self._arrays[name]
            if array.row_bytes > BATCH_BYTES:
                raise InputError(
                    f"The array {name} of {self.path} has {array.row_bytes:,} bytes in each row. Expected at most "
                    f"{BATCH_BYTES:,}. Save shorter names, or other features."
                )
            if array.transposed and array.row_bytes * array.shape[0] > LARGEST_TRANSPOSED:
                raise InputError(
                    f"The array {name} of {self.path} is in Fortran order, column after column, and too large to be "
                    f"turned. Expected rows one after the other. Save it as np.ascontiguousarray({name})."
                )


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Say that a file can't be read, whatever numpy and zipfile raise over a damaged one, which is nearly anything."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        raise cannot_read(path, error) from None


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Array:
    with archive.open(member) as stream:
        shape, transposed, dtype = _header(stream)
    if any(length < 0 for length in shape):
        raise ValueError(f"{member.filename} holds {dtype} of shape {shape}")
    return Array(member, shape, transposed and len(shape) > 1, dtype)


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"it has an array of version {version[0]}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(stream)


def _kind(array: Array) -> str:
    dtype, axes = array.dtype, len(array.shape)
    if dtype.hasobject:
        return OBJECTS
    if dtype.kind in "biuf" and axes in (1, 2):
        return NUMBER if axes == 1 else LIST
    return TEXT if dtype.kind == "U" and axes == 1 else f"{dtype} of shape {array.shape}"


def _blocks(archive: zipfile.ZipFile, array: Array, rows: int) -> Iterator[Matrix]:
    """Yield an array in blocks of rows, and see that its bytes end with it, which checks their sum."""
    count = array.shape[0]
    with archive.open(array.member) as stream:
        _header(stream)
        whole = None
        if array.transposed:
            whole = np.frombuffer(_exactly(stream, count * array.row_bytes), array.dtype).reshape(array.shape[::-1]).T
        for first in range(0, count, rows):
            length = min(rows, count - first)
            if whole is not None:
                yield whole[first : first + length]
            else:
                block = np.frombuffer(_exactly(stream, length * array.row_bytes), array.dtype)
                yield block.reshape(length, *array.shape[1:])
        if stream.read(1):
            raise ValueError(f"{array.member.filename} has more bytes than its header says")


def _exactly(stream: IO[bytes], count: int) -> bytes:
    data = stream.read(count)
    if len(data) < count:
        raise EOFError("it is cut short")
    return data


def _key(block: Matrix, name: str) -> list[Any]:
    """Return the values of a key: float of a frame's number, else text."""
    if name in FRAME:
        return block.astype(np.float64).tolist()
    texts = [str(value) for value in block.tolist()]
    "".join(texts).encode()  # raises where half of a pair of surrogates stands alone
    return texts
