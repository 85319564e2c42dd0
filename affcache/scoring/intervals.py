"""Intervals of a metric over videos, whose frames resemble one another, and over training seeds."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.special import expit, logit, stdtrit

from affcache.tasks.metrics import Bounds, Interval, Table
from affcache.tasks.task import Task

LEVEL = 0.95  # how often an interval is to hold the true value
FEWEST_VIDEOS = 3  # that must have a class: with fewer, no interval of its F1, or of a mean with it, holds what it says
CLOSEST = 1e-4  # to an end of a metric's range, as a share of it, where odds would be infinite


def metric_interval(
    task: Task, ours: Sequence[Table], theirs: Sequence[Table] = (), outputs: Sequence[int] | None = None
) -> Interval:
    """Return a task's metric with its interval, or by how much it is above another's on the same videos.

    Args:
        task: gives the metric.
        ours: for each of K seeds, the sums (G, C, S) of the videos.
        theirs: of what is compared, in the same order of seeds and videos; empty for the metric itself.
        outputs: those that the metric is the mean of; None for all.

    Returns:
        The mean over seeds; without an interval where a class lies in fewer than ``FEWEST_VIDEOS`` videos.
    """
    chosen = list(range(task.outputs)) if outputs is None else list(outputs)

    def both(of: Sequence[Table]) -> tuple[Table, Table]:
        values = np.stack([task.class_metric_of(sums.sum(axis=0)) for sums in of])[:, chosen]  # (K, C)
        without = np.stack([task.class_metric_of(sums.sum(axis=0) - sums) for sums in of])[:, :, chosen]  # (K, G, C)
        return task.combined(values, chosen), task.combined(without, chosen)

    values, without = both(ours)
    if theirs:
        others, others_without = both(theirs)
        values, without = values - others, without - others_without
    if (task.videos_of_outputs(ours[0])[chosen] < FEWEST_VIDEOS).any():
        return Interval(float(values.mean()))
    return video_interval(values, without, None if theirs else task.metric_limits)


def video_interval(each: Table, without: Table, limits: Bounds | None = None) -> Interval:
    """Return a mean over K seeds with the interval in which it lies for other videos, and other seeds.

    A jackknife over videos, which Quenouille and Tukey proposed, in three respects made to hold the truth for few and
    unequal ones (simulated in docs/method/intervals.md): a metric with limits is taken on the scale of log-odds; the
    interval reaches from the lower to the higher of the value and the value corrected for the jackknife's estimate of
    its bias, and beyond both by Student's t; whose degrees of freedom are as many as the kurtosis of the videos'
    pseudo-values leave. With several seeds the variance of their mean is added, which for crossed factors errs on the
    wide side (Owen, The pigeonhole bootstrap, Annals of Applied Statistics 1, 2007).

    Args:
        each: (K,), for each seed its value on all videos.
        without: (K, G), for each seed its value without each of G videos.
        limits: the metric's range; None for a difference.

    Returns:
        The interval, with the value in it; without one where all pseudo-values are equal.
    """
    plain = Interval(float(each.mean()))
    seeds, videos = without.shape
    value, others = _scaled(each.mean(), limits), _scaled(without.mean(axis=0), limits)  # (), (G,)
    if not np.ptp(others) > 0:  # nothing varies but by rounding
        return plain
    pseudo_values = videos * value - (videos - 1) * others  # (G,)
    corrected = pseudo_values.mean()
    squares = (pseudo_values - corrected) ** 2
    if not squares.sum() > 0:
        return plain
    variance = squares.sum() / (videos * (videos - 1))
    freedom = min(max(3 * squares.sum() ** 2 / (squares**2).sum() - 2, 1), videos - 1)
    if seeds > 1:
        of_seeds = _scaled(each, limits).var(ddof=1) / seeds
        total = variance + of_seeds
        # Satterthwaite, An approximate distribution of estimates of variance components, Biometrics 2, 1946
        freedom = total**2 / (variance**2 / freedom + of_seeds**2 / (seeds - 1))
        variance = total
    reach = stdtrit(freedom, (1 + LEVEL) / 2) * np.sqrt(variance)
    low, high = min(value, corrected) - reach, max(value, corrected) + reach
    return Interval(plain.value, (_unscaled(low, limits), _unscaled(high, limits)))


def _scaled(values: npt.ArrayLike, limits: Bounds | None) -> npt.NDArray[np.float64]:
    """Return log-odds of values within limits; other values as they are."""
    values = np.asarray(values, np.float64)
    if limits is None:
        return values
    low, high = limits
    return logit(np.clip((values - low) / (high - low), CLOSEST, 1 - CLOSEST))


def _unscaled(value: float, limits: Bounds | None) -> float:
    if limits is None:
        return float(value)
    low, high = limits
    return float(low + (high - low) * expit(value))


def without_interval(task: Task, sums: Table) -> str:
    """Say which classes lie in too few videos (G, C, S) for an interval of the metric; "" where none does."""
    carried = zip(task.classes, task.videos_of_outputs(sums), strict=True)
    few = [f"{name} in {count or 'none'}" for name, count in carried if count < FEWEST_VIDEOS]
    return f"{', '.join(few)} of the videos, expected each in at least {FEWEST_VIDEOS}" if few else ""
