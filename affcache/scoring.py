"""Scoring a run: its head over a split's frames, the task's metrics, and the predictions per frame."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from affcache.annotations import JoinAccount, JoinedLabels, join_labels
from affcache.config import build
from affcache.devices import resolve_device
from affcache.errors import StoreError
from affcache.fingerprint import differing_fields
from affcache.heads import MLPHead
from affcache.learner import build_head, predict
from affcache.listener import Listener
from affcache.memory import GIGABYTE, default_memory
from affcache.metrics import Scores
from affcache.risk import cvar
from affcache.runs import RunFolder, newest_run, read_tensors, settings_from_json, write_json
from affcache.settings import RUNS, FitSettings, ScoreSettings
from affcache.stacked_heads import StackedHeads
from affcache.store import EmbeddingStore
from affcache.streaming import load_frames
from affcache.tasks import Task, find_task
from affcache.training_data import require_finite


@dataclass(frozen=True)
class ScoreResult:
    """The scores of one run on one split."""

    run: str
    store: str
    task: str
    split: str
    epoch: int  # of the head that was scored, counted from 1
    frames: int
    account: JoinAccount
    scores: Scores
    loss: float  # mean of the frames' losses (for au and va of each frame's 12 or 2)
    cvar: float  # the mean of the worst share ``alpha`` of them, over the whole split
    alpha: float  # the level of the run
    scores_file: str  # the file these scores were written to
    predictions_file: str

    def to_json(self) -> dict[str, Any]:
        """Return the result as one JSON object."""
        return {
            "task": self.task,
            "split": self.split,
            **self.scores.to_json(),
            "loss": self.loss,
            "cvar": self.cvar,
            "alpha": self.alpha,
            "frames": self.frames,
            "epoch": self.epoch,
            "run": self.run,
            "predictions": self.predictions_file,
            "store": self.store,
            "classes_without_support": list(self.scores.without_support),
            "labels": self.account.to_json(),
        }


def score(settings: ScoreSettings | None = None, /, *, listener: Listener | None = None, **values: Any) -> ScoreResult:
    """Score a run's best head on a split, and write the scores and the predictions into the run folder.

    Args:
        settings: all settings, or none and single ones by name, for instance ``score(run=Path("runs/a"))``.
        listener: receives messages and warnings.

    Raises:
        InputError: no run, or labels that can't be read or that join to no crop.
        StoreError: the store has changed since the run, is of another encoder, incomplete or damaged.
    """
    settings = build(ScoreSettings, values, over=settings)
    listener = listener or Listener()
    folder = RunFolder(settings.run) if settings.run else newest_run(RUNS)
    config = folder.read_config()
    task = find_task(config["task"])
    fitted = settings_from_json(config["settings"])
    device = resolve_device(settings.device)
    store = _open_store(settings, config, folder)
    head, epoch = _load_head(folder, fitted, store.width, task)
    if fitted.head != "ridge" and folder.finished_epochs() < fitted.epochs:
        listener.warning(
            f"run {folder.path} is unfinished: {folder.finished_epochs()} of {fitted.epochs} epochs. Finish it with "
            f"'affcache fit --run {folder.path} --resume' and the settings it began with."
        )
    joined = join_labels(store, settings.annotations or fitted.annotations, task, settings.split)
    listener.message(joined.account.sentence(settings.split))
    frames = load_frames(store, joined, device, default_memory(device) * GIGABYTE)
    require_finite(frames, settings.split)
    heads = StackedHeads([head], dropout=[0.0], device=device)
    (logits,) = predict(heads, frames, fitted.normalize)  # (n, C)
    losses = task.losses(logits, frames.labels)  # (n,) or (n, C)
    probabilities = task.probabilities(logits).cpu().numpy()
    decided = task.decide(probabilities)
    scores = task.score(joined.labels, decided, task.classes)
    if scores.without_support:
        listener.warning(
            f"No {settings.split} frame is labelled {', '.join(scores.without_support)}: each counts as 0 in "
            f"{scores.metric}, as the mean runs over all {task.outputs} classes."
        )
    result = ScoreResult(
        run=str(folder.path),
        store=str(store.path),
        task=task.name,
        split=settings.split,
        epoch=epoch,
        frames=len(joined),
        account=joined.account,
        scores=scores,
        loss=float(losses.mean()),
        cvar=float(cvar(losses, fitted.alpha)),
        alpha=fitted.alpha,
        scores_file=str(folder.of_split(folder.scores, settings.split)),
        predictions_file=str(folder.of_split(folder.predictions, settings.split)),
    )
    _write_predictions(Path(result.predictions_file), result, task, store, joined, probabilities, decided)
    write_json(Path(result.scores_file), result.to_json())
    return result


def _open_store(settings: ScoreSettings, config: dict[str, Any], folder: RunFolder) -> EmbeddingStore:
    """Open the store to score on: the run's own, which must not have changed, or the one that was chosen."""
    path = settings.store or Path(config["store"]["path"])
    if settings.store is None and not path.exists():
        raise StoreError(
            f"The store that run {folder.path} was trained on is not at {path} any more. Say where it is with "
            "--store FILE."
        )
    store = EmbeddingStore.open(path)
    store.require_complete()
    _require_store(store, config["store"], folder, chosen=settings.store is not None)
    return store


