"""Trials of a grid and what came out of them, and what they say of its settings: means, and paired differences."""

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from affcache.ablation.grid import NOT_VARIED, Variant
from affcache.errors import StoreError
from affcache.files import Tensors, read_json, read_tensors, write_json, write_tensors
from affcache.scoring.intervals import metric_interval
from affcache.scoring.together import beside
from affcache.tasks.metrics import Interval, Table
from affcache.tasks.multitask import MultiTask
from affcache.tasks.own import task_to_json
from affcache.tasks.task import Task
from affcache.training.epochs import Best, Entry
from affcache.training.fit import HEADER
from affcache.training.run_folder import RunFolder
from affcache.training.settings import FitSettings
from affcache.training.splits import JoinedSplits, LoadedSplits

RESULT = ("value", "selected", "best_epoch", "diverged")  # of an outcome, in result.json
STATISTICS = "videos.safetensors"
# of the settings, what doesn't decide a result, or what the labels say
SAID_BY_OTHERS: tuple[str, ...] = (*NOT_VARIED, "train_on", "keep_epoch", "strength")
FEW_SEEDS = 3  # with fewer, an interval says little of what seeds do


@dataclass(frozen=True)
class Trial:
    """One head of the grid: a setting with a seed, on one store with its labels."""

    variant: Variant
    settings: FitSettings
    splits: JoinedSplits
    folder: RunFolder

    @classmethod
    def of(cls, variant: Variant, settings: FitSettings, splits: JoinedSplits, out: Path) -> "Trial":
        """Name a trial by everything that decides its result, so that it is found again in whatever grid it stands."""
        store, labels = splits.description["store"], splits.description["labels"]
        described = splits.describe_task(settings)
        identity = {
            "settings": {name: v for name, v in described["settings"].items() if name not in SAID_BY_OTHERS},
            "store": store["fingerprint"],
            "encoder": store["encoder_fingerprint"],
            "labels": {name: of["sha256"] for name, of in {"selection": labels["validation"], **labels}.items()},
        }
        if "definition" in described:
            identity["task"] = task_to_json(replace(splits.task, description="", labels=None, columns=()))
        name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        return cls(variant, settings, splits, RunFolder(out / "cells" / name))

    @property
    def name(self) -> str:
        """The folder's name, which no other trial has."""
        return self.folder.path.name

    @property
    def result(self) -> Path:
        """The file of the result, which is written last: the trial is finished once it is there."""
        return self.folder.path / "result.json"

    @property
    def probabilities(self) -> Path:
        """The file of what the head says of the frames of its fold, where it has one."""
        return self.folder.path / "probabilities.safetensors"

    def write(self, outcome: "Outcome", head: Tensors | None, probabilities: torch.Tensor | None = None) -> None:
        """Write the run folder, its result last; and the probabilities (n, C) of a fold."""
        config = self.splits.describe_run(self.settings)
        write_json(self.folder.config, config)
        self.folder.write_history(outcome.history)
        if outcome.statistics is not None:
            sums = {"sums": torch.from_numpy(outcome.statistics)}
            write_tensors(self.folder.path / STATISTICS, sums, {"videos": outcome.videos})
        if head is not None:
            best = {"epoch": outcome.best_epoch, self.splits.task.metric: outcome.value}
            write_tensors(self.folder.head, head, {**{name: config[name] for name in HEADER}, **best})
        if probabilities is not None:
            write_tensors(self.probabilities, {"probabilities": probabilities}, {})
        write_json(self.result, {name: getattr(outcome, name) for name in RESULT})

    def read(self) -> "Outcome":
        """Return the result.

        Raises:
            StoreError: it is damaged.
        """
        try:
            found = read_json(self.result)
            history = self.folder.read_history()
            value, selected, best_epoch, diverged = (found[name] for name in RESULT)
            numbers = (best_epoch, value, selected) if diverged is None else (best_epoch, diverged)
            if not all(isinstance(number, (int, float)) for number in numbers):
                raise ValueError(f"{numbers} are not all numbers")
            if diverged is not None:
                return Outcome(None, None, best_epoch, diverged, history, None, [])
            tensors, header = read_tensors(self.folder.path / STATISTICS)
            sums, videos = tensors["sums"].numpy(), [str(name) for name in header["videos"]]
            if sums.ndim != 3 or len(sums) != len(videos):
                raise ValueError(f"{len(videos)} videos, sums of shape {sums.shape}")
            return Outcome(value, selected, best_epoch, None, history, sums, videos)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"The result in {self.folder.path} can't be read ({error}). Expected what 'affcache ablate' wrote. "
                "Delete that folder and call again: the cell is trained anew."
            ) from None


