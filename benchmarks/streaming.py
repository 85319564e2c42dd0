"""Training on a store larger than memory against training on the same frames in memory.

    python -m benchmarks.streaming                # 60,000 rows of ViT-L width, half of them allowed in memory
    python -m benchmarks.streaming --keep-cached  # leave the file in the page cache

One epoch of ``Learner`` each in turn, the paper's head on a store of random embeddings. Before each streamed epoch the
file's pages are thrown out of the page cache (no root is needed for pages that are written and not mapped), and how
much of the file is cached then is looked at and printed: on a virtual machine the host may still have the rest.

    ratio    of the rates, resident seconds / streamed seconds, of each round; the median of the rounds
    fastest  the same of the fastest epochs: what is left when other programs disturb least
    cpu      the same of processor seconds, all threads
    read     seconds to read all chunks of an epoch without training, from the disk or the cache alike
"""

import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from affcache.devices import describe_machine, resolve_device
from affcache.store.reading import EmbeddingStore
from affcache.tasks.annotations import JoinAccount, JoinedLabels
from affcache.tasks.tasks import TASKS
from affcache.training.data import Frames, FrameSource, StreamedFrames, load_frames
from affcache.training.learner import Learner
from affcache.training.settings import FitSettings
from benchmarks.shared import random_blocks, script_parser, temporary_folder, write_store

PAGE = 4096  # bytes


def evict(path: Path) -> None:
    """Ask the system to forget the file's cached pages."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_share(path: Path, pages: int = 1000) -> float | None:
    """Return the share of some pages, spread over the file, that could be read without the disk; None if unknown."""
    found, page = 0, bytearray(PAGE)
    with path.open("rb") as file:
        offsets = np.linspace(0, path.stat().st_size // PAGE - 1, pages).astype(int) * PAGE
        for offset in offsets.tolist():
            try:
                found += os.preadv(file.fileno(), [page], offset, os.RWF_NOWAIT) > 0
            except BlockingIOError:
                continue
            except OSError:  # a file system that can't say
                return None
    return found / pages


def seconds_of_epoch(learner: Learner, frames: FrameSource) -> tuple[float, float]:
    """Train one epoch; return its seconds on the clock and of processors."""
    start, busy = time.perf_counter(), time.process_time()
    learner.epoch(frames, 1e-3).tolist()  # waits for a GPU
    return time.perf_counter() - start, time.process_time() - busy


def seconds_of_reading(frames: StreamedFrames, batch_size: int) -> float:
    """Take all chunks of an epoch without training; return the seconds."""
    start = time.perf_counter()
    for _ in frames.chunks(torch.randperm(len(frames))[None], batch_size):
        pass
    return time.perf_counter() - start


def measure(path: Path, settings: FitSettings, share: float, rounds: int, keep_cached: bool) -> dict[str, Any]:
    """Train rounds of an epoch each, resident and streamed in turn; return the figures."""
    device, task = resolve_device(settings.device), TASKS["expr"]
    store = EmbeddingStore.open(path)
    labels = np.random.default_rng(1).integers(0, len(task.classes), len(store))
    joined = JoinedLabels(np.arange(len(store)), labels, JoinAccount(used=len(store)))
    limit = int(store.features.nbytes * share)
    streamed = load_frames(store, joined, device, limit)
    assert isinstance(streamed, StreamedFrames)
    resident = Frames.load(EmbeddingStore.open(path), joined, device)  # a map of its own, gone with its pages
    learner = Learner([settings], task, store.width, device)  # for both: where its parameters lie changes its speed
    few = Frames(*(tensor[:2048] for tensor in (resident.embeddings, resident.labels, resident.videos)))
    learner.epoch(few, 1e-3)  # warm up
    turns: list[tuple[str, FrameSource]] = [("resident", resident), ("streamed", streamed)]
    lines: list[dict[str, Any]] = []
    for number in range(rounds):
        line: dict[str, Any] = {}
        for name, frames in turns[:: 1 if number % 2 == 0 else -1]:
            if name == "streamed":
                if not keep_cached:
                    evict(path)
                line["cached"] = cached_share(path)
            line[name], line[f"{name}_cpu"] = seconds_of_epoch(learner, frames)
        if not keep_cached:
            evict(path)
        line["read"] = seconds_of_reading(streamed, settings.batch_size)
        line["ratio"] = line["resident"] / line["streamed"]
        line["cpu_ratio"] = line["resident_cpu"] / line["streamed_cpu"]
        lines.append(line)
    return {
        "ratio": statistics.median(line["ratio"] for line in lines),
        "fastest_ratio": min(line["resident"] for line in lines) / min(line["streamed"] for line in lines),
        "cpu_ratio": statistics.median(line["cpu_ratio"] for line in lines),
        "step_ms": 1e3 * statistics.median(line["streamed"] for line in lines) * settings.batch_size / len(store),
        "bytes": store.features.nbytes,
        "allowed_bytes": limit,
        "chunk_frames": streamed.chunk_frames,
        "rounds": lines,
        "machine": describe_machine(device),
    }


def main() -> None:
    """Measure, and print a table or one JSON object."""
    parser = script_parser(__doc__)
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--share", type=float, default=0.5, help="of the store that may be in memory")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", type=Path, help="where to write the store; a disk, not a file system in memory")
    parser.add_argument("--keep-cached", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    settings = FitSettings(batch_size=arguments.batch_size, device=arguments.device)
    with temporary_folder(arguments.folder) as folder:
        path = Path(folder) / "store.h5"
        write_store(path, arguments.rows, arguments.width, random_blocks(arguments.rows, arguments.width))
        result = measure(path, settings, arguments.share, arguments.rounds, arguments.keep_cached)
    if arguments.json:
        print(
            json.dumps({"rows": arguments.rows, "width": arguments.width, "batch_size": settings.batch_size, **result})
        )
        return
    print(f"{result['bytes'] / 1e6:.0f} MB, {result['allowed_bytes'] / 1e6:.0f} MB of them allowed in memory")
    print("resident s  streamed s  ratio    cpu  cached  read s")
    for line in result["rounds"]:
        cached = "unknown" if line["cached"] is None else f"{line['cached']:.0%}"
        print(
            f"{line['resident']:10.2f}  {line['streamed']:10.2f}  {line['ratio']:5.3f}  {line['cpu_ratio']:5.3f}"
            f"  {cached:>6}  {line['read']:6.2f}"
        )
    print(
        f"ratio {result['ratio']:.3f}, fastest {result['fastest_ratio']:.3f}, cpu {result['cpu_ratio']:.3f}, "
        f"{result['step_ms']:.1f} ms a step"
    )


if __name__ == "__main__":
    main()
