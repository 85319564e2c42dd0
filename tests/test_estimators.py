"""The scikit-learn estimators: scikit-learn's own checks, its tools around them, and the core underneath."""

from collections.abc import Callable
from typing import Any

from sklearn.utils.estimator_checks import parametrize_with_checks

from affcache.estimators import CVaRMLPClassifier, CVaRMLPMultiLabelClassifier

SMALL: dict[str, Any] = {"epochs": 12, "hidden_layers": 1, "hidden_width": 16, "dropout": 0.1, "lr": 1e-2}


@parametrize_with_checks([CVaRMLPClassifier(**SMALL), CVaRMLPMultiLabelClassifier(**SMALL)])
def test_scikit_learns_own_checks(estimator: Any, check: Callable[[Any], None]) -> None:
    check(estimator)
