"""Scores of several tasks at once: each by its own rule on the frames that have its label, and their sum."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from affcache.errors import ConfigError, InputError
from affcache.progress import Listener
from affcache.scoring.ensemble import Ensemble, parse_weights
from affcache.scoring.frames import Scored, score_split, warn_of_training
from affcache.scoring.intervals import metric_interval
from affcache.scoring.predict import TrainedRun, require_one_task
from affcache.scoring.rule import DecisionRule
from affcache.scoring.settings import PredictionSettings, ScoreSettings, SplitSettings
from affcache.store.frames import all_frames, shared_frames
from affcache.tasks.metrics import Scores, Table
from affcache.tasks.multitask import MultiTask
from affcache.tasks.splits import group_frames
from affcache.tasks.task import Task
from affcache.tasks.tasks import TASKS

OfVideos = tuple[Sequence[str], Table]  # (G,) names, rising, and sums (G, C, S)


def whole_of(ensembles: Sequence[Ensemble]) -> Task:
    """Return the task that those of ensembles are the parts of; that of one alone where no run is of several."""
    if len(ensembles) == 1 and not any(run.whole.parts for run in ensembles[0].runs):
        return ensembles[0].task
    whole = TASKS["mtl"]
    assert isinstance(whole, MultiTask)
    return whole.only([one.task.name for one in ensembles])


def score_each(
    settings: SplitSettings, runs: Sequence[TrainedRun], ensembles: Sequence[Ensemble], listener: Listener
) -> list[Scored]:
    """Score each task's runs on the frames of a split that have its label; raises as ``score_split``."""
    each = zip(ensembles, settings_of_each(settings, runs, ensembles), strict=True)
    several = bool(whole_of(ensembles).parts)
    return [score_split(own, one, listener, f"{one.task.name}, " if several else "") for one, own in each]


AnySettings = TypeVar("AnySettings", bound=PredictionSettings)


def settings_of_each(
    settings: AnySettings, runs: Sequence[TrainedRun], ensembles: Sequence[Ensemble]
) -> list[AnySettings]:
    """Return the settings for the runs of each task: weights of these, and no thresholds or temperature for values.

    Args:
        settings: as they were said.
        runs: in the order in which they were named.
        ensembles: of each task.

    Raises:
        ConfigError: weights aren't of the runs, or there is no task of which several runs are averaged.
    """
    if not whole_of(ensembles).parts:
        return [settings]
    named = [run.source for run in runs]
    weights = None if settings.weights == "fitted" else parse_weights(settings.weights, len(named))
    if settings.weights and all(len(one.runs) == 1 for one in ensembles):
        raise ConfigError(
            f"--weights is {settings.weights}, and no two of the runs are of one task, so that nothing is averaged. "
            "Expected it without, or several runs of one task."
        )
    found = []
    for one in ensembles:
        own = "fitted" if settings.weights == "fitted" and len(one.runs) > 1 else ""
        if weights is not None and len(one.runs) > 1:
            own = ",".join(repr(weights[named.index(run.source)]) for run in one.runs)
        fitting = (settings.decide, settings.calibrate) if one.task.has_classes else ("plain", False)
        found.append(replace(settings, weights=own, decide=fitting[0], calibrate=fitting[1]))
    return found


def scores_of_all(task: Task, each: Sequence[Scored]) -> Scores:
    """Return the sum of the tasks' metrics, with its interval over the videos of all."""
    assert isinstance(task, MultiTask)
    _, table = beside(task, [(one.videos, one.statistics) for one in each])
    return replace(task.sum_of([one.scores for one in each]), interval=metric_interval(task, [table]).bounds)


def rule_of_all(rules: Sequence[DecisionRule]) -> DecisionRule:
    """Return what the tasks' rules have in common: how frames are smoothed, and where rules were fitted."""
    found = next((rule for rule in rules if rule.name), rules[0])
    return found if len(rules) == 1 else replace(found, offsets=None, temperature=1.0, weights=None)


