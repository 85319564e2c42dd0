"""What heads train on: embeddings with their labels, in memory, and the order in which an epoch takes them."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from affcache.devices import GIGABYTE
from affcache.errors import ConfigError, InputError
from affcache.progress import Listener
from affcache.store.pooled import PooledStore, RowStore
from affcache.store.prefetch import read_ahead
from affcache.tasks.annotations import JoinedLabels

EVALUATION_BATCH = 8192  # frames per forward pass without gradients
BLOCK_FRAMES = 64  # 98 KB of ViT-L: 64 reads of a disk in one; larger ones mix worse, in proportion
FLOAT16 = 2  # bytes
SMALLEST_CHUNK = 64 * BLOCK_FRAMES  # frames; a batch of 32 from fewer blocks has more than 7 pairs of one block
CONSTANT = 1e-12  # a deviation below this share of the mean is rounding: float32 can't hold a step that small
SCALER = "scaler."  # begins the names of its tensors beside a head's
Order = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Frames:
    """Embeddings with their labels in memory, on the device that trains: a batch is one index into them."""

    embeddings: torch.Tensor  # (n, D) float16 as a store has them, or float32: of pooled videos, or as given
    labels: torch.Tensor  # (n,) or (n, values)
    videos: torch.Tensor  # (n,) int64, the video of each
    weights: torch.Tensor | None = None  # (n,) above 0, how much of the whole each stands for; None where all do alike

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def load(cls, store: RowStore, joined: JoinedLabels, device: torch.device) -> "Frames":
        """Copy the joined rows of a store to a device."""
        embeddings = torch.from_numpy(store.read(joined.rows))
        return cls(embeddings.to(device), *labels_and_videos(store, joined, device))

    def chunks(self, order: torch.Tensor, batch_size: int) -> Iterator[tuple["Frames", torch.Tensor]]:
        """Yield the frames with an order (H, m) of them: everything lies in memory, so there is one chunk."""
        yield self, order.to(self.labels.device)

    def evaluation_batches(self) -> Iterator[torch.Tensor]:
        """Yield the embeddings (at most ``EVALUATION_BATCH``, D), in their order."""
        yield from self.embeddings.split(EVALUATION_BATCH)


class StreamedFrames:
    """Labels and videos in memory, embeddings read from the store as they are needed.

    Args:
        store: the store; its file is opened anew for every epoch and must stay as it is.
        joined: which rows, with their labels.
        device: where the heads train. Embeddings go there chunk by chunk.
        chunk_frames: how many frames a chunk may hold at most. Two chunks are in memory at a time.
    """

    def __init__(self, store: RowStore, joined: JoinedLabels, device: torch.device, chunk_frames: int) -> None:
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


FrameSource = Frames | StreamedFrames  # where an epoch's frames come from: memory, or disk


def labels_and_videos(store: RowStore, joined: JoinedLabels, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the labels and the videos (n,) of joined rows on a device."""
    videos = torch.from_numpy(store.video_of_rows()[joined.rows].astype(np.int64))
    return torch.from_numpy(joined.labels).to(device), videos.to(device)


def broken_rows(embeddings: torch.Tensor) -> torch.Tensor:
    """Return the positions (k, 1) of embeddings (n, D) that hold nan or inf; a sum hides neither."""
    return (~embeddings.sum(dim=1, dtype=torch.float32).isfinite()).nonzero()


def require_finite(frames: FrameSource, split: str) -> None:
    """Refuse embeddings that hold nan or inf: a loss over them is no number, and a decision by them means nothing.

    Raises:
        InputError: some do.
    """
    broken, first, start = 0, -1, 0
    for batch in frames.evaluation_batches():
        wrong = broken_rows(batch)
        if len(wrong) and not broken:
            first = start + int(wrong[0])
        broken += len(wrong)
        start += len(batch)
    if broken:
        raise InputError(
            f"{broken:,} of {start:,} {split} frames have an embedding with nan or inf in it, the first is frame "
            f"{first:,} of those joined. Expected finite numbers. Extract or import these embeddings again."
        )


