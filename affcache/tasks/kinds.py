"""The kinds of tasks: one of several classes, units that are present or absent, and values."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from affcache.tasks.losses import Loss, concordance, pairwise_auc_loss
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
from affcache.tasks.task import Labels, Task

TINY = 1e-16  # a probability of a unit has a logit from here on, and up to 1 less that


class Labelled(Task):
    """A task whose labels are classes, scored by F1; sums over videos are counts as ``class_counts`` has them."""

    class_metric = "F1"

    def log_prior(self, counts: torch.Tensor) -> torch.Tensor:
        smoothed = (counts.double() + 1).view(self.outputs, -1)  # (C, 1), or (C, 2) absent and present; from 1 on
        return (smoothed[:, -1] / (smoothed.sum() if self.exclusive else smoothed[:, 0])).log()

    def class_metric_of(self, sums: Table) -> Table:
        return f1_of_classes(sums)

    def videos_of_outputs(self, sums: Table) -> npt.NDArray[np.int64]:
        return (sums[:, :, 2] > 0).sum(axis=0)


class Classes(Labelled):
    """One of C classes for each frame, by macro F1. Labels are int64 (n,)."""

    kind, metric, exclusive = "classes", "macro_f1", True
    values_per_line = 1

    @property
    def valid_range(self) -> tuple[float, float]:
        return 0, self.outputs - 1

    @property
    def class_count(self) -> int:
        return self.outputs

    def class_of(self, labels: torch.Tensor) -> torch.Tensor:
        return labels

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.softmax(logits, dim=-1)

    def logits(self, probabilities: torch.Tensor) -> torch.Tensor:
        return probabilities.clamp(min=torch.finfo(torch.float64).tiny).log()

    def averaged(self, logits: torch.Tensor, shares: torch.Tensor | None = None) -> torch.Tensor:
        logs = torch.log_softmax(logits, dim=-1)
        return logs.logsumexp(0) - math.log(len(logits)) if shares is None else (logs + shares.log()).logsumexp(0)

    def decide(self, probabilities: npt.NDArray[np.float32]) -> Labels:
        return probabilities.argmax(axis=1)

    def score(self, labels: Labels, decided: Labels) -> Scores:
        return multiclass_scores(labels, decided, self.classes)

    def sums_by_video(self, labels: Labels, decided: Labels, videos: npt.NDArray[np.int64], count: int) -> Table:
        return class_counts(labels, decided, videos, count, self.outputs)

    def draw_labels(self, count: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randint(self.outputs, (count,), generator=generator)


class Units(Labelled):
    """C units, each present in a frame or not, by the mean of their F1. Labels are int64 (n, C) of 0 and 1."""

    kind, metric, batch_term_weight = "units", "mean_f1", "auc_weight"
    valid_range = 0, 1

    @property
    def class_count(self) -> int:
        return 2 * self.outputs  # absent and present of each

    def class_of(self, labels: torch.Tensor) -> torch.Tensor:
        return 2 * torch.arange(self.outputs, device=labels.device) + labels

    def batch_term(
        self, logits: torch.Tensor, labels: torch.Tensor, margin: float, counts: torch.Tensor | None = None
    ) -> torch.Tensor:
        return pairwise_auc_loss(logits, labels, margin=margin, counts=counts)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(logits)

    def logits(self, probabilities: torch.Tensor) -> torch.Tensor:
        return torch.logit(probabilities, eps=TINY)

    def averaged(self, logits: torch.Tensor, shares: torch.Tensor | None = None) -> torch.Tensor:
        logs = 0.0 if shares is None else shares.log()
        present, absent = (functional.logsigmoid(of) + logs for of in (logits, -logits))
        return present.logsumexp(0) - absent.logsumexp(0)

    def decide(self, probabilities: npt.NDArray[np.float32]) -> Labels:
        return (probabilities >= 0.5).astype(np.int64)

    def score(self, labels: Labels, decided: Labels) -> Scores:
        return multilabel_scores(labels, decided, self.classes)

    def sums_by_video(self, labels: Labels, decided: Labels, videos: npt.NDArray[np.int64], count: int) -> Table:
        return unit_counts(labels, decided, videos, count)

    def draw_labels(self, count: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randint(2, (count, self.outputs), generator=generator)


@dataclass(frozen=True, repr=False)
class Values(Task):
    """C values in a range, by the mean of their CCC; sums over videos are moments. Labels are float32 (n, C).

    Logits are in the units of half the range, around its middle, so that a head learns alike whatever the units are:
    those of [-1, 1] are the values themselves, and so are those of a range without ends.
    """

    low: float = -1.0
    high: float = 1.0

    kind, metric, class_metric, batch_term_weight = "values", "mean_ccc", "CCC", "ccc_weight"
    metric_limits = (-1, 1)
    label_dtype, invalid_value, has_classes = "float32", -5, False

    def __post_init__(self) -> None:
        if not self.low < self.high or self.low <= self.invalid_value <= self.high:
            raise ValueError(
                f"task {self.name} has values from {self.low:g} to {self.high:g}; expected a range without "
                f"{self.invalid_value:g}, which marks a frame without a label"
            )

    @property
    def valid_range(self) -> tuple[float, float]:
        return self.low, self.high

    @property
    def middle(self) -> float:
        """The middle of the range, where there is one; else 0."""
        return (self.low + self.high) / 2 if math.isfinite(self.high - self.low) else 0.0

    @property
    def half(self) -> float:
        """Half the length of the range, where it has one; else 1."""
        return (self.high - self.low) / 2 if math.isfinite(self.high - self.low) else 1.0

    def loss(self, name: str) -> Loss:
        of_logits = super().loss(name)
        if (self.middle, self.half) == (0, 1):
            return of_logits
        return lambda logits, labels, **knobs: of_logits(logits, self.logits(labels), **knobs)

    def batch_term(
        self, logits: torch.Tensor, labels: torch.Tensor, margin: float, counts: torch.Tensor | None = None
    ) -> torch.Tensor:
        return 1 - concordance(logits, self.logits(labels), counts=counts).mean(-1)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        if (self.middle, self.half) == (0, 1):
            return logits.clamp(self.low, self.high)
        return (logits * self.half + self.middle).clamp(self.low, self.high)

    def logits(self, probabilities: torch.Tensor) -> torch.Tensor:
        return probabilities if (self.middle, self.half) == (0, 1) else (probabilities - self.middle) / self.half

    def averaged(self, logits: torch.Tensor, shares: torch.Tensor | None = None) -> torch.Tensor:
        values = self.probabilities(logits)
        return self.logits(values.mean(0) if shares is None else (values * shares).sum(0))

    def decide(self, probabilities: npt.NDArray[np.float32]) -> Labels:
        return probabilities

    def score(self, labels: Labels, decided: Labels) -> Scores:
        return regression_scores(labels, decided, self.classes)

    def sums_by_video(self, labels: Labels, decided: Labels, videos: npt.NDArray[np.int64], count: int) -> Table:
        return moments(labels, decided, videos, count, centre=self.middle)

    def class_metric_of(self, sums: Table) -> Table:
        return ccc_of_outputs(sums)

    def videos_of_outputs(self, sums: Table) -> npt.NDArray[np.int64]:
        return (sums[:, :, 0] > 0).sum(axis=0)

    def draw_labels(self, count: int, generator: torch.Generator) -> torch.Tensor:
        return self.low + (self.high - self.low) * torch.rand(count, self.outputs, generator=generator)
