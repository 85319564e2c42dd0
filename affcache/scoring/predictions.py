"""What heads say of frames: probabilities, averaged over runs and views, beside the frames' places in their videos."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from affcache.errors import InputError
from affcache.progress import Listener
from affcache.scoring.predict import OpenedRun, Rows
from affcache.store.reading import EmbeddingStore

VIEWS = {"plain": ("plain",), "both": ("plain", "flip")}
FEW = 50_000  # frames; up to here nobody waits


@dataclass(frozen=True)
class Predictions:
    """Probabilities of n frames of a store, in the order of their rows."""

    store: EmbeddingStore
    rows: Rows  # (n,) rising
    probabilities: npt.NDArray[Any]  # (n, C) float32, or float64 where several are averaged
    logits: torch.Tensor  # (n, C) float32: the head's own, or those that averaged probabilities stand for

    @property
    def videos(self) -> npt.NDArray[np.int64]:
        """Which video of the store each frame is of, (n,)."""
        return self.store.video_of_rows()[self.rows].astype(np.int64)

    @property
    def frame_numbers(self) -> npt.NDArray[np.int32]:
        """The number of each frame in its video, (n,)."""
        return np.asarray(self.store.frame_number[self.rows])

    @classmethod
    def of(
        cls, runs: Sequence[OpenedRun], rows: Rows, device: torch.device, views: str, listener: Listener
    ) -> "Predictions":
        """Predict rows of the first run's store with every run and view, and average the probabilities.

        Raises:
            InputError: another run's store has other frames in these rows, or an embedding isn't finite.
            StoreError: a view is missing, or a store can't be read any more.
        """
        first, kinds = runs[0], VIEWS[views]
        for run in runs[1:]:
            require_same_frames(first.store, run.store, rows)
        total, done = len(rows) * len(runs) * len(kinds), 0

        def on_done(frames: int) -> None:
            nonlocal done
            done += frames
            if total > FEW:
                listener.progress(done, total, "frame")

        logits = [run.logits(rows, device, view, on_done) for run in runs for view in kinds]
        if len(logits) == 1:
            return cls(first.store, rows, first.task.probabilities(logits[0]).numpy(), logits[0])
        averaged = torch.stack([first.task.probabilities(one).double() for one in logits]).mean(0)
        return cls(first.store, rows, averaged.numpy(), first.task.logits(averaged).float())


def require_same_frames(store: EmbeddingStore, other: EmbeddingStore, rows: Rows) -> None:
    """Refuse to average or compare predictions of different frames: rows of stores must be of the same crops.

    Raises:
        InputError: they aren't.
    """
    if other.path == store.path:
        return
    same = len(other) == len(store) and other.video_names == store.video_names
    same = same and bool((other.video_of_rows()[rows] == store.video_of_rows()[rows]).all())
    if not (same and bool((np.asarray(other.frame_number)[rows] == np.asarray(store.frame_number)[rows]).all())):
        raise InputError(
            f"{store.path} and {other.path} don't hold the same frames, so that predictions on them can't be averaged "
            "or compared. Expected stores of the same crops. Extract both from the same folders, or name one store "
            "with --store FILE."
        )