def frames_of_all(each: Sequence[Scored]) -> int:
    """Return how many frames have a label of any of the tasks."""
    frames, rows = all_frames([one.predictions.frames for one in each])
    labelled = np.zeros(len(frames), dtype=bool)
    for one, own in zip(each, rows, strict=True):
        labelled |= np.isin(own, one.joined.rows)
    return int(labelled.sum())


def compared(settings: ScoreSettings, task: Task, each: Sequence[Scored], listener: Listener) -> dict[str, Any]:
    """Score another run; return its value and the difference to it, both on the frames that both have.

    Args:
        settings: say which run.
        task: of what is compared; of several at once, that of all.
        each: what is compared, task by task.
        listener: is told of the other run.

    Raises:
        InputError: it is of another task, or has none of the frames.
    """
    assert settings.against is not None
    run = TrainedRun.on_store(settings.against, settings.store, settings.device, listener)
    warn_of_training(run, settings.split, listener)
    theirs = {one.task.name: one for one in Ensemble.of_each_task([run], listener)}
    if any(one.task.name not in theirs for one in each):
        require_one_task([*(one.runs[0] for one in each), run])
    plain, against = replace(settings, weights=""), [theirs[one.task.name] for one in each]
    found, own_settings = [], settings_of_each(plain, [run], against)
    for one, of_task in zip(each, own_settings, strict=True):
        annotations = settings.annotations or one.runs[0].annotations
        other = score_split(replace(of_task, annotations=annotations), theirs[one.task.name], Listener())
        found.append(_on_shared_frames(one, other))
    tables: list[Table] = []
    for which in (0, 1):
        of_each = [(names, sums[which]) for names, sums, _, _ in found]
        tables.append(beside(task, of_each)[1] if isinstance(task, MultiTask) else of_each[0][1])
    own, value = (sum(values[which] for _, _, values, _ in found) for which in (0, 1))
    difference = metric_interval(task, tables[:1], tables[1:]).to_json()
    frames = max(count for *_, count in found)
    return {"run": run.source, "value": value, "own": own, "frames": frames, "difference": difference}


def _on_shared_frames(ours: Scored, theirs: Scored) -> tuple[list[str], tuple[Table, Table], tuple[float, float], int]:
    """Return the videos, the sums over them, and the metric of both, on the frames that both have; and how many."""
    frames, others = ours.predictions.frames, theirs.predictions.frames
    _, (rows, their_rows) = shared_frames([frames, others])
    both = np.isin(rows, ours.joined.rows) & np.isin(their_rows, theirs.joined.rows)
    if not both.any():
        raise InputError(
            f"No labelled frame is both in {frames.path} and in {others.path}, on which {theirs.runs[0].source} "
            "predicts. Expected stores of the same videos. Compare runs on the same crops."
        )
    places = np.searchsorted(ours.joined.rows, rows[both])
    their_places = np.searchsorted(theirs.joined.rows, their_rows[both])
    names, group = group_frames(frames, ours.joined)
    videos, group = np.unique(group[places], return_inverse=True)  # of these frames alone
    labels, decided = ours.joined.labels[places], (ours.decided[places], theirs.decided[their_places])
    own, other = (ours.task.sums_by_video(labels, one, group, len(videos)) for one in decided)
    values = (ours.task.score(labels, decided[0]).value, ours.task.score(labels, decided[1]).value)
    return [names[video] for video in videos], (own, other), values, len(labels)


def beside(task: MultiTask, each: Sequence[OfVideos]) -> tuple[list[str], Table]:
    """Return the videos of all tasks, and the sums over them (G, C, S); 0 where a video has no label of a task."""
    every = sorted({name for names, _ in each for name in names})
    tables = []
    for names, table in each:
        whole = np.zeros((len(every), *table.shape[1:]))
        whole[np.searchsorted(every, list(names))] = table
        tables.append(whole)
    return every, task.beside(tables)
