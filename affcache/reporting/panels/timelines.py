"""All frames of every video: probabilities, labels and decisions, drawn by ``page.js`` from one element of JSON."""

import base64
import json
from typing import Any

import numpy as np
import numpy.typing as npt

from affcache.reporting.frames import ReportContext
from affcache.scoring.figures import PALETTE

TOOLS = (
    '<p class="tools"><label for="video">Video</label><select id="video"></select>'
    '<button type="button" id="back" aria-label="back">◀</button>'
    '<button type="button" id="on" aria-label="on">▶</button>'
    '<button type="button" id="in" aria-label="zoom in">+</button>'
    '<button type="button" id="out" aria-label="zoom out">−</button>'
    '<input type="range" id="position" aria-label="first frame shown"></p>'
)
LABEL = (
    "Timeline of the chosen video. Arrow keys step from frame to frame, plus and minus zoom, page keys scroll; what a "
    "frame says is read out below."
)


def timelines(context: ReportContext) -> str:
    """Return the timeline of a chosen video, with the frames of all."""
    task, outputs = context.task, context.task.outputs
    words = "The stronger a colour, the larger the probability; the line below a row is the label."
    if not task.has_classes:
        low, high = task.valid_range
        words = f"Coloured: the outputs; plain: the labels; from {low:g} at the bottom to {high:g}."
    height = max(min(10 * outputs, 20), 1.6 * outputs)
    data = json.dumps(all_frames(context)).replace("<", "\\u003c")  # nothing in it can end the element it stands in
    return (
        f'{TOOLS}<canvas id="timeline" tabindex="0" role="img" style="height:{height:g}rem" aria-label="{LABEL}">'
        '</canvas><p id="readout" role="status">Click the timeline, or focus it and use the arrow keys.</p>'
        f'<p>{words}</p><script type="application/json" id="frames">{data}</script>'
    )


def all_frames(context: ReportContext) -> dict[str, Any]:
    """Return all frames in bytes: probabilities in 255ths, values in 255ths of the task's range, and labels.

    Each array is base64 of little-endian bytes: ``numbers`` int32 (n,), ``probabilities`` uint8 (n, C), ``labels`` and
    ``decided`` uint8 (n,) for classes, else (n, C).
    """
    task, (labels, decided, probabilities) = context.task, context.said
    videos, numbers = context.frame_names
    names = context.run.store.video_names
    low, high = (0, 1) if task.has_classes else task.valid_range

    def plain(values: npt.NDArray[Any]) -> str:
        return _base64(values.astype(np.uint8)) if task.has_classes else _in_255ths(values, low, high)

    found, starts, counts = np.unique(videos, return_index=True, return_counts=True)
    return {
        "kind": task.kind,
        "range": task.valid_range,
        "classes": task.classes,
        "colours": PALETTE,
        "videos": [
            {"name": names[video], "start": int(start), "count": int(count)}
            for video, start, count in zip(found, starts, counts, strict=True)
        ],
        "numbers": _base64(numbers.astype("<i4")),
        "probabilities": _in_255ths(probabilities, low, high),
        "labels": plain(labels),
        "decided": plain(decided),
    }


def _in_255ths(values: npt.NDArray[Any], low: float, high: float) -> str:
    return _base64(np.rint(np.clip((values - low) / (high - low), 0, 1) * 255).astype(np.uint8))


def _base64(values: npt.NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()
