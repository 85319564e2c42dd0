"""Scoring runs: their heads over a split's frames, the task's metrics with intervals, and predictions per frame."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import torch

from affcache.errors import InputError
from affcache.figures import drawing, save_figures
from affcache.files import write_bytes, write_json
from affcache.progress import Listener, metric_name
from affcache.scoring.ensemble import Ensemble
from affcache.scoring.figures import score_figures
from affcache.scoring.intervals import metric_interval, without_interval
from affcache.scoring.postprocess import find_rule, reliability
from affcache.scoring.predict import Predictions, TrainedRun, require_one_task, rows_to_predict
from affcache.scoring.published import sha256_of
from affcache.scoring.rule import DecisionRule
from affcache.scoring.settings import ScoreSettings, SplitSettings
from affcache.scoring.trained import AVERAGE
from affcache.settings import command
from affcache.store.frames import BESIDE, shared_frames
from affcache.tasks.annotations import JoinAccount, JoinedLabels, join_labels
from affcache.tasks.kinds import Task
from affcache.tasks.metrics import Scores, Table
from affcache.tasks.splits import group_frames
from affcache.training.risk import cvar
from affcache.training.run_folder import RunFolder


@dataclass(frozen=True)
class ScoreResult:
    """The scores of one run, or of several averaged, on one split."""

    runs: tuple[str, ...]
    store: str  # of several runs, those of all
    store_fingerprint: str  # of the first run's
    task: str
    split: str
    epoch: int  # of the first run's head, counted from 1
    level: str  # what is scored, and what a label is of: a frame or a video
    frames: int  # or videos: how many of these
    videos: int  # persons of a video together: what the intervals are over
    account: JoinAccount
    scores: Scores
    loss: float  # mean of the frames' losses (for au and va of each frame's 12 or 2)
    cvar: float  # the mean of the worst share ``alpha`` of them, over the whole split
    alpha: float  # the level of the first run
    rule: DecisionRule
    calibration_error: float | None  # in [0, 1]; None for va
    against: dict[str, Any] | None  # the other run; on the frames of both its value, this one's, and their difference
    heads: tuple[str, ...]  # sha256 of each run's head
    scores_file: str  # the file these scores were written to
    predictions_file: str
    figures: tuple[str, ...] = ()  # pictures, where they were asked for

    @property
    def run(self) -> str:
        """The first run."""
        return self.runs[0]

    def to_json(self) -> dict[str, Any]:
        """Return the result as one JSON object."""
        names = ("loss", "cvar", "alpha", "level", "frames", "videos", "epoch", "run")
        own = {name: getattr(self, name) for name in names}
        return {
            "task": self.task, "split": self.split, **self.scores.to_json(), **own, "runs": list(self.runs),
            "rule": self.rule.to_json(), "calibration_error": self.calibration_error, "against": self.against,
            "predictions": self.predictions_file, "figures": list(self.figures), "store": self.store,
            "store_fingerprint": self.store_fingerprint, "heads": list(self.heads),
            "classes_without_support": list(self.scores.without_support), "labels": self.account.to_json(),
        }  # fmt: skip


@dataclass(frozen=True)
class Scored:
    """What runs say of a split's frames, and what it is worth."""

    runs: tuple[TrainedRun, ...]
    joined: JoinedLabels
    predictions: Predictions  # smoothed and calibrated as the rule says
    rule: DecisionRule
    decided: npt.NDArray[Any]
    scores: Scores  # with intervals over videos
    statistics: Table  # (G, C, S) of the videos

    @property
    def task(self) -> Task:
        """What was predicted."""
        return self.runs[0].task

    @property
    def losses(self) -> torch.Tensor:
        """The loss of each frame (n,), or of its units or values (n, C)."""
        return self.task.losses(self.predictions.logits, torch.from_numpy(self.joined.labels))


