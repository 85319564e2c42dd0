"""What a report tells of: a run, its scores, what was said of each frame, and which frames are worth a look."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from affcache.files import drawing
from affcache.reporting.frames import find_pictures, hardest, suspicious, tail_positions
from affcache.reporting.page import inline_figure
from affcache.scoring.figures import score_figures
from affcache.scoring.predict import TrainedRun
from affcache.scoring.score import Scored
from affcache.tasks.annotations import JoinedLabels
from affcache.tasks.metrics import Scores
from affcache.tasks.tasks import Task


@dataclass(frozen=True)
class ReportContext:
    """What the panels of a report draw on. Frames are named by their position among the n of the split."""

    run: TrainedRun
    split: str
    joined: JoinedLabels
    scored: Scored
    scores: Scores  # with intervals
    losses: npt.NDArray[np.float64]  # (n,) the mean of a frame's units or values where it has several
    crops: tuple[Path, ...]

    @property
    def task(self) -> Task:
        """What was predicted."""
        return self.run.task

    @property
    def said(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
        """Labels, (n,) class indices or (n, C); what was decided, likewise; and probabilities (n, C)."""
        return self.joined.labels, self.scored.decided, self.scored.probabilities

    @cached_property
    def frame_names(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        """The video of the store (n,) that each frame is of, and its number (n,) there."""
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
        """Data URIs of the crops of the frames to show, where they are found."""
        return find_pictures(self.crops, self.scored.predictions, [*self.hardest, *self.suspicious])

    @cached_property
    def figures(self) -> dict[str, str]:
        """The figures of ``score --figures``, by name, as elements of the page."""
        with drawing():
            drawn = score_figures(self.task, self.scores, *self.said, self.run.folder.read_history())
            return {name: inline_figure(figure) for name, figure in drawn.items()}
