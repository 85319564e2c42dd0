"""Trained heads beside a store of their encoder, and what they predict of its rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from affcache.crops.names import canonical
from affcache.errors import ConfigError, InputError, StoreError
from affcache.progress import Listener
from affcache.scoring.trained import TrainedHead, said_elsewhere
from affcache.settings import RUNS
from affcache.store.prefetch import read_ahead
from affcache.store.reading import ENCODED, EmbeddingStore, Rows, differing_fields
from affcache.tasks.tasks import Task
from affcache.training.data import EVALUATION_BATCH
from affcache.training.run_folder import newest_run

FEW = 50_000  # frames; up to here nobody waits


@dataclass(frozen=True)
class TrainedRun(TrainedHead):
    """A trained head beside a store of its encoder."""

    store: EmbeddingStore

    @classmethod
    def on_store(cls, location: Path | str, store: Path | None, device: str, listener: Listener) -> "TrainedRun":
        """Open a run on the store it was trained on, which must not have changed, or a head on one that was chosen.

        Raises:
            InputError: this is neither a run folder nor a published head.
            StoreError: the store has changed since, is of another encoder or incomplete; or the head is damaged.
            ConfigError: the device isn't there, or a published head has no store.
        """
        trained = TrainedHead.open(location, device, listener)
        return cls(**vars(trained), store=open_store(store, trained))

    def logits_of_rows(self, rows: Rows, view: str, on_done: Callable[[int], None]) -> torch.Tensor:
        """Return the head's logits (n, C) float32, on the CPU, for rows of the store, which rise.

        ``on_done`` is told how many more frames are done, now and then.

        Raises:
            InputError: an embedding isn't finite.
            StoreError: there is no such view, or the file can't be read any more.
        """
        store = self.store if view == "plain" else self.store.view(view)
        groups = [rows[start : start + EVALUATION_BATCH] for start in range(0, len(rows), EVALUATION_BATCH)]
        found = [torch.empty(0, self.task.outputs)]
        for group, embeddings in zip(groups, read_ahead(store, groups, self.device), strict=True):
            found.append(self.logits_of_group(embeddings, partial(_row_name, store, group)))
            on_done(len(group))
        return torch.cat(found)


def _row_name(store: EmbeddingStore, rows: Rows, position: int) -> str:
    return f"row {int(rows[position]):,} of {store.path}"


def open_runs(paths: Sequence[Path], store: Path | None, device: str, listener: Listener) -> list[TrainedRun]:
    """Open runs whose probabilities are averaged, of one task; where none is named, the newest one below runs/.

    Raises:
        InputError: there is none, one is no run folder, or they are of several tasks.
        StoreError: as of ``TrainedRun.on_store``.
    """
    runs = [TrainedRun.on_store(path, store, device, listener) for path in paths or [newest_run(RUNS).path]]
    require_one_task(runs)
    return runs


def require_one_task(runs: Sequence[TrainedRun]) -> None:
    """Refuse to average or compare predictions of several tasks.

    Raises:
        InputError: the runs are of several.
    """
    tasks = {run.task.name: run for run in runs}
    if len(tasks) > 1:
        words = ", ".join(f"{run.source} predicts {name}" for name, run in tasks.items())
        raise InputError(f"The runs are of several tasks: {words}. Expected runs of one task.")


def open_store(chosen: Path | None, trained: TrainedHead) -> EmbeddingStore:
    """Open the store to predict on: the run's own, which must not have changed, or one of the head's encoder.

    Raises:
        StoreError: it has changed, is incomplete, or is of another encoder.
        ConfigError: a published head has no store.
    """
    if chosen is None and trained.published:
        raise ConfigError(said_elsewhere(trained.source))
    run, trained_on = trained.folder.path, trained.config.get("store", {})
    path = chosen or Path(trained_on["path"])
    if chosen is None and not path.exists():
        raise StoreError(
            f"The store that run {run} was trained on is not at {path} any more. Say where it is with --store FILE."
        )
    store = EmbeddingStore.open(path)
    store.require_complete()
    if store.encoder_fingerprint != trained.encoder_fingerprint or store.width != trained.width:
        lines = "\n  ".join(differing_fields(trained.encoder, store.encoder))
        raise StoreError(
            f"Run {run} was trained on embeddings of another encoder than {store.path} holds. Expected the "
            f"same one; these differ (run against store):\n  {lines}\nScore with --store FILE and a store of the run's "
            "encoder, or train again with 'affcache fit'."
        )
    if chosen is None and store.fingerprint() != trained_on["fingerprint"]:
        raise StoreError(
            f"The store {store.path} has changed since run {run} was trained on it: other crops or other "
            f"embeddings, of the same encoder. Score on it as it is now with --store {store.path}, or train again "
            "with 'affcache fit'."
        )
    return store


@dataclass(frozen=True)
class Predictions:
    """Probabilities of n frames of a store, in the order of their rows."""

    store: EmbeddingStore
    rows: Rows  # (n,) rising
    probabilities: npt.NDArray[Any]  # (n, C) float32, or float64 where several are averaged
    logits: torch.Tensor  # (n, C): the head's own in float32, or in float64 those that the probabilities stand for

    def at(self, rows: Rows) -> "Predictions":
        """Return the predictions of some of the rows, which rise."""
        chosen = np.searchsorted(self.rows, rows)
        return replace(self, rows=rows, probabilities=self.probabilities[chosen], logits=self.logits[chosen])

    @property
    def videos(self) -> npt.NDArray[np.int64]:
        """Which video of the store each frame is of, (n,)."""
        return self.store.video_of_rows()[self.rows].astype(np.int64)

    @property
    def frame_numbers(self) -> npt.NDArray[np.int32]:
        """The number of each frame in its video, (n,)."""
        return np.asarray(self.store.frame_number[self.rows])

    @classmethod
    def of(cls, runs: Sequence[TrainedRun], rows: Rows, views: str, listener: Listener) -> "Predictions":
        """Predict rows of the first run's store with every run and view, and average the probabilities.

        Raises:
            InputError: another run's store has other frames in these rows, or an embedding isn't finite.
            StoreError: a view is missing, or a store or view is incomplete, damaged or can't be read any more.
        """
        first, kinds = runs[0], ("plain",) if views == "plain" else ("plain", "flip")
        for run in runs[1:]:
            require_same_frames(first.store, run.store, rows)
        for store in {run.store.path: run.store for run in runs}.values():
            for view in kinds:  # two seconds for a million rows; a damaged one would predict without a word
                (store if view == "plain" else store.view(view)).verify()
        total, done = len(rows) * len(runs) * len(kinds), 0

        def on_done(frames: int) -> None:
            nonlocal done
            done += frames
            if total > FEW:
                listener.progress(done, total, "frame")

        logits = [run.logits_of_rows(rows, view, on_done) for run in runs for view in kinds]
        return cls(first.store, rows, *averaged(first.task, logits))


def averaged(task: Task, logits: Sequence[torch.Tensor]) -> tuple[npt.NDArray[Any], torch.Tensor]:
    """Average what several heads, or several views, say: return probabilities (n, C), and logits that stand for them.

    Of one, logits float32 (n, C), both are its own; of several they are float64.
    """
    if len(logits) == 1:
        return task.probabilities(logits[0]).numpy(), logits[0]
    probabilities = torch.stack([task.probabilities(one.double()) for one in logits]).mean(0)
    return probabilities.numpy(), task.averaged(torch.stack(list(logits)).double())


def rows_to_predict(store: EmbeddingStore, rows: Rows, smooth: str) -> Rows:
    """Return which rows to predict for what is asked of some: where it is smoothed, all crops of their videos."""
    if smooth == "none":
        return rows
    videos, wanted = store.video_of_rows(), np.zeros(len(store.video_names), bool)
    wanted[videos[rows]] = True
    return np.flatnonzero(wanted[videos] & (np.asarray(store.status) == ENCODED))


def require_same_frames(store: EmbeddingStore, other: EmbeddingStore, rows: Rows) -> None:
    """Refuse to average or compare predictions of different frames: rows of stores must be of the same crops.

    Raises:
        InputError: they aren't.
    """
    if other.path == store.path:
        return
    names, others = (list(map(canonical, one.video_names)) for one in (store, other))
    same = len(other) == len(store) and names == others
    same = same and np.array_equal(other.video_of_rows()[rows], store.video_of_rows()[rows])
    if not (same and np.array_equal(other.frame_number[rows], store.frame_number[rows])):
        raise InputError(
            f"{store.path} and {other.path} don't hold the same frames, so that predictions on them can't be averaged "
            "or compared. Expected stores of the same crops. Extract both from the same folders, or name one store "
            "with --store FILE."
        )
