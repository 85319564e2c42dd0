"""Reading and writing a store against the bare file, and against the chunked HDF5 that others keep embeddings in."""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import torch

from affcache.devices import describe_machine
from affcache.progress import Listener, Result
from affcache.settings import build
from affcache.store.reading import BLOCK_ROWS, EmbeddingStore
from benchmarks.settings import BenchStoreSettings
from benchmarks.shared import temporary_folder, write_store

READ_ROWS = 4096  # rows of one random read

Read = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float16]]


@dataclass(frozen=True)
class BenchStoreResult(Result):
    """Rates of a store and of other ways to keep the same matrix; medians over rounds in which each took its turn."""

    rate: float  # rows per second, random sorted reads of 4,096 rows from the store
    bare: float  # the same from a plain numpy.memmap
    ratio: float
    unit: str
    random: dict[str, float]  # layout -> milliseconds for 4,096 random rows
    sequential: dict[str, float]  # layout -> GB per second, reading all rows in order
    write: dict[str, float]  # layout -> GB per second, in blocks of 4,096 rows, each flushed to the disk
    rows: int
    width: int
    machine: dict[str, Any]


def bench_store(
    settings: BenchStoreSettings | None = None, /, *, listener: Listener | None = None, **values: Any
) -> BenchStoreResult:
    """Measure a store's sequential and random reads, and its writes, against plain files and chunked HDF5.

    Everything is read once before it is measured, so that the page cache holds it, as in training.

    Raises:
        StoreError: the disk has no room.
    """
    settings = build(BenchStoreSettings, values, over=settings)
    listener = listener or Listener()
    matrix = np.random.default_rng(0).standard_normal((settings.rows, settings.width), dtype=np.float32)
    features = matrix.astype(np.float16)
    del matrix
    with temporary_folder(settings.folder) as folder:
        listener.message(f"writing {features.nbytes / 1e9:.2f} GB four times over to {folder}")
        write = {
            "store": _write_store(Path(folder) / "store.h5", features),
            "plain file": _write_plain(Path(folder) / "plain.npy", features),
            "HDF5, chunks of 4,096 rows": _write_chunked(Path(folder) / "blocks.h5", features, BLOCK_ROWS),
            "HDF5, chunks of 16 rows": _write_chunked(Path(folder) / "rows.h5", features, 16),
        }
        store = EmbeddingStore.open(Path(folder) / "store.h5")
        plain = np.load(Path(folder) / "plain.npy", mmap_mode="r")
        with h5py.File(Path(folder) / "blocks.h5") as blocks, h5py.File(Path(folder) / "rows.h5") as rows:
            readers: dict[str, Read] = {
                "store": lambda wanted: store.features[wanted],
                "numpy.memmap": lambda wanted: plain[wanted],
                "HDF5, chunks of 4,096 rows": lambda wanted: blocks["features"][wanted],
                "HDF5, chunks of 16 rows": lambda wanted: rows["features"][wanted],
            }
            arrays = {"store": store.features, "numpy.memmap": plain}
            arrays |= {name: file["features"] for name, file in zip(list(readers)[2:], (blocks, rows), strict=True)}
            sequential = {name: _sequential(array, features.nbytes) for name, array in arrays.items()}
            random = _random(readers, settings, listener)
    return BenchStoreResult(
        rate=READ_ROWS / statistics.median(random["store"]),
        bare=READ_ROWS / statistics.median(random["numpy.memmap"]),
        ratio=statistics.median(
            plain / ours for ours, plain in zip(random["store"], random["numpy.memmap"], strict=True)
        ),
        unit="rows/s",
        random={name: statistics.median(seconds) * 1e3 for name, seconds in random.items()},
        sequential=sequential,
        write=write,
        rows=settings.rows,
        width=settings.width,
        machine=describe_machine(torch.device("cpu")),
    )


def _random(readers: dict[str, Read], settings: BenchStoreSettings, listener: Listener) -> dict[str, list[float]]:
    """Time random reads, each layout in turn with the same rows."""
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    generator = np.random.default_rng(1)
    for done in range(settings.reads):
        wanted = np.sort(generator.choice(settings.rows, min(READ_ROWS, settings.rows), replace=False))
        for name, read in readers.items():
            start = time.perf_counter()
            read(wanted)
            seconds[name].append(time.perf_counter() - start)
        listener.progress(done + 1, settings.reads, "read")
    return seconds


def _sequential(array: Any, size: int) -> float:
    """Return GB per second of reading all rows in blocks; the second pass, since the first fills the page cache."""
    for _ in range(2):
        start = time.perf_counter()
        for first in range(0, len(array), BLOCK_ROWS):
            block = array[first : first + BLOCK_ROWS]
            if not block.flags.owndata:  # a map's rows are read as they are copied; HDF5 has copied them already
                block.copy()
        seconds = time.perf_counter() - start
    return size / seconds / 1e9


def _write_store(path: Path, features: npt.NDArray[np.float16]) -> float:
    start = time.perf_counter()
    blocks = (features[first : first + BLOCK_ROWS] for first in range(0, len(features), BLOCK_ROWS))
    write_store(path, len(features), features.shape[1], blocks)
    return features.nbytes / (time.perf_counter() - start) / 1e9


def _write_plain(path: Path, features: npt.NDArray[np.float16]) -> float:
    start = time.perf_counter()
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=features.shape)
    for first in range(0, len(features), BLOCK_ROWS):
        array[first : first + BLOCK_ROWS] = features[first : first + BLOCK_ROWS]
        array.flush()
    return features.nbytes / (time.perf_counter() - start) / 1e9


def _write_chunked(path: Path, features: npt.NDArray[np.float16], chunk: int) -> float:
    start = time.perf_counter()
    with h5py.File(path, "w") as file:
        chunks = (min(chunk, len(features)), features.shape[1])
        dataset = file.create_dataset("features", features.shape, features.dtype, chunks=chunks)
        for first in range(0, len(features), BLOCK_ROWS):
            dataset[first : first + BLOCK_ROWS] = features[first : first + BLOCK_ROWS]
            file.flush()
            with path.open("rb") as flushed:
                os.fsync(flushed.fileno())
    return features.nbytes / (time.perf_counter() - start) / 1e9
