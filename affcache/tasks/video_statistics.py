"""What a task's metric needs to know of each video: sums over its frames, from which any set of videos is scored.

Resampling videos then resamples rows of a small table instead of frames. Knows arrays only.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Table = npt.NDArray[np.float64]
CONSTANT = 1e-12  # a variance that is a smaller part of the mean square is rounding


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