@dataclass(frozen=True)
class Outcome:
    """What training a trial found."""

    value: float | None  # the metric on validation at the best epoch; None where it diverged
    selected: float | None  # the metric by which that epoch was chosen, there
    best_epoch: int  # counted from 1
    diverged: int | None  # the epoch in which it did
    history: list[Entry]
    statistics: Table | None  # (G, C, S) of validation's videos, for ``Task.metric_of``
    videos: list[str]  # (G,)
    of_folds: tuple[float, ...] = ()  # where folds are pooled, the metric on each

    @classmethod
    def of(cls, best: Best, logits: torch.Tensor, splits: LoadedSplits) -> "Outcome":
        """Return what a head's logits (n, C) on validation say; nothing where it diverged."""
        if best.diverged is not None:
            return cls(None, None, best.epoch, best.diverged, best.history, None, [])
        task, names, validation = splits.task, splits.video_names, splits.validation
        probabilities, labelled = task.scored(logits, validation.videos)
        labels, decided = validation.labels.cpu().numpy()[labelled], task.decide(probabilities)
        value = task.score(labels, decided).value
        statistics = task.sums_by_video(labels, decided, splits.video_of_frame[labelled], len(names))
        return cls(value, best.value, best.epoch, None, best.history, statistics, names)


Outcomes = Mapping[int, Outcome]  # by seed


@dataclass(frozen=True)
class Summary:
    """A setting over its seeds."""

    variant: Variant
    task: str
    metric: str
    finished: int  # seeds that are trained
    diverged: int  # of these, whose training broke down; they are in no mean
    mean: float | None  # of the metric on validation, or on all frames together, each by the head that never saw it
    deviation: float | None  # standard deviation over seeds; None for fewer than two
    selected: float | None  # mean of the metric where epochs were chosen
    difference: Interval | None  # to the base setting, over the seeds and videos of both
    is_base: bool
    folds: int = 0  # whose frames together the metric is of; 0 for validation
    interval: Interval | None = None  # of the mean, over seeds and the videos of all folds; None without folds
    fold_mean: float | None = None  # of the metric on one fold, over folds and seeds
    fold_deviation: float | None = None  # and its standard deviation

    @property
    def count(self) -> int:
        """How many seeds the mean is of."""
        return self.finished - self.diverged

    @property
    def differs(self) -> bool:
        """Whether the interval of the difference leaves out 0, and there are seeds enough for it to know of them."""
        bounds = self.difference.bounds if self.difference else None
        return bounds is not None and self.count >= FEW_SEEDS and not bounds[0] <= 0 <= bounds[1]


def summarise(
    variants: Sequence[Variant], outcomes: Sequence[Outcomes], base: int, tasks: Sequence[Task], folds: int = 0
) -> list[Summary]:
    """Summarise each setting over its finished seeds.

    Args:
        variants: of the grid, in its order.
        outcomes: of each setting, by seed, of which folds are pooled; those that aren't finished are absent.
        base: which setting the others are compared with. Settings of another task than its own are compared with
            its like of their task.
        tasks: of each setting.
        folds: how many are pooled; 0 for none.
    """
    rows = []
    for index, (variant, found, task) in enumerate(zip(variants, outcomes, tasks, strict=True)):
        against = _base_for(variant, variants, base)
        other = outcomes[against] if against is not None and against != index else None
        rows.append(_summary(variant, found, task, other, folds, is_base=against == index))
    return rows


def summarise_together(
    variants: Sequence[Variant], outcomes: Sequence[Outcomes], base: int, tasks: Sequence[Task], folds: int = 0
) -> list[Summary]:
    """Summarise, for each setting of several tasks at once, what heads of each task alone come to, seed by seed.

    That is: the sum of the metrics of its like of each task alone, where the grid has them. It is compared as that
    setting would be, or where that is the base, with it. Arguments are those of ``summarise``.
    """
    rows: list[Summary] = []
    for index, (variant, task) in enumerate(zip(variants, tasks, strict=True)):
        if not isinstance(task, MultiTask):
            continue
        likes = [_like(variant, variants, part.name) for part in task.parts]
        alone = [like for like in likes if like is not None]
        if len(alone) < len(likes):
            continue
        of_seeds = {seed: _beside(task, [outcomes[one].get(seed) for one in alone]) for seed in outcomes[index]}
        found = {seed: both for seed, both in of_seeds.items() if both is not None}
        values = {**variant.values, "task": " + ".join(part.name for part in task.parts)}
        named = Variant(" + ".join(variants[one].name for one in alone), values, variant.store)
        if not _same_labels(task, found, outcomes[index]):
            continue
        against = _base_for(variant, variants, base)
        row = _summary(named, found, task, None if against is None else outcomes[against], folds, is_base=False)
        rows.append(replace(row, fold_deviation=None))  # each task has folds of its own
    return rows


