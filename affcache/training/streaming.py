"""Frames of a store that is larger than memory: chunks of it, read while the one before trains.

Frames are shuffled twice. Small blocks of neighbouring frames are dealt out to chunks at random, since a disk reads
neighbours fastest; a chunk's frames are then taken in random order. How near is that to a shuffle of all? As long as
a batch's frames are all of different blocks, which blocks and which frame of each are as random as in a full shuffle.
So whatever is asked of a batch (how many classes or videos it has, say), the distributions of the answer under both
shuffles differ, in total variation, by at most the probability that two of its frames share a block. For batches of B
from chunks of M frames in blocks of b that is at most B (B - 1) / 2 * (b - 1) / (M - 1): with B = 32, b = 64 and chunks
of 2 GB of ViT-L embeddings (M = 1.3 million), 0.024; with 50 MB, 0.96.
"""

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import numpy.typing as npt
import torch

from affcache.devices import GIGABYTE
from affcache.errors import ConfigError
from affcache.progress import Listener
from affcache.store.prefetch import read_ahead
from affcache.store.reading import EmbeddingStore
from affcache.tasks.annotations import JoinedLabels
from affcache.training.data import EVALUATION_BATCH, Frames, FrameSource, labels_and_videos

BLOCK_FRAMES = 64  # 98 KB of ViT-L: 64 reads of a disk in one; larger ones mix worse, in proportion
SMALLEST_CHUNK = 64 * BLOCK_FRAMES  # frames; a batch of 32 from fewer blocks has more than 7 pairs of one block

Order = npt.NDArray[np.int64]


