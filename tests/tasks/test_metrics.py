"""Scores against scikit-learn's, SciPy's and NumPy's own functions and against counting by hand."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score, root_mean_squared_error

from affcache.tasks.metrics import Scores, multiclass_scores, multilabel_scores, regression_scores

NAMES = ("a", "b", "c", "d", "e")
PAIRS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40)
ROWS = st.lists(st.lists(st.integers(0, 1), min_size=10, max_size=10), min_size=1, max_size=25)
VALUES = st.floats(-1, 1, width=32)
FRAMES = st.lists(st.tuples(VALUES, VALUES, VALUES, VALUES), min_size=1, max_size=40)
VA_NAMES = ("valence", "arousal")


def values_of(scores: Scores, name: str) -> list[float]:
    return [c.values[name] for c in scores.classes]


def f1_by_hand(labels: npt.NDArray[np.bool_], decided: npt.NDArray[np.bool_]) -> float:
    hits = int((labels & decided).sum())
    wrong = int((labels != decided).sum())
    return 2 * hits / (2 * hits + wrong) if hits else 0.0


@settings(deadline=None)
@given(PAIRS)
def test_multiclass_equals_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    labels, decided = np.array(pairs).T  # often without some of the classes
    scores = multiclass_scores(labels, decided, NAMES)
    options = {"labels": range(5), "average": None, "zero_division": 0}
    assert scores.metric == "macro_f1"
    assert scores.value == pytest.approx(f1_score(labels, decided, **{**options, "average": "macro"}))
    assert values_of(scores, "f1") == pytest.approx(f1_score(labels, decided, **options))
    assert values_of(scores, "precision") == pytest.approx(precision_score(labels, decided, **options))
    assert values_of(scores, "recall") == pytest.approx(recall_score(labels, decided, **options))
    assert scores.further["accuracy"] == pytest.approx(accuracy_score(labels, decided))
    by_hand = [f1_by_hand(labels == i, decided == i) for i in range(5)]
    assert values_of(scores, "f1") == pytest.approx(by_hand)
    assert [c.support for c in scores.classes] == [int((labels == i).sum()) for i in range(5)]
    assert scores.without_support == tuple(name for i, name in enumerate(NAMES) if i not in labels)


@settings(deadline=None)
@given(ROWS)
def test_multilabel_equals_scikit_learn(rows: list[list[int]]) -> None:
    labels, decided = np.array(rows)[:, :5], np.array(rows)[:, 5:]
    scores = multilabel_scores(labels, decided, NAMES)
    options = {"average": None, "zero_division": 0}
    assert scores.metric == "mean_f1"
    assert scores.value == pytest.approx(f1_score(labels, decided, **{**options, "average": "macro"}))
    assert values_of(scores, "f1") == pytest.approx(f1_score(labels, decided, **options))
    assert values_of(scores, "precision") == pytest.approx(precision_score(labels, decided, **options))
    assert values_of(scores, "recall") == pytest.approx(recall_score(labels, decided, **options))
    assert scores.further["accuracy"] == pytest.approx(accuracy_score(labels.ravel(), decided.ravel()))
    by_hand = [f1_by_hand(labels[:, i] == 1, decided[:, i] == 1) for i in range(5)]
    assert values_of(scores, "f1") == pytest.approx(by_hand)
    assert scores.without_support == tuple(name for i, name in enumerate(NAMES) if not labels[:, i].any())


def test_one_unit_alone_is_scored_by_its_presence() -> None:
    (scores,) = multilabel_scores(np.array([[0], [1], [1]]), np.array([[0], [0], [1]]), ("smile",)).classes
    assert scores.values == {"precision": 1, "recall": 0.5, "f1": pytest.approx(2 / 3)}
    assert multilabel_scores(np.zeros((3, 1), int), np.zeros((3, 1), int), ("smile",)).value == 0


def test_absent_classes_count_as_zero_in_the_mean() -> None:
    labels = np.array([0, 0, 1])
    scores = multiclass_scores(labels, labels, NAMES)
    assert scores.value == pytest.approx(2 / 5)
    assert scores.without_support == ("c", "d", "e")


def test_the_json_is_flat_with_every_class() -> None:
    found = multiclass_scores(np.array([0, 1]), np.array([0, 0]), ("x", "y")).to_json()
    assert found == {
        "metric": "macro_f1",
        "value": pytest.approx((2 / 3) / 2),
        "accuracy": 0.5,
        "classes": [
            {"name": "x", "precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), "support": 1},
            {"name": "y", "precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1},
        ],
    }


def ccc_by_hand(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> float:
    """2 rho sx sy / (sx^2 + sy^2 + (mx - my)^2), with rho by NumPy; 0 where one of the two is constant."""
    if x.min() == x.max() or y.min() == y.max():
        return 0.0
    rho = np.corrcoef(x, y)[0, 1]
    return float(2 * rho * x.std() * y.std() / (x.var() + y.var() + (x.mean() - y.mean()) ** 2))


@settings(deadline=None)
@given(FRAMES)
@example([(0.1, 0.1, 0.1, 0.3)] * 3)  # constants whose float64 mean is another number
@example([(1e-30, -1e-30, 1, -1), (-1e-30, 1e-30, -1, 1)])
def test_regression_equals_the_formula(frames: list[tuple[float, ...]]) -> None:
    columns = np.array(frames, dtype=np.float32)
    labels, decided = columns[:, :2], columns[:, 2:]
    scores = regression_scores(labels, decided, VA_NAMES)
    wide = labels.astype(np.float64), decided.astype(np.float64)
    assert scores.metric == "mean_ccc"
    assert scores.value == pytest.approx(np.mean(values_of(scores, "ccc")))
    rmse = root_mean_squared_error(*wide, multioutput="raw_values")
    assert values_of(scores, "rmse") == pytest.approx(rmse)
    assert scores.further == {"mean_rmse": pytest.approx(rmse.mean())}
    assert [c.support for c in scores.classes] == [len(frames)] * 2
    assert scores.without_support == ()
    for column, found in enumerate(scores.classes):
        x, y = wide[0][:, column], wide[1][:, column]
        assert -1 <= found.values["ccc"] <= 1
        assert -1 <= found.values["pearson"] <= 1
        if min(np.ptp(x), np.ptp(y)) > 1e-4 or 0 in (np.ptp(x), np.ptp(y)):  # else the yardsticks lose their digits
            assert found.values["ccc"] == pytest.approx(ccc_by_hand(x, y), abs=1e-9)
            varies = np.ptp(x) > 0 and np.ptp(y) > 0
            assert found.values["pearson"] == pytest.approx(pearsonr(x, y).statistic if varies else 0, abs=1e-9)


def test_concordance_of_a_worked_example() -> None:
    labels = np.array([[-1, 0.5], [0, 0.5], [1, 0.5]])
    decided = np.array([[-0.5, -1], [0.5, 0], [1.5, 1]])
    scores = regression_scores(labels, decided, VA_NAMES)
    # valence is off by 1/2 everywhere: 2 * 2/3 / (2/3 + 2/3 + 1/4); arousal's labels are constant
    assert values_of(scores, "ccc") == pytest.approx([16 / 19, 0])
    assert values_of(scores, "pearson") == pytest.approx([1, 0])
    assert values_of(scores, "rmse") == pytest.approx([0.5, np.sqrt((1.5**2 + 0.5**2 + 0.5**2) / 3)])
    assert scores.value == pytest.approx(8 / 19)
    assert regression_scores(labels, -labels, VA_NAMES).to_json()["classes"][0] == {
        "name": "valence", "ccc": -1, "pearson": -1, "rmse": pytest.approx(np.sqrt(8 / 3)), "support": 3
    }  # fmt: skip


def test_moments_are_of_float64() -> None:
    random = np.random.default_rng(0)
    labels = (0.9 + random.normal(scale=1e-3, size=(200_000, 2))).astype(np.float32)  # float32 sums would drown it
    decided = (labels + random.normal(scale=1e-3, size=labels.shape)).astype(np.float32)
    scores = regression_scores(labels, decided, VA_NAMES)
    expected = [
        ccc_by_hand(x, y) for x, y in zip(labels.T.astype(np.float64), decided.T.astype(np.float64), strict=True)
    ]
    assert values_of(scores, "ccc") == pytest.approx(expected, abs=1e-9)


def test_values_far_from_zero_cancel_nothing() -> None:
    random = np.random.default_rng(1)
    labels = 1e6 + random.normal(size=(1000, 2))
    decided = labels + random.normal(size=(1000, 2))
    scores = regression_scores(labels, decided, VA_NAMES)
    expected = [ccc_by_hand(x, y) for x, y in zip(labels.T, decided.T, strict=True)]
    assert values_of(scores, "ccc") == pytest.approx(expected, abs=1e-8)
