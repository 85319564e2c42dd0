"""What a task is: what a head predicts, and how its logits become losses, predictions and a metric.

There are three kinds: one of several classes, units that are present or absent, and values. A task is a kind with the
names of its outputs, and all sizes follow from these.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from affcache.errors import ConfigError, did_you_mean
from affcache.tasks.losses import LOSSES, Loss
from affcache.tasks.metrics import Positions, Scores, Table, mean_by_video

Labels = npt.NDArray[Any]
AnyLabels = TypeVar("AnyLabels", torch.Tensor, npt.NDArray[Any])


@dataclass(frozen=True)
class Task(ABC):
    """One prediction task. C is how many outputs it has, n how many frames."""

    name: str
    classes: tuple[str, ...]  # (C,) names of the outputs; the header of a label file, as it must read
    description: str = ""
    folders: tuple[str, ...] = ()  # names of the challenge folder, the newest first
    labels: Path | None = field(default=None, compare=False)  # the table or the folder of labels, without ``folders``
    level: str = "frame"  # what one label is of: a frame, or a whole video
    parts: tuple["Task", ...] = ()  # of several tasks at once, each of them
    columns: tuple[tuple[str, str], ...] = field(default=(), compare=False)  # (role, header) of a table of labels

    kind: ClassVar[str]  # classes, units or values: where ``LOSSES`` has its losses
    metric: ClassVar[str]  # name of the value by which the best epoch is chosen
    class_metric: ClassVar[str]  # what each output has of its own, of which the metric is the mean: F1 or CCC
    metric_limits: ClassVar[tuple[float, float]] = (0, 1)  # of both
    exclusive: ClassVar[bool] = False  # whether exactly one class is true of a frame
    has_classes: ClassVar[bool] = True  # whether labels are classes, of which each may be rare or hard
    label_dtype: ClassVar[str] = "int64"  # numpy dtype of a parsed label
    invalid_value: ClassVar[float] = -1  # marks a frame without a label
    batch_term_weight: ClassVar[str] = ""  # the setting that is the share of ``batch_term`` in the loss; "" for none

    def __repr__(self) -> str:
        """Say what it predicts; what its files are called stands in ``folders``."""
        return f"<task {self.name}: {self.kind} {', '.join(self.classes)}; {self.metric}>"

    @property
    def outputs(self) -> int:
        """C, the number of logits."""
        return len(self.classes)

    @property
    def header(self) -> str:
        """The first line of a label file."""
        return ",".join(self.classes)

    @property
    def values_per_line(self) -> int:
        """How many values a line of a label file has."""
        return self.outputs

    @property
    def losses_per_frame(self) -> int:
        """How many losses of one frame stand in the batch that alpha is a share of."""
        return self.values_per_line

    @property
    @abstractmethod
    def valid_range(self) -> tuple[float, float]:
        """The smallest and the largest valid value of a label."""

    @property
    def class_count(self) -> int:
        """K, of how many classes a loss can be; 0 without classes."""
        return 0

    def labelled(self, labels: AnyLabels) -> AnyLabels:
        """Return where there is a label, bool in the shape of labels: it is neither -1 nor nan."""
        return labels == labels if np.dtype(self.label_dtype).kind == "f" else labels >= 0  # nan isn't

    def filled(self, labels: torch.Tensor) -> torch.Tensor:
        """Return labels with 0 where there is none, for losses that are left out then."""
        return torch.where(self.labelled(labels), labels, 0)

    def losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the usual losses of logits (..., n, C), without any knob: (..., n) or (..., n, C)."""
        return self.loss("")(logits, labels)

    def labelled_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the usual losses of logits (n, C): (m,) of the labels that there are."""
        return self.losses(logits, self.filled(labels))[self.labelled(labels)]

    def loss(self, name: str) -> Loss:
        """Return a loss of the task's kind by its name, or with "" the usual one.

        Raises:
            ConfigError: there is none of that name.
        """
        known = LOSSES[self.kind]
        if name and name not in known:
            raise ConfigError(
                f"--loss {name!r} is no loss of task {self.name}{did_you_mean(name, known)}. Expected "
                f"{' or '.join(known)}."
            )
        return known[name or next(iter(known))]

    def accepts(self, loss: str) -> bool:
        """Say whether a name is that of a loss of the task's kind; "" is."""
        return not loss or loss in LOSSES[self.kind]

    def class_of(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the class, below K, of each loss of labels (..., n) or (..., n, C), in their shape."""
        raise TypeError(f"task {self.name} has no classes")  # our own mistake: ``has_classes`` says so

    def log_prior(self, counts: torch.Tensor) -> torch.Tensor:
        """Return float64 (C,), what ``--logit-adjustment`` adds to the logits, from counts of classes (K,)."""
        raise TypeError(f"task {self.name} has no classes")

    def batch_term(
        self, logits: torch.Tensor, labels: torch.Tensor, margin: float, counts: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the loss (...) of a whole batch, logits (..., n, C), which ``batch_term_weight`` weighs.

        ``counts`` says how much each label does, in their shape, 0 where there is none; None where all do alike.
        """
        raise TypeError(f"task {self.name} has no term of whole batches")

    @abstractmethod
    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Return probabilities (..., C) of logits, as predictions.h5 keeps them; values are clipped to their range."""

    @abstractmethod
    def logits(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Return logits (..., C) that stand for float64 probabilities."""

    @abstractmethod
    def averaged(self, logits: torch.Tensor, shares: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits (n, C) that stand for the mean of the probabilities of float64 logits (K, n, C), exactly.

        ``shares`` (K, n, 1), which sum to 1, say how much each counts; None where all do alike.
        """

    def scored(self, logits: torch.Tensor, videos: torch.Tensor) -> tuple[npt.NDArray[Any], Positions | slice]:
        """Return the probabilities (m, C) of what is scored, and where among n its labels stand (m,).

        That is frames, or, where a label is of a whole video, videos, each by the mean of what is said of its frames.

        Args:
            logits: (n, C) of frames, or of pooled videos, of which each is a row already.
            videos: (n,), whose frame each is; those of a video stand side by side.
        """
        probabilities = self.probabilities(logits).cpu().numpy()
        if self.level == "frame":
            return probabilities, slice(None)
        return mean_by_video(probabilities, videos.cpu().numpy())

    def logits_of_videos(self, logits: torch.Tensor, videos: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return float64 logits (V, C) that stand for the mean probabilities of each video; as ``scored``."""
        means, _ = mean_by_video(self.probabilities(logits).cpu().numpy(), videos)
        return self.logits(torch.from_numpy(means))

    @abstractmethod
    def decide(self, probabilities: npt.NDArray[np.float32]) -> Labels:
        """Return labels, in the form of label files, that probabilities (n, C) say."""

    @abstractmethod
    def score(self, labels: Labels, decided: Labels) -> Scores:
        """Return the scores of decided labels against true ones."""

    @abstractmethod
    def sums_by_video(self, labels: Labels, decided: Labels, videos: npt.NDArray[np.int64], count: int) -> Table:
        """Return sums (V, C, S) over the frames of each of V videos, by the video (n,) of each frame.

        Those of one task add up, whatever frames they are of: of folds, say.
        """

    @abstractmethod
    def class_metric_of(self, sums: Table) -> Table:
        """Return F1 or CCC of each output (..., C) from sums over videos (..., C, S)."""

    def metric_of(self, sums: Table) -> Table:
        """Return the metric (...) from sums over videos (..., C, S)."""
        return self.combined(self.class_metric_of(sums), range(self.outputs))

    def combined(self, of_outputs: Table, outputs: Sequence[int]) -> Table:
        """Return the metric (...) from F1 or CCC (..., c) of some of its outputs: their mean."""
        return np.asarray(of_outputs.mean(axis=-1))

    @abstractmethod
    def videos_of_outputs(self, sums: Table) -> npt.NDArray[np.int64]:
        """Return in how many videos each output is labelled (C,), from sums (V, C, S): a class, where it is present."""

    @abstractmethod
    def draw_labels(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Draw labels of ``count`` frames at random, to try a computation with."""
