"""Scores against scikit-learn's own functions and against counting by hand."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from affcache.metrics import Scores, multiclass_scores, multilabel_scores

NAMES = ("a", "b", "c", "d", "e")
PAIRS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40)
ROWS = st.lists(st.lists(st.integers(0, 1), min_size=10, max_size=10), min_size=1, max_size=25)


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
