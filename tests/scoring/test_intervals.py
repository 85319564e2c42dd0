"""Intervals over videos and seeds: how often they hold the truth, against scipy, and where there are none."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from affcache.scoring.intervals import FEWEST_VIDEOS, metric_interval, video_interval, without_interval
from affcache.tasks.metrics import Table
from affcache.tasks.tasks import TASKS
from benchmarks.interval_coverage import Truth, coverage

EXPR = TASKS["expr"]


def means_without(values: Table) -> Table:
    """Return the mean of values (K, G) without each of G."""
    return (values.sum(axis=1, keepdims=True) - values) / (values.shape[1] - 1)


def test_of_a_plain_mean_it_is_students() -> None:
    values = np.random.default_rng(0).uniform(size=(1, 12))  # of low kurtosis: all 11 degrees of freedom are left
    found = video_interval(values.mean(axis=1), means_without(values))
    expected = stats.ttest_1samp(values[0], 0).confidence_interval(0.95)
    assert found.bounds == pytest.approx((expected.low, expected.high), rel=1e-12)


def test_it_reaches_beyond_both_the_value_and_the_one_corrected_for_bias() -> None:
    values = np.random.default_rng(0).uniform(1, 3, size=(1, 12))
    value, others = values.mean() ** 2, means_without(values) ** 2  # a square of a mean is too large
    found = video_interval(np.array([value]), others)
    pseudo = 12 * value - 11 * others[0]
    reach = stats.t.ppf(0.975, 11) * stats.sem(pseudo)
    assert pseudo.mean() < value - 0.01
    assert found.value == value
    assert found.bounds == pytest.approx((pseudo.mean() - reach, value + reach))


def test_a_video_that_decides_alone_leaves_one_degree_of_freedom() -> None:
    values = np.zeros((1, 12))
    values[0, 3] = 1
    found = video_interval(values.mean(axis=1), means_without(values))
    assert found.bounds is not None
    reach = (found.bounds[1] - found.bounds[0]) / 2 / stats.sem(values[0])
    assert stats.t.ppf(0.975, 2) < reach <= stats.t.ppf(0.975, 1) + 1e-9


def test_a_metric_with_limits_is_taken_on_the_scale_of_odds() -> None:
    odds = np.random.default_rng(1).uniform(-3, 3, (1, 20))
    value, without = odds.mean(axis=1), means_without(odds)
    plain = video_interval(value, without)
    for low, high in ((0.0, 1.0), (-1.0, 1.0)):
        found = video_interval(
            low + (high - low) / (1 + np.exp(-value)), low + (high - low) / (1 + np.exp(-without)), (low, high)
        )
        assert plain.bounds is not None
        assert found.bounds == pytest.approx([low + (high - low) / (1 + np.exp(-b)) for b in plain.bounds])


@pytest.mark.parametrize(("of_seeds", "seeds", "videos"), [(0.0, 3, 40), (1.0, 30, 30), (0.3, 3, 10), (0.3, 5, 70)])
def test_seeds_and_videos_are_both_held_as_often_as_it_says(of_seeds: float, seeds: int, videos: int) -> None:
    random, held = np.random.default_rng(4), 0
    for _ in range(600):
        values = random.normal(scale=of_seeds, size=(seeds, 1)) + random.normal(size=(1, videos))  # (K, G)
        found = video_interval(values.mean(axis=1), means_without(values))
        assert found.bounds is not None
        held += found.bounds[0] <= 0 <= found.bounds[1]
    assert 0.92 <= held / 600 <= 0.985


@pytest.mark.parametrize(("kind", "videos"), [("expr, mix 6", 19), ("au, mix 6", 10), ("va", 10)])
def test_unequal_videos_with_rare_classes_are_held_as_often_as_it_says(kind: str, videos: int) -> None:
    found = coverage(kind, Truth.of(kind, 20_000), videos, sets=400)
    assert 0.91 <= found["value"] <= 0.985
    assert 0.91 <= found["difference"] <= 0.985
    assert found["percentile"] < found["value"], "what was there before"


@given(st.integers(0, 2**32), st.integers(3, 30), st.sampled_from(["expr", "au", "va"]), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_the_value_lies_in_its_interval_and_that_in_the_limits(seed: int, videos: int, task: str, seeds: int) -> None:
    random = np.random.default_rng(seed)
    outputs = TASKS[task].outputs
    if task == "va":
        frames = random.normal(size=(seeds, videos, outputs, 2, 8))
        x, y = frames[..., 0, :], frames[..., 1, :]
        sums = np.stack([of.sum(axis=-1) for of in (np.ones_like(x), x, y, x * x, y * y, x * y)], axis=-1)
    else:
        right = random.integers(0, 9, (seeds, videos, outputs))
        sums = np.stack([right, right + random.integers(0, 9, right.shape), right + 1], axis=-1).astype(float)
    found = metric_interval(TASKS[task], list(sums))
    assert found.bounds is not None
    low, high = found.bounds
    assert TASKS[task].metric_limits[0] <= low <= found.value <= high <= TASKS[task].metric_limits[1]
    assert found.value == pytest.approx(float(np.mean([TASKS[task].metric_of(one.sum(axis=0)) for one in sums])))


def counts(videos: int, *, of_fear: int) -> Table:
    """Return counts of videos that show every class, but Fear in so many only."""
    sums = np.random.default_rng(0).integers([1, 9, 9], [9, 20, 20], (videos, 8, 3)).astype(float)
    sums[of_fear:, EXPR.classes.index("Fear"), 2] = 0
    return sums


def test_a_class_in_few_videos_leaves_the_metric_without_an_interval_and_says_so() -> None:
    few = counts(9, of_fear=FEWEST_VIDEOS - 1)
    assert metric_interval(EXPR, [few]).bounds is None
    assert metric_interval(EXPR, [few], [few[::-1]]).bounds is None
    assert without_interval(EXPR, few) == "Fear in 2 of the videos, expected each in at least 3"
    assert without_interval(EXPR, counts(9, of_fear=0)).startswith("Fear in none of the videos")
    fear = EXPR.classes.index("Fear")
    others = [number for number in range(8) if number != fear]
    assert metric_interval(EXPR, [few], outputs=[fear]).bounds is None
    assert metric_interval(EXPR, [few], outputs=others).bounds is not None
    enough = counts(9, of_fear=FEWEST_VIDEOS)
    assert metric_interval(EXPR, [enough]).bounds is not None
    assert without_interval(EXPR, enough) == ""


def test_two_videos_or_none_that_differs_have_no_interval() -> None:
    for videos in (1, 2):
        assert metric_interval(EXPR, [counts(videos, of_fear=videos)]).bounds is None
    perfect = np.ones((8, 8, 3))
    found = metric_interval(EXPR, [perfect])
    assert (found.value, found.bounds) == (1.0, None)
    assert found.to_json() == {"value": 1.0, "low": None, "high": None}


@pytest.mark.parametrize("videos", range(3, 12))
def test_where_nothing_varies_rounding_makes_no_interval(videos: int) -> None:
    assert video_interval(np.zeros(1), np.zeros((1, videos)), (0, 1)).bounds is None
    assert video_interval(np.full(2, 0.3), np.full((2, videos), 0.3), (-1, 1)).bounds is None
