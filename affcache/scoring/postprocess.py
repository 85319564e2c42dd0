"""Fitting how probabilities become decisions: smoothing, a temperature, a bias for each class or a threshold a unit.

Macro F1 asks for other decisions than accuracy: a rare class is worth deciding for where it is unlikely. Both fits are
exact sweeps over all decisions that a bias or a threshold can change, not searches.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from scipy.special import log_expit, log_softmax

from affcache.errors import ConfigError
from affcache.progress import Listener, counted
from affcache.scoring.ensemble import Ensemble, Weights, fit_weights, parse_weights
from affcache.scoring.predict import Predictions, TrainedRun, rows_to_predict
from affcache.scoring.rule import DecisionRule, Values, require_frames_to_smooth
from affcache.scoring.settings import PredictionSettings
from affcache.tasks.annotations import JoinedLabels
from affcache.tasks.metrics import class_counts, f1_of_classes
from affcache.tasks.splits import group_frames, join_either, of_videos, stripped_name, unite

BINS = 15
Decided = npt.NDArray[np.int64]
ROUNDS = 20  # over all classes, at most; it ends once none improves
WIDTHS = (1, 3, 5, 9, 15, 25, 51, 101, 201)  # frame numbers in a window; 1 is none


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
        labels: int (n,) of class indices, or (n, C); -1 doesn't count.
        bins: how many.
    """
    labelled = labels >= 0
    if labels.ndim == 1:
        confidence, so = probabilities.max(axis=1)[labelled], (probabilities.argmax(axis=1) == labels)[labelled]
    else:
        confidence, so = probabilities[labelled], labels[labelled] == 1
    confidence = confidence.astype(np.float64)
    number = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    count = np.bincount(number, minlength=bins).astype(np.float64)

    def mean_of(values: npt.NDArray[Any]) -> Values:
        sums = np.bincount(number, values, minlength=bins)
        return np.divide(sums, count, out=np.full(bins, np.nan), where=count > 0)

    return Reliability(mean_of(confidence), mean_of(so), count / max(len(confidence), 1))


def fit_temperature(logits: npt.NDArray[np.float64], labels: npt.NDArray[Any]) -> float:
    """Return the temperature in [0.05, 20], by which logits are divided, with the smallest loss of the labels.

    The loss is the mean negative log-likelihood (Guo, Pleiss, Sun and Weinberger, On Calibration of Modern Neural
    Networks, 2017).

    Args:
        logits: float64 (n, C).
        labels: int (n,) of class indices, or (n, C) of 0 and 1; -1 doesn't count.
    """
    labelled = labels >= 0
    if labels.ndim == 2:
        logits, labels = logits[labelled], labels[labelled]  # (m,)
    exclusive = logits.ndim == 2

    def loss(log_temperature: float) -> float:
        divided = logits / np.exp(log_temperature)
        if exclusive:
            return float(-log_softmax(divided, axis=1)[np.arange(len(labels)), labels].mean())
        return float(-log_expit(np.where(labels == 1, divided, -divided)).mean())

    found = minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded", options={"xatol": 1e-4})
    return float(np.exp(found.x))


def fit_class_biases(probabilities: npt.NDArray[Any], labels: Decided) -> Values:
    """Find the biases on log probabilities that raise macro F1, one class after the other until none helps.

    Of each class all biases that change a decision are tried, the others' being fixed, so that macro F1 never falls.

    Args:
        probabilities: float (n, C), each above 0 or so.
        labels: int (n,) of class indices.

    Returns:
        float64 (C,), to be added to log probabilities before the largest is taken; 0 where nothing helps, and for a
        class that no frame has: nothing can be said of it.
    """
    scores = np.log(np.maximum(probabilities, np.finfo(np.float64).tiny).astype(np.float64))  # (n, C)
    biases = np.zeros(scores.shape[1])
    (counts,) = class_counts(labels, scores.argmax(axis=1), np.zeros_like(labels), 1, len(biases))  # (C, 3)
    best = float(f1_of_classes(counts).mean())
    for _ in range(ROUNDS):
        before = best
        for one in np.unique(labels).tolist():
            value, bias = _best_bias(scores + biases, labels, one)
            if value > best + 1e-12:
                best = value
                biases[one] += bias
        if best <= before:
            break
    return biases


