"""Several tasks predicted at once, by one head: the multi-task challenge."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from affcache.tasks.losses import Loss
from affcache.tasks.metrics import Scores, Table
from affcache.tasks.task import AnyLabels, Labels, Task


@dataclass(frozen=True, repr=False)
class MultiTask(Task):
    """Tasks side by side: their outputs and their labels one after the other, and the sum of their metrics.

    Labels are float32 (n, values), nan where a frame has none of a task's; ``split`` gives each task its own back.
    """

    kind, metric, class_metric = "multi", "p", "F1 or CCC"
    label_dtype, losses_per_frame = "float32", 1  # a task's may be as few as the frames
    valid_range = -np.inf, np.inf  # each has its own

    @classmethod
    def of(cls, name: str, parts: Sequence[Task], description: str) -> "MultiTask":
        """Put tasks side by side."""
        return cls(name, tuple(one for part in parts for one in part.classes), description, parts=tuple(parts))

    def only(self, names: Sequence[str]) -> "MultiTask":
        """Return the same with some of its parts."""
        return self.of(self.name, [part for part in self.parts if part.name in names], self.description)

    @property
    def values_per_line(self) -> int:
        return sum(part.values_per_line for part in self.parts)

    @property
    def metric_limits(self) -> tuple[float, float]:  # type: ignore[override]
        low, high = zip(*(part.metric_limits for part in self.parts), strict=True)
        return sum(low), sum(high)

    def outputs_of(self, given: AnyLabels) -> list[AnyLabels]:
        """Return what of logits or probabilities (..., C) is each part's, (..., C of it)."""
        ends = np.cumsum([part.outputs for part in self.parts]).tolist()
        return [given[..., end - part.outputs : end] for part, end in zip(self.parts, ends, strict=True)]

    def split(self, labels: AnyLabels) -> list[AnyLabels]:
        """Return each part's own labels, in its form, of labels (..., values): -1 or nan where there is none."""
        found, start = [], 0
        for part in self.parts:
            own = labels[..., start : start + part.values_per_line]
            start += part.values_per_line
            found.append(_in_form_of(part, own))
        return found

    def joined(self, labels: Sequence[Labels]) -> npt.NDArray[np.float32]:
        """Return labels (n, values) of those of the parts: ``split`` gives them back."""
        columns = [
            np.where(part.labelled(own), own, np.nan).reshape(len(own), -1)
            for part, own in zip(self.parts, labels, strict=True)
        ]
        return np.concatenate(columns, axis=1).astype(np.float32)

    def accepts(self, loss: str) -> bool:
        return any(part.accepts(loss) for part in self.parts)

    def loss(self, name: str) -> Loss:
        """Return a loss of that name, of the first part that has one; raises ConfigError where none has."""
        return next((part for part in self.parts if part.accepts(name)), self.parts[-1]).loss(name)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        each = zip(self.parts, self.outputs_of(logits), strict=True)
        return torch.cat([part.probabilities(of) for part, of in each], dim=-1)

    def logits(self, probabilities: torch.Tensor) -> torch.Tensor:
        each = zip(self.parts, self.outputs_of(probabilities), strict=True)
        return torch.cat([part.logits(of) for part, of in each], dim=-1)

    def averaged(self, logits: torch.Tensor, shares: torch.Tensor | None = None) -> torch.Tensor:
        each = zip(self.parts, self.outputs_of(logits), strict=True)
        return torch.cat([part.averaged(of, shares) for part, of in each], dim=-1)

    def decide(self, probabilities: npt.NDArray[np.float32]) -> Labels:
        each = zip(self.parts, self.outputs_of(probabilities), strict=True)
        return self.joined([part.decide(of) for part, of in each])

    def score(self, labels: Labels, decided: Labels) -> Scores:
        each = [
            part.score(own, of)
            for part, own, of in zip(self.parts, self.split(labels), self.split(decided), strict=True)
        ]
        return self.sum_of(each)

    def sum_of(self, scores: Sequence[Scores]) -> Scores:
        """Return the scores of all, from those of the parts: their sum, and each one's own beside it."""
        return Scores(
            metric=self.metric,
            value=sum(one.value for one in scores),
            classes=tuple(found for one in scores for found in one.classes),
            further={one.metric: one.value for one in scores},
        )

    def sums_by_video(self, labels: Labels, decided: Labels, videos: npt.NDArray[np.int64], count: int) -> Table:
        tables = [
            part.sums_by_video(own, of, videos, count)
            for part, own, of in zip(self.parts, self.split(labels), self.split(decided), strict=True)
        ]
        return self.beside(tables)

    def beside(self, tables: Sequence[Table]) -> Table:
        """Return the sums over videos (V, C, S) of those of the parts, filled with 0 where a part has fewer."""
        most = max(table.shape[-1] for table in tables)
        padded = [np.pad(table, ((0, 0), (0, 0), (0, most - table.shape[-1]))) for table in tables]
        return np.concatenate(padded, axis=1)

    def class_metric_of(self, sums: Table) -> Table:
        return np.concatenate([part.class_metric_of(own) for part, own in self._sums_of_parts(sums)], axis=-1)

    def combined(self, of_outputs: Table, outputs: Sequence[int]) -> Table:
        """Return the sum over the parts of the mean of its outputs, of F1 and CCC (..., c) of some outputs."""
        part_of = np.repeat(np.arange(len(self.parts)), [part.outputs for part in self.parts])[list(outputs)]
        return np.asarray(sum(of_outputs[..., part_of == one].mean(axis=-1) for one in np.unique(part_of)))

    def videos_of_outputs(self, sums: Table) -> npt.NDArray[np.int64]:
        return np.concatenate([part.videos_of_outputs(own) for part, own in self._sums_of_parts(sums)])

    def labels_of_outputs(self, sums: Table) -> Table:
        """Return how often each output is labelled (C,), a class or a unit as present, from sums (C, S)."""
        return np.concatenate([own[:, 2 if part.has_classes else 0] for part, own in self._sums_of_parts(sums)])

    def _sums_of_parts(self, sums: Table) -> list[tuple[Task, Table]]:
        return list(
            zip(self.parts, (one.swapaxes(-1, -2) for one in self.outputs_of(sums.swapaxes(-1, -2))), strict=True)
        )

    def draw_labels(self, count: int, generator: torch.Generator) -> torch.Tensor:
        drawn = [part.draw_labels(count, generator).numpy() for part in self.parts]
        return torch.from_numpy(self.joined(drawn))


def _in_form_of(part: Task, own: AnyLabels) -> AnyLabels:
    """Return labels (..., values) float, nan where there is none, in the form of a task's."""
    if np.dtype(part.label_dtype).kind == "f":
        return own
    missing = own != own
    if isinstance(own, torch.Tensor):
        whole = torch.where(missing, -1, own).long()
    else:
        whole = np.where(missing, -1, own).astype(np.int64)
    return whole[..., 0] if part.exclusive else whole
