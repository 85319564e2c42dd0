"""Scores of decided labels against true ones, per class and for the task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Bounds = tuple[float, float]  # low, high
Table = npt.NDArray[np.float64]
Positions = npt.NDArray[np.int64]
CONSTANT = 1e-12  # a variance that is a smaller part of the mean square is rounding


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval, if one is to be had."""

    value: float
    bounds: Bounds | None = None

    def to_json(self) -> dict[str, float | None]:
        """Return the value and the bounds as one JSON object."""
        low, high = self.bounds or (None, None)
        return {"value": self.value, "low": low, "high": high}


@dataclass(frozen=True)
class ClassScores:
    """Scores of one output of a task."""

    name: str
    values: Mapping[str, float]  # precision, recall, f1 in [0, 1]; or ccc, pearson in [-1, 1], rmse; 0 where undefined
    support: int  # frames with this label; all frames for a continuous value
    interval: Bounds | None = None  # 95 % of the value that the task's metric averages


@dataclass(frozen=True)
class Scores:
    """Scores of one split."""

    metric: str  # what ``value`` is, such as macro_f1
    value: float  # the task's metric: the unweighted mean over all classes, present or not; in [-1, 1] for mean_ccc
    classes: tuple[ClassScores, ...]
    further: Mapping[str, float] = field(default_factory=dict)  # others of the split, such as accuracy, mean_rmse
    interval: Bounds | None = None  # 95 % of ``value``
    present: Interval | None = None  # the mean over the classes that some frame has, where they aren't all

    @property
    def without_support(self) -> tuple[str, ...]:
        """Classes that no frame of the split has; each counts as an F1 of 0. Never so for continuous values."""
        return tuple(c.name for c in self.classes if c.support == 0)

    def to_json(self) -> dict[str, Any]:
        """Return the scores as one flat JSON object."""
        classes = [{"name": c.name, **c.values, "support": c.support, **_range(c.interval)} for c in self.classes]
        present = {} if self.present is None else {"over_classes_present": self.present.to_json()}
        own = {"metric": self.metric, "value": self.value, **_range(self.interval), **self.further}
        return {**own, **present, "classes": classes}

    def with_intervals(self, own: Interval, of_classes: Sequence[Interval], present: Interval | None) -> "Scores":
        """Return the scores with the interval of the metric, of each class, and of the mean over those present."""
        classes = tuple(replace(c, interval=of.bounds) for c, of in zip(self.classes, of_classes, strict=True))
        return replace(self, interval=own.bounds, classes=classes, present=present)


def _range(interval: Bounds | None) -> dict[str, float]:
    return {} if interval is None else {"low": interval[0], "high": interval[1]}


def multiclass_scores(labels: npt.NDArray[Any], decided: npt.NDArray[Any], classes: tuple[str, ...]) -> Scores:
    """Score class indices: precision, recall and F1 per class, their macro F1, and accuracy.

    Args:
        labels, decided: int arrays (n,) of indices into ``classes``; a label of -1 doesn't count.
        classes: names of the C classes; the macro F1 runs over all of them.
    """
    counts = class_counts(labels, decided, np.zeros(len(labels), np.int64), 1, len(classes))[0]  # (C, 3)
    return _f1_scores("macro_f1", counts, classes, _accuracy(labels, decided))


def multilabel_scores(labels: npt.NDArray[Any], decided: npt.NDArray[Any], classes: tuple[str, ...]) -> Scores:
    """Score present-or-absent labels: precision, recall and F1 of presence per column, their mean, and accuracy.

    Args:
        labels, decided: int arrays (n, C) of 0 and 1; a label of -1 doesn't count.
        classes: names of the C columns.

    The accuracy is over all frame-class pairs with a label, up to n * C.
    """
    counts = unit_counts(labels, decided, np.zeros(len(labels), np.int64), 1)[0]  # (C, 3)
    return _f1_scores("mean_f1", counts, classes, _accuracy(labels, decided))


