"""Writing the embedding store: created whole under a temporary name, then committed in blocks, by one process.

See reading.py for the format and for why committed rows survive a kill.
"""

import errno
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np
import numpy.typing as npt

from affcache.crops.crop_list import CropList
from affcache.errors import StoreError
from affcache.files import DISK_IS_FULL, discard_partials, existing_parent, locked, whole_file
from affcache.progress import Listener
from affcache.store.frames import ENCODED, PENDING, UNREADABLE
from affcache.store.reading import (
    BLOCK_ROWS,
    FORMAT,
    FORMAT_VERSION,
    NUMERIC_DATASETS,
    VIEWS,
    EmbeddingStore,
    block_bounds,
    block_crc,
    index_sha256,
    read_rows,
    view_path,
)

RESERVE_BYTES = 1 << 24
PIECE = 1 << 16  # bytes of a sparse file
CAN_NOT_RESERVE = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)  # said by the file system
PAGE = 4096  # bytes; datasets start on page borders so that they can be memory-mapped


class SparseFile(io.RawIOBase):
    """A file in memory, whose zeros take none, for HDF5 to write to: that swallows errors of a disk, or crashes."""

    def __init__(self) -> None:
        self._pieces: dict[int, bytearray] = {}
        self._at = self._size = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to an offset from the start, from here or from the end; return where that is."""
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def _go(self, length: int) -> Iterator[tuple[bytearray, slice, slice]]:
        """Go on so many bytes; yield each piece met, and which of its and of these bytes are the same."""
        done = 0
        while done < length:
            number, first = divmod(self._at, PIECE)
            count = min(PIECE - first, length - done)
            if number not in self._pieces:
                self._pieces[number] = bytearray(PIECE)
            yield self._pieces[number], slice(first, first + count), slice(done, done + count)
            done, self._at = done + count, self._at + count

    def write(self, data: Any) -> int:
        """Write bytes where the file is; return how many."""
        view = memoryview(data).cast("B")
        for piece, here, there in self._go(len(view)):
            piece[here] = view[there]
        self._size = max(self._size, self._at)
        return len(view)

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer from where the file is; return with how many bytes."""
        view = memoryview(buffer).cast("B")
        for piece, here, there in self._go(len(view)):
            view[there] = piece[here]
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """End the file at a size, or here; return it."""
        self._size = size or self._at
        return self._size

    def copy_to(self, file: IO[bytes]) -> None:
        """Write everything to a new file."""
        for number, piece in self._pieces.items():
            file.seek(number * PIECE)
            file.write(piece)
        file.seek(file.truncate(self._size))


