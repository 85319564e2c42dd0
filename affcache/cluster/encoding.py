"""Encoding in a cluster: pieces of pending rows go to workers, and come back in whatever order they finish."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

from affcache.cluster.nodes import WorkerSize, counted
from affcache.cluster.pieces import Piece, PieceQueue
from affcache.cluster.pool import PIECES_A_WORKER, Worker, WorkerPool, reason
from affcache.cluster.worker import Reply
from affcache.errors import AffcacheError
from affcache.extraction.commit import Encoded
from affcache.extraction.decoding import Rows
from affcache.extraction.stats import Account, bottleneck, shares_text
from affcache.store.reading import BLOCK_ROWS

SECONDS_A_PIECE = 10.0  # what a lost worker costs, at most about twice this: it has two
SHARES_OF_REST = 4  # towards the end pieces become smaller, so that no worker is left with much
SECONDS_TO_WAIT = 1.0


@dataclass
class ClusterEncoding:
    """Crops of one view, being encoded by a pool of workers."""

    ray: ModuleType
    pool: WorkerPool
    size: WorkerSize
    batch_size: int
    mirror: bool
    account: Account = field(default_factory=Account)

    def encode(self, pending: Rows) -> Generator[tuple[Rows, Encoded], None, None]:
        """Yield consecutive rows with float16 features (n, D) and status (n,), as pieces come back.

        No piece is handed out while the caller is busy with one: what is in flight is bounded, and so is memory.

        Args:
            pending: int64 (n,), rising.

        Raises:
            InputError: the last worker lost sight of the crops, or a piece ended every worker that had it.
            ConfigError: no worker has room for a crop in its GPU's memory.
        """
        queue = PieceQueue(pending, self.batch_size)
        in_flight: dict[Any, tuple[Piece, Worker]] = {}
        while queue.left or in_flight:
            self.pool.tend()
            self._hand_out(queue, in_flight)
            waited_for = [*in_flight, *self.pool.joining]
            done, _ = self.ray.wait(waited_for, num_returns=1, timeout=SECONDS_TO_WAIT)
            for reference in done:
                if reference not in in_flight:
                    self.pool.take_join(reference)
                    continue
                piece, worker = in_flight.pop(reference)
                worker.busy -= 1
                reply = self._reply(reference, piece, worker, queue)
                if reply is not None:
                    self.account.take(reply.account)
                    self.pool.pass_on(worker, reply.remarks)
                    worker.rate = len(piece.rows) / reply.seconds
                    yield from consecutive_runs(piece.rows, reply.encoded)

    def _hand_out(self, queue: PieceQueue, in_flight: dict[Any, tuple[Piece, Worker]]) -> None:
        present = self.pool.present
        for busy in range(PIECES_A_WORKER):  # everybody has one before anybody has two
            for worker in present:
                if worker.busy > busy:
                    continue
                piece = queue.take(self._rows_for(worker, queue.left, len(present)))
                if piece is None:
                    return
                reference = worker.actor.encode.remote(piece.rows, self.batch_size, self.mirror)
                in_flight[reference] = piece, worker
                worker.busy += 1

    def _rows_for(self, worker: Worker, left: int, workers: int) -> int:
        """Return how many rows to give a worker: some seconds' worth, at most a block, fewer towards the end."""
        least = self.batch_size * self.size.cores
        seconds_worth = int(worker.rate * SECONDS_A_PIECE) or 2 * least
        return max(least, min(BLOCK_ROWS, seconds_worth, left // (SHARES_OF_REST * workers)))

    def _reply(self, reference: Any, piece: Piece, worker: Worker, queue: PieceQueue) -> Reply | None:
        """Return what a worker made of a piece; None where it has to be made by another."""
        try:
            reply = self.ray.get(reference)
        except self.ray.exceptions.RayTaskError:  # a bug, and shown as one
            raise
        except self.ray.exceptions.RayError as error:
            queue.give_back(piece, lost=True)
            self.pool.lost(worker, reason(error))
            return None
        if reply is None:
            queue.give_back(piece, lost=False)
            self.pool.lost(worker, "its process was replaced")
            return None
        if isinstance(reply, AffcacheError):
            queue.give_back(piece, lost=False)
            self.pool.leave_out(worker, reply)
            return None
        assert isinstance(reply, Reply)
        return reply

    def bottleneck(self) -> str:
        """Return one sentence on what holds the run up and which flag to turn."""
        description = self.pool.description
        return bottleneck(
            self.account.clock.shares(),
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
        return f"{where}; {shares_text(self.account.clock.shares())}; {self.bottleneck().partition(' ')[0]}"


def consecutive_runs(rows: Rows, encoded: Encoded) -> Iterator[tuple[Rows, Encoded]]:
    """Cut rising rows (n,), with their features (n, D) and status (n,), where numbers are left out."""
    cuts = np.flatnonzero(np.diff(rows) != 1) + 1
    features, status = encoded
    yield from zip(
        np.split(rows, cuts), zip(np.split(features, cuts), np.split(status, cuts), strict=True), strict=True
    )
