"""Pending rows cut into shards of work: whole batches of one block of the store, of a size that suits the worker."""

from collections import deque
from dataclasses import dataclass

import numpy as np

from affcache.errors import InputError
from affcache.extraction.pipeline import consecutive_batches
from affcache.store.reading import BLOCK_ROWS, Rows

MOST_LOSSES = 5  # of the workers that had the same shard: then the shard is to blame


@dataclass
class Shard:
    """Rows of one block, for one worker."""

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