def _best_bias(scores: Values, labels: Decided, one: int) -> tuple[float, float]:
    """Return the best macro F1 over all biases of one class, and that bias."""
    frames, classes = scores.shape
    others = scores.copy()
    others[:, one] = -np.inf
    rival = others.argmax(axis=1)  # (n,) what is decided unless the class is
    needed = others[np.arange(frames), rival] - scores[:, one]  # (n,) the bias from which on it is
    order = needed.argsort(kind="stable")
    rival, labels, needed = rival[order], labels[order], needed[order]
    is_rival = rival[:, None] == np.arange(classes)  # (n, C)
    rival_is_right = is_rival & (labels == rival)[:, None]
    right, decided = np.zeros((2, frames + 1, classes))  # row k: the first k frames are decided for the class
    right[0], decided[0] = rival_is_right.sum(axis=0), is_rival.sum(axis=0)
    right[1:] = right[0] - rival_is_right.cumsum(axis=0)
    decided[1:] = decided[0] - is_rival.cumsum(axis=0)
    right[1:, one] = (labels == one).cumsum()
    decided[:, one] = np.arange(frames + 1)
    labelled = np.broadcast_to(np.bincount(labels, minlength=classes), right.shape)
    f1 = f1_of_classes(np.stack([right, decided, labelled], axis=-1)).mean(axis=1)  # (n + 1,)
    # between equal ones, which rounding may set apart, nothing can be cut
    cut = np.concatenate([[True], needed[1:] > needed[:-1] + 1e-9, [True]])
    best = int(np.flatnonzero(cut)[f1[cut].argmax()])
    between = np.concatenate([needed[:1] - 1, (needed[:-1] + needed[1:]) / 2, needed[-1:] + 1])  # (n + 1,)
    return float(f1[best]), float(between[best])


def fit_thresholds(probabilities: npt.NDArray[Any], labels: Decided) -> Values:
    """Find for each unit the threshold with the largest F1.

    Args:
        probabilities: float (n, C) in [0, 1].
        labels: int (n, C) of 0 and 1; -1 doesn't count.

    Returns:
        float64 (C,) in [0, 1]; a unit is present where its probability is at least that. 0.5 for a unit that no frame
        has.
    """
    thresholds = np.full(probabilities.shape[1], 0.5)
    for unit in range(len(thresholds)):
        labelled = labels[:, unit] >= 0
        present, probability = labels[labelled, unit], probabilities[labelled, unit]
        if not present.any():
            continue
        order = probability.argsort(kind="stable")[::-1]
        falling = probability[order].astype(np.float64)
        right = present[order].cumsum()  # of the k most probable
        f1 = 2 * right / (np.arange(1, len(order) + 1) + present.sum())
        cut = np.append(falling[1:] < falling[:-1], True)
        last = int(np.flatnonzero(cut)[f1[cut].argmax()])
        thresholds[unit] = falling[last] if last + 1 == len(falling) else (falling[last] + falling[last + 1]) / 2
    return thresholds


