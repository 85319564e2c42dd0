"""Smoothing over frame numbers against a loop over frames: across gaps, never across videos."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from affcache.scoring.postprocess import smooth


def written_out(values: np.ndarray, videos: np.ndarray, numbers: np.ndarray, width: int, kind: str) -> np.ndarray:
    rows = []
    for video, number in zip(videos, numbers, strict=True):
        near = (videos == video) & (np.abs(numbers - number) <= width // 2)
        rows.append(getattr(np, kind)(values[near], axis=0))
    return np.array(rows)


@pytest.mark.parametrize("kind", ["mean", "median"])
@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    lengths=st.lists(st.integers(1, 25), min_size=1, max_size=4),
    width=st.integers(0, 15).map(lambda half: 2 * half + 1),
)
def test_smoothing_is_that_of_a_loop(kind: str, seed: int, lengths: list[int], width: int) -> None:
    random = np.random.default_rng(seed)
    videos = np.repeat(np.array([3, 4, 9, 20])[: len(lengths)], lengths)
    numbers = np.concatenate([np.sort(random.choice(60, size, replace=False)) + 1 for size in lengths]).astype(np.int32)
    values = random.random((len(videos), 3)).astype(np.float32)
    found = smooth(values, videos, numbers, width, kind)
    np.testing.assert_allclose(found, written_out(values.astype(float), videos, numbers, width, kind), atol=1e-12)


def test_a_constant_stays_to_the_bit_and_probabilities_stay_probabilities() -> None:
    numbers = np.arange(1, 1001)
    assert (smooth(np.full((1000, 1), 0.1), np.zeros(1000, int), numbers, 51) == 0.1).all()
    shares = np.random.default_rng(0).dirichlet(np.ones(8), 1000)
    smoothed = smooth(shares, np.zeros(1000, int), numbers, 101)
    np.testing.assert_allclose(smoothed.sum(axis=1), 1, atol=1e-12)
    assert smoothed.min() >= 0


@pytest.mark.parametrize("width", [0, 2, -3])
def test_widths_are_odd(width: int) -> None:
    with pytest.raises(ValueError, match="expected an odd number"):
        smooth(np.zeros((3, 1)), np.zeros(3), np.arange(3), width)
    with pytest.raises(ValueError, match="expected mean or median"):
        smooth(np.zeros((3, 1)), np.zeros(3), np.arange(3), 3, "mode")


def test_nothing_is_nothing() -> None:
    assert smooth(np.zeros((0, 8)), np.zeros(0), np.zeros(0), 5).shape == (0, 8)
