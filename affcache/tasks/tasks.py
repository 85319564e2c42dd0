"""The tasks: what a head predicts, how its label files read, how its logits become losses, predictions and a metric.

Everything that depends on the task stands in one ``Task``; the rest of the library asks ``TASKS[name]``. A further
task is a further entry here, without a change elsewhere.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from affcache.errors import ConfigError, did_you_mean
from affcache.tasks.losses import (
    binary_cross_entropy,
    concordance,
    cross_entropy,
    cross_entropy_with_gradient,
    pairwise_auc_loss,
    squared_error,
)
from affcache.tasks.metrics import (
    Scores,
    Table,
    ccc_of_outputs,
    class_counts,
    f1_of_classes,
    moments,
    multiclass_scores,
    multilabel_scores,
    regression_scores,
    unit_counts,
)
from affcache.training.settings import FitSettings

Labels = npt.NDArray[Any]
TINY = 1e-12  # a probability has a logit from here on


@dataclass(frozen=True)
class Task:
    """One prediction task."""

    name: str
    description: str
    classes: tuple[str, ...]  # (C,) names of the outputs; the header of a label file, as it must read
    folders: tuple[str, ...]  # names of the challenge folder, the newest first
    values_per_line: int
    label_dtype: str  # numpy dtype of a parsed label
    valid_range: tuple[float, float]  # smallest and largest valid value
    invalid_value: float  # marks a frame without a label
    losses: Callable[..., torch.Tensor]  # logits (..., B, C), labels -> (..., B) or (..., B, C); CVaR goes over them
    losses_with_gradients: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None  # the same, and each one's gradient
    losses_per_frame: int  # how many losses of one frame stand in the batch that alpha is a share of
    class_of: Callable[[torch.Tensor], torch.Tensor] | None  # labels -> the class, of K, of each loss
    class_count: int  # K
    batch_term: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor] | None  # logits, labels, margin -> (...)
    batch_term_weight: Callable[[FitSettings], float]  # its share of the loss
    exclusive: bool  # whether exactly one class is true of a frame
    logits: Callable[[torch.Tensor], torch.Tensor]  # probabilities (n, C) -> logits that stand for them
    probabilities: Callable[[torch.Tensor], torch.Tensor]  # logits (n, C) -> (n, C), as predictions.h5 keeps them
    decide: Callable[[npt.NDArray[np.float32]], Labels]  # probabilities (n, C) -> labels in the label files' form
    score: Callable[[Labels, Labels, tuple[str, ...]], Scores]  # labels, decided, classes -> scores
    metric: str  # name of the value by which the best epoch is chosen
    video_statistics: Callable[..., Table]  # labels, decided, video numbers (n,), V -> (V, C, S), sums over frames
    class_metric_of: Callable[[Table], Table]  # such sums over videos (..., C, S) -> F1 or CCC of each class (..., C)

    def metric_of(self, sums: Table) -> Table:
        """Return the metric (...) from sums over videos (..., C, S): the mean of its classes'."""
        return np.asarray(self.class_metric_of(sums).mean(axis=-1))

    @property
    def outputs(self) -> int:
        """C, the number of logits."""
        return len(self.classes)

    @property
    def header(self) -> str:
        """The first line of a label file."""
        return ",".join(self.classes)


EXPR = Task(
    name="expr",
    description="Facial expression: one of 8 classes per frame, by macro F1",
    classes=("Neutral", "Anger", "Disgust", "Fear", "Happiness", "Sadness", "Surprise", "Other"),
    folders=("EXPR_Recognition_Challenge", "EXPR_Classification_Challenge"),
    values_per_line=1,
    label_dtype="int64",
    valid_range=(0, 7),
    invalid_value=-1,
    losses=cross_entropy,
    losses_with_gradients=cross_entropy_with_gradient,
    losses_per_frame=1,
    class_of=lambda labels: labels,
    class_count=8,
    batch_term=None,
    batch_term_weight=lambda settings: 0.0,
    exclusive=True,
    logits=lambda probabilities: probabilities.clamp(min=TINY).log(),
    probabilities=lambda logits: torch.softmax(logits, dim=-1),
    decide=lambda probabilities: probabilities.argmax(axis=1),
    score=multiclass_scores,
    metric="macro_f1",
    video_statistics=partial(class_counts, classes=8),
    class_metric_of=f1_of_classes,
)

AU = Task(
    name="au",
    description="Facial action units: 12 present-or-absent labels per frame, by the mean of 12 F1",
    classes=("AU1", "AU2", "AU4", "AU6", "AU7", "AU10", "AU12", "AU15", "AU23", "AU24", "AU25", "AU26"),
    folders=("AU_Detection_Challenge",),
    values_per_line=12,
    label_dtype="int64",
    valid_range=(0, 1),
    invalid_value=-1,
    losses=binary_cross_entropy,
    losses_with_gradients=None,
    losses_per_frame=12,
    class_of=lambda labels: 2 * torch.arange(labels.shape[-1], device=labels.device) + labels,  # absent, present
    class_count=24,
    batch_term=lambda logits, labels, margin: pairwise_auc_loss(logits, labels, margin=margin),
    batch_term_weight=lambda settings: settings.auc_weight,
    exclusive=False,
    logits=partial(torch.logit, eps=TINY),
    probabilities=torch.sigmoid,
    decide=lambda probabilities: (probabilities >= 0.5).astype(np.int64),
    score=multilabel_scores,
    metric="mean_f1",
    video_statistics=unit_counts,
    class_metric_of=f1_of_classes,
)

VA = Task(
    name="va",
    description="Valence and arousal: two values in [-1, 1] per frame, by the mean of two CCC",
    classes=("valence", "arousal"),
    folders=("VA_Estimation_Challenge",),
    values_per_line=2,
    label_dtype="float32",
    valid_range=(-1, 1),
    invalid_value=-5,
    losses=squared_error,
    losses_with_gradients=None,
    losses_per_frame=2,
    class_of=None,
    class_count=0,
    batch_term=lambda outputs, labels, margin: 1 - concordance(outputs, labels).mean(-1),
    batch_term_weight=lambda settings: settings.ccc_weight,
    exclusive=False,
    logits=lambda outputs: outputs,
    probabilities=lambda outputs: outputs.clamp(-1, 1),
    decide=lambda outputs: outputs,
    score=regression_scores,
    metric="mean_ccc",
    video_statistics=moments,
    class_metric_of=ccc_of_outputs,
)

TASKS: Mapping[str, Task] = {task.name: task for task in (EXPR, AU, VA)}


def find_task(name: str) -> Task:
    """Return a task by name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in TASKS:
        known = " or ".join(f"{task.name} ({task.description})" for task in TASKS.values())
        raise ConfigError(f"--task {name!r} is unknown{did_you_mean(name, TASKS)}. Expected one of: {known}.")
    return TASKS[name]
