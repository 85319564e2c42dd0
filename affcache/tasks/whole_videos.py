"""What is scored where a label is of a whole video: videos, each by the mean of what is said of its frames.

Where heads are trained on pooled videos a row is a video already, and all of this leaves it as it is.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from affcache.tasks.metrics import Table
from affcache.tasks.task import Task

Positions = npt.NDArray[np.int64]


def mean_by_video(probabilities: npt.NDArray[Any], videos: npt.NDArray[np.int64]) -> tuple[Table, Positions]:
    """Return the mean probabilities (V, C) of each video, in float64, and where its frames begin (V,).

    Args:
        probabilities: float (n, C) of frames.
        videos: int (n,), whose frame each is; those of a video stand side by side.
    """
    if not len(videos):
        return np.zeros(probabilities.shape), np.empty(0, np.int64)
    first = np.concatenate([[0], np.flatnonzero(np.diff(videos)) + 1])
    sums = np.add.reduceat(probabilities.astype(np.float64), first, axis=0)
    return sums / np.diff(first, append=len(videos))[:, None], first


def scored(task: Task, logits: torch.Tensor, videos: torch.Tensor) -> tuple[npt.NDArray[Any], Positions | slice]:
    """Return the probabilities (m, C) of what is scored, frames or videos, and where among n their labels stand (m,).

    Args:
        task: says which of the two.
        logits: (n, C) of frames.
        videos: (n,), whose frame each is; those of a video stand side by side.
    """
    probabilities = task.probabilities(logits).cpu().numpy()
    if task.level == "frame":
        return probabilities, slice(None)
    return mean_by_video(probabilities, videos.cpu().numpy())


def logits_of_videos(task: Task, logits: torch.Tensor, videos: npt.NDArray[np.int64]) -> torch.Tensor:
    """Return float64 logits (V, C) that stand for the mean probabilities of each video; as ``scored``."""
    means, _ = mean_by_video(task.probabilities(logits).cpu().numpy(), videos)
    return task.logits(torch.from_numpy(means))