def _beside(task: MultiTask, each: Sequence[Outcome | None]) -> Outcome | None:
    """Return what heads of one task each come to together; None where one isn't finished, or diverged."""
    valid = [one for one in each if one is not None and one.value is not None and one.statistics is not None]
    if len(valid) < len(each):
        return None
    videos, sums = beside(task, [(one.videos, one.statistics) for one in valid if one.statistics is not None])
    of_folds = [sum(values) for values in zip(*(one.of_folds for one in valid), strict=False)]
    value = sum(one.value for one in valid if one.value is not None)
    return Outcome(value, None, 0, None, [], sums, videos, tuple(of_folds))


def _same_labels(task: MultiTask, found: Outcomes, other: Outcomes) -> bool:
    """Say whether the same was labelled where tasks are alone as where they are together: they can be compared then."""
    sums = [[one.statistics for one in of.values() if one.statistics is not None] for of in (found, other)]
    if not all(sums):
        return False
    ours, theirs = (task.labels_of_outputs(of[0].sum(axis=0)) for of in sums)
    return np.array_equal(ours, theirs)


def _summary(
    variant: Variant, found: Outcomes, task: Task, other: Outcomes | None, folds: int, *, is_base: bool
) -> Summary:
    valid = {seed: outcome for seed, outcome in found.items() if outcome.value is not None}
    values = [outcome.value for outcome in valid.values() if outcome.value is not None]
    selected = [outcome.selected for outcome in valid.values() if outcome.selected is not None]
    of_folds = [value for outcome in valid.values() for value in outcome.of_folds]
    sums = [outcome.statistics for outcome in valid.values() if outcome.of_folds and outcome.statistics is not None]
    return Summary(
        variant=variant,
        task=task.name,
        metric=task.metric,
        finished=len(found),
        diverged=len(found) - len(valid),
        mean=statistics.fmean(values) if values else None,
        deviation=statistics.stdev(values) if len(values) > 1 else None,
        selected=statistics.fmean(selected) if selected else None,
        difference=None if other is None else paired_difference(valid, other, task),
        is_base=is_base,
        folds=folds,
        interval=metric_interval(task, sums) if sums else None,
        fold_mean=statistics.fmean(of_folds) if of_folds else None,
        fold_deviation=statistics.stdev(of_folds) if of_folds else None,
    )


def paired_difference(found: Outcomes, base: Outcomes, task: Task) -> Interval | None:
    """Return how much a setting's metric is above the base's, over the seeds and videos that both have.

    Both are scored on the same videos with the same seeds: what a hard video or a lucky seed does to both alike leaves
    their difference alone. None where they share no seed or no video.
    """
    seeds = [seed for seed in found if seed in base and base[seed].statistics is not None]
    if not seeds:
        return None
    ours, theirs = [found[seed] for seed in seeds], [base[seed] for seed in seeds]
    shared = sorted(set(ours[0].videos) & set(theirs[0].videos))
    if not shared:
        return None
    return metric_interval(task, [_rows(one, shared) for one in ours], [_rows(one, shared) for one in theirs])


def _rows(outcome: Outcome, videos: Sequence[str]) -> Table:
    """Return the statistics (G, C, S) of some of an outcome's videos, in their order."""
    assert outcome.statistics is not None  # it is valid
    number = {name: row for row, name in enumerate(outcome.videos)}
    return outcome.statistics[[number[name] for name in videos]]


def _base_for(variant: Variant, variants: Sequence[Variant], base: int) -> int | None:
    """Return the setting that one is compared with: the base, or its like of the setting's own task."""
    if "task" not in variants[base].values:
        return base
    return _like(variants[base], variants, variant.values["task"])


def _like(variant: Variant, variants: Sequence[Variant], task: str) -> int | None:
    """Return the setting that differs from one in the task alone."""
    wanted = {**variant.values, "task": task}
    for index, other in enumerate(variants):
        if other.values == wanted and other.store == variant.store:
            return index
    return None
