"""What runs say of the labelled frames of a split, and what it is worth: predicted, decided by a rule, scored."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from affcache.progress import Listener, metric_name
from affcache.scoring.ensemble import Ensemble
from affcache.scoring.intervals import metric_interval, without_interval
from affcache.scoring.postprocess import find_rule, reliability
from affcache.scoring.predict import Predictions, TrainedRun, rows_to_predict
from affcache.scoring.rule import DecisionRule
from affcache.scoring.settings import SplitSettings
from affcache.tasks.annotations import JoinedLabels
from affcache.tasks.metrics import Scores, Table
from affcache.tasks.splits import group_frames
from affcache.tasks.task import Labels, Task


@dataclass(frozen=True)
class Scored:
    """What runs say of a split's frames, and what it is worth."""

    runs: tuple[TrainedRun, ...]
    joined: JoinedLabels
    predictions: Predictions  # smoothed and calibrated as the rule says
    rule: DecisionRule
    decided: Labels
    scores: Scores  # with intervals over videos
    videos: list[str]  # (G,) the names of the videos, persons of one together
    statistics: Table  # (G, C, S) of the videos

    @property
    def task(self) -> Task:
        """What was predicted."""
        return self.runs[0].task

    @property
    def losses(self) -> torch.Tensor:
        """The loss of each label: of the frames (n,), or of what of their units or values is labelled (m,)."""
        return self.task.labelled_losses(self.predictions.logits, torch.from_numpy(self.joined.labels))

    @property
    def frame_losses(self) -> npt.NDArray[np.float64]:
        """The loss of each frame (n,): of what of its units or values is labelled, the mean."""
        labels = torch.from_numpy(self.joined.labels)
        losses = self.task.losses(self.predictions.logits, self.task.filled(labels)).numpy().reshape(len(labels), -1)
        labelled = self.task.labelled(labels).numpy().reshape(len(labels), -1)
        return np.asarray(losses.mean(axis=1, where=labelled, dtype=np.float64))

    @property
    def calibration_error(self) -> float | None:
        """The expected calibration error, in [0, 1]; None for values."""
        if not self.task.has_classes:
            return None
        return reliability(self.predictions.probabilities, self.joined.labels).error


def score_split(settings: SplitSettings, runs: Ensemble, listener: Listener, said_of: str = "") -> Scored:
    """Join the labels of a split to the frames of runs of one task, predict, decide and score; say what to know of it.

    Args:
        settings: which split, and how is decided.
        runs: of one task.
        listener: receives progress.
        said_of: begins what is said of the labels; "" where there is one task.

    Raises:
        InputError: labels that can't be read or that join to no crop.
        StoreError: a store is damaged.
        ConfigError: rules are to be fitted, but nothing was held out of the training.
    """
    annotations = settings.annotations or runs.first.annotations
    joined = runs.join(annotations, settings.split)
    listener.message(said_of + joined.account.sentence(settings.split, runs.task.level))
    for run in runs.runs:
        warn_of_training(run, settings.split, listener)
    rule = find_rule(settings, runs, annotations, listener, reported=settings.split)
    scored = scored_by(rule, settings, runs, joined, listener)
    _warn(scored, settings.split, listener)
    return scored


def scored_by(
    rule: DecisionRule, settings: SplitSettings, runs: Ensemble, joined: JoinedLabels, listener: Listener
) -> Scored:
    """Predict joined frames, or videos, decide by a rule, and score."""
    task, frames = runs.task, runs.frames
    rows = rows_to_predict(frames, joined.rows, settings.smooth)
    predictions = rule.apply(runs.predict(rows, settings.views, listener, rule.weights), task).at(joined.rows)
    decided = rule.decide(predictions.probabilities, task)
    names, group = group_frames(frames, joined)
    statistics = task.sums_by_video(joined.labels, decided, group, len(names))
    scores = with_intervals(task, task.score(joined.labels, decided), statistics)
    return Scored(runs.runs, joined, predictions, rule, decided, scores, names, statistics)


def warn_of_training(run: TrainedRun, split: str, listener: Listener) -> None:
    """Warn where a run was trained on the split that it is scored on."""
    if split == "validation" and run.settings.trained_on_validation:
        listener.warning(f"{run.source}: {run.settings.trained_on_validation}")


def with_intervals(task: Task, scores: Scores, statistics: Table) -> Scores:
    """Return scores with intervals over videos (G, C, S), where enough of these have a class for one."""
    each = [metric_interval(task, [statistics], outputs=[output]) for output in range(task.outputs)]
    present = task.videos_of_outputs(statistics).nonzero()[0].tolist()
    of_present = metric_interval(task, [statistics], outputs=present) if len(present) < len(each) else None
    return scores.with_intervals(metric_interval(task, [statistics]), each, of_present)


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
