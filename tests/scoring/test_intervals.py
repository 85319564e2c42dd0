"""Intervals by resampling: how often they hold the truth, and what they do with one seed, one video, no spread."""

import numpy as np
import pytest

from affcache.scoring.intervals import VideoResamples, seed_and_video_interval, video_interval
from affcache.tasks.metrics import Table
from affcache.tasks.tasks import TASKS


def mean_of(sums: Table) -> Table:
    """Return a metric that is a plain mean: statistics are (sum, count)."""
    return np.asarray(sums[..., 0, 0] / sums[..., 0, 1])


def test_resamples_draw_as_many_videos_as_there_are() -> None:
    resamples = VideoResamples(7, resamples=400)
    assert resamples.times.shape == (400, 7)
    assert (resamples.times.sum(axis=1) == 7).all()
    assert resamples.times.mean(axis=0) == pytest.approx(np.ones(7), abs=0.2)
    assert (VideoResamples(7, 400, seed=1).times != resamples.times).any()
    assert (VideoResamples(7, 400).times == resamples.times).all()


def test_a_metric_of_resamples_is_that_of_the_drawn_videos() -> None:
    counts = np.random.default_rng(0).integers(1, 9, (6, 3, 3)).astype(float)
    resamples = VideoResamples(6, resamples=5)
    found = resamples.metric(counts, TASKS["expr"].metric_of)
    for value, times in zip(found, resamples.times, strict=True):
        assert value == pytest.approx(float(TASKS["expr"].metric_of(np.repeat(counts, times, axis=0).sum(0))))


def coverage(seed_spread: float, video_spread: float, seeds: int, videos: int) -> float:
    """Return how often the interval holds the mean of the population that seeds and videos are drawn from."""
    random, held = np.random.default_rng(4), 0
    for trial in range(400):
        of_seeds = random.normal(scale=seed_spread, size=(seeds, 1))
        values = of_seeds + random.normal(scale=video_spread, size=(1, videos))
        statistics = np.stack([values, np.ones_like(values)], axis=-1)[:, :, None]  # (K, G, 1, 2)
        resamples = VideoResamples(videos, 400, seed=trial)
        resampled = np.stack([resamples.metric(one, mean_of) for one in statistics])
        found = seed_and_video_interval(float(values.mean()), resampled, seed=trial)
        held += found.low <= 0 <= found.high
    return held / 400


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    assert 0.91 <= coverage(0.0, 1.0, seeds=3, videos=40) <= 0.98, "videos alone"
    assert 0.91 <= coverage(1.0, 1.0, seeds=30, videos=30) <= 0.99, "both"


def test_what_does_not_vary_has_an_interval_of_no_width() -> None:
    found = seed_and_video_interval(0.5, np.full((3, 100), 0.5))
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)


def test_few_seeds_that_differ_widen_the_interval() -> None:
    resampled = np.array([[0.1], [0.5]]).repeat(500, axis=1)
    found = seed_and_video_interval(0.3, resampled)
    assert (found.low, found.high) == (0.1, 0.5)
    one = seed_and_video_interval(0.1, resampled[:1])
    assert (one.low, one.high) == (0.1, 0.1)


def drawn_videos(random: np.random.Generator, videos: int) -> Table:
    """Draw videos of four classes: each with its own length, mixture of classes, and how well it is recognised."""
    mixtures = random.dirichlet(np.ones(4), videos)
    lengths = random.integers(20, 200, videos)
    skill = random.beta(4, 3, videos)
    counts = np.empty((videos, 4, 3))
    for video in range(videos):
        labelled = random.multinomial(lengths[video], mixtures[video])
        right = random.binomial(labelled, skill[video])
        wrong = random.multinomial((labelled - right).sum(), np.full(4, 0.25))
        counts[video] = np.stack([right, right + wrong, labelled], axis=-1)
    return counts


def test_macro_f1_of_seventy_videos_is_held_by_its_interval_as_often_as_it_says() -> None:
    random, held, trials = np.random.default_rng(7), 0, 1000
    truth = float(TASKS["expr"].metric_of(drawn_videos(random, 40_000).sum(0)))
    for trial in range(trials):
        counts = drawn_videos(random, 70)
        found = video_interval(0.0, VideoResamples(70, 300, seed=trial).metric(counts, TASKS["expr"].metric_of))
        held += found.low <= truth <= found.high
    assert 0.93 <= held / trials <= 0.97, held / trials
