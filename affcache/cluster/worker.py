"""What runs on the machines of a cluster: an encoder, with a pipeline around it. Ray makes an actor of it."""

import os
import socket
import time
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
import torchvision

import affcache
from affcache.cluster.connection import WorkerSize
from affcache.crops.archives import UnreadableCropError
from affcache.crops.crop_list import CropList
from affcache.errors import AffcacheError, InputError
from affcache.extraction.pipeline import Encoded, ExtractionStats, Pipeline
from affcache.extraction.settings import ExtractSettings
from affcache.extraction.tuning import tune_encoder
from affcache.progress import Listener
from affcache.store.frames import Rows

SAMPLED = 8  # crops


@dataclass(frozen=True)
class CropSample:
    """A few of the driver's crops, by which other machines see whether they have the same."""

    rows: Sequence[int]
    checksums: Sequence[int | None]  # CRC-32 of each one's file; None where it can't be read
    paths: Sequence[Path]  # folders of those crops, and every archive

    @classmethod
    def of(cls, crops: CropList) -> "CropSample":
        """Read a few crops, spread over all."""
        rows = np.unique(np.linspace(0, len(crops) - 1, SAMPLED).astype(np.int64)).tolist()
        archives = {archive.path.absolute() for archive, _ in crops.archived.values()}
        paths = sorted({crops.container(row).absolute() for row in rows} | archives)
        return cls(rows, [_checksum(crops, row) for row in rows], paths)

    def require_paths(self, node: str) -> None:
        """Look for the folders and archives.

        Raises:
            InputError: one can't be seen here.
        """
        for path in self.paths:
            if not os.access(path, os.R_OK):
                raise _refusal(node, f"{path} is not there, or can't be read")

    def require(self, crops: CropList, node: str) -> None:
        """Compare with what this machine reads.

        Raises:
            InputError: another file, or none, is found here where the driver has one.
        """
        for row, expected in zip(self.rows, self.checksums, strict=True):
            if _checksum(crops, row) != expected:
                raise _refusal(node, f"{crops.path(row)} is not the file that the driver has, or can't be read")


def _refusal(node: str, what: str) -> InputError:
    return InputError(
        f"Node {node} doesn't see the crops: {what}. Expected every machine of the cluster to find the same crops "
        "under the same path. Put them on a file system that all of them mount, or copy them to the same place "
        "everywhere, then run the same command again."
    )


def _checksum(crops: CropList, row: int) -> int | None:
    try:
        return zlib.crc32(crops.read(row))
    except (OSError, UnreadableCropError):
        return None


@dataclass(frozen=True)
class Job:
    """What all workers of an extraction have in common. What is large stands as a reference, read once a machine."""

    settings: ExtractSettings
    weights: Any  # reference to Weights
    crops: Any  # reference to CropList
    sample: CropSample
    size: WorkerSize


def versions() -> dict[str, str]:
    """Return what has to be the same on all machines, or embeddings may differ."""
    return {"affcache": affcache.__version__, "torch": torch.__version__, "torchvision": torchvision.__version__}


@dataclass(frozen=True)
class Joined:
    """A worker that is ready."""

    node: str  # the machine's name
    node_id: str  # Ray's
    device: str
    description: Mapping[str, Any]  # of its encoder
    remarks: Sequence[str] = ()  # warnings, for the driver to pass on


@dataclass(frozen=True)
class Reply:
    """A shard that is done."""

    encoded: Encoded  # features (n, D) and status (n,) of the shard's rows
    stats: ExtractionStats  # of this shard
    seconds: float  # that it took
    remarks: Sequence[str] = ()


class Remarks(Listener):
    """Keeps warnings until they can be sent to the driver."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def warning(self, text: str) -> None:
        """Keep one."""
        self.texts.append(text)


class EncodingWorker:
    """Encodes shards: two at a time, of which the second decodes while the first encodes.

    Errors of affcache's own are returned and not raised, as Ray would wrap them.
    """

    def __init__(self) -> None:
        self._node = socket.gethostname()
        self._turn = Lock()
        self._idle_since: float | None = None  # after the first shard
        self._loaded: tuple[Any, ...] | None = None
        self._largest_call = 0  # crops; what the device's memory was found to hold
        warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd metadata in files that it reads well

    def answer(self) -> bool:
        """Say that this process is there."""
        return True

    def join(self, job: Job, recorded: Mapping[str, Any], answer: bool) -> Joined | AffcacheError:
        """Look at the crops, and load the encoder as it was begun with.

        Args:
            job: what to do; not the constructor's, since Ray can't repeat that with references.
            recorded: the description of the encoder; empty for the first worker of a new store.
            answer: what ``answer`` returned: Ray calls this no earlier.
        """
        import ray

        try:
            job.sample.require_paths(self._node)
            crops = ray.get(job.crops)
            job.sample.require(crops, self._node)
            settings = job.settings
            if recorded:  # precision, batch size and compiling are settled then
                settings = replace(settings, precision="auto", batch_size=None, compile="auto")
            remarks = Remarks()
            encoder = tune_encoder(ray.get(job.weights), settings, recorded, remarks)
        except AffcacheError as error:
            return error
        self._loaded = job, crops, encoder
        node_id = ray.get_runtime_context().get_node_id()
        return Joined(self._node, node_id, str(encoder.device), encoder.description, remarks.texts)

    def encode_shard(self, rows: Rows, batch_size: int, mirror: bool) -> Reply | AffcacheError | None:
        """Encode the rows of one shard, int64 (n,); None where this process is new, and the driver doesn't know yet."""
        if self._loaded is None:
            return None
        job, crops, encoder = self._loaded
        stats = ExtractionStats()
        if self._idle_since is not None and not self._turn.locked():  # the driver was busy writing
            stats.seconds["write"] += time.perf_counter() - self._idle_since
        start = time.perf_counter()
        remarks = Remarks()
        workers, cores = job.size.workers, job.size.cores
        pipeline = Pipeline(crops, encoder, remarks, batch_size, workers, mirror, cores, stats, self._largest_call)
        try:
            parts = [encoded for _, encoded in pipeline.run(rows, self._turn)]
        except AffcacheError as error:
            return error
        finally:
            end = time.perf_counter()
            seconds = end - max(start, self._idle_since or start)  # without the wait for its turn
            self._idle_since = end
        self._largest_call = pipeline.largest_call
        features, status = (np.concatenate(of_all) for of_all in zip(*parts, strict=True))
        return Reply((features, status), stats, seconds, remarks.texts)