@command(ScoreSettings)
def score(settings: ScoreSettings, listener: Listener) -> ScoreResult:
    """Score a run's best head on a split, and write the scores and the predictions into the run folder.

    Of a published head they go below scores/; it needs a store and labels to be said.

    The probabilities of several runs are averaged, by ``weights`` where given, each run's on its own store or on that
    of its encoder; what is written then goes into ``average/`` in the first one's folder. Intervals are of 95 %, over
    videos, persons of a video together.

    Raises:
        InputError: no run, or labels that can't be read or that join to no crop; runs of several tasks.
        StoreError: the store has changed since the run, is of another encoder, incomplete or damaged.
        ConfigError: rules are to be fitted, but nothing was held out of the training.
    """
    runs, annotations, joined = open_split(settings, settings.run, listener)
    task, first = runs.task, runs.first
    scored = score_frames(settings, runs, annotations, joined, listener)
    _warn(scored, settings.split, listener)
    against = None if settings.against is None else _compared(settings, settings.against, scored, annotations, listener)
    figures: list[Path] = []
    if settings.figures is not None:
        given, history = (joined.labels, scored.decided, scored.predictions.probabilities), first.folder.read_history()
        with drawing():
            figures = save_figures(settings.figures, score_figures(task, scored.scores, *given, history))
    losses, probabilities = scored.losses, scored.predictions.probabilities
    out = first.out if len(runs.runs) == 1 else RunFolder(first.out.path / AVERAGE)
    result = ScoreResult(
        runs=tuple(run.source for run in runs.runs),
        store=BESIDE.join(dict.fromkeys(str(part.path) for run in runs.runs for part in run.store.parts)),
        heads=tuple(sha256_of(run.folder.head) for run in runs.runs),
        store_fingerprint=first.store.fingerprint(),
        task=task.name,
        split=settings.split,
        epoch=first.epoch,
        level=task.level,
        frames=len(joined),
        videos=len(scored.statistics),
        account=joined.account,
        scores=scored.scores,
        loss=float(losses.mean()),
        cvar=float(cvar(losses, first.settings.alpha)),
        alpha=first.settings.alpha,
        rule=scored.rule,
        calibration_error=reliability(probabilities, joined.labels).error if task.has_classes else None,
        against=against,
        scores_file=str(out.of_split(out.scores, settings.split, scored.rule.name)),
        predictions_file=str(out.of_split(out.predictions, settings.split, scored.rule.name)),
        figures=tuple(map(str, figures)),
    )
    _write_predictions(Path(result.predictions_file), result, scored)
    write_json(Path(result.scores_file), result.to_json())
    return result


def _warn(scored: Scored, split: str, listener: Listener) -> None:
    """Say what a reader has to know of scores before trusting them."""
    level = scored.task.level
    if missing := scored.scores.without_support:
        listener.warning(
            f"No {split} {level} is labelled {', '.join(missing)}: each counts as 0 in {scored.scores.metric}, "
            f"as the mean runs over all {scored.task.outputs} classes."
        )
    if few := without_interval(scored.task, scored.statistics):
        listener.message(f"{metric_name(scored.task.metric)} has no interval: {few}")
    if scored.rule.optimistic:
        listener.warning(f"The rule was fitted on the very {level}s that are scored here: the scores are optimistic.")


