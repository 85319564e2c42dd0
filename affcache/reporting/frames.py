"""What a report shows: its context, the hardest frames, those whose labels may be wrong, and their pictures."""

import base64
import io
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from affcache.crops.archives import UnreadableCropError
from affcache.crops.crop_list import CropList
from affcache.crops.folders import find_crops
from affcache.crops.images import decode_crop
from affcache.crops.names import VideoNames
from affcache.errors import InputError
from affcache.figures import drawing
from affcache.reporting.page import inline_figure
from affcache.scoring.figures import score_figures
from affcache.scoring.frames import Scored
from affcache.scoring.predict import TrainedRun
from affcache.tasks.annotations import JoinedLabels
from affcache.tasks.task import Task
from affcache.training.risk import tail_size

PER_CLASS = 24  # of the hardest frames of each class
SUSPICIOUS = 60
SIDE = 112  # pixels at most
QUALITY = 75


@dataclass(frozen=True)
class ReportContext:
    """What the panels of a report draw on. Frames are named by their position among the n of the split."""

    run: TrainedRun
    split: str
    scored: Scored  # with intervals
    crops: CropList | None  # None where there are none

    @property
    def joined(self) -> JoinedLabels:
        """The labels of the n frames."""
        return self.scored.joined

    @cached_property
    def losses(self) -> npt.NDArray[np.float64]:
        """The loss of each frame (n,): the mean of its units or values where it has several."""
        return self.scored.frame_losses

    @property
    def task(self) -> Task:
        """What was predicted."""
        return self.run.task

    @property
    def said(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
        """Labels, (n,) class indices or (n, C); what was decided, likewise; and probabilities (n, C)."""
        return self.joined.labels, self.scored.decided, self.scored.predictions.probabilities

    @property
    def video_names(self) -> tuple[str, ...]:
        """The names of the videos that ``frame_names`` counts."""
        return self.scored.predictions.frames.video_names

    @cached_property
    def frame_names(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        """The video (n,) that each frame is of, and its number (n,) there."""
        return self.scored.predictions.videos, self.scored.predictions.frame_numbers

    @cached_property
    def tail(self) -> npt.NDArray[np.int64]:
        """The frames in CVaR's tail at the run's alpha, the hardest first."""
        return tail_positions(self.losses, self.run.settings.alpha)

    @cached_property
    def hardest(self) -> list[int]:
        """Frames of the tail to show, the hardest first."""
        return hardest(self.task, self.joined.labels, self.tail)

    @cached_property
    def suspicious(self) -> list[int]:
        """Frames where head and label disagree and the head is sure, the surest first."""
        return suspicious(self.task, *self.said)

    @cached_property
    def pictures(self) -> dict[int, str]:
        """Small pictures of the frames to show, as data URIs by position; none of videos, or of crops not found."""
        chosen, crops, names = [*self.hardest, *self.suspicious], self.crops, self.video_names
        if crops is None or self.task.level == "video":
            return {}
        try:
            index_of = VideoNames(crops.video_names).match(names, Path())
        except InputError:  # no saying which is whose
            return {}
        videos, numbers = self.frame_names
        pictures = {}
        for position in chosen:
            index = index_of.get(names[videos[position]])
            if index is None:
                continue
            first, last = crops.video_start[index : index + 2]
            for row in first + np.flatnonzero(crops.frame_number[first:last] == numbers[position]):  # one, or none
                with suppress(OSError, UnreadableCropError):
                    pictures[position] = small_picture(decode_crop(crops.read(row)).pixels)
        return pictures

    @cached_property
    def figures(self) -> dict[str, str]:
        """The figures of ``score --figures``, by name, as elements of the page."""
        with drawing():
            drawn = score_figures(self.task, self.scored.scores, *self.said, self.run.folder.read_history())
            return {name: inline_figure(figure, self.task.name) for name, figure in drawn.items()}


def crops_below(roots: Sequence[Path]) -> CropList | None:
    """Return the crops in folders and archives, as far as these are there; None without any."""
    try:
        return find_crops([root for root in roots if root.exists()])
    except InputError:
        return None


def tail_positions(losses: npt.NDArray[Any], alpha: float) -> npt.NDArray[np.int64]:
    """Return the frames in CVaR's tail at a level, the hardest first."""
    count = int(np.ceil(tail_size(len(losses), alpha)))
    return np.argsort(-losses, kind="stable")[:count]


def hardest(task: Task, labels: npt.NDArray[Any], tail: npt.NDArray[np.int64]) -> list[int]:
    """Return positions in the tail to show, the hardest first: so many of each class that all can be looked at."""
    shown: dict[str, int] = {}
    chosen = []
    for position in tail.tolist():
        classes = classes_of(task, labels[position])
        if any(shown.get(name, 0) < PER_CLASS for name in classes):
            chosen.append(position)
            shown |= {name: shown.get(name, 0) + 1 for name in classes}
    return chosen


def suspicious(task: Task, labels: npt.NDArray[Any], decided: npt.NDArray[Any], probabilities: Any) -> list[int]:
    """Return positions where head and label disagree and the head is sure, the surest first."""
    if not task.has_classes:
        return []
    if task.exclusive:
        sure = np.where(decided != labels, probabilities[np.arange(len(labels)), decided], -1)
    else:
        confidence = np.where(decided == 1, probabilities, 1 - probabilities)
        sure = np.where((decided != labels) & task.labelled(labels), confidence, -1).max(axis=1)
    order = np.argsort(-sure, kind="stable")[:SUSPICIOUS]
    return [int(position) for position in order if sure[position] > 0.5]


def classes_of(task: Task, label: Any) -> tuple[str, ...]:
    """Return the names that a label stands for: its class, the units that are present, or the outputs."""
    if task.exclusive:
        return (task.classes[int(label)],)
    if not task.has_classes:
        return task.classes
    return tuple(name for name, present in zip(task.classes, label, strict=True) if present == 1) or ("none",)


def small_picture(pixels: npt.NDArray[np.uint8]) -> str:
    """Return pixels (height, width, 3) as a data URI of a JPEG, made smaller where they are many."""
    image, file = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((SIDE, SIDE))
    image.save(file, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