def create_store(path: Path, crops: CropList, width: int, encoder: Mapping[str, Any], encoder_fingerprint: str) -> None:
    """Lay out a new store in which every row is pending, and reserve its room on the disk.

    Args:
        path: where it goes; must not exist. Parent folders are made.
        crops: the N crops, which fix the rows.
        width: D, the number of values in one embedding.
        encoder: what is kept as the store's ``encoder`` attribute.
        encoder_fingerprint: sha256 over the fields of ``encoder`` that change the numbers.

    Raises:
        StoreError: the disk has no room, or the folder can't be written.
    """
    rows = len(crops)
    needed = rows * (width * 2 + 5) + PAGE * 8
    try:
        with whole_file(path) as target:
            if needed > shutil.disk_usage(path.parent).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sparse = SparseFile()
            with h5py.File(sparse, "w", libver="v110", alignment_threshold=1, alignment_interval=PAGE) as file:
                file.attrs["format"] = FORMAT
                file.attrs["format_version"] = FORMAT_VERSION
                file.attrs["encoder"] = json.dumps(encoder, sort_keys=True, separators=(",", ":"))
                file.attrs["encoder_fingerprint"] = encoder_fingerprint
                file.attrs["index_sha256"] = index_sha256(crops.video_names, crops.video_start, crops.frame_number)
                file.create_dataset("video_name", data=list(crops.video_names), dtype=h5py.string_dtype())
                shapes = {
                    "features": (rows, width),
                    "status": (rows,),
                    "frame_number": (rows,),
                    "video_start": (len(crops.video_start),),
                    "block_checksum": (-(-rows // BLOCK_ROWS),),
                }
                for name, dtype in NUMERIC_DATASETS.items():
                    _allocate(file, name, shapes[name], dtype)
                file["frame_number"][:] = crops.frame_number
                file["video_start"][:] = crops.video_start
            sparse.copy_to(target)
            _reserve(target)
    except OSError as error:
        if error.errno in DISK_IS_FULL:
            free = shutil.disk_usage(existing_parent(path)).free
            raise StoreError(
                f"No space for the store {path}: {rows:,} rows of {width} values need {needed / 1e9:.3f} GB, "
                f"{free / 1e9:.3f} GB are free. Free some space, or choose another disk with --store FILE."
            ) from None
        raise _cannot_write(path, error) from None


def _cannot_write(path: Path, error: OSError) -> StoreError:
    return StoreError(
        f"The store {path} can't be written: {error.strerror or error}. Expected a folder that can be written. "
        "Choose another place with --store FILE."
    )


def _allocate(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Create a contiguous dataset whose bytes exist from the start, all zero."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)  # the reserved room reads as zeros already
    properties.set_obj_track_times(False)  # the same crops and encoder give the same bytes
    space = h5py.h5s.create_simple(shape)
    h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(dtype), space, properties)


def _reserve(file: IO[bytes]) -> None:
    """Make the file system set every byte aside now, so that a disk fills at the start or not at all."""
    file.flush()
    size = os.fstat(file.fileno()).st_size
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in CAN_NOT_RESERVE:
            raise
        for offset in range(0, size, RESERVE_BYTES):  # can't reserve: write every byte again as it is
            file.seek(offset)
            contents = file.read(RESERVE_BYTES)
            file.seek(offset)
            file.write(contents)


@contextmanager
def writing_lock(path: Path, listener: Listener) -> Iterator[None]:
    """Hold the right to create or write the store at ``path``; the system lets go of it when the process ends.

    Raises:
        StoreError: another process holds it, or it isn't a file.
        InputError: the folder can't be written.
    """
    if path.exists() and not path.is_file():
        raise StoreError(
            f"{path} is {'a folder' if path.is_dir() else 'no file'}. Expected a store, or a new file's name. Choose "
            "another place with --store FILE."
        )
    refusal = StoreError(
        f"{path} is being written by another process. Wait until that is done, or stop it and run the same "
        "command again: it continues at the last committed row. To extract something else at the same time, "
        "choose another --store FILE."
    )
    with locked(path.with_name(path.name + ".lock"), refusal, listener):
        for one in (path, *(view_path(path, view) for view in VIEWS)):
            discard_partials(one)
        yield


def all_finite(features: npt.NDArray[np.float16]) -> bool:
    """Say whether no value is nan or inf: by their bits, which takes a tenth of the time of ``np.isfinite``."""
    without_sign = features.view(np.uint16) & 0x7FFF
    return not features.size or int(without_sign.max()) < 0x7C00  # an exponent of ones


class StoreWriter(AbstractContextManager["StoreWriter"]):
    """Commits encoded rows to a store that ``create_store`` made. Use it as a context manager, under writing_lock."""

    def __init__(self, path: Path) -> None:
        self.store = EmbeddingStore.open(path)
        try:
            self._file = path.open("r+b", buffering=0)
        except OSError as error:
            raise _cannot_write(path, error) from None

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def pending_rows(self) -> npt.NDArray[np.int64]:
        """Return the rows that are still to be encoded, in order."""
        return np.flatnonzero(self.store.status == PENDING)

    def commit(self, first_row: int, features: npt.NDArray[np.float16], status: npt.NDArray[np.uint8]) -> None:
        """Make n consecutive rows durable: features, flushed; then their status, flushed; then finished checksums.

        Args:
            first_row: the first of the n rows.
            features: float16 (n, D), finite; zero where a row is unreadable.
            status: uint8 (n,), each 1 (encoded) or 2 (unreadable).

        Raises:
            StoreError: an embedding is not finite in float16, or the disk refuses the write.
        """
        assert features.shape == (len(status), self.store.width)
        assert np.isin(status, (ENCODED, UNREADABLE)).all()
        if not all_finite(features):
            row = first_row + int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])
            raise StoreError(
                f"The embedding of row {row} is not finite in float16. The encoder's weights or its precision are at "
                "fault: try --precision fp32, or another --model."
            )
        last_row = first_row + len(status)
        self._write(self.store.features, features.astype("<f2", copy=False), first_row)
        self._write(self.store.status, status, first_row)
        for block in range(first_row // BLOCK_ROWS, -(-last_row // BLOCK_ROWS)):
            self._finish_block(block)

    def reopen_unreadable(self) -> int:
        """Mark every unreadable row as pending again, and return how many there were."""
        rows = np.flatnonzero(self.store.status == UNREADABLE)
        if len(rows):
            checksums, status = np.array(self.store.block_checksum), np.array(self.store.status)
            checksums[rows // BLOCK_ROWS], status[rows] = 0, PENDING
            self._write(self.store.block_checksum, checksums, 0)
            self._write(self.store.status, status, 0)
        return len(rows)

    def finish_checksums(self) -> None:
        """Write checksums that a kill between a block's last status and its checksum left out."""
        for block in np.flatnonzero(self.store.block_checksum == 0):
            self._finish_block(int(block))

    def _finish_block(self, block: int) -> None:
        first, last = block_bounds(block, len(self.store))
        if (self.store.status[first:last] != PENDING).all():
            checksum = block_crc(read_rows(self._file, self.store.features, first, last))
            self._write(self.store.block_checksum, np.array([checksum], "<u4"), block)

    def _write(self, target: npt.NDArray[Any], values: npt.NDArray[Any], first: int) -> None:
        """Write values over target[first:...] and wait until they are on the disk."""
        assert isinstance(target, np.memmap)
        bytes_per_entry = target.strides[0]
        try:
            self._file.seek(target.offset + first * bytes_per_entry)
            remaining = np.ascontiguousarray(values).view(np.uint8).data.cast("B")
            while remaining:
                remaining = remaining[self._file.write(remaining) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise StoreError(
                f"Writing to {self.store.path} failed: {error.strerror or error}. Rows committed before are safe: "
                "make room or reconnect the disk, then run the same command again."
            ) from None
