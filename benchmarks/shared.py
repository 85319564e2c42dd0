"""What several benchmarks need: made-up stores, crops spread over a list, and the frame of a script."""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from affcache.crops.crop_list import CropList
from affcache.store.description import fingerprint
from affcache.store.frames import ENCODED
from affcache.store.reading import BLOCK_ROWS
from affcache.store.writing import StoreWriter, create_store

Features = npt.NDArray[np.float16]


def script_parser(documentation: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help is a script's own documentation, lines as they are."""
    return argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)


def temporary_folder(inside: Path | None = None) -> "tempfile.TemporaryDirectory[str]":
    """Return a folder that is gone when the measurement is over."""
    return tempfile.TemporaryDirectory(prefix="affcache-bench-", dir=inside)


def seconds_of(work: Callable[[], None]) -> float:
    """Return how long some work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def one_video(rows: int) -> CropList:
    """Return a list of so many frames of one video, whose crops are never read."""
    return CropList((Path("crops"),), ("video",), np.array([0, rows]), np.arange(rows, dtype=np.int32))


def random_blocks(rows: int, width: int) -> Iterator[Features]:
    """Yield random float16 embeddings (at most BLOCK_ROWS, width) of so many rows, the same every time."""
    random = np.random.default_rng(0)
    for first in range(0, rows, BLOCK_ROWS):
        block = random.standard_normal((min(BLOCK_ROWS, rows - first), width), dtype=np.float32)
        yield block.astype(np.float16)


def write_store(path: Path, rows: int, width: int, blocks: Iterable[Features]) -> None:
    """Write a store of one video from blocks of its embeddings, each committed by itself."""
    create_store(path, one_video(rows), width, {"model": "none"}, fingerprint({"model": "none"}))
    first = 0
    with StoreWriter(path) as writer:
        for block in blocks:
            writer.commit(first, block, np.full(len(block), ENCODED, np.uint8))
            first += len(block)


def spread(rows: int, count: int) -> list[int]:
    """Return so many rows, or all there are, spread evenly over all of them."""
    return np.unique(np.linspace(0, rows - 1, count).astype(int)).tolist()
