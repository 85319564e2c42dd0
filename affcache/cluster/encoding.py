"""Encoding in a cluster: shards of pending rows go to workers, and come back in whatever order they finish."""

from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from types import ModuleType
from typing import Any

import numpy as np
import torch

from affcache.cluster.connection import (
    Node,
    Travelling,
    WorkerSize,
    connected,
    living_nodes,
    require_handed_out,
    require_ray,
    result_or_loss,
    worker_size,
)
from affcache.cluster.pool import SHARDS_A_WORKER, Worker, WorkerPool
from affcache.cluster.worker import CropSample, EncodingWorker, Job, Reply, versions
from affcache.crops.crop_list import CropList
from affcache.encoders.encoder import Weights
from affcache.errors import AffcacheError, ConfigError, InputError, first_line
from affcache.extraction.pipeline import Encoded, Encoding, Engine, ExtractionStats, bottleneck, consecutive_batches
from affcache.extraction.settings import ExtractSettings
from affcache.extraction.tuning import load_wanted
from affcache.progress import Listener, counted
from affcache.store.frames import Rows
from affcache.store.reading import BLOCK_ROWS

SECONDS_A_SHARD = 10.0  # what a lost worker costs, at most about twice this: it has two
SHARES_OF_REST = 4  # towards the end shards become smaller, so that no worker is left with much
SECONDS_TO_WAIT = 1.0
MOST_LOSSES = 5  # of the workers that had the same shard: then the shard is to blame
STAYS = ("onnx:", "python:")  # encoders that other machines wouldn't find
ROOM_FOR_REPLIES = 2**30  # bytes of shared memory, of which the list of crops takes some too


@dataclass
class Shard:
    """Rows of one block of the store, for one worker: whole batches, of a size that suits it."""

    rows: Rows  # (n,) rising
    losses: int = 0  # workers that were lost while they had it


class ShardQueue:
    """What is still to be handed out. Batches are those of an extraction in one process, and so are their bits."""

    def __init__(self, pending: Rows, batch_size: int) -> None:
        self.left = len(pending)  # rows that nobody has
        self._batches = consecutive_batches(pending, batch_size)
        self._next: Rows | None = next(self._batches, None)
        self._given_back: deque[Shard] = deque()

    def take(self, rows: int) -> Shard | None:
        """Take about so many rows, at least one batch, at most what is left of a block; None when nothing is left.

        What was given back comes first, as large as it was.
        """
        if self._given_back:
            shard = self._given_back.popleft()
        elif self._next is None:
            return None
        else:
            block = self._next[0] // BLOCK_ROWS
            taken: list[Rows] = []
            while self._next is not None and self._next[0] // BLOCK_ROWS == block and sum(map(len, taken)) < rows:
                taken.append(self._next)
                self._next = next(self._batches, None)
            shard = Shard(np.concatenate(taken))
        self.left -= len(shard.rows)
        return shard

    def give_back(self, shard: Shard, *, lost: bool) -> None:
        """Put a shard that wasn't encoded at the front; ``lost`` when the worker that had it is gone.

        Raises:
            InputError: it was lost too often.
        """
        shard.losses += lost
        if shard.losses >= MOST_LOSSES:
            raise InputError(
                f"{shard.losses} workers in turn were lost while they encoded rows {shard.rows[0]} to "
                f"{shard.rows[-1]}. Expected a worker to survive any crop: see its log in Ray's session folder, or "
                "whether it ran out of memory. What is encoded is kept; the same command continues."
            )
        self.left += len(shard.rows)
        self._given_back.append(shard)


