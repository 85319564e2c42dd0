"""Scores of decided labels against true ones, per class and for the task, by scikit-learn's arithmetic."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import precision_recall_fscore_support


@dataclass(frozen=True)
class ClassScores:
    """Scores of one output of a task."""

    name: str
    values: Mapping[str, float]  # such as precision, recall, f1, each in [0, 1]; 0 where a ratio has no denominator
    support: int  # frames with this label


@dataclass(frozen=True)
class Scores:
    """Scores of one split."""

    metric: str  # what ``value`` is, such as macro_f1
    value: float  # the task's metric: the unweighted mean over all classes, present or not
    classes: tuple[ClassScores, ...]
    further: Mapping[str, float] = field(default_factory=dict)  # other scores of the whole split, such as accuracy

    @property
    def without_support(self) -> tuple[str, ...]:
        """Classes that no frame of the split has; each counts as an F1 of 0 in the mean."""
        return tuple(c.name for c in self.classes if c.support == 0)

    def to_json(self) -> dict[str, Any]:
        """Return the scores as one flat JSON object."""
        classes = [{"name": c.name, **c.values, "support": c.support} for c in self.classes]
        return {"metric": self.metric, "value": self.value, **self.further, "classes": classes}


def multiclass_scores(labels: npt.NDArray[Any], decided: npt.NDArray[Any], classes: tuple[str, ...]) -> Scores:
    """Score class indices: precision, recall and F1 per class, their macro F1, and accuracy.

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
