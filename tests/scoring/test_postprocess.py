"""Fitted decision rules against searches over a grid, never worse where they were fitted; smoothing against a loop."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from affcache.scoring.postprocess import fit_class_biases, fit_thresholds
from affcache.scoring.rule import smooth


def macro_f1(labels: np.ndarray, decided: np.ndarray, classes: int) -> float:
    return float(f1_score(labels, decided, labels=range(classes), average="macro", zero_division=0))


def f1_of_rows(labels: np.ndarray, decided: np.ndarray) -> np.ndarray:
    """F1 (m,) of boolean labels (n,) and each row of decisions (m, n), thousands at a time."""
    right, said = (labels & decided).sum(1), labels.sum() + decided.sum(1)
    return np.divide(2 * right, said, out=np.zeros(len(decided)), where=said > 0)


def problem(seed: int, frames: int, classes: int, digits: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that say something of imbalanced labels; with few digits many are equal."""
    random = np.random.default_rng(seed)
    labels = random.choice(classes, frames, p=np.sort(random.dirichlet(np.ones(classes) / 2)))
    scores = random.normal(size=(frames, classes)) + 1.5 * (labels[:, None] == np.arange(classes))
    probabilities = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    return probabilities.round(digits), labels


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), frames=st.integers(1, 80), classes=st.integers(2, 8), digits=st.integers(1, 9))
def test_biases_never_lower_macro_f1(seed: int, frames: int, classes: int, digits: int) -> None:
    probabilities, labels = problem(seed, frames, classes, digits)
    biases = fit_class_biases(probabilities, labels)
    logs = np.log(np.maximum(probabilities, np.finfo(float).tiny))
    before = macro_f1(labels, logs.argmax(1), classes)
    after = macro_f1(labels, (logs + biases).argmax(1), classes)
    assert after >= before - 1e-9
    assert not biases[np.bincount(labels, minlength=classes) == 0].any(), "of a class that no frame has"


@pytest.mark.parametrize("seed", range(8))
def test_no_bias_of_one_class_helps_any_more(seed: int) -> None:
    probabilities, labels = problem(seed, 120, 5, 9)
    logs = np.log(probabilities)
    biases = fit_class_biases(probabilities, labels)
    found = macro_f1(labels, (logs + biases).argmax(1), 5)
    assert found > macro_f1(labels, logs.argmax(1), 5), "there was something to gain"
    for one in np.unique(labels):
        changed = biases + np.linspace(-6, 6, 400)[:, None] * (np.arange(5) == one)
        decided = (logs + changed[:, None]).argmax(2)
        others = np.mean([f1_of_rows(labels == label, decided == label) for label in range(5)], axis=0)
        assert others[7] == pytest.approx(macro_f1(labels, decided[7], 5))
        assert (others <= found + 1e-9).all()


def test_of_two_classes_the_bias_is_the_best_there_is() -> None:
    probabilities, labels = problem(3, 60, 2, 9)
    logs = np.log(probabilities)
    found = macro_f1(labels, (logs + fit_class_biases(probabilities, labels)).argmax(1), 2)
    gaps = np.sort(logs[:, 0] - logs[:, 1])
    every = [gaps[0] - 1, *(gaps[:-1] + np.diff(gaps) / 2), gaps[-1] + 1]
    best = max(macro_f1(labels, (logs + [0, bias]).argmax(1), 2) for bias in every)
    assert found == pytest.approx(best)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), frames=st.integers(1, 60), digits=st.integers(1, 9))
def test_thresholds_are_the_best_of_all(seed: int, frames: int, digits: int) -> None:
    random = np.random.default_rng(seed)
    labels = (random.random((frames, 3)) < [0.5, 0.05, 0.9]).astype(int)
    probabilities = np.clip(0.5 * random.random((frames, 3)) + 0.4 * labels, 0, 1).round(digits)
    thresholds = fit_thresholds(probabilities, labels)
    for unit in range(3):
        decided = (probabilities[:, unit] >= thresholds[unit]).astype(int)
        found = f1_score(labels[:, unit], decided, zero_division=0)
        every = probabilities[:, unit] >= probabilities[:, unit, None]  # at each threshold that makes a difference
        assert found == pytest.approx(f1_of_rows(labels[:, unit] == 1, every).max())


def test_a_unit_that_no_frame_has_keeps_one_half() -> None:
    assert fit_thresholds(np.array([[0.2], [0.9]]), np.zeros((2, 1), dtype=int)).tolist() == [0.5]


def test_a_threshold_lies_between_two_probabilities() -> None:
    probabilities = np.array([[0.9], [0.4], [0.2], [0.1]])
    assert fit_thresholds(probabilities, np.array([[1], [1], [0], [0]])).tolist() == [pytest.approx(0.3)]
    assert fit_thresholds(probabilities, np.array([[1], [1], [1], [1]])).tolist() == [0.1]


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


@pytest.mark.parametrize("kind", ["mean", "median"])
def test_a_window_wider_than_any_video_is_the_whole_video(kind: str) -> None:
    values, videos, numbers = np.random.default_rng(0).random((20, 3)), np.repeat([0, 7], 10), np.tile(np.arange(10), 2)
    whole = smooth(values, videos, numbers, 19, kind)
    for width in (2**31 + 1, 2**61 + 1, 2**63 - 1, 2**63 + 1):
        assert (smooth(values, videos, numbers, width, kind) == whole).all()


@pytest.mark.parametrize("width", [0, 2, -3])
def test_widths_are_odd(width: int) -> None:
    with pytest.raises(ValueError, match="expected an odd number"):
        smooth(np.zeros((3, 1)), np.zeros(3), np.arange(3), width)
    with pytest.raises(ValueError, match="expected mean or median"):
        smooth(np.zeros((3, 1)), np.zeros(3), np.arange(3), 3, "mode")


def test_nothing_is_nothing() -> None:
    assert smooth(np.zeros((0, 8)), np.zeros(0), np.zeros(0), 5).shape == (0, 8)