@dataclass
class ClusterEncoding(Encoding):
    """Crops of one view, being encoded by a pool of workers."""

    pool: WorkerPool
    batch_size: int
    mirror: bool
    stats: ExtractionStats = field(default_factory=ExtractionStats)

    def run(self, pending: Rows) -> Generator[tuple[Rows, Encoded], None, None]:
        """Yield consecutive rows with float16 features (n, D) and status (n,), as shards come back.

        No shard is handed out while the caller is busy with one: what is in flight is bounded, and so is memory.

        Args:
            pending: int64 (n,), rising.

        Raises:
            InputError: the last worker lost sight of the crops, or a shard ended every worker that had it.
            ConfigError: no worker has room for a crop in its GPU's memory.
        """
        queue = ShardQueue(pending, self.batch_size)
        in_flight: dict[Any, tuple[Shard, Worker]] = {}
        while queue.left or in_flight:
            self.pool.tend()
            self._hand_out(queue, in_flight)
            waited_for = [*self.pool.joining, *in_flight]  # in this order: shards could keep a new worker waiting
            done, _ = self.pool.ray.wait(waited_for, num_returns=1, timeout=SECONDS_TO_WAIT)
            for reference in done:
                if reference not in in_flight:
                    self.pool.take_join(reference)
                    continue
                shard, worker = in_flight.pop(reference)
                worker.busy -= 1
                reply = self._reply(reference, shard, worker, queue)
                if reply is not None:
                    self.stats.take(reply.stats)
                    self.pool.pass_on(worker, reply.remarks)
                    worker.rate = len(shard.rows) / reply.seconds
                    yield from consecutive_runs(shard.rows, reply.encoded)

    def _hand_out(self, queue: ShardQueue, in_flight: dict[Any, tuple[Shard, Worker]]) -> None:
        present = self.pool.present
        for busy in range(SHARDS_A_WORKER):  # everybody has one before anybody has two
            for worker in present:
                if worker.busy > busy:
                    continue
                shard = queue.take(self._rows_for(worker, queue.left, len(present)))
                if shard is None:
                    return
                reference = worker.actor.encode_shard.remote(shard.rows, self.batch_size, self.mirror)
                in_flight[reference] = shard, worker
                worker.busy += 1

    def _rows_for(self, worker: Worker, left: int, workers: int) -> int:
        """Return how many rows to give a worker: some seconds' worth, at most a block, fewer towards the end."""
        least = self.batch_size * self.pool.size.cores
        seconds_worth = int(worker.rate * SECONDS_A_SHARD) or 2 * least
        return max(least, min(BLOCK_ROWS, seconds_worth, left // (SHARES_OF_REST * workers)))

    def _reply(self, reference: Any, shard: Shard, worker: Worker, queue: ShardQueue) -> Reply | None:
        """Return what a worker made of a shard; None where it has to be made by another."""
        reply, why = result_or_loss(self.pool.ray, reference)
        if isinstance(reply, Reply):
            return reply
        queue.give_back(shard, lost=bool(why))
        if isinstance(reply, AffcacheError):
            self.pool.leave_out(worker, reply)
        else:
            self.pool.lost(worker, why or "its process was replaced")
        return None

    def bottleneck(self) -> str:
        size, precision = self.pool.size, str(self.pool.description["precision"])
        cores = max(size.workers, size.cores)
        return bottleneck(
            self.stats.shares(), workers=size.workers, cores=cores, device=size.device, precision=precision
        )

    def note(self) -> str:
        present = [worker.joined for worker in self.pool.present if worker.joined]
        nodes = len({joined.node_id for joined in present})
        where = f"{counted(len(present), 'worker')} on {counted(nodes, 'node')}"
        return f"{where}; {super().note()}"


def consecutive_runs(rows: Rows, encoded: Encoded) -> Iterator[tuple[Rows, Encoded]]:
    """Cut rising rows (n,), with their features (n, D) and status (n,), where numbers are left out."""
    cuts = np.flatnonzero(np.diff(rows) != 1) + 1
    for run, features, status in zip(*(np.split(array, cuts) for array in (rows, *encoded)), strict=True):
        yield run, (features, status)


def driver_device(settings: ExtractSettings) -> torch.device:
    """Return the device of the driver, which encodes nothing.

    Raises:
        ConfigError: Ray hands out no such device or isn't installed, or nothing listens at the address; or the encoder
            can't travel.
    """
    if settings.model.startswith(STAYS):
        raise ConfigError(
            f"--engine ray sends the encoder to other machines, and {settings.model} can't travel: code and files are "
            "of this one. Expected an encoder of open_clip or timm. Leave out --engine, or take another --model."
        )
    require_handed_out(settings.device)
    require_ray(settings.ray_address)
    return torch.device("cpu")


@contextmanager
def opened_engine(
    settings: ExtractSettings, recorded: Mapping[str, Any], crops: CropList, listener: Listener
) -> Iterator[Engine]:
    """Be connected to a cluster whose workers have the encoder and see the crops; arguments as for the local engine.

    Raises:
        ConfigError: Ray isn't installed, there is no cluster, or none of its machines can take a worker.
        InputError: a machine doesn't see the crops, or the weights can't be loaded.
    """
    weights = load_wanted(settings, listener)
    crops = crops.absolute()
    held = sum(tensor.nbytes for tensor in chain(weights.tower.parameters(), weights.tower.buffers()))
    with connected(settings.ray_address, 2 * held + ROOM_FOR_REPLIES, listener) as ray:
        nodes = living_nodes(ray)
        size = worker_size(nodes, settings.device, settings.actors, settings.workers)
        sample = CropSample.of(crops)
        require_everywhere(ray, nodes, size, sample, listener)
        settings = replace(settings, device=size.device)
        job = Job(settings, ray.put(share_weights(weights)), ray.put(crops), sample, size)
        del weights  # workers have theirs; the driver needs none
        pool = WorkerPool(ray, ray.remote(EncodingWorker), job, size, settings.actors, recorded, listener)
        try:
            yield Engine(pool.description, partial(ClusterEncoding, pool), pool.facts)
        finally:
            pool.close()


def share_weights(weights: Weights) -> Weights:
    """Prepare an image tower for the journey; it is of no other use any more."""
    for module in weights.tower.modules():
        for own in (module._parameters, module._buffers):
            travelling: dict[str, Any] = {name: Travelling(t) for name, t in own.items() if t is not None}
            own.update(travelling)
    return weights


def require_everywhere(
    ray: ModuleType, nodes: Sequence[Node], size: WorkerSize, sample: CropSample, listener: Listener
) -> None:
    """Ask every machine that can have a worker whether it runs this affcache, and sees the crops.

    Raises:
        ConfigError: one runs another affcache, or none.
        InputError: one doesn't see the crops.
    """
    affinity = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    remote = ray.remote(look_around)
    asked = [node for node in nodes if size.room([node])]
    references = [
        remote.options(num_cpus=0, scheduling_strategy=affinity(node.id, soft=False)).remote(sample, node.name)
        for node in asked
    ]
    ours = versions()
    for node, reference in zip(asked, references, strict=True):
        try:
            found = ray.get(reference)
        except ray.exceptions.RayError as error:
            raise ConfigError(
                f"Node {node.name} can't run affcache: {first_line(error)}. Expected the same Python with "
                "affcache[ray] installed on every machine of the cluster. Install it there, then run the same command "
                "again."
            ) from None
        if isinstance(found, AffcacheError):
            raise found
        if found["affcache"] != ours["affcache"]:
            raise ConfigError(
                f"Node {node.name} has affcache {found['affcache']}, and the driver {ours['affcache']}. Expected the "
                "same everywhere. Install it there, then run the same command again."
            )
        if found != ours:
            listener.warning(f"node {node.name} has {found}, the driver {ours}: embeddings can differ by rounding")


def look_around(sample: CropSample, node: str) -> dict[str, str] | AffcacheError:
    """Return what is installed here, or why the crops can't be seen."""
    try:
        sample.require_paths(node)
    except InputError as error:
        return error
    return versions()
