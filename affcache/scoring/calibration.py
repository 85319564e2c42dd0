"""Whether probabilities mean what they say: calibration error, the reliability table, temperature. Arrays only.

Guo, Pleiss, Sun and Weinberger, On Calibration of Modern Neural Networks, 2017.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar

BINS = 15
Values = npt.NDArray[np.float64]
TINY = 1e-12  # probabilities stay this far from 0 and 1


@dataclass(frozen=True)
class Reliability:
    """How often what was said with some confidence was so, in bins of equal width over [0, 1]."""

    confidence: Values  # (bins,) mean of each bin; nan where it is empty
    frequency: Values  # (bins,) how often it was so; nan where it is empty
    share: Values  # (bins,) of all; they sum to 1

    @property
    def error(self) -> float:
        """The expected calibration error: the mean of |frequency - confidence| over all, in [0, 1]."""
        filled = self.share > 0
        return float((self.share[filled] * np.abs(self.frequency - self.confidence)[filled]).sum())


def reliability(probabilities: npt.NDArray[Any], labels: npt.NDArray[Any], bins: int = BINS) -> Reliability:
    """Return the reliability of probabilities.

    Args:
        probabilities: float (n, C). With labels (n,) the confidence is the largest, and "so" is that its class is the
            label; with labels (n, C) of 0 and 1 each entry is a confidence that its unit is present.
        labels: int (n,) of class indices, or (n, C).
        bins: how many.
    """
    if labels.ndim == 1:
        confidence, so = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    else:
        confidence, so = probabilities.ravel(), labels.ravel() == 1
    confidence = confidence.astype(np.float64)
    number = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    count = np.bincount(number, minlength=bins).astype(np.float64)

    def mean_of(values: npt.NDArray[Any]) -> Values:
        sums = np.bincount(number, values, minlength=bins)
        return np.divide(sums, count, out=np.full(bins, np.nan), where=count > 0)

    return Reliability(mean_of(confidence), mean_of(so), count / max(len(confidence), 1))


def with_temperature(probabilities: npt.NDArray[Any], temperature: float, *, exclusive: bool) -> Values:
    """Return probabilities (n, C) as if logits had been divided by a temperature; above 1 they become less sure.

    Args:
        probabilities: float (n, C).
        temperature: above 0.
        exclusive: whether the C sum to 1 (classes) or each stands alone (units).
    """
    inside = np.clip(np.asarray(probabilities, np.float64), TINY, 1 - TINY)
    if exclusive:
        scaled = np.log(inside) / temperature
        scaled = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        return np.asarray(scaled / scaled.sum(axis=1, keepdims=True))
    return np.asarray(1 / (1 + np.exp(-(np.log(inside) - np.log1p(-inside)) / temperature)))


def fit_temperature(probabilities: npt.NDArray[Any], labels: npt.NDArray[Any]) -> float:
    """Return the temperature in [0.05, 20] with the smallest negative log-likelihood of the labels.

    Args:
        probabilities: float (n, C).
        labels: int (n,) of class indices, or (n, C) of 0 and 1.
    """
    exclusive = labels.ndim == 1

    def loss(log_temperature: float) -> float:
        scaled = with_temperature(probabilities, float(np.exp(log_temperature)), exclusive=exclusive)
        said = scaled[np.arange(len(labels)), labels] if exclusive else np.where(labels == 1, scaled, 1 - scaled)
        return float(-np.log(np.maximum(said, TINY)).mean())

    found = minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded", options={"xatol": 1e-4})
    return float(np.exp(found.x))
