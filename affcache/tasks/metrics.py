"""Scores of decided labels against true ones, per class and for the task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import precision_recall_fscore_support

Interval = tuple[float, float]  # low, high


@dataclass(frozen=True)
class ClassScores:
    """Scores of one output of a task."""

    name: str
    values: Mapping[str, float]  # precision, recall, f1 in [0, 1]; or ccc, pearson in [-1, 1], rmse; 0 where undefined
    support: int  # frames with this label; all frames for a continuous value
    interval: Interval | None = None  # 95 % of the value that the task's metric averages


@dataclass(frozen=True)
class Scores:
    """Scores of one split."""

    metric: str  # what ``value`` is, such as macro_f1
    value: float  # the task's metric: the unweighted mean over all classes, present or not; in [-1, 1] for mean_ccc
    classes: tuple[ClassScores, ...]
    further: Mapping[str, float] = field(default_factory=dict)  # others of the split, such as accuracy, mean_rmse
    interval: Interval | None = None  # 95 % of ``value``

    @property
    def without_support(self) -> tuple[str, ...]:
        """Classes that no frame of the split has; each counts as an F1 of 0. Never so for continuous values."""
        return tuple(c.name for c in self.classes if c.support == 0)

    def to_json(self) -> dict[str, Any]:
        """Return the scores as one flat JSON object."""
        classes = [{"name": c.name, **c.values, "support": c.support, **_range(c.interval)} for c in self.classes]
        return {"metric": self.metric, "value": self.value, **_range(self.interval), **self.further, "classes": classes}

    def with_intervals(self, own: Interval, of_classes: Sequence[Interval]) -> "Scores":
        """Return the scores with the interval of the metric and of each class."""
        classes = tuple(replace(c, interval=of) for c, of in zip(self.classes, of_classes, strict=True))
        return replace(self, interval=own, classes=classes)


def _range(interval: Interval | None) -> dict[str, float]:
    return {} if interval is None else {"low": interval[0], "high": interval[1]}


def multiclass_scores(labels: npt.NDArray[Any], decided: npt.NDArray[Any], classes: tuple[str, ...]) -> Scores:
    """Score class indices: precision, recall and F1 per class, their macro F1, and accuracy, as scikit-learn does.

    Args:
        labels, decided: int arrays (n,) of indices into ``classes``.
        classes: names of the C classes; the macro F1 runs over all of them.
    """
    return _f1_scores("macro_f1", labels, decided, classes, np.arange(len(classes)))


def multilabel_scores(labels: npt.NDArray[Any], decided: npt.NDArray[Any], classes: tuple[str, ...]) -> Scores:
    """Score present-or-absent labels: precision, recall and F1 of presence per column, their mean, and accuracy.

    Args:
        labels, decided: int arrays (n, C) of 0 and 1.
        classes: names of the C columns.

    The accuracy is over all n * C frame-class pairs.
    """
    return _f1_scores("mean_f1", labels, decided, classes, None)


def regression_scores(labels: npt.NDArray[Any], decided: npt.NDArray[Any], classes: tuple[str, ...]) -> Scores:
    """Score continuous values: CCC, Pearson's correlation and root mean squared error per column, and the mean CCC.

    CCC, the concordance correlation coefficient, is ``2 cov / (var + var + (mean - mean)^2)``: population moments over
    all frames, in float64 (Lin, A concordance correlation coefficient to evaluate reproducibility, Biometrics 45,
    1989). Where labels or decided values are constant, CCC and correlation are 0.

    Args:
        labels, decided: float arrays (n, C) of finite values, n at least 1.
        classes: names of the C columns.
    """
    true, given = np.asarray(labels, np.float64), np.asarray(decided, np.float64)  # (n, C)
    varies = (np.ptp(true, axis=0) > 0) & (np.ptp(given, axis=0) > 0)  # (C,); rounding gives constants a variance
    true_deviation, given_deviation = true - true.mean(axis=0), given - given.mean(axis=0)
    covariance = (true_deviation * given_deviation).mean(axis=0)  # (C,)
    true_sd, given_sd = (np.sqrt((each**2).mean(axis=0)) for each in (true_deviation, given_deviation))
    spread = true_sd**2 + given_sd**2 + (true.mean(axis=0) - given.mean(axis=0)) ** 2
    ccc = _ratio(2 * covariance, spread, varies)
    pearson = _ratio(covariance, true_sd * given_sd, varies)
    rmse = np.sqrt(((true - given) ** 2).mean(axis=0))
    return Scores(
        metric="mean_ccc",
        value=float(ccc.mean()),
        classes=tuple(
            ClassScores(name, {"ccc": float(c), "pearson": float(p), "rmse": float(r)}, len(true))
            for name, c, p, r in zip(classes, ccc, pearson, rmse, strict=True)
        ),
        further={"mean_rmse": float(rmse.mean())},
    )


def _ratio(
    numerator: npt.NDArray[np.float64], denominator: npt.NDArray[np.float64], defined: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float64]:
    """Return the ratio within [-1, 1], past which rounding may carry it; 0 where it is not defined."""
    defined = defined & (denominator > 0)  # tiny deviations have squares of 0
    return np.divide(numerator, denominator, out=np.zeros_like(denominator), where=defined).clip(-1, 1)


def _f1_scores(
    metric: str,
    labels: npt.NDArray[Any],
    decided: npt.NDArray[Any],
    classes: tuple[str, ...],
    indices: npt.NDArray[np.int64] | None,
) -> Scores:
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, decided, labels=indices, average=None, zero_division=0
    )
    return Scores(
        metric=metric,
        value=float(np.mean(f1)),
        classes=tuple(
            ClassScores(name, {"precision": float(p), "recall": float(r), "f1": float(f)}, int(s))
            for name, p, r, f, s in zip(classes, precision, recall, f1, support, strict=True)
        ),
        further={"accuracy": float(np.mean(labels == decided))},
    )
