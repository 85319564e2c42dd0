"""What heads train on: embeddings with their labels, in memory, and the order in which an epoch takes them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from affcache.errors import InputError
from affcache.store.reading import EmbeddingStore
from affcache.tasks.annotations import JoinedLabels

EVALUATION_BATCH = 8192  # frames per forward pass without gradients


@dataclass(frozen=True)
class Frames:
    """Embeddings with their labels in memory, on the device that trains: a batch is one index into them."""

    embeddings: torch.Tensor  # (n, D) float16 as a store has them, or float32
    labels: torch.Tensor  # (n,) or (n, values)
    videos: torch.Tensor  # (n,) int64, the video of each

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def load(cls, store: EmbeddingStore, joined: JoinedLabels, device: torch.device) -> "Frames":
        """Copy the joined rows of a store to a device."""
        embeddings = torch.from_numpy(np.asarray(store.features[joined.rows]))
        return cls(embeddings.to(device), *labels_and_videos(store, joined, device))

    def chunks(self, order: torch.Tensor, batch_size: int) -> Iterator[tuple["Frames", torch.Tensor]]:
        """Yield the frames with an order (H, m) of them: everything lies in memory, so there is one chunk."""
        yield self, order.to(self.labels.device)

    def evaluation_batches(self) -> Iterator[torch.Tensor]:
        """Yield the embeddings (at most ``EVALUATION_BATCH``, D), in their order."""
        yield from self.embeddings.split(EVALUATION_BATCH)


class FrameSource(Protocol):
    """Where an epoch's frames come from: memory (``Frames``) or disk (``StreamedFrames``)."""

    @property
    def labels(self) -> torch.Tensor:
        """The label of every frame, (n,) or (n, values)."""

    @property
    def videos(self) -> torch.Tensor:
        """The video of every frame, int64 (n,)."""

    def __len__(self) -> int: ...

    def chunks(self, order: torch.Tensor, batch_size: int) -> Iterator[tuple[Frames, torch.Tensor]]:
        """Yield frames that lie in memory, each with an order (H, m) of its rows; together the whole order."""

    def evaluation_batches(self) -> Iterator[torch.Tensor]:
        """Yield the embeddings of all frames, a few thousand at a time, in their order."""


def labels_and_videos(
    store: EmbeddingStore, joined: JoinedLabels, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
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


def prepare(embeddings: torch.Tensor, normalize: str) -> torch.Tensor:
    """Turn stored float16 embeddings into the head's float32 input, scaled to length 1 for "l2"."""
    prepared = embeddings.float()
    return torch.nn.functional.normalize(prepared, dim=-1) if normalize == "l2" else prepared


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