def _accuracy(labels: npt.NDArray[Any], decided: npt.NDArray[Any]) -> float:
    """Return the share of labels that were decided rightly; 0 without any."""
    return float(((labels == decided) & (labels >= 0)).sum() / max((labels >= 0).sum(), 1))


def _f1_scores(metric: str, counts: Table, classes: tuple[str, ...], accuracy: float) -> Scores:
    """Return the scores that counts (C, 3) of ``class_counts`` say; what is undefined is 0, as in scikit-learn."""
    right, decided, labelled = counts.T
    precision, recall, f1 = _ratio(right, decided), _ratio(right, labelled), f1_of_classes(counts)
    return Scores(
        metric=metric,
        value=float(np.mean(f1)),
        classes=tuple(
            ClassScores(name, {"precision": float(p), "recall": float(r), "f1": float(f)}, int(s))
            for name, p, r, f, s in zip(classes, precision, recall, f1, labelled, strict=True)
        ),
        further={"accuracy": accuracy},
    )


def regression_scores(labels: npt.NDArray[Any], decided: npt.NDArray[Any], classes: tuple[str, ...]) -> Scores:
    """Score continuous values: CCC, Pearson's correlation and root mean squared error per column, and the mean CCC.

    CCC, the concordance correlation coefficient, is ``2 cov / (var + var + (mean - mean)^2)``: population moments over
    all frames, in float64 (Lin, A concordance correlation coefficient to evaluate reproducibility, Biometrics 45,
    1989). Where labels or decided values are constant, CCC and correlation are 0.

    Args:
        labels, decided: float arrays (n, C) of finite values, n at least 1; a label that is nan doesn't count.
        classes: names of the C columns.
    """
    there = ~np.isnan(labels)
    centre = np.where(there, labels, 0).sum(axis=0, dtype=np.float64) / np.maximum(there.sum(axis=0), 1)  # (C,)
    sums = moments(labels, decided, np.zeros(len(labels), np.int64), 1, centre)[0]  # (C, 6)
    ccc, pearson = ccc_of_outputs(sums), _pearson(labels, decided)
    count, squares = sums[:, 0], np.subtract(labels, decided, dtype=np.float64) ** 2
    rmse = np.sqrt(np.where(there, squares, 0).sum(axis=0) / np.maximum(count, 1))
    return Scores(
        metric="mean_ccc",
        value=float(ccc.mean()),
        classes=tuple(
            ClassScores(name, {"ccc": float(c), "pearson": float(p), "rmse": float(r)}, int(n))
            for name, c, p, r, n in zip(classes, ccc, pearson, rmse, count, strict=True)
        ),
        further={"mean_rmse": float(rmse.mean())},
    )


def _pearson(labels: npt.NDArray[Any], decided: npt.NDArray[Any]) -> Table:
    """Return Pearson's correlation of each column (C,), of values from their own means: sums around one lose digits."""
    given = [np.ma.array(values, np.float64, mask=np.isnan(labels)) for values in (labels, decided)]
    x, y = (values - values.mean(axis=0) for values in given)
    lengths = np.sqrt((x**2).sum(axis=0) * (y**2).sum(axis=0))
    varies = [np.ma.filled(np.ma.ptp(values, axis=0), 0) > 0 for values in given]
    covariance = np.where(varies[0] & varies[1], np.ma.filled((x * y).sum(axis=0), 0), 0)
    return _ratio(covariance, np.ma.filled(lengths, 0)).clip(-1, 1)


def _ratio(numerator: Table, denominator: Table) -> Table:
    """Return the ratio, 0 where it is not defined."""
    return np.divide(numerator, denominator, out=np.zeros_like(denominator), where=denominator > 0)


def class_counts(
    labels: npt.NDArray[Any], decided: npt.NDArray[Any], videos: npt.NDArray[np.int64], count: int, classes: int
) -> Table:
    """Count the frames of each class in each video.

    Args:
        labels, decided: int arrays (n,) of class indices; frames with a label of -1 don't count.
        videos: int array (n,), which video each frame is of.
        count: V, how many videos there are.
        classes: C.

    Returns:
        (V, C, 3): frames rightly decided for a class, decided for it, and labelled with it.
    """

    each = np.arange(classes)
    is_label, is_decided = labels[:, None] == each, decided[:, None] == each  # (n, C)
    is_decided &= (labels >= 0)[:, None]
    return _sums((is_label & is_decided, is_decided, is_label), videos, count)


