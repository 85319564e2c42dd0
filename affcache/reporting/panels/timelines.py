"""All frames of every video: probabilities, labels and decisions, drawn by ``page.js`` from one element of JSON."""

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from affcache.reporting.frames import ReportContext
from affcache.scoring.figures import PALETTE
from affcache.tasks.task import Task

TOOLS = (
    '<p class="tools"><label>Video <select class="video"></select></label><select class="task" '
    'aria-label="task"></select><button type="button" class="back" aria-label="back">◀</button>'
    '<button type="button" class="on" aria-label="on">▶</button>'
    '<button type="button" class="in" aria-label="zoom in">+</button>'
    '<button type="button" class="out" aria-label="zoom out">−</button>'
    '<input type="range" class="position" aria-label="first frame shown"></p>'
)
LABEL = (
    "Timeline of the chosen video. Arrow keys step from frame to frame, plus and minus zoom, page keys scroll; what a "
    "frame says is read out below."
)


@dataclass(frozen=True)
class TaskFrames:
    """What is said of n frames for one task."""

    task: Task
    probabilities: npt.NDArray[Any]  # (n, C)
    decided: npt.NDArray[Any]  # (n,) class indices, or (n, C)
    labels: npt.NDArray[Any] | None  # likewise, -1 or nan where one is missing; None where there are none


@dataclass(frozen=True)
class TimelineFrames:
    """n frames, those of a video side by side and in order, and what is said of them."""

    names: Sequence[str]  # of the videos
    videos: npt.NDArray[np.int64]  # (n,) an index into ``names``, rising
    numbers: npt.NDArray[Any]  # int (n,) of the frames, rising within a video
    tasks: Sequence[TaskFrames]
    seconds: npt.NDArray[np.float64] | None = None  # (n,) when they are shown; nan where that isn't known


def timelines(context: ReportContext) -> str | None:
    """Return the timeline of a chosen video, with the frames of all; None where whole videos were scored."""
    if context.task.level == "video":
        return None
    labels, decided, probabilities = context.said
    videos, numbers = context.frame_names
    said = TaskFrames(context.task, probabilities, decided, labels)
    return timeline(TimelineFrames(context.video_names, videos, numbers, [said]))


def timeline(frames: TimelineFrames) -> str:
    """Return the timeline of a chosen video and task, with all frames."""
    labelled = any(one.labels is not None for one in frames.tasks)
    words = []
    if any(one.task.has_classes for one in frames.tasks):
        line = "; the line below a row is the label." if labelled else "; the line below a row is what was decided."
        words.append(f"The stronger a colour, the larger the probability{line}")
    for task in [one.task for one in frames.tasks if not one.task.has_classes]:
        low, high = task.valid_range
        plain = "; plain: the labels" if labelled else ""
        words.append(f"Coloured: the outputs of {task.name}{plain}; from {low:g} at the bottom to {high:g}.")
    data = json.dumps(all_frames(frames)).replace("<", "\\u003c")  # nothing in it can end the element it stands in
    return (
        f'{TOOLS}<canvas class="timeline" tabindex="0" role="img" aria-label="{LABEL}"></canvas>'
        '<p class="readout" role="status">Click the timeline, or focus it and use the arrow keys.</p>'
        f'<p>{" ".join(words)}</p><script type="application/json" class="frames">{data}</script>'
    )


def all_frames(frames: TimelineFrames) -> dict[str, Any]:
    """Return all frames in bytes: probabilities in 255ths, values in 255ths of the task's range, and labels.

    Each array is base64 of little-endian bytes: ``numbers`` int32 (n,), ``seconds`` float64 (n,), and of each task
    ``probabilities`` uint8 (n, C), ``labels`` and ``decided`` uint8 (n,) for classes, else (n, C), and ``labelled``
    in their shape, which is 0 where a label is missing and null where none is.
    """
    found, starts, counts = np.unique(frames.videos, return_index=True, return_counts=True)
    return {
        "colours": PALETTE,
        "videos": [
            {"name": frames.names[video], "start": int(start), "count": int(count)}
            for video, start, count in zip(found, starts, counts, strict=True)
        ],
        "numbers": _base64(frames.numbers.astype("<i4")),
        "seconds": None if frames.seconds is None else _base64(frames.seconds.astype("<f8")),
        "tasks": [_of_task(one) for one in frames.tasks],
    }


def _of_task(said: TaskFrames) -> dict[str, Any]:
    task = said.task
    low, high = (0, 1) if task.has_classes else task.valid_range

    def plain(values: npt.NDArray[Any]) -> str:
        return _base64(values.astype(np.uint8)) if task.has_classes else _in_255ths(values, low, high)

    return {
        "name": task.name,
        "kind": task.kind,
        "range": task.valid_range,
        "classes": task.classes,
        "probabilities": _in_255ths(said.probabilities, low, high),
        **_of_labels(said, plain),
        "decided": plain(said.decided),
    }


def _of_labels(said: TaskFrames, plain: Callable[[npt.NDArray[Any]], str]) -> dict[str, str | None]:
    if said.labels is None:
        return {"labels": None, "labelled": None}
    labelled = said.task.labelled(said.labels)
    gaps = None if labelled.all() else _base64(labelled.astype(np.uint8))
    return {"labels": plain(np.where(labelled, said.labels, 0)), "labelled": gaps}


def _in_255ths(values: npt.NDArray[Any], low: float, high: float) -> str:
    return _base64(np.rint(np.clip((values - low) / (high - low), 0, 1) * 255).astype(np.uint8))


def _base64(values: npt.NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()