def _compared(
    settings: ScoreSettings, against: Path, scored: Scored, annotations: Path, listener: Listener
) -> dict[str, Any]:
    """Score another run, and return its value and the difference to it, both on the frames that both have."""
    task, store = scored.task, settings.store
    other = Ensemble.of([TrainedRun.on_store(against, store, settings.device, listener)], listener)
    require_one_task([*scored.runs, other.first])
    joined = join_labels(other.frames, annotations, task, settings.split)
    theirs = score_frames(replace(settings, weights=""), other, annotations, joined, listener)
    _, (rows, their_rows) = shared_frames([scored.predictions.frames, other.frames])
    both = np.isin(rows, scored.joined.rows) & np.isin(their_rows, joined.rows)
    if not both.any():
        raise InputError(
            f"No labelled frame is both in {scored.predictions.frames.path} and in {other.frames.path}, on which "
            f"{other.first.source} predicts. Expected stores of the same videos. Compare runs on the same crops."
        )
    places = np.searchsorted(scored.joined.rows, rows[both])
    their_places = np.searchsorted(joined.rows, their_rows[both])
    _, group = group_frames(scored.predictions.frames, scored.joined)
    videos, group = np.unique(group[places], return_inverse=True)  # of these frames alone
    labels, decided = scored.joined.labels[places], (scored.decided[places], theirs.decided[their_places])
    sums = [task.sums_by_video(labels, one, group, len(videos)) for one in decided]
    found = metric_interval(task, sums[:1], sums[1:])
    own, value = (task.score(labels, one).value for one in decided)
    difference = found.to_json()
    return {"run": other.first.source, "value": value, "own": own, "frames": len(labels), "difference": difference}


def open_split(
    settings: SplitSettings, paths: Sequence[Path], listener: Listener
) -> tuple[Ensemble, Path, JoinedLabels]:
    """Open runs, and join the labels of a split to their frames; return the folder of the labels, too."""
    against = [settings.against] if isinstance(settings, ScoreSettings) and settings.against else []
    runs = Ensemble.open(paths, settings.store, settings.device, listener, also=against)
    annotations = settings.annotations or runs.first.annotations
    joined = join_labels(runs.frames, annotations, runs.task, settings.split)
    listener.message(joined.account.sentence(settings.split, runs.task.level))
    return runs, annotations, joined


def score_frames(
    settings: SplitSettings, runs: Ensemble, annotations: Path, joined: JoinedLabels, listener: Listener
) -> Scored:
    """Predict the joined frames of a split, or its videos, decide by the rule that the settings ask for, and score."""
    task, frames = runs.task, runs.frames
    rule = find_rule(settings, runs, annotations, listener, reported=settings.split)
    rows = rows_to_predict(frames, joined.rows, settings.smooth)
    predictions = rule.apply(runs.predict(rows, settings.views, listener, rule.weights), task).at(joined.rows)
    decided = rule.decide(predictions.probabilities, task)
    names, group = group_frames(frames, joined)
    statistics = task.sums_by_video(joined.labels, decided, group, len(names))
    scores = with_intervals(task, task.score(joined.labels, decided), statistics)
    return Scored(runs.runs, joined, predictions, rule, decided, scores, statistics)


def with_intervals(task: Task, scores: Scores, statistics: Table) -> Scores:
    """Return scores with intervals over videos (G, C, S), where enough of these have a class for one."""
    each = [metric_interval(task, [statistics], outputs=[output]) for output in range(task.outputs)]
    present = task.videos_of_outputs(statistics).nonzero()[0].tolist()
    of_present = metric_interval(task, [statistics], outputs=present) if len(present) < len(each) else None
    return scores.with_intervals(metric_interval(task, [statistics]), each, of_present)


def _write_predictions(path: Path, result: ScoreResult, scored: Scored) -> None:
    """Write what is said of every scored frame, with the keys that find it again."""
    given = scored.predictions
    written = io.BytesIO()  # HDF5 swallows errors of a disk, or crashes at them
    with h5py.File(written, "w") as file:
        file.attrs["format"] = "affcache-predictions"
        file.attrs["format_version"] = 1
        file.attrs["classes"] = json.dumps(scored.task.classes)
        file.attrs["rule"] = json.dumps(result.rule.to_json())
        for name in ("task", "split", "run", "store"):
            file.attrs[name] = getattr(result, name)
        file["rows"] = given.rows
        file["video"] = given.videos.astype(np.int32)
        file["frame_number"] = given.frame_numbers
        file.create_dataset("video_name", data=list(given.frames.video_names), dtype=h5py.string_dtype())
        file["probabilities"] = given.probabilities.astype(np.float32)
        file["decided"] = scored.decided
        file["labels"] = scored.joined.labels
    write_bytes(path, written.getbuffer())
