"""The rule by which probabilities become decisions: smoothed, calibrated, with a bias a class or a threshold a unit."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, replace
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from affcache.errors import ConfigError
from affcache.progress import Result, counted
from affcache.tasks.task import Labels, Task

Values = npt.NDArray[np.float64]
KINDS = ("none", "mean", "median")  # of smoothing


class FramesSaid(Protocol):
    """A dataclass of what is said of n frames: all that a rule has to know of them."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def probabilities(self) -> npt.NDArray[Any]:
        """Float (n, C)."""

    @property
    def logits(self) -> torch.Tensor:
        """Float (n, C), that the probabilities stand for."""

    @property
    def videos(self) -> npt.NDArray[np.int64]:
        """Which video each frame is of (n,), rising."""

    @property
    def frame_numbers(self) -> npt.NDArray[Any]:
        """The number of each frame (n,), rising within a video."""


Said = TypeVar("Said", bound=FramesSaid)


@dataclass(frozen=True)
class DecisionRule(Result):
    """How a task's probabilities become decisions. The default is the task's own rule."""

    smooth: str = "none"
    width: int = 1  # frame numbers
    temperature: float = 1.0
    offsets: tuple[float, ...] | None = None  # (C,): a bias a class, or a threshold a unit
    fitted_on: str | None = None  # which frames, in words
    optimistic: bool = False  # whether the frames that are reported are among them
    weights: tuple[float, ...] | None = None  # (R,) of the runs that are averaged, in their order; None: equal ones

    @classmethod
    def from_json(cls, values: Mapping[str, Any], task: Task) -> "DecisionRule":
        """Return the rule that ``to_json`` wrote; raises ValueError or KeyError where it isn't the task's."""
        kind, width, temperature, offsets = (values[name] for name in ("smooth", "width", "temperature", "offsets"))
        where, optimistic = values["fitted_on"], values["optimistic"]
        if kind not in KINDS or type(width) is not int or width < 1 or width % 2 == 0:
            raise ValueError(f"it smooths by {kind!r} over {width!r}")
        if not _finite(temperature) or temperature <= 0:
            raise ValueError(f"its temperature is {temperature!r}")
        fits = isinstance(offsets, (list, tuple)) and len(offsets) == task.outputs and all(map(_finite, offsets))
        if offsets is not None and not (fits and task.has_classes):
            raise ValueError(f"its offsets are not {task.outputs} numbers")
        if not isinstance(where, (str, type(None))) or not isinstance(optimistic, bool):
            raise ValueError(f"it was fitted on {where!r}")
        weights = values.get("weights")  # older rules lack it
        sound = isinstance(weights, list) and all(map(_finite, weights)) and are_weights(weights)
        if weights is not None and not sound:
            raise ValueError(f"its weights are {weights!r}")
        lists = [tuple(one) if one is not None else None for one in (offsets, weights)]
        return cls(kind, width, float(temperature), lists[0], where, optimistic, lists[1])

    @property
    def name(self) -> str:
        """What files of its scores are called by: "" for the task's own rule."""
        if self.optimistic or self.fitted_on:
            return "optimistic" if self.optimistic else "fitted"
        smoothed = self.smooth != "none" and self.width > 1
        return "smoothed" if smoothed else "weighted" if self.weights else ""

    def in_words(self, names: Sequence[str]) -> str:
        """Say what the rule does where it isn't the task's own; ``names`` are the task's outputs."""
        parts = []
        if self.weights:
            parts.append(f"weights {', '.join(f'{share / sum(self.weights):.2f}' for share in self.weights)}")
        if self.smooth != "none":
            smoothed = f"{self.smooth} over {counted(self.width, 'frame number')}"
            parts.append(smoothed if self.width > 1 else "no smoothing, which was best")
        if self.temperature != 1:
            parts.append(f"temperature {self.temperature:.2f}")
        if self.offsets:
            each = ", ".join(f"{name} {offset:.2f}" for name, offset in zip(names, self.offsets, strict=True))
            parts.append(f"offsets {each}")
        return "; ".join(parts)

    def apply(self, given: Said, task: Task) -> Said:
        """Return predictions smoothed over the frames given, and with the temperature; as they are where both are off.

        Of the frames of a video all should be given, not only those with a label: a window is of frames as they follow.
        """
        if self.smooth != "none" and self.width > 1:
            found = smooth(given.probabilities, given.videos, given.frame_numbers, self.width, self.smooth)
            if self.smooth == "median" and task.exclusive:
                sums = found.sum(axis=1, keepdims=True)
                if (sums == 0).any():  # a window in which no class is sure in most frames
                    means = smooth(given.probabilities, given.videos, given.frame_numbers, self.width)
                    found, sums = np.where(sums == 0, means, found), np.where(sums == 0, 1, sums)
                found = found / sums
            given = replace(given, probabilities=found, logits=task.logits(torch.from_numpy(found)))
        if self.temperature != 1:
            logits = given.logits.double() / self.temperature
            given = replace(given, probabilities=task.probabilities(logits).numpy(), logits=logits)
        return given

    def decide(self, probabilities: npt.NDArray[Any], task: Task) -> Labels:
        """Return decided labels, in the form of label files, from probabilities (n, C) of what ``apply`` returned."""
        if self.offsets is None:
            return task.decide(probabilities)
        if task.exclusive:
            logs = np.log(np.maximum(probabilities, np.finfo(np.float64).tiny).astype(np.float64))
            return np.asarray((logs + np.asarray(self.offsets)).argmax(axis=1))
        return (probabilities >= np.asarray(self.offsets)).astype(np.int64)


