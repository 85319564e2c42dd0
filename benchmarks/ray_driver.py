"""How many blocks a second the driver of a cluster takes: workers that make up embeddings in no time, and the disk.

    python -m benchmarks.ray_driver --rows 400000 --actors 2 --folder /scratch

Three rates, in turn, in one run: a plain file written and flushed once, which is the bare limit; the store filled from
memory, without Ray; and the store filled by a driver whose workers only make arrays up.
"""

import os
import socket
import statistics
from collections.abc import Generator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from affcache.cluster.connection import WorkerSize, connected
from affcache.cluster.encoding import ClusterEncoding
from affcache.cluster.pool import WorkerPool
from affcache.cluster.worker import Joined, Reply
from affcache.extraction.extract import write_embeddings
from affcache.extraction.pipeline import Encoded, ExtractionStats
from affcache.progress import Listener
from affcache.store.description import fingerprint
from affcache.store.frames import Rows
from affcache.store.reading import BLOCK_ROWS
from affcache.store.writing import StoreWriter, create_store
from benchmarks.shared import one_video, script_parser, seconds_of, temporary_folder

DESCRIPTION: dict[str, Any] = {"model": "stand-in", "precision": "fp32", "batch_size": 256, "compiled": False}


class StandInWorker:
    """Answers as a worker does, without crops and without an encoder."""

    def answer(self) -> bool:
        """Say that the process has started."""
        return True

    def join(self, width: int, recorded: Any, answer: bool) -> Joined:
        """Make up a block of embeddings."""
        self._features = np.random.default_rng(0).normal(size=(BLOCK_ROWS, width)).astype(np.float16)
        return Joined(socket.gethostname(), "", "cpu", {**DESCRIPTION, "width": width})

    def encode_shard(self, rows: Rows, batch_size: int, mirror: bool) -> Reply:
        """Return as many of them as there are rows; fast enough to be given whole blocks."""
        status = np.ones(len(rows), np.uint8)
        return Reply((self._features[: len(rows)], status), ExtractionStats(), 1e-3)


@dataclass
class FromMemory:
    """Yields made-up blocks in this process."""

    width: int
    stats: ExtractionStats = field(default_factory=ExtractionStats)

    def run(self, pending: Rows) -> Generator[tuple[Rows, Encoded], None, None]:
        """Yield a block at a time."""
        features = np.random.default_rng(0).normal(size=(BLOCK_ROWS, self.width)).astype(np.float16)
        for first in range(0, len(pending), BLOCK_ROWS):
            rows = pending[first : first + BLOCK_ROWS]
            yield rows, (features[: len(rows)], np.ones(len(rows), np.uint8))

    def note(self) -> str:
        """Return nothing."""
        return ""

    def bottleneck(self) -> str:
        """Return nothing."""
        return ""


def main() -> None:
    """Measure, and print medians over the rounds."""
    parser = script_parser(__doc__)
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None)
    given = parser.parse_args()
    crops = one_video(given.rows)
    seconds: dict[str, list[float]] = {"plain file": [], "store from memory": [], "store from Ray": []}
    with connected(None, 2**30, Listener()) as ray:
        size = WorkerSize("cpu", 1 / given.actors, 1)
        pool = WorkerPool(ray, ray.remote(StandInWorker), given.width, size, given.actors, {}, Listener())
        while pool.joining:
            pool.take_join(ray.wait(pool.joining, num_returns=1)[0][0])
        for _ in range(given.rounds):
            with temporary_folder(given.folder) as folder:
                path = Path(folder) / "plain"
                seconds["plain file"].append(seconds_of(partial(write_plainly, path, given.rows, given.width)))
            encoding = ClusterEncoding(pool, DESCRIPTION["batch_size"], mirror=False)
            for name, source in (("store from memory", FromMemory(given.width)), ("store from Ray", encoding)):
                with temporary_folder(given.folder) as folder:
                    path = Path(folder) / "store.h5"
                    create_store(path, crops, given.width, DESCRIPTION, fingerprint(DESCRIPTION))
                    with StoreWriter(path) as writer:
                        pending = writer.pending_rows()
                        seconds[name].append(seconds_of(partial(write_embeddings, writer, source, pending, Listener())))
    for name, taken in seconds.items():
        rate = given.rows / statistics.median(taken)
        each = ", ".join(f"{one:.2f}" for one in taken)
        print(f"{name}: {rate / BLOCK_ROWS:.1f} blocks/s, {rate:,.0f} crops/s, {rate * given.width * 2 / 1e9:.2f} GB/s")
        print(f"    seconds: {each}")


def write_plainly(path: Path, rows: int, width: int) -> None:
    """Write as many bytes as a store's features are, block by block, and flush them once."""
    block = np.random.default_rng(0).normal(size=(BLOCK_ROWS, width)).astype(np.float16).tobytes()
    with path.open("wb", buffering=0) as file:
        for _ in range(rows // BLOCK_ROWS):
            file.write(block)
        os.fsync(file.fileno())


if __name__ == "__main__":
    main()
