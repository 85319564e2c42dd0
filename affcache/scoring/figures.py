"""Pictures of a scored run, fit for a paper: confusion, F1 of classes with intervals, reliability, learning curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from affcache.files import save_figures, single_axes
from affcache.progress import metric_name
from affcache.scoring.calibration import reliability
from affcache.tasks.metrics import Scores
from affcache.tasks.tasks import Task

GREY = "#999999"


def write_score_figures(
    folder: Path,
    task: Task,
    scores: Scores,
    labels: npt.NDArray[Any],
    decided: npt.NDArray[Any],
    probabilities: npt.NDArray[Any],
    history: Sequence[Mapping[str, Any]],
) -> list[Path]:
    """Write what fits the task, PNG and SVG, and return the files.

    Args:
        folder: where to; made if need be.
        task: what was predicted.
        scores: with intervals.
        labels: (n,) or (n, C).
        decided: as labels.
        probabilities: (n, C), by which was decided.
        history: a line an epoch of the first run.
    """
    figures = {"classes": _classes(scores)}
    if task.exclusive:
        figures["confusion"] = _confusion(labels, decided, task.classes)
    if task.has_classes:
        figures["reliability"] = _reliability(labels, probabilities)
    if len(history) > 1 and "train_loss" in history[0]:
        figures["learning"] = _learning(history, task.metric)
    return save_figures(folder, figures)


def confusion(labels: npt.NDArray[Any], decided: npt.NDArray[Any], classes: int) -> npt.NDArray[np.int64]:
    """Count the frames (C, C) of each label, down, that were decided for each class, across."""
    return np.bincount(labels * classes + decided, minlength=classes**2).reshape(classes, classes)


def _confusion(labels: npt.NDArray[Any], decided: npt.NDArray[Any], names: Sequence[str]) -> Figure:
    """Draw shares of each label's frames, and write their counts."""
    counts = confusion(labels, decided, len(names))
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, axes = single_axes(width=5.2, height=4.6)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, line in enumerate(counts):
        for column, count in enumerate(line):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{count:,}", ha="center", va="center", color=color, fontsize=7)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("decided")
    axes.set_ylabel("label")
    figure.colorbar(image, ax=axes, label="share of the label's frames")
    return figure


def _classes(scores: Scores) -> Figure:
    """Draw the value that the metric averages for each class, with its interval, and the metric as a line."""
    name = scores.metric.rpartition("_")[2]
    values = [one.values[name] for one in scores.classes]
    figure, axes = single_axes(width=4.8, height=0.9 + 0.26 * len(values))
    positions = range(len(values))
    axes.barh(positions, values, color="#4c78a8")
    for position, one in zip(positions, scores.classes, strict=True):
        if one.interval:
            axes.plot(one.interval, [position, position], color="black", linewidth=1.2)
    axes.axvline(scores.value, color=GREY, linestyle="--", linewidth=1)
    axes.set_yticks(positions, [one.name for one in scores.classes])
    axes.invert_yaxis()
    axes.set_xlabel(f"{metric_name(name)}; dashed: {metric_name(scores.metric)} {scores.value:.3f}; lines: 95 %")
    return figure


def _reliability(labels: npt.NDArray[Any], probabilities: npt.NDArray[Any]) -> Figure:
    """Draw how often what was said with some confidence was so."""
    found = reliability(probabilities, labels)
    figure, axes = single_axes(width=3.6, height=3.6)
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
    filled = found.share > 0
    size = 8 + 200 * found.share[filled]
    axes.scatter(found.confidence[filled], found.frequency[filled], s=size, color="#4c78a8", alpha=0.8)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("confidence")
    axes.set_ylabel("how often it was so")
    axes.set_title(f"calibration error {found.error:.3f}", fontsize="medium")
    return figure


def _learning(history: Sequence[Mapping[str, Any]], metric: str) -> Figure:
    """Draw losses and the metric over epochs."""
    figure, axes = single_axes()
    epochs = [entry["epoch"] for entry in history]
    axes.plot(epochs, [entry["train_loss"] for entry in history], label="training loss", color="#f58518")
    axes.plot(epochs, [entry["validation_loss"] for entry in history], label="validation loss", color="#e45756")
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss")
    other = axes.twinx()
    other.plot(epochs, [entry[metric] for entry in history], label=metric_name(metric), color="#4c78a8")
    other.set_ylabel(f"{metric_name(metric)} on validation")
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize="small")
    return figure