def find_rule(
    settings: PredictionSettings, runs: Ensemble, annotations: Path, listener: Listener, *, reported: str
) -> DecisionRule:
    """Return the rule that the settings ask for, fitted where they say: weights, width, temperature, then offsets.

    Args:
        settings: what is asked for.
        runs: whose averaged predictions are decided on.
        annotations: where the labels of the frames to fit on are.
        listener: receives progress.
        reported: the split that will be scored, or "" where none is.

    Raises:
        ConfigError: it is to be fitted on held-out videos, but the runs held none out, or not the same; or the task's
            values are no probabilities, so that nothing can be fitted to them.
    """
    task, frames = runs.task, runs.frames
    require_frames_to_smooth(settings.smooth, task)
    if not task.has_classes and (settings.calibrate or settings.decide == "fitted"):
        name = "--calibrate" if settings.calibrate else "--decide fitted"
        raise ConfigError(
            f"{name} asks for probabilities, but {task.name} predicts values. Expected it without; --smooth works."
        )
    rule = DecisionRule(smooth=settings.smooth, width=settings.smooth_width or 1)
    if settings.weights != "fitted":
        rule = replace(rule, weights=parse_weights(settings.weights, len(runs.runs)))
    elif len(runs.runs) == 1:
        raise ConfigError("--weights fitted weighs several runs. Expected at least 2; name them, or leave it out.")
    if not settings.fits_rules:
        return rule
    joined, where = _frames_to_fit_on(settings, runs, annotations, listener)
    rows, labels = rows_to_predict(frames, joined.rows, settings.smooth), joined.labels
    logits = runs.logits(rows, settings.views, listener)
    fitted_split = "validation" if settings.fit_on == "validation" else "train"
    rule = replace(rule, fitted_on=where, optimistic=fitted_split == reported)

    def by(rule: DecisionRule) -> Predictions:
        return rule.apply(given, task).at(joined.rows)

    def metric(width: int) -> float:
        smoothed = replace(rule, width=width)
        return task.score(labels, smoothed.decide(by(smoothed).probabilities, task)).value

    def metric_by(weights: Weights) -> float:
        said = rule.apply(runs.average(rows, logits, weights), task).at(joined.rows)
        return task.score(labels, rule.decide(said.probabilities, task)).value

    if settings.weights == "fitted":
        rule = replace(rule, weights=fit_weights(len(runs.runs), metric_by))
    given = runs.average(rows, logits, rule.weights)
    if settings.smooth != "none" and settings.smooth_width is None:
        rule = replace(rule, width=max(WIDTHS, key=metric))  # the smallest of those that are equal
    if settings.calibrate:
        rule = replace(rule, temperature=fit_temperature(by(rule).logits.double().numpy(), labels))
    if settings.decide == "fitted":
        fit = fit_class_biases if task.exclusive else fit_thresholds
        rule = replace(rule, offsets=tuple(fit(by(rule).probabilities, labels).tolist()))
    return rule


def _frames_to_fit_on(
    settings: PredictionSettings, runs: Ensemble, annotations: Path, listener: Listener
) -> tuple[JoinedLabels, str]:
    """Return the labelled frames on which rules are fitted, and what they are called; raises as ``find_rule``."""
    frames = runs.frames
    if settings.fit_on == "validation":
        return runs.join(annotations, "validation"), "validation"
    names = _held_out_videos(settings, runs.runs)
    if any(run.settings.train_on == "all" for run in runs.runs):
        partial = runs.first.settings.partial
        train = runs.own(unite(frames, *join_either(frames, annotations, runs.first.whole, partial, listener)))
    else:
        train = runs.join(annotations, "train")
    joined, missing = of_videos(frames, train, names), sorted(set(names) - set(group_frames(frames, train)[0]))
    if missing:
        words = f"{counted(len(missing), 'held-out video')} not in {frames.path} with labels: {', '.join(missing[:5])}"
        if not len(joined):
            raise ConfigError(f"No rule can be fitted: {words}. Expected the store and labels of the training.")
        listener.warning(f"The rule is fitted without {words}")
    return joined, "held-out training videos"


def _held_out_videos(settings: PredictionSettings, runs: Sequence[TrainedRun]) -> list[str]:
    """Return the names of the training videos that runs held out, and that none trained on.

    Raises:
        ConfigError: a run held none out, or has one that another held out in its store, and didn't hold it out.
    """
    each = [_held_out_by(run) for run in runs]
    every = sorted({name for names in each for name in names})
    there = [set(map(stripped_name, run.store.video_names)) for run in runs]
    if all(each) and not any(has & set(every) - set(own) for own, has in zip(each, there, strict=True)):
        return every
    found = "held out different ones" if any(each) else "trained on all training videos"
    if any(run.published for run in runs):
        found = "don't say which videos they held out, as published heads don't"
    paths = ", ".join(run.source for run in runs)
    smoothed = settings.smooth != "none" and settings.smooth_width is None
    raise ConfigError(
        f"A rule can't be fitted on held-out training videos: {paths} {found}. Expected runs that held the same out. "
        "Train with 'affcache fit --held-out 0.2', or fit on validation with --fit-on validation: scores there are "
        f"optimistic then.{' Smoothing needs no fitting with --smooth-width N.' if smoothed else ''}"
    )


def _held_out_by(run: TrainedRun) -> list[str]:
    """Return what a run held out; a published head doesn't say."""
    return list(run.config.get("labels", {}).get("train", {}).get("held_out_videos", []))
