"""Encoding in a cluster: shards of pending rows go to workers, and come back in whatever order they finish."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

from affcache.cluster.nodes import WorkerSize, counted
from affcache.cluster.pool import SHARDS_A_WORKER, Worker, WorkerPool
from affcache.cluster.shards import Shard, ShardQueue
from affcache.cluster.worker import Reply
from affcache.errors import AffcacheError, first_line
from affcache.extraction.pipeline import Encoded
from affcache.extraction.stats import ExtractionStats, bottleneck, shares_text
from affcache.store.reading import BLOCK_ROWS, Rows

SECONDS_A_SHARD = 10.0  # what a lost worker costs, at most about twice this: it has two
SHARES_OF_REST = 4  # towards the end shards become smaller, so that no worker is left with much
SECONDS_TO_WAIT = 1.0


@dataclass
class ClusterEncoding:
    """Crops of one view, being encoded by a pool of workers."""

    ray: ModuleType
    pool: WorkerPool
    size: WorkerSize
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
            done, _ = self.ray.wait(waited_for, num_returns=1, timeout=SECONDS_TO_WAIT)
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
        least = self.batch_size * self.size.cores
        seconds_worth = int(worker.rate * SECONDS_A_SHARD) or 2 * least
        return max(least, min(BLOCK_ROWS, seconds_worth, left // (SHARES_OF_REST * workers)))

    def _reply(self, reference: Any, shard: Shard, worker: Worker, queue: ShardQueue) -> Reply | None:
        """Return what a worker made of a shard; None where it has to be made by another."""
        try:
            reply = self.ray.get(reference)
        except self.ray.exceptions.RayTaskError:  # a bug, and shown as one
            raise
        except self.ray.exceptions.RayError as error:
            queue.give_back(shard, lost=True)
            self.pool.lost(worker, first_line(error))
            return None
        if reply is None:
            queue.give_back(shard, lost=False)
            self.pool.lost(worker, "its process was replaced")
            return None
        if isinstance(reply, AffcacheError):
            queue.give_back(shard, lost=False)
            self.pool.leave_out(worker, reply)
            return None
        assert isinstance(reply, Reply)
        return reply

    def bottleneck(self) -> str:
        """Return one sentence on what holds the run up and which flag to turn."""
        description = self.pool.description
        return bottleneck(
            self.stats.shares(),
            workers=self.size.workers,
            cores=max(self.size.workers, self.size.cores),
            device=self.size.device,
            precision=str(description["precision"]),
        )

    def note(self) -> str:
        """Return how it stands, in a few words."""
        present = [worker.joined for worker in self.pool.present if worker.joined]
        nodes = len({joined.node_id for joined in present})
        where = f"{counted(len(present), 'worker')} on {counted(nodes, 'node')}"
        return f"{where}; {shares_text(self.stats.shares())}; {self.bottleneck().partition(' ')[0]}"


def consecutive_runs(rows: Rows, encoded: Encoded) -> Iterator[tuple[Rows, Encoded]]:
    """Cut rising rows (n,), with their features (n, D) and status (n,), where numbers are left out."""
    cuts = np.flatnonzero(np.diff(rows) != 1) + 1
    features, status = encoded
    yield from zip(
        np.split(rows, cuts), zip(np.split(features, cuts), np.split(status, cuts), strict=True), strict=True
    )
