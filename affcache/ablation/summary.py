"""What the trials of a grid say of its settings: means over seeds, and paired differences to the base setting."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from affcache.ablation.grid import Variant
from affcache.ablation.trials import Outcome
from affcache.scoring.intervals import Interval, VideoResamples, seed_and_video_interval
from affcache.tasks.metrics import Table
from affcache.tasks.tasks import find_task

Outcomes = Mapping[int, Outcome]  # by seed

MetricOf = Callable[[Table], Table]


@dataclass(frozen=True)
class Summary:
    """A setting over its seeds."""

    variant: Variant
    task: str
    metric: str
    finished: int  # seeds that are trained
    diverged: int  # of these, whose training broke down; they are in no mean
    mean: float | None  # of the metric on validation
    deviation: float | None  # standard deviation over seeds; None for fewer than two
    selected: float | None  # mean of the metric where epochs were chosen
    difference: Interval | None  # to the base setting, over the seeds and videos of both
    is_base: bool

    @property
    def count(self) -> int:
        """How many seeds the mean is of."""
        return self.finished - self.diverged


def summarise(variants: Sequence[Variant], outcomes: Sequence[Outcomes], base: int, task: str) -> list[Summary]:
    """Summarise each setting over its finished seeds.

    Args:
        variants: of the grid, in its order.
        outcomes: of each setting, by seed; those that aren't finished are absent.
        base: which setting the others are compared with. Settings of another task than its own are compared with
            its like of their task.
        task: of the settings that don't vary it.
    """
    rows = []
    for index, (variant, found) in enumerate(zip(variants, outcomes, strict=True)):
        of = find_task(str(variant.values.get("task", task)))
        against = _base_for(variant, variants, base)
        valid = {seed: outcome for seed, outcome in found.items() if outcome.value is not None}
        values = [outcome.value for outcome in valid.values() if outcome.value is not None]
        selected = [outcome.selected for outcome in valid.values() if outcome.selected is not None]
        compared = None
        if against is not None and against != index:
            compared = paired_difference(valid, outcomes[against], of.metric_of)
        rows.append(
            Summary(
                variant=variant,
                task=of.name,
                metric=of.metric,
                finished=len(found),
                diverged=len(found) - len(valid),
                mean=statistics.fmean(values) if values else None,
                deviation=statistics.stdev(values) if len(values) > 1 else None,
                selected=statistics.fmean(selected) if selected else None,
                difference=compared,
                is_base=against == index,
            )
        )
    return rows


def paired_difference(found: Outcomes, base: Outcomes, metric_of: MetricOf) -> Interval | None:
    """Return how much a setting's metric is above the base's, over the seeds and videos that both have.

    Videos and seeds are drawn anew, the same for both settings: what a hard video or a lucky seed does to both alike
    leaves their difference alone. None where they share no seed or no video.
    """
    seeds = [seed for seed in found if seed in base and base[seed].statistics is not None]
    if not seeds:
        return None
    ours, theirs = [found[seed] for seed in seeds], [base[seed] for seed in seeds]
    shared = sorted(set(ours[0].videos) & set(theirs[0].videos))
    if not shared:
        return None
    resamples = VideoResamples(len(shared))
    differences, resampled = [], []
    for one, other in zip(ours, theirs, strict=True):
        tables = [_rows(outcome, shared) for outcome in (one, other)]
        value, value_of_base = (float(metric_of(table.sum(0))) for table in tables)
        differences.append(value - value_of_base)
        again, again_of_base = (resamples.metric(table, metric_of) for table in tables)
        resampled.append(again - again_of_base)
    return seed_and_video_interval(statistics.fmean(differences), np.stack(resampled))


def _rows(outcome: Outcome, videos: Sequence[str]) -> Table:
    """Return the statistics (G, C, S) of some of an outcome's videos, in their order."""
    assert outcome.statistics is not None  # it is valid
    number = {name: row for row, name in enumerate(outcome.videos)}
    return outcome.statistics[[number[name] for name in videos]]


def _base_for(variant: Variant, variants: Sequence[Variant], base: int) -> int | None:
    """Return the setting that one is compared with: the base, or its like of the setting's own task."""
    wanted = dict(variants[base].values)
    if "task" not in wanted:
        return base
    wanted["task"] = variant.values["task"]
    for index, other in enumerate(variants):
        if other.values == wanted and other.store == variants[base].store:
            return index
    return None