def unit_counts(
    labels: npt.NDArray[Any], decided: npt.NDArray[Any], videos: npt.NDArray[np.int64], count: int
) -> Table:
    """Count the frames with each unit, of labels and decided (n, C) of 0 and 1, as ``class_counts`` does: (V, C, 3)."""
    is_label, is_decided = labels == 1, (decided == 1) & (labels >= 0)
    return _sums((is_label & is_decided, is_decided, is_label), videos, count)


def moments(
    labels: npt.NDArray[Any], decided: npt.NDArray[Any], videos: npt.NDArray[np.int64], count: int, centre: Any
) -> Table:
    """Sum up labels x and decided values y, (n, C) each, in each video: (V, C, 6) of 1, x, y, x^2, y^2, x y.

    ``centre``, a number or (C,), is taken from both first, which changes no score, so that values far from 0 cancel
    nothing. Sums around one centre may be added up. Where a label is nan, nothing is added.
    """
    x, y = np.asarray(labels, np.float64) - centre, np.asarray(decided, np.float64) - centre
    there = ~np.isnan(x)
    x, y = np.where(there, x, 0), np.where(there, y, 0)
    return _sums((there, x, y, x * x, y * y, x * y), videos, count)


def mean_by_video(probabilities: npt.NDArray[Any], videos: npt.NDArray[np.int64]) -> tuple[Table, Positions]:
    """Return the mean probabilities (V, C) of each video, in float64, and where its frames begin (V,).

    Args:
        probabilities: float (n, C) of frames.
        videos: int (n,), whose frame each is; those of a video stand side by side.
    """
    if not len(videos):
        return np.zeros(probabilities.shape), np.empty(0, np.int64)
    first = np.concatenate([[0], np.flatnonzero(np.diff(videos)) + 1])
    sums = np.add.reduceat(probabilities.astype(np.float64), first, axis=0)
    return sums / np.diff(first, append=len(videos))[:, None], first


def _sums(values: Sequence[npt.NDArray[Any]], videos: npt.NDArray[np.int64], count: int) -> Table:
    """Sum S arrays (n, C) over the frames of each video: (V, C, S)."""
    sums = np.zeros((count, values[0].shape[1], len(values)))
    for kind, each in enumerate(values):
        for column in range(each.shape[1]):
            sums[:, column, kind] = np.bincount(videos, each[:, column], count)
    return sums


def f1_of_classes(counts: Table) -> Table:
    """Return the F1 of each class (..., C), from counts (..., C, 3 or more) summed over videos; undefined, it is 0."""
    right, decided, labelled = np.moveaxis(counts, -1, 0)[:3]
    return _ratio(2 * right, decided + labelled)


def ccc_of_outputs(sums: Table) -> Table:
    """Return the concordance correlation of each output (..., C), from sums (..., C, 6) over videos.

    As ``regression_scores`` defines it: 0 where labels or decided values are constant.
    """
    means, variances, covariance = _central(sums)
    spread = variances[0] + variances[1] + (means[0] - means[1]) ** 2
    return _ratio(2 * covariance, spread).clip(-1, 1)


def _central(sums: Table) -> tuple[Table, Table, Table]:
    """Return means (2, ..., C), variances (2, ..., C) and covariance (..., C); the latter 0 where one is constant."""
    count, *moments = np.moveaxis(sums, -1, 0)
    x, y, xx, yy, xy = (each / np.maximum(count, 1) for each in moments)
    means, squares = np.stack([x, y]), np.stack([xx, yy])
    variances = np.maximum(squares - means**2, 0)  # below 0 by rounding
    varies = (variances > CONSTANT * squares).all(axis=0)
    return means, variances, np.where(varies, xy - x * y, 0.0)