def require_frames_to_smooth(kind: str, task: Task) -> None:
    """Refuse to smooth what is said of whole videos; raises ConfigError."""
    if kind != "none" and task.level == "video":
        raise ConfigError(
            f"--smooth {kind} is over frames of a video, but task {task.name} decides once for each. Expected none: "
            "leave it out."
        )


def are_weights(numbers: Sequence[float]) -> bool:
    """Say whether numbers can weigh: none below 0, and a sum above it that is no infinity."""
    return all(0 <= one < math.inf for one in numbers) and 0 < sum(numbers) < math.inf


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def smooth(
    values: npt.NDArray[Any], videos: npt.NDArray[Any], frame_numbers: npt.NDArray[Any], width: int, kind: str = "mean"
) -> Values:
    """Smooth values over the frames of each video.

    Args:
        values: float (n, C).
        videos: int (n,), rising: which video each frame is of.
        frame_numbers: int (n,), rising within a video.
        width: odd number of frame numbers in a window, the frame in its middle; 1 changes nothing.
        kind: "mean" or "median".

    Returns:
        float64 (n, C).

    Raises:
        ValueError: an even width or one below 1, or another kind.
    """
    if width < 1 or width % 2 == 0:
        raise ValueError(f"width is {width}; expected an odd number of at least 1")
    if kind not in ("mean", "median"):
        raise ValueError(f"kind is {kind!r}; expected mean or median")
    values = np.asarray(values, np.float64)
    if width == 1 or not len(values):
        return values
    # one rising key for video and frame: videos lie further apart than any window reaches
    numbers = np.asarray(frame_numbers, np.int64) - int(frame_numbers.min())
    reach = min(width // 2, int(numbers.max()))  # further there is nothing
    key = np.asarray(videos, np.int64) * (int(numbers.max()) + reach + 1) + numbers
    first, last = np.searchsorted(key, key - reach, "left"), np.searchsorted(key, key + reach, "right")
    if kind == "median":
        return np.stack([np.median(values[a:b], axis=0) for a, b in zip(first, last, strict=True)])
    offset = values.mean(axis=0)  # running sums of what is left stay small
    sums = np.concatenate([np.zeros((1, values.shape[1])), (values - offset).cumsum(axis=0)])
    means = (sums[last] - sums[first]) / (last - first)[:, None] + offset
    return np.asarray(means.clip(values.min(axis=0), values.max(axis=0)))  # which rounding may pass
