"""Calibration error on cases worked by hand, temperature against its own formula, and what it recovers."""

import numpy as np
import pytest
from scipy.special import expit, softmax

from affcache.scoring.postprocess import fit_temperature, reliability, with_temperature


def test_the_error_of_classes_by_hand() -> None:
    probabilities = np.array([[0.95, 0.05], [0.95, 0.05], [0.55, 0.45], [0.45, 0.55]])
    found = reliability(probabilities, np.array([0, 1, 0, 0]), bins=10)
    # two frames at 0.95, one right; two at 0.55, one right
    assert found.error == pytest.approx(0.5 * 0.45 + 0.5 * 0.05)
    assert found.share.tolist() == [0, 0, 0, 0, 0, 0.5, 0, 0, 0, 0.5]
    assert found.confidence[9] == pytest.approx(0.95)
    assert found.frequency[9] == 0.5
    assert np.isnan(found.frequency[0])


def test_the_error_of_units_counts_every_unit_of_every_frame() -> None:
    probabilities = np.array([[0.0, 1.0], [0.25, 1.0]])
    found = reliability(probabilities, np.array([[0, 1], [1, 0]]), bins=4)
    assert found.error == pytest.approx(0.25 * 0 + 0.25 * 0.75 + 0.5 * 0.5)
    assert found.share.sum() == 1


def test_probabilities_that_are_true_have_a_small_error() -> None:
    random = np.random.default_rng(0)
    probabilities = random.dirichlet(np.ones(4), 20_000)
    labels = np.array([random.choice(4, p=p) for p in probabilities])
    assert reliability(probabilities, labels).error < 0.02
    assert reliability(with_temperature(probabilities, 0.3, exclusive=True), labels).error > 0.1


@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0])
def test_a_temperature_divides_logits(temperature: float) -> None:
    logits = np.random.default_rng(1).normal(size=(50, 8)) * 3
    found = with_temperature(softmax(logits, axis=1), temperature, exclusive=True)
    np.testing.assert_allclose(found, softmax(logits / temperature, axis=1), atol=1e-9)
    found = with_temperature(expit(logits), temperature, exclusive=False)
    np.testing.assert_allclose(found, expit(logits / temperature), atol=1e-9)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_that_spoilt_probabilities_is_found(temperature: float) -> None:
    random = np.random.default_rng(2)
    logits = random.normal(size=(20_000, 3)) * 2
    true = softmax(logits, axis=1)
    labels = (true.cumsum(axis=1) < random.random((20_000, 1))).sum(axis=1)
    assert fit_temperature(softmax(logits * temperature, axis=1), labels) == pytest.approx(temperature, rel=0.05)
    units = (random.random((20_000, 3)) < expit(logits)).astype(int)
    assert fit_temperature(expit(logits * temperature), units) == pytest.approx(temperature, rel=0.05)


def test_certainty_that_is_wrong_is_no_infinity() -> None:
    assert 1 < fit_temperature(np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]), np.array([0, 0, 1])) <= 20.01
    assert np.isfinite(with_temperature(np.array([[0.0, 1.0]]), 0.1, exclusive=False)).all()
