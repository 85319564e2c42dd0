"""The embedding store, format 1: one HDF5 file, laid out whole at creation, read through a memory map.

After creation nothing in the file moves. The writer changes bytes inside contiguous datasets only, through plain file
writes at their offsets, so a killed process leaves a file that opens, and the rows it had committed. HDF5 itself
writes just once, into a temporary file that is renamed when it is whole.
"""

import hashlib
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt

from affcache.errors import StoreError
from affcache.files import open_regular
from affcache.store.description import fingerprint
from affcache.store.frames import PENDING, UNREADABLE, FrameIndex, Rows
from affcache.store.hdf5 import TEXT, StoreFile

FORMAT = "affcache-embeddings"
FORMAT_VERSION = 1
NUMERIC_DATASETS: dict[str, np.dtype[Any]] = {
    "features": np.dtype("<f2"),
    "status": np.dtype("u1"),
    "frame_number": np.dtype("<i4"),
    "video_start": np.dtype("<i8"),
    "block_checksum": np.dtype("<u4"),
}
BLOCK_ROWS = 4096  # rows under one checksum
VIEWS = ("flip",)  # further matrices that may lie beside a store


def mapped_fields(path: Path) -> dict[str, Any]:
    """Read the structure of a store file, check that every byte it promises is there, and map its arrays.

    Returns:
        The fields of an ``EmbeddingStore``, but for its path; raises as ``EmbeddingStore.open``.
    """
    if not path.is_file():
        raise StoreError(
            f"There is no embedding store at {path}. Make one with 'affcache extract --store {path}', or say where "
            'it is with --store FILE or with store = "..." in affcache.toml.'
        )
    try:
        with open_regular(path) as file:
            found = StoreFile(file)
            _check_format(path, found.attributes)
            places = {name: found.dataset(name) for name in NUMERIC_DATASETS}
            names = found.texts(found.dataset("video_name"))
            _check_shapes({name: (place.kind, place.shape) for name, place in places.items()}, len(names))
        encoder, sha256 = found.attributes["encoder"], found.attributes["encoder_fingerprint"]
        index = found.attributes.get("index_sha256", "")  # the oldest stores lack it
        fields = {"video_names": names, "encoder": json.loads(str(encoder)), "encoder_fingerprint": str(sha256)}
        if not isinstance(fields["encoder"], dict) or (index and fingerprint(fields["encoder"]) != sha256):
            raise ValueError("the description of its encoder doesn't match its fingerprint")
    except PermissionError as error:
        raise StoreError(
            f"The store {path} can't be opened: {error.strerror}. Expected a file that may be read. Give yourself the "
            "right to read it, or name another with --store FILE."
        ) from None
    except (OSError, KeyError, IndexError, ValueError, TypeError, RecursionError, struct.error) as error:
        raise StoreError(
            f"{path} can't be read as an embedding store: it is cut short, damaged or no store at all "
            f"({type(error).__name__}: {error}). Check the path. Restore the store from a sound copy, or delete it and "
            "extract again."
        ) from None
    maps = {
        name: np.memmap(path, NUMERIC_DATASETS[name], "r", place.offset, place.shape) for name, place in places.items()
    }
    return {**maps, **fields, "index_sha256": str(index)}


def _check_format(path: Path, attributes: Mapping[str, object]) -> None:
    found, version = attributes.get("format"), attributes.get("format_version")
    if found != FORMAT:
        raise StoreError(
            f"{path} is an HDF5 file but no embedding store: its attribute 'format' is {found!r}, expected "
            f"{FORMAT!r}. Make a store with 'affcache extract --store FILE'."
        )
    if version != FORMAT_VERSION:
        raise StoreError(
            f"{path} has store format version {version}; this affcache reads version {FORMAT_VERSION}. Use the "
            "affcache version that wrote it, or delete it and extract again."
        )


