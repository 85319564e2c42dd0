"""Scores of decided labels against true ones, per class and for the task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import precision_recall_fscore_support

Interval = tuple[float, float]  # low, high
Table = npt.NDArray[np.float64]
CONSTANT = 1e-12  # a variance that is a smaller part of the mean square is rounding


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
    present = np.ones(1, np.int64) if len(classes) == 1 else None  # scikit-learn takes one column for two classes
    return _f1_scores("mean_f1", labels, decided, classes, present)


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


def class_counts(
    labels: npt.NDArray[Any], decided: npt.NDArray[Any], videos: npt.NDArray[np.int64], count: int, classes: int
) -> Table:
    """Count the frames of each class in each video.

    Args:
        labels, decided: int arrays (n,) of class indices.
        videos: int array (n,), which video each frame is of.
        count: V, how many videos there are.
        classes: C.

    Returns:
        (V, C, 3): frames rightly decided for a class, decided for it, and labelled with it.
    """

    each = np.arange(classes)
    is_label, is_decided = labels[:, None] == each, decided[:, None] == each  # (n, C)
    return _sums((is_label & is_decided, is_decided, is_label), videos, count)


def unit_counts(
    labels: npt.NDArray[Any], decided: npt.NDArray[Any], videos: npt.NDArray[np.int64], count: int
) -> Table:
    """Count the frames with each unit, of labels and decided (n, C) of 0 and 1, as ``class_counts`` does: (V, C, 3)."""
    return _sums((labels * decided, decided, labels), videos, count)


def moments(labels: npt.NDArray[Any], decided: npt.NDArray[Any], videos: npt.NDArray[np.int64], count: int) -> Table:
    """Sum up labels x and decided values y, (n, C) each, in each video: (V, C, 6) of 1, x, y, x^2, y^2, x y."""
    x, y = np.asarray(labels, np.float64), np.asarray(decided, np.float64)
    return _sums((np.ones_like(x), x, y, x * x, y * y, x * y), videos, count)


def _sums(values: Sequence[npt.NDArray[Any]], videos: npt.NDArray[np.int64], count: int) -> Table:
    """Sum S arrays (n, C) over the frames of each video: (V, C, S)."""
    sums = np.zeros((count, values[0].shape[1], len(values)))
    for kind, each in enumerate(values):
        for column in range(each.shape[1]):
            sums[:, column, kind] = np.bincount(videos, each[:, column], count)
    return sums


def f1_of_classes(counts: Table) -> npt.NDArray[np.float64]:
    """Return the F1 of each class (..., C), from counts (..., C, 3) summed over videos; an undefined one is 0."""
    right, decided, labelled = np.moveaxis(counts, -1, 0)
    total = decided + labelled
    return np.divide(2 * right, total, out=np.zeros_like(total), where=total > 0)


def ccc_of_outputs(sums: Table) -> npt.NDArray[np.float64]:
    """Return the concordance correlation of each output (..., C), from sums (..., C, 6) over videos.

    As ``metrics.regression_scores`` defines it: 0 where labels or decided values are constant.
    """
    count, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    count = np.maximum(count, 1)
    x, y, xx, yy, xy = (each / count for each in (x, y, xx, yy, xy))
    x_variance, y_variance = xx - x * x, yy - y * y
    varies = (x_variance > CONSTANT * xx) & (y_variance > CONSTANT * yy)
    spread = x_variance + y_variance + (x - y) ** 2
    ccc = np.divide(2 * (xy - x * y), spread, out=np.zeros_like(spread), where=varies & (spread > 0))
    return np.asarray(ccc.clip(-1, 1))