class StreamedFrames:
    """Labels and videos in memory, embeddings read from the store as they are needed: a ``FrameSource``.

    Args:
        store: the store; its file is opened anew for every epoch and must stay as it is.
        joined: which rows, with their labels.
        device: where the heads train. Embeddings go there chunk by chunk.
        chunk_frames: how many frames a chunk may hold at most. Two chunks are in memory at a time.
    """

    def __init__(self, store: EmbeddingStore, joined: JoinedLabels, device: torch.device, chunk_frames: int) -> None:
        self.store, self.device, self.chunk_frames = store, device, chunk_frames
        self.labels, self.videos = labels_and_videos(store, joined, device)
        self._rows = joined.rows

    def __len__(self) -> int:
        return len(self._rows)

    def chunks(self, order: torch.Tensor, batch_size: int) -> Iterator[tuple[Frames, torch.Tensor]]:
        """Yield chunks of an epoch's frames, each with an order (H, M) of its rows.

        All chunks hold the same number of frames, a multiple of ``batch_size`` (the last one what is left), and each
        is taken in the order in which ``order`` has its frames. Everything follows from ``order``: the order of the
        blocks is that in which they first come up in it. Where heads draw different frames, every head has its own
        in the chunk's blocks. If all frames fit in one chunk, the order is ``order``.

        A chunk's embeddings are overwritten once the chunk after it has been taken.

        Args:
            order: int64 tensor (H, m) on the CPU of positions, each at most once for a head.
            batch_size: frames of a step.

        Raises:
            ConfigError: a chunk doesn't hold a batch.
            StoreError: the store's file is cut short or can't be read any more.
        """
        taken = self._chunks_of(order.numpy(), batch_size)
        held = [np.unique(positions) for positions in taken]
        with closing(read_ahead(self.store, [self._rows[of] for of in held], self.device)) as read:
            for embeddings, of, positions in zip(read, held, taken, strict=True):
                frames = torch.from_numpy(of).to(self.device)
                part = torch.from_numpy(np.searchsorted(of, positions))  # (H, M)
                yield Frames(embeddings, self.labels[frames], self.videos[frames]), part.to(self.device)

    def evaluation_batches(self) -> Iterator[torch.Tensor]:
        """Yield all embeddings in their order, float16 (at most ``EVALUATION_BATCH``, D), on the device.

        Each is overwritten once the one after it has been taken.

        Raises:
            StoreError: the store's file is cut short or can't be read any more.
        """
        starts = range(0, len(self), EVALUATION_BATCH)
        yield from read_ahead(self.store, [self._rows[i : i + EVALUATION_BATCH] for i in starts], self.device)

    def _chunks_of(self, order: Order, batch_size: int) -> list[Order]:
        """Cut an order (H, m) into those of the chunks, (H, M) each."""
        size = self._chunk_size(order.shape[0], order.shape[1], batch_size)
        columns = by_blocks(order)  # (H, m)
        parts = [np.sort(columns[:, first:last], axis=1) for first, last in chunk_bounds(order.shape[1], size)]
        return [np.take_along_axis(order, part, axis=1) for part in parts]

    def _chunk_size(self, heads: int, frames: int, batch_size: int) -> int:
        """Return how many of a head's frames come in one chunk, so that all chunks are about equally large."""
        sharing = 1 if frames == len(self) else heads  # drawn frames differ from head to head
        most = self.chunk_frames // sharing
        if frames <= most:
            return frames
        most = (most - 1) // batch_size  # in batches; 1 frame is for a last one that would stand alone
        if most < 1:
            raise ConfigError(
                f"--batch-size is {batch_size}, but --memory lets a chunk hold {self.chunk_frames // sharing} frames "
                f"of each of {heads} heads. Expected room for more than a batch. Raise --memory or lower --batch-size."
            )
        batches = -(-frames // batch_size)
        return -(-batches // -(-batches // most)) * batch_size


def by_blocks(order: Order) -> Order:
    """Sort an order (H, m) by blocks: return the columns (H, m) of ``order`` in the order in which chunks take them.

    Blocks come in the order in which they first come up in ``order``, the first head's before all others', and the
    same for all heads; within a block, positions rise.
    """
    names, turns = np.unique(order // BLOCK_FRAMES, return_index=True)
    turn = np.zeros(names[-1] + 1, dtype=np.int64)
    turn[names] = turns
    return np.argsort(turn[order // BLOCK_FRAMES] * BLOCK_FRAMES + order % BLOCK_FRAMES, axis=1)


def chunk_bounds(frames: int, size: int) -> list[tuple[int, int]]:
    """Cut frames into chunks of a size, first and last of each; a last one of a single frame joins the one before."""
    starts = list(range(0, frames, size))
    if len(starts) > 1 and frames - starts[-1] == 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], frames], strict=True))


def load_frames(store: EmbeddingStore, joined: JoinedLabels, device: torch.device, limit: float) -> FrameSource:
    """Load the joined rows of a store into memory, or, if they take more than ``limit`` bytes, stream them.

    Raises:
        ConfigError: ``limit`` is too little to shuffle by.
    """
    frame = store.width * store.features.itemsize  # bytes
    if len(joined) * frame <= limit:
        return Frames.load(store, joined, device)
    if limit < 2 * SMALLEST_CHUNK * frame:
        raise ConfigError(
            f"--memory leaves {limit / GIGABYTE:.3g} GB for the embeddings of a split, expected at least "
            f"{2 * SMALLEST_CHUNK * frame / GIGABYTE:.3g}: two chunks of {SMALLEST_CHUNK:,} frames, since frames are "
            "shuffled within a chunk. Raise --memory."
        )
    return StreamedFrames(store, joined, device, int(limit // (2 * frame)))


def load_splits(
    store: EmbeddingStore,
    train: JoinedLabels,
    validation: JoinedLabels,
    device: torch.device,
    memory: float,
    listener: Listener,
) -> tuple[FrameSource, FrameSource]:
    """Load both splits, or stream what doesn't fit in ``memory`` GB of embeddings, and say so.

    Training frames go first: a full shuffle needs them in memory, and evaluation reads in order.

    Raises:
        ConfigError: ``memory`` is too little to shuffle by.
    """
    frame, limit = store.width * store.features.itemsize, memory * GIGABYTE
    evaluating = min(len(validation), 2 * EVALUATION_BATCH) * frame
    source = load_frames(store, train, device, max(limit - evaluating, 0))
    left = limit - len(train) * frame if isinstance(source, Frames) else evaluating
    held_out = load_frames(store, validation, device, left)
    streamed = [
        name for name, frames in (("train", source), ("validation", held_out)) if not isinstance(frames, Frames)
    ]
    if streamed:
        total = (len(train) + len(validation)) * frame / GIGABYTE
        size = f", {source.chunk_frames:,} frames at a time" if isinstance(source, StreamedFrames) else ""
        listener.message(
            f"the embeddings take {total:.3g} GB, more than the {memory:g} GB of --memory: {' and '.join(streamed)} "
            f"frames are read from the store as they are needed{size}"
        )
    return source, held_out
