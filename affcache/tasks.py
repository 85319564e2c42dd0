"""The tasks: what a head predicts, how its label files read, how its logits become losses, predictions and a metric.

Everything that depends on the task stands in one ``Task``; the rest of the library asks ``TASKS[name]``. A further
task is a further entry here, without a change elsewhere.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from affcache.errors import ConfigError, did_you_mean
from affcache.losses import binary_cross_entropy, cross_entropy, cvar
from affcache.metrics import Scores, multiclass_scores, multilabel_scores

Labels = npt.NDArray[Any]


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
    loss: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]  # logits (B, C), labels, alpha -> scalar
    losses_per_frame: int  # how many losses of one frame stand in the batch that alpha is a share of
    probabilities: Callable[[torch.Tensor], torch.Tensor]  # logits (n, C) -> (n, C), as predictions.h5 keeps them
    decide: Callable[[npt.NDArray[np.float32]], Labels]  # probabilities (n, C) -> labels in the label files' form
    score: Callable[[Labels, Labels, tuple[str, ...]], Scores]  # labels, decided, classes -> scores
    metric: str  # name of the value by which the best epoch is chosen

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
    loss=lambda logits, labels, alpha: cvar(cross_entropy(logits, labels), alpha),
    losses_per_frame=1,
    probabilities=lambda logits: torch.softmax(logits, dim=-1),
    decide=lambda probabilities: probabilities.argmax(axis=1),
    score=multiclass_scores,
    metric="macro_f1",
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
    loss=lambda logits, labels, alpha: cvar(binary_cross_entropy(logits, labels), alpha),
    losses_per_frame=12,
    probabilities=torch.sigmoid,
    decide=lambda probabilities: (probabilities >= 0.5).astype(np.int64),
    score=multilabel_scores,
    metric="mean_f1",
)

TASKS: Mapping[str, Task] = {task.name: task for task in (EXPR, AU)}


def find_task(name: str) -> Task:
    """Return a task by name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in TASKS:
        known = " or ".join(f"{task.name} ({task.description})" for task in TASKS.values())
        raise ConfigError(f"--task {name!r} is unknown{did_you_mean(name, TASKS)}. Expected one of: {known}.")
    return TASKS[name]
