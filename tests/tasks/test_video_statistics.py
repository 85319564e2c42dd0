"""Metrics from sums over videos against the metrics over frames, which are scikit-learn's."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from affcache.tasks.tasks import TASKS


def frames(task: str, seed: int, count: int, kinds: int) -> tuple[Any, Any, Any]:
    """Draw labels and decisions of a few kinds only, so that classes are absent and values constant at times."""
    random = np.random.default_rng(seed)
    if task == "mtl":
        own, of = [], TASKS["mtl"]
        for number, part in enumerate(of.parts):
            labels, decided, videos = frames(part.name, seed + number, count, kinds)
            missing = random.random(labels.shape) < 0.3
            gap = np.nan if part.name == "va" else -1
            own.append((np.where(missing, gap, labels), decided, videos))
        labels, decided = (of.joined([parts[which] for parts in own]) for which in (0, 1))
        return labels, decided, own[0][2]
    if task == "expr":
        labels, decided = random.integers(0, kinds, (2, count))
    elif task == "au":
        labels, decided = (random.random((2, count, 12)) < random.random(12) * (random.random(12) < 0.8)).astype(int)
    else:
        labels, decided = random.integers(-kinds, kinds, (2, count, 2)) / kinds
    return labels, decided, random.integers(0, 5, count)


@pytest.mark.parametrize("task", sorted(TASKS))
@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 60), kinds=st.integers(1, 8))
def test_sums_over_videos_give_the_metric_of_their_frames(task: str, seed: int, count: int, kinds: int) -> None:
    of, (labels, decided, videos) = TASKS[task], frames(task, seed, count, kinds)
    statistics = of.sums_by_video(labels, decided, videos, 5)
    assert statistics.shape[:2] == (5, of.outputs)
    expected = of.score(labels, decided).value
    assert float(of.metric_of(statistics.sum(0))) == pytest.approx(expected, abs=1e-9)
    some = np.isin(videos, (1, 3, 4))
    if some.any():
        expected = of.score(labels[some], decided[some]).value
        assert float(of.metric_of(statistics[[1, 3, 4]].sum(0))) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("task", sorted(TASKS))
def test_many_sets_of_videos_are_scored_at_once(task: str) -> None:
    of, (labels, decided, videos) = TASKS[task], frames(task, 3, 50, 8)
    statistics = of.sums_by_video(labels, decided, videos, 5)
    times = np.array([[1, 1, 1, 1, 1], [0, 2, 0, 0, 3], [0, 0, 1, 0, 0]])
    found = of.metric_of(np.tensordot(times, statistics, axes=1))
    for row, value in zip(times, found, strict=True):
        drawn = np.concatenate([np.flatnonzero(videos == video) for video in range(5) for _ in range(row[video])])
        assert value == pytest.approx(of.score(labels[drawn], decided[drawn]).value, abs=1e-12)


@pytest.mark.parametrize("task", sorted(TASKS))
def test_no_frames_at_all_score_0(task: str) -> None:
    of, (labels, decided, videos) = TASKS[task], frames(task, 3, 50, 8)
    assert float(of.metric_of(0 * of.sums_by_video(labels, decided, videos, 5).sum(0))) == 0


@pytest.mark.parametrize(("value", "frames"), [(0.1, 7), (0.1, 30), (0.7, 100)])
def test_constants_in_some_of_the_videos_agree_by_chance_alone(value: float, frames: int) -> None:
    labels = np.full((frames + 10, 2), value)
    labels[frames:] = -0.25  # another video's
    videos = np.repeat([0, 1], [frames, 10])
    sums = TASKS["va"].sums_by_video(labels, labels, videos, 2)
    assert TASKS["va"].class_metric_of(sums).tolist() == [[0, 0], [0, 0]], "variances are rounding"
    assert float(TASKS["va"].metric_of(sums.sum(0))) == pytest.approx(1)
