"""Scoring runs: their heads over a split's frames, the task's metrics with intervals, and predictions per frame."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from affcache.figures import drawing, save_figures
from affcache.files import write_json
from affcache.progress import Listener
from affcache.scoring.ensemble import Ensemble, open_runs
from affcache.scoring.figures import learning_figure, score_figures
from affcache.scoring.frames import Scored
from affcache.scoring.predict import FramesDecided, TrainedRun, write_predictions
from affcache.scoring.published import sha256_of
from affcache.scoring.rule import DecisionRule
from affcache.scoring.settings import ScoreSettings
from affcache.scoring.together import compared, frames_of_all, rule_of_all, score_each, scores_of_all, whole_of
from affcache.scoring.trained import AVERAGE
from affcache.settings import command
from affcache.store.frames import BESIDE
from affcache.tasks.annotations import JoinAccount
from affcache.tasks.metrics import Scores
from affcache.tasks.task import Task
from affcache.training.risk import cvar
from affcache.training.run_folder import RunFolder


@dataclass(frozen=True)
class ScoreResult:
    """The scores of one run, or of several averaged, on one split."""

    runs: tuple[str, ...]
    store: str  # of several runs, those of all
    store_fingerprint: str  # of the first run's
    task: str
    definition: Task
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
    note: str = ""  # what has to be known before such scores are believed: they may mean nothing
    parts: "tuple[ScoreResult, ...]" = ()  # of several tasks at once, each one's

    @property
    def labels(self) -> dict[str, Any]:
        """What was joined and left out; of several tasks that of each, by its name."""
        return {part.task: part.labels for part in self.parts} if self.parts else self.account.to_json()

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
            "classes_without_support": list(self.scores.without_support), "labels": self.labels,
            **({"note": self.note} if self.note else {}),
            **({"parts": {part.task: part.to_json() for part in self.parts}} if self.parts else {}),
        }  # fmt: skip


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
    also = [settings.against] if settings.against else []
    runs = open_runs(settings.run, settings.store, settings.device, listener, also)
    ensembles = Ensemble.of_each_task(runs, listener)
    task = whole_of(ensembles)
    each = score_each(settings, runs, ensembles, listener)
    against = None if settings.against is None else compared(settings, task, each, listener)
    out = runs[0].out if len(runs) == 1 else RunFolder(runs[0].out.path / AVERAGE)
    rule = rule_of_all([one.rule for one in each])
    files = [out.of_split(path, settings.split, rule.name) for path in (out.scores, out.predictions)]
    parts = [_result(settings, one, out) for one in each]
    result = _of_all(task, each, parts, runs) if task.parts else parts[0]
    result = replace(
        result,
        runs=tuple(run.source for run in runs),
        heads=tuple(sha256_of(run.folder.head) for run in runs),
        rule=rule,
        note=next((note for run in runs if (note := run.settings.trained_on_validation)), "")
        if settings.split == "validation"
        else "",
        against=against,
        scores_file=str(files[0]),
        predictions_file=str(files[1]),
        figures=tuple(map(str, _draw(settings, task, each))),
    )
    _write_predictions(files[1], result, each)
    write_json(files[0], result.to_json())
    return result


def _result(settings: ScoreSettings, scored: Scored, out: RunFolder) -> ScoreResult:
    """Return what one task's scores come to."""
    task, first, losses = scored.task, scored.runs[0], scored.losses
    return ScoreResult(
        runs=tuple(run.source for run in scored.runs),
        store=BESIDE.join(dict.fromkeys(str(part.path) for run in scored.runs for part in run.store.parts)),
        heads=tuple(sha256_of(run.folder.head) for run in scored.runs),
        store_fingerprint=first.store.fingerprint(),
        task=task.name,
        definition=task,
        split=settings.split,
        epoch=first.epoch,
        level=task.level,
        frames=len(scored.joined),
        videos=len(scored.statistics),
        account=scored.joined.account,
        scores=scored.scores,
        loss=float(losses.mean()),
        cvar=float(cvar(losses, first.settings.alpha)),
        alpha=first.settings.alpha,
        rule=scored.rule,
        calibration_error=scored.calibration_error,
        against=None,
        scores_file=str(out.scores),
        predictions_file=str(out.predictions),
    )


def _of_all(
    task: Task, each: Sequence[Scored], parts: Sequence[ScoreResult], runs: Sequence[TrainedRun]
) -> ScoreResult:
    """Return what the scores of several tasks come to: the sum of their metrics, and the weighted sum of losses."""
    frames, weights = frames_of_all(each), runs[0].settings.weights_of(task)
    return replace(
        parts[0],
        task=task.name,
        definition=task,
        frames=frames,
        videos=len({name for one in each for name in one.videos}),
        store=BESIDE.join(dict.fromkeys(part.store for part in parts)),
        account=JoinAccount(used=frames, label_files=max(part.account.label_files for part in parts)),
        scores=scores_of_all(task, each),
        loss=sum(weight * part.loss for weight, part in zip(weights, parts, strict=True)),
        cvar=sum(weight * part.cvar for weight, part in zip(weights, parts, strict=True)),
        calibration_error=None,
        parts=tuple(parts),
    )


def _draw(settings: ScoreSettings, task: Task, each: Sequence[Scored]) -> list[Path]:
    """Draw the figures, where they are asked for; of several tasks each in a folder of its own."""
    if settings.figures is None:
        return []
    written: list[Path] = []
    with drawing():
        for one in each:
            given = (one.joined.labels, one.decided, one.predictions.probabilities)
            figures = score_figures(one.task, one.scores, *given, one.runs[0].folder.read_history())
            written += save_figures(settings.figures / one.task.name if task.parts else settings.figures, figures)
        history = each[0].runs[0].folder.read_history()
        if task.parts and (learning := learning_figure(history, task.metric)) is not None:
            written += save_figures(settings.figures, {"learning": learning})
    return written


def _write_predictions(path: Path, result: ScoreResult, each: Sequence[Scored]) -> None:
    """Write what is said of every scored frame; of several tasks a group each."""
    attributes = {name: getattr(result, name) for name in ("task", "split", "run", "store")}
    said = [
        FramesDecided(
            one.task,
            one.rule,
            one.predictions.frames,
            one.predictions.rows,
            {
                "probabilities": one.predictions.probabilities.astype(np.float32),
                "decided": one.decided,
                "labels": one.joined.labels,
            },
        )
        for one in each
    ]
    write_predictions(path, attributes, said, grouped=bool(result.parts))
