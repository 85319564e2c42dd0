"""Figures of a scored run, for a paper and for the report: classes, confusion, learning, precision, reliability."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import average_precision_score, precision_recall_curve

from affcache.figures import single_axes
from affcache.progress import metric_name
from affcache.scoring.postprocess import reliability
from affcache.tasks.metrics import Scores
from affcache.tasks.task import Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# told apart on white and on black
PALETTE = ("#3b7ddd", "#e4572e", "#2a9d5c", "#b05cc6", "#d99a00", "#1aa7b8",
           "#d4437c", "#7a8794", "#8a6d3b", "#5f6fd0", "#6aa31f", "#c0504d")  # fmt: skip
BLUE, RED, *_ = PALETTE
GREY = "#888888"
MOST_POINTS = 200  # of a line; more can't be seen


def score_figures(
    task: Task,
    scores: Scores,
    labels: npt.NDArray[Any],
    decided: npt.NDArray[Any],
    probabilities: npt.NDArray[Any],
    history: Sequence[Mapping[str, Any]],
) -> "dict[str, Figure]":
    """Draw what fits the task, within ``files.drawing``; the label of each figure is its caption.

    Args:
        task: what was predicted.
        scores: with intervals.
        labels: (n,) class indices, or (n, C).
        decided: as labels.
        probabilities: (n, C), by which was decided.
        history: a line an epoch of the first run.
    """
    figures = {"classes": _classes(task.class_metric, scores)}
    if task.exclusive:
        figures["confusion"] = _confusion(labels, decided, task.classes, task.level)
    if (learning := learning_figure(history, task.metric)) is not None:
        figures["learning"] = learning
    if task.has_classes:
        present = labels[:, None] == np.arange(task.outputs) if task.exclusive else labels
        figures["precision_recall"] = _precision_recall(present, probabilities, task.classes)
        figures["reliability"] = _reliability(labels, probabilities)
    return figures


def _axes(caption: str, width: float = 4.8, height: float = 3.2) -> "tuple[Figure, Axes]":
    figure, axes = single_axes(width, height)
    figure.set_label(caption)
    axes.set_prop_cycle(color=PALETTE)
    axes.set_axisbelow(True)
    axes.grid(color=GREY, alpha=0.3, linewidth=0.8)
    return figure, axes


def _classes(name: str, scores: Scores) -> "Figure":
    """Draw the value that the metric averages for each class, with its interval, and the metric as a line."""
    values = [one.values[name.lower()] for one in scores.classes]
    metric = f"{metric_name(scores.metric)} {scores.value:.3f}"
    figure, axes = _axes(f"{name} with 95 % intervals", height=0.9 + 0.26 * len(values))
    positions = range(len(values))
    axes.barh(positions, values, color=BLUE)
    for position, one in zip(positions, scores.classes, strict=True):
        if one.interval:
            axes.plot(one.interval, [position, position], color="black", linewidth=1.2)
    axes.axvline(scores.value, color=GREY, linestyle="--", linewidth=1)
    axes.set_yticks(positions, [one.name for one in scores.classes])
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(f"{name}; dashed: {metric}; lines: 95 %")
    return figure


def _confusion(labels: npt.NDArray[Any], decided: npt.NDArray[Any], names: Sequence[str], unit: str) -> "Figure":
    """Write the frames of each label, down, that were decided for each class, across, on their shares as shades."""
    count = len(names)
    counts = np.bincount(labels * count + decided, minlength=count**2).reshape(count, count)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, axes = _axes("Confusion", width=1.4 + 0.45 * count, height=1.2 + 0.42 * count)
    for (row, column), frames in np.ndenumerate(counts):
        cell = ([column - 0.5, column + 0.5], row - 0.5, row + 0.5)
        axes.fill_between(*cell, color=BLUE, alpha=shares[row, column], linewidth=0)
        axes.text(column, row, f"{frames:,}", ha="center", va="center", fontsize=8)
    axes.set(xlim=(-0.5, count - 0.5), ylim=(count - 0.5, -0.5), xlabel="decided", ylabel="label")
    axes.set_xticks(range(count), names, rotation=45, ha="right")
    axes.set_yticks(range(count), names)
    axes.set_title(f"shade: share of the label's {unit}s", fontsize="small")
    axes.grid(visible=False)
    return figure


def learning_figure(history: Sequence[Mapping[str, Any]], metric: str) -> "Figure | None":
    """Draw losses and the metric over epochs, within ``files.drawing``; None where the history has none."""
    drawn = {"epoch", "train_loss", "validation_loss", metric}
    if len(history) < 2 or not all(drawn <= entry.keys() for entry in history):
        return None
    name = metric_name(metric)
    figure, axes = _axes(f"Losses and {name} over epochs")
    epochs = [entry["epoch"] for entry in history]
    axes.plot(epochs, [entry["train_loss"] for entry in history], label="training loss", color=PALETTE[4])
    axes.plot(epochs, [entry["validation_loss"] for entry in history], label="validation loss", color=RED)
    axes.set(xlabel="epoch", ylabel="loss")
    axes.locator_params(axis="x", integer=True)
    other = axes.twinx()
    other.plot(epochs, [entry[metric] for entry in history], label=name, color=BLUE)
    other.set_ylabel(f"{name} on validation")
    other.spines["top"].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize="small")
    return figure


def _precision_recall(present: npt.NDArray[Any], probabilities: npt.NDArray[Any], names: Sequence[str]) -> "Figure":
    """Draw precision against recall of each class that has a frame, from (n, C) each; -1 is no label."""
    figure, axes = _axes("Precision against recall, with average precision", height=3 + 0.07 * len(names))
    for name, labels, chances in zip(names, present.T, probabilities.T, strict=True):
        so, probability = labels[labels >= 0] == 1, chances[labels >= 0]
        if so.any():
            precision, recall, _ = precision_recall_curve(so, probability)
            kept = np.linspace(0, len(recall) - 1, min(len(recall), MOST_POINTS)).astype(int)
            label = f"{name} {average_precision_score(so, probability):.2f}"
            axes.plot(recall[kept], precision[kept], label=label)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    return figure


def _reliability(labels: npt.NDArray[Any], probabilities: npt.NDArray[Any]) -> "Figure":
    """Draw how often what was said with some confidence was so."""
    found = reliability(probabilities, labels)
    figure, axes = _axes("Calibration: dots as large as their share of what was said", height=3.6)
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
    filled = found.share > 0
    size = 8 + 200 * found.share[filled]
    axes.scatter(found.confidence[filled], found.frequency[filled], s=size, color=BLUE, alpha=0.8)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="how often it was so")
    axes.set_title(f"calibration error {found.error:.3f}", fontsize="medium")
    return figure