@dataclass(frozen=True)
class Scaler:
    """What is done to an embedding before a head sees it; ``--normalize`` says what. It is kept beside the head."""

    normalize: str = "none"  # none, l2 (scaled to length 1) or standard (each dimension by mean and deviation)
    mean: torch.Tensor | None = None  # float32 (D,) of the training frames; None unless standard
    deviation: torch.Tensor | None = None  # float32 (D,), above 0; 1 for a dimension that doesn't vary

    @classmethod
    def fit(cls, normalize: str, batches: Iterable[torch.Tensor]) -> "Scaler":
        """Take mean and deviation of embeddings, batches (B, D) of any float type, where they count.

        Batches are merged in float64 (Chan, Golub and LeVeque, Algorithms for computing the sample variance, The
        American Statistician 37, 1983); the deviation is the population's, as scikit-learn's StandardScaler has it.
        """
        if normalize != "standard":
            return cls(normalize)
        count, mean, squares = 0, torch.zeros(()), torch.zeros(())
        for batch in batches:
            values = batch.double()  # (B, D)
            variance, own = torch.var_mean(values, dim=0, correction=0)  # (D,), (D,)
            step, total = own - mean.to(own), count + len(values)
            squares = squares.to(own) + variance * len(values) + step**2 * (count * len(values) / total)
            mean = mean.to(own) + step * (len(values) / total)
            count = total
        deviation = (squares / count).sqrt()
        varies = deviation > CONSTANT * mean.abs()
        return cls(normalize, mean.float(), torch.where(varies, deviation, 1.0).float())

    @classmethod
    def of_state(cls, normalize: str, state: Mapping[str, torch.Tensor]) -> "Scaler":
        """Return the scaler whose ``tensors`` a head's state holds; raises KeyError where it lacks them."""
        if normalize != "standard":
            return cls(normalize)
        return cls(normalize, *(state[SCALER + name] for name in ("mean", "deviation")))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what is kept in the state of a head."""
        if self.mean is None or self.deviation is None:
            return {}
        return {SCALER + "mean": self.mean, SCALER + "deviation": self.deviation}

    def to(self, device: torch.device) -> "Scaler":
        """Return the same on a device."""
        return Scaler.of_state(self.normalize, {name: tensor.to(device) for name, tensor in self.tensors().items()})

    def __call__(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Turn embeddings (..., D) into a head's input, float32; float64 stays so."""
        prepared = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
        if self.normalize == "l2":
            return torch.nn.functional.normalize(prepared, dim=-1)
        if self.mean is None or self.deviation is None:
            return prepared
        return (prepared - self.mean) / self.deviation


AS_STORED: Scaler = Scaler()


def without_scaler(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the state of a head's module alone."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(SCALER)}


def epoch_order(
    videos: torch.Tensor, *, stride: int, frames_per_epoch: int | None, generator: torch.Generator
) -> torch.Tensor:
    """Draw the frames of an epoch and their order.

    Neighbouring frames of a video show nearly the same. With a stride of k, one frame is drawn of every k that follow
    one another in a video; with ``frames_per_epoch``, that many are drawn of what is left. Both are drawn anew each
    time, so that all frames come up in the end.

    Args:
        videos: int64 tensor (n,) on the CPU, the video of each frame; a video's frames stand side by side.
        stride: at least 1.
        frames_per_epoch: at least 2, or None for all.
        generator: draws.

    Returns:
        int64 tensor (m,) of positions in ``videos``, each at most once.
    """
    rows = torch.arange(len(videos)) if stride == 1 else _one_of_each(videos, stride, generator)
    return rows[torch.randperm(len(rows), generator=generator)[:frames_per_epoch]]


def _one_of_each(videos: torch.Tensor, stride: int, generator: torch.Generator) -> torch.Tensor:
    """Draw one frame of every ``stride`` that follow one another in a video."""
    _, lengths = torch.unique_consecutive(videos, return_counts=True)
    groups = -(-lengths // stride)  # of each video
    starts = (lengths.cumsum(0) - lengths).repeat_interleave(groups)
    number = torch.arange(len(starts)) - (groups.cumsum(0) - groups).repeat_interleave(groups)  # within its video
    sizes = (lengths.repeat_interleave(groups) - number * stride).clamp(max=stride)
    drawn = (torch.rand(len(sizes), generator=generator, dtype=torch.float64) * sizes).long()
    return starts + number * stride + drawn


def epoch_length(videos: torch.Tensor, *, stride: int, frames_per_epoch: int | None) -> int:
    """Return how many frames ``epoch_order`` draws."""
    _, lengths = torch.unique_consecutive(videos, return_counts=True)
    frames = int((-(-lengths // stride)).sum())
    return frames if frames_per_epoch is None else min(frames, frames_per_epoch)


def batches(order: torch.Tensor, size: int) -> list[torch.Tensor]:
    """Cut an order (H, m) into batches (H, size); a last one of a single frame joins the one before, for BatchNorm."""
    cut = list(order.split(size, dim=1))
    if len(cut) > 1 and cut[-1].shape[1] == 1:
        cut[-2:] = [torch.cat(cut[-2:], dim=1)]
    return cut


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


def load_frames(store: RowStore, joined: JoinedLabels, device: torch.device, limit: float) -> FrameSource:
    """Load the joined rows of a store into memory, or, if they take more than ``limit`` bytes, stream them.

    Pooled videos are few, and are always loaded.

    Raises:
        ConfigError: ``limit`` is too little to shuffle by.
    """
    frame = store.width * FLOAT16  # bytes
    if len(joined) * frame <= limit or isinstance(store, PooledStore):
        return Frames.load(store, joined, device)
    if limit < 2 * SMALLEST_CHUNK * frame:
        raise ConfigError(
            f"--memory leaves {limit / GIGABYTE:.3g} GB for the embeddings of a split, expected at least "
            f"{2 * SMALLEST_CHUNK * frame / GIGABYTE:.3g}: two chunks of {SMALLEST_CHUNK:,} frames, since frames are "
            "shuffled within a chunk. Raise --memory."
        )
    return StreamedFrames(store, joined, device, int(limit // (2 * frame)))


def load_splits(
    store: RowStore,
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
    frame, limit = store.width * FLOAT16, memory * GIGABYTE
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
