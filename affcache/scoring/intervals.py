"""Intervals by resampling whole videos, whose frames resemble one another, and training seeds. Knows arrays only."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from affcache.tasks.metrics import Table

RESAMPLES = 2000
LEVEL = 0.95  # how often an interval is to hold the true value


@dataclass(frozen=True)
class Interval:
    """A value with the range that resampling gives it."""

    value: float
    low: float
    high: float


class VideoResamples:
    """Sets of videos drawn with replacement, each as large as the whole.

    Args:
        videos: G, how many there are to draw from: at least 1.
        resamples: R, how many sets are drawn.
        seed: decides them.
    """

    def __init__(self, videos: int, resamples: int = RESAMPLES, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.times = random.multinomial(videos, np.full(videos, 1 / videos), size=resamples)  # (R, G) each was drawn

    def metric(self, statistics: Table, metric_of: Callable[[Table], npt.NDArray[np.float64]]) -> Table:
        """Return the metric (R,) of each set, from statistics (G, C, S) of videos."""
        return np.asarray(metric_of(np.tensordot(self.times, statistics, axes=1)))


def video_interval(value: float, resampled: Table) -> Interval:
    """Return a value with its interval when videos are drawn anew: the middle of what the draws gave.

    Args:
        value: on the videos as they are.
        resampled: (R,), on each set of videos.
    """
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


def seed_and_video_interval(value: float, resampled: Table, *, seed: int = 0) -> Interval:
    """Return a mean over seeds with its interval when both seeds and videos are drawn anew.

    Seeds and videos cross: every seed is scored on every video. Each resample draws seeds and videos, one independent
    of the other, as Owen, The pigeonhole bootstrap, Annals of Applied Statistics 1, 2007 does; for crossed factors that
    errs on the wide side. With one seed, only videos are drawn.

    Args:
        value: the mean over seeds on the videos as they are.
        resampled: (K, R), for each seed its value on each set of videos.
        seed: decides which seeds are drawn.
    """
    seeds, resamples = resampled.shape
    random = np.random.default_rng([seed, 1])  # not the stream that drew the videos
    share = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples).T / seeds  # (K, R)
    return video_interval(value, (share * resampled).sum(axis=0))