def _check_shapes(found: Mapping[str, tuple[str, tuple[int, ...]]], videos: int) -> None:
    """Raise ValueError unless the datasets are of the format's types, and of lengths that belong together."""
    rows = found["status"][1][0]
    lengths = {
        "status": rows,
        "frame_number": rows,
        "video_start": videos + 1,
        "block_checksum": -(-rows // BLOCK_ROWS),
    }
    for name, (kind, shape) in found.items():
        expected = shape == (lengths[name],) if name in lengths else len(shape) == 2 and shape[0] == rows
        if np.dtype(kind if kind != TEXT else "O") != NUMERIC_DATASETS[name] or not expected:
            raise ValueError(f"{name} is {kind} of shape {shape}, for {rows:,} rows and {videos:,} videos")


@dataclass(frozen=True)
class EmbeddingStore(FrameIndex):
    """A store opened for reading. The arrays are read-only memory maps; nothing is loaded until it is used.

    A row is there for every crop that was found, also for one that cannot be read (status 2, features zero).
    """

    features: npt.NDArray[np.float16]  # (N, D) raw encoder output, not normalised
    block_checksum: npt.NDArray[np.uint32]  # (ceil(N / 4096),) CRC-32 of finished blocks of features, 0 while pending
    encoder: dict[str, Any]  # how the embeddings were made
    encoder_fingerprint: str  # sha256 over the fields of ``encoder`` that change the numbers
    index_sha256: str = ""  # over video names, borders and frame numbers; empty in stores that were made without it

    @classmethod
    def open(cls, path: Path | str) -> "EmbeddingStore":
        """Open a store for reading, finished or not.

        Raises:
            StoreError: no such file, not a store, of another format version, or cut short.
        """
        return cls(Path(path), **mapped_fields(Path(path)))

    def __repr__(self) -> str:
        counts = ", ".join(f"{count:,} {name}" for name, count in self.counts.items() if count)
        videos, model = len(self.video_names), self.encoder.get("model", "unknown")
        return f"<EmbeddingStore {self.path}: {counts} of {len(self):,} x {self.width}, videos: {videos:,}, by {model}>"

    @property
    def width(self) -> int:
        """D, the number of values in one embedding."""
        return self.features.shape[1]

    @property
    def counts(self) -> dict[str, int]:
        """Rows per status: pending, encoded, unreadable."""
        pending, encoded, unreadable = np.bincount(self.status, minlength=3)[:3]
        return {"pending": int(pending), "encoded": int(encoded), "unreadable": int(unreadable)}

    @property
    def parts(self) -> "tuple[EmbeddingStore, ...]":
        """The stores whose embeddings stand side by side: of one, itself."""
        return (self,)

    def read(self, rows: Rows) -> npt.NDArray[np.float16]:
        """Return the embeddings (n, D) of some rows, as stored."""
        return np.asarray(self.features[rows])

    def fingerprint(self) -> str:
        """Return a sha256 over what the store holds: encoder, index, statuses and block checksums."""
        digest = hashlib.sha256(self.encoder_fingerprint.encode())
        digest.update("\n".join(self.video_names).encode())
        for array in (self.video_start, self.frame_number, self.status, self.block_checksum):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def summary(self) -> dict[str, Any]:
        """Return what the store holds and how it was made, as one JSON object."""
        return {
            "store": str(self.path),
            "format_version": FORMAT_VERSION,
            "rows": len(self),
            "width": self.width,
            "videos": len(self.video_names),
            **self.counts,
            "bytes": self.path.stat().st_size,
            "complete": self.counts["pending"] == 0 and bool(self.block_checksum.all()),
            "views": self.views,
            "encoder_fingerprint": self.encoder_fingerprint,
            "encoder": self.encoder,
        }

    @property
    def views(self) -> list[str]:
        """The names of the further views that lie beside this store, such as "flip"."""
        return [name for name in VIEWS if view_path(self.path, name).is_file()]

    def view(self, name: str) -> "EmbeddingStore":
        """Open the matrix of another view of the same crops, such as "flip", which lies beside this store.

        Raises:
            StoreError: there is none, or it is of other crops or another encoder.
        """
        path = view_path(self.path, name)
        if not path.is_file():
            raise StoreError(
                f"{self.path} has no view {name!r}: expected it in {path}. Make it with the command that made the "
                f"store, and --view {name}."
            )
        other = EmbeddingStore.open(path)
        plain = {key: value for key, value in other.encoder.items() if key != "view"}
        same_encoder = fingerprint(plain) == self.encoder_fingerprint and other.encoder.get("view") == name
        same_frames = (
            self.video_names == other.video_names
            and np.array_equal(self.video_start, other.video_start)
            and np.array_equal(self.frame_number, other.frame_number)
        )
        unlike = same_frames and (self.status != other.status) & (self.status != PENDING) & (other.status != PENDING)
        if same_encoder and np.any(unlike):
            raise StoreError(
                f"{path} has embeddings of other crops than {self.path}: one has some that the other couldn't read. "
                f"Expected both of the same. Run the command that made the store again, with --view {name} and "
                "--retry-unreadable."
            )
        if not (same_encoder and same_frames):
            raise StoreError(
                f"{path} is no view of {self.path}: it is of other crops or another encoder. Delete it, and make it "
                f"with the command that made the store, and --view {name}."
            )
        return other

    def require_complete(self, remark: str = "") -> None:
        """Raise StoreError unless every row is encoded or known to be unreadable, and summed. Reads no features."""
        if (self.status > UNREADABLE).any():
            raise StoreError(
                f"{self.path} is corrupt: a row has status {self.status.max()}, expected 0, 1 or 2. The disk or a copy "
                "damaged the file. Delete it and extract again, or restore it from a sound copy."
            )
        pending, unsummed = self.counts["pending"], int((self.block_checksum == 0).sum())
        if pending or unsummed:
            left = f"{pending:,} of {len(self):,} rows are still to be encoded"
            if not pending:  # killed between a block's last status and its checksum
                left = f"the checksums of {unsummed:,} of {len(self.block_checksum):,} blocks are still to be written"
            raise StoreError(
                f"{self.path} is incomplete: {left}.{remark} An extraction is running on it, or one was interrupted: "
                "run the same 'affcache extract' again and it continues where it stopped."
            )

    def verify(self, on_block: Callable[[int, int], None] | None = None) -> None:
        """Read everything and check it.

        Args:
            on_block: called with (blocks read, blocks in all) after each block.

        Raises:
            StoreError: names the first bad block: features that don't match their checksum, rows with an impossible
                status, an unreadable row that isn't zero. Else, when rows are still pending, says how many, and how
                many blocks are whole.
        """
        self._verify_index()
        whole = 0
        with self.path.open("rb", buffering=0) as file:
            for block, checksum in enumerate(self.block_checksum):
                first, last = block_bounds(block, len(self))
                features = read_rows(file, self.features, first, last)
                problem = problem_of_block(features, self.status[first:last], int(checksum))
                if problem:
                    raise StoreError(
                        f"{self.path}: block {block} (rows {first} to {last - 1}) is corrupt: {problem}. The disk or a "
                        "copy damaged the file. Delete it and extract again, or restore it from a sound copy."
                    )
                whole += bool(checksum and (self.status[first:last] != PENDING).all())
                if on_block is not None:
                    on_block(block + 1, len(self.block_checksum))
        self.require_complete(f" No damage was found, and {whole:,} of {len(self.block_checksum):,} blocks are whole.")

    def _verify_index(self) -> None:
        starts = self.video_start
        sound = starts[0] == 0 and starts[-1] == len(self) and (np.diff(starts) > 0).all()
        within_video = np.ones(len(self), dtype=bool)
        if sound:
            within_video[starts[:-1]] = False
            sound = bool((np.diff(self.frame_number)[within_video[1:]] > 0).all() and (self.frame_number >= 0).all())
        if self.index_sha256:
            sound = sound and self.index_sha256 == index_sha256(self.video_names, starts, self.frame_number)
        if not sound or len(starts) != len(self.video_names) + 1:
            raise StoreError(
                f"{self.path}: the index of videos and frames is corrupt (rows must be grouped by video, frame "
                "numbers rising). Delete the file and extract again, or restore it from a sound copy."
            )


def index_sha256(
    video_names: Sequence[str], video_start: npt.NDArray[np.int64], frame_number: npt.NDArray[np.int32]
) -> str:
    """Return a sha256 over what says which row is which frame."""
    digest = hashlib.sha256("\n".join(video_names).encode())
    digest.update(np.ascontiguousarray(video_start, dtype="<i8").tobytes())
    digest.update(np.ascontiguousarray(frame_number, dtype="<i4").tobytes())
    return digest.hexdigest()


def view_path(path: Path, view: str) -> Path:
    """Return where the matrix of another view lies beside a store: faces.h5 and "flip" give faces.flip.h5."""
    return path.with_name(f"{path.stem}.{view}{path.suffix}")


def read_rows(file: RawIOBase, features: npt.NDArray[np.float16], first: int, last: int) -> npt.NDArray[np.float16]:
    """Read rows first:last of the memory-mapped features through the file instead.

    Pages of a map count as the process's memory; a whole store read that way would look like gigabytes in use.
    """
    assert isinstance(features, np.memmap)
    file.seek(features.offset + first * features.strides[0])
    rows = np.empty((last - first, features.shape[1]), dtype="<f2")
    view = memoryview(rows.view(np.uint8).data).cast("B")
    while view:
        count = file.readinto(view)
        if not count:
            raise StoreError(f"{features.filename} is cut short. Copy it again, or delete it and extract again.")
        view = view[count:]
    return rows


def problem_of_block(features: npt.NDArray[np.float16], status: npt.NDArray[np.uint8], checksum: int) -> str:
    """Say what is wrong with a block's rows, or nothing. A checksum of 0 is still to be written, and says nothing."""
    if (status > UNREADABLE).any():
        return f"a row has status {status.max()}, expected 0, 1 or 2"
    if features[status == UNREADABLE].any():
        return "a row that is marked unreadable holds features"
    if checksum and (status != PENDING).all() and block_crc(features) != checksum:
        return "its features don't match their checksum"
    return ""


def block_bounds(block: int, rows: int) -> tuple[int, int]:
    """Return the first row of a checksum block and the row after its last one."""
    return block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, rows)


def block_crc(features: npt.NDArray[np.float16]) -> int:
    """CRC-32 over one block's little-endian float16 bytes; a sum of 0, which means pending, is kept as 1."""
    return crc32(np.ascontiguousarray(features, dtype="<f2").view(np.uint8).data) or 1