def _load_head(folder: RunFolder, fitted: FitSettings, width: int, task: Task) -> tuple[MLPHead, int]:
    """Return the run's best head and its epoch."""
    tensors, best = read_tensors(folder.head)
    head = build_head(fitted, width, task)
    try:
        head.load_state_dict(tensors)
    except RuntimeError:
        raise StoreError(
            f"{folder.head} doesn't fit {folder.config}: the head has other layers than the settings there describe. "
            "Expected both files as 'affcache fit' wrote them. Restore them, or train again with 'affcache fit'."
        ) from None
    return head, int(best["epoch"])


def _require_store(store: EmbeddingStore, trained_on: dict[str, Any], folder: RunFolder, *, chosen: bool) -> None:
    """Refuse a store of another encoder; one that merely holds other crops is fine if the user chose it."""
    if store.encoder_fingerprint != trained_on["encoder_fingerprint"]:
        lines = "\n  ".join(differing_fields(trained_on["encoder"], store.encoder))
        raise StoreError(
            f"Run {folder.path} was trained on embeddings of another encoder than {store.path} holds. Expected the "
            f"same one; these differ (run against store):\n  {lines}\nScore with --store FILE and a store of the run's "
            "encoder, or train again with 'affcache fit'."
        )
    if not chosen and store.fingerprint() != trained_on["fingerprint"]:
        raise StoreError(
            f"The store {store.path} has changed since run {folder.path} was trained on it: other crops or other "
            f"embeddings, of the same encoder. Score on it as it is now with --store {store.path}, or train again "
            "with 'affcache fit'."
        )


def _write_predictions(
    path: Path,
    result: ScoreResult,
    task: Task,
    store: EmbeddingStore,
    joined: JoinedLabels,
    probabilities: npt.NDArray[np.float32],
    decided: npt.NDArray[Any],
) -> None:
    """Write what the head says of every scored frame, with the keys that find it again."""
    partial = path.with_name(path.name + ".partial")
    with h5py.File(partial, "w") as file:
        file.attrs["format"] = "affcache-predictions"
        file.attrs["format_version"] = 1
        file.attrs["classes"] = json.dumps(task.classes)
        for name in ("task", "split", "run", "store"):
            file.attrs[name] = getattr(result, name)
        file["rows"] = joined.rows
        file["video"] = store.video_of_rows()[joined.rows].astype(np.int32)
        file["frame_number"] = np.asarray(store.frame_number[joined.rows])
        file.create_dataset("video_name", data=list(store.video_names), dtype=h5py.string_dtype())
        file["probabilities"] = probabilities.astype(np.float32)
        file["decided"] = decided
        file["labels"] = joined.labels
    partial.replace(path)
