"""Calibration error by hand, temperature and averages against their formulas, and what a median leaves."""

from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from scipy.special import expit, log_expit, log_softmax, logsumexp, softmax

from affcache.scoring.postprocess import fit_temperature, reliability
from affcache.scoring.predict import Predictions
from affcache.scoring.rule import DecisionRule
from affcache.store.frames import FrameIndex
from affcache.tasks.task import Task
from affcache.tasks.tasks import TASKS
from tests.conftest import write_store


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
    assert reliability(softmax(np.log(probabilities) / 0.3, axis=1), labels).error > 0.1


def predictions(task: Task, logits: np.ndarray) -> Predictions:
    """Return predictions of frames that are of no store."""
    given = torch.from_numpy(logits).float()
    nowhere = cast(FrameIndex, None)
    return Predictions(nowhere, np.arange(len(logits)), task.probabilities(given).numpy(), given)


@pytest.mark.parametrize("temperature", [0.2, 3.0])
@pytest.mark.parametrize("task", ["expr", "au"])
def test_a_temperature_divides_logits_also_where_probabilities_are_0_and_1(task: str, temperature: float) -> None:
    logits = np.random.default_rng(1).normal(size=(50, TASKS[task].outputs)) * 60
    found = DecisionRule(temperature=temperature).apply(predictions(TASKS[task], logits), TASKS[task])
    given = logits.astype(np.float32).astype(float) / temperature
    np.testing.assert_allclose(found.probabilities, softmax(given, axis=1) if task == "expr" else expit(given), 1e-9)
    np.testing.assert_allclose(found.logits, given)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 2.5, 8.0, 12.0])
def test_the_temperature_that_spoilt_logits_is_found(temperature: float) -> None:
    random = np.random.default_rng(2)
    logits = random.normal(size=(20_000, 3)) * 2
    labels = (softmax(logits, axis=1).cumsum(axis=1) < random.random((20_000, 1))).sum(axis=1)
    assert fit_temperature(logits * temperature, labels) == pytest.approx(temperature, rel=0.05)
    units = (random.random((20_000, 3)) < expit(logits)).astype(int)
    assert fit_temperature(logits * temperature, units) == pytest.approx(temperature, rel=0.05)


def test_certainty_that_is_wrong_is_no_infinity() -> None:
    assert 1 < fit_temperature(np.array([[900.0, -900.0]] * 3), np.array([0, 0, 1])) <= 20.01


@pytest.mark.parametrize("task", ["expr", "au"])
def test_logits_of_an_average_are_exact_where_probabilities_are_0_and_1(task: str) -> None:
    logits = np.random.default_rng(3).normal(size=(2, 40, TASKS[task].outputs)) * 60
    found = TASKS[task].averaged(torch.from_numpy(logits)).numpy()
    with np.errstate(over="raise"):
        if task == "expr":
            expected = logsumexp(log_softmax(logits, axis=2), axis=0) - np.log(2)
        else:
            expected = logsumexp(log_expit(logits), axis=0) - logsumexp(log_expit(-logits), axis=0)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    mean = TASKS[task].probabilities(torch.from_numpy(logits)).mean(0)
    torch.testing.assert_close(TASKS[task].probabilities(torch.from_numpy(found)), mean, rtol=1e-9, atol=1e-15)


def test_a_probability_at_its_threshold_is_present() -> None:
    rule = DecisionRule(offsets=(0.25,) * 12)
    assert rule.decide(np.full((1, 12), 0.25), TASKS["au"]).tolist() == [[1] * 12]
    assert rule.decide(np.full((1, 12), np.nextafter(0.25, 0)), TASKS["au"]).tolist() == [[0] * 12]


def test_a_median_of_classes_that_take_turns_is_their_mean(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s.h5", {"a": range(1, 4)}, np.zeros((3, 4), np.float16))
    certain = torch.full((3, 8), -900.0)
    certain[range(3), [1, 2, 3]] = 900
    given = Predictions(store, np.arange(3), TASKS["expr"].probabilities(certain).numpy(), certain)
    found = DecisionRule("median", 3).apply(given, TASKS["expr"]).probabilities
    np.testing.assert_allclose(found[1], [0, 1 / 3, 1 / 3, 1 / 3, 0, 0, 0, 0])
    np.testing.assert_allclose(found.sum(axis=1), 1)
    assert np.isfinite(reliability(found, np.array([1, 2, 3])).error)
