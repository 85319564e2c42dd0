"""From probabilities to decisions: smoothing, temperature, and biases or thresholds, with where they were fitted."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from affcache.errors import ConfigError
from affcache.scoring.calibration import fit_temperature, with_temperature
from affcache.scoring.postprocess import fit_biases, fit_thresholds
from affcache.scoring.predictions import Predictions
from affcache.scoring.settings import PredictionSettings
from affcache.scoring.smoothing import smooth
from affcache.tasks.tasks import Task

WIDTHS = (1, 3, 5, 9, 15, 25, 51, 101, 201)  # frame numbers in a window; 1 is none

Labels = npt.NDArray[Any]


@dataclass(frozen=True)
class DecisionRule:
    """How a task's probabilities become decisions. The default is the task's own rule."""

    smooth: str = "none"
    width: int = 1  # frame numbers
    temperature: float = 1.0
    offsets: tuple[float, ...] | None = None  # (C,): a bias a class, or a threshold a unit
    fitted_on: str | None = None  # which frames, in words
    optimistic: bool = False  # whether the frames that are reported are among them

    def probabilities(self, given: Predictions, task: Task) -> npt.NDArray[Any]:
        """Return the probabilities (n, C), smoothed and with the temperature; untouched where both are off."""
        found = given.probabilities
        if self.smooth != "none" and self.width > 1:
            found = smooth(found, given.videos, given.frame_numbers, self.width, self.smooth)
            if self.smooth == "median" and task.exclusive:
                found = found / found.sum(axis=1, keepdims=True)
        if self.temperature != 1:
            found = with_temperature(found, self.temperature, exclusive=task.exclusive)
        return found

    def decide(self, probabilities: npt.NDArray[Any], task: Task) -> Labels:
        """Return decided labels, in the form of label files, from what ``probabilities`` returned."""
        if self.offsets is None:
            return task.decide(probabilities)
        if task.exclusive:
            logs = np.log(np.maximum(probabilities, np.finfo(np.float64).tiny).astype(np.float64))
            return np.asarray((logs + np.asarray(self.offsets)).argmax(axis=1))
        return (probabilities >= np.asarray(self.offsets)).astype(np.int64)

    def to_json(self) -> dict[str, Any]:
        """Return the rule as one JSON object."""
        return asdict(self)


def fit_rule(
    settings: PredictionSettings, task: Task, given: Predictions, labels: Labels, fitted_on: str, optimistic: bool
) -> DecisionRule:
    """Fit what the settings ask for on labelled frames: the width first, then the temperature, then the offsets.

    Args:
        settings: what to fit.
        task: what is predicted.
        given: predictions of these frames.
        labels: (n,) or (n, C), theirs.
        fitted_on: says which frames these are.
        optimistic: whether the frames that will be reported are among them.
    """
    rule = plain_rule(settings, task)
    rule = replace(rule, fitted_on=fitted_on, optimistic=optimistic)
    if settings.smooth != "none" and settings.smooth_width is None:
        rule = replace(rule, width=_best_width(rule, task, given, labels))
    if settings.calibrate:
        rule = replace(rule, temperature=fit_temperature(rule.probabilities(given, task), labels))
    if settings.decide == "fitted":
        fit = fit_biases if task.exclusive else fit_thresholds
        rule = replace(rule, offsets=tuple(fit(rule.probabilities(given, task), labels).tolist()))
    return rule


def plain_rule(settings: PredictionSettings, task: Task) -> DecisionRule:
    """Return the rule without anything fitted.

    Raises:
        ConfigError: the task's values are no probabilities, so that nothing can be fitted to them.
    """
    if task.class_of is None and (settings.calibrate or settings.decide == "fitted"):
        name = "--calibrate" if settings.calibrate else "--decide fitted"
        raise ConfigError(
            f"{name} asks for probabilities, but {task.name} predicts values. Expected it without; --smooth works."
        )
    return DecisionRule(smooth=settings.smooth, width=settings.smooth_width or 1)


def _best_width(rule: DecisionRule, task: Task, given: Predictions, labels: Labels) -> int:
    """Return the width of the best metric, the smallest of those that are equal."""

    def value(width: int) -> float:
        smoothed = replace(rule, width=width)
        decided = smoothed.decide(smoothed.probabilities(given, task), task)
        return task.score(labels, decided, task.classes).value

    return _first_best(WIDTHS, [value(width) for width in WIDTHS])


def _first_best(widths: Sequence[int], values: Sequence[float]) -> int:
    return widths[int(np.argmax(values))]
