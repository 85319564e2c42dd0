"""Frames worth a look, each a button that shows the timeline there: the hardest, and those of doubtful labels.

Where whole videos were scored, these: rows of a table.
"""

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from affcache.progress import counted
from affcache.reporting.frames import ReportContext, classes_of
from affcache.reporting.page import table
from affcache.tasks.task import Task


def hardest_frames(context: ReportContext) -> str:
    """Return frames of CVaR's tail, to be filtered by their labels."""
    shown = context.hardest
    if context.task.level == "video":
        return _videos(context, shown)
    return (
        f"<p>CVaR at the run's alpha {context.run.settings.alpha:g} is the mean loss of the hardest "
        f"{counted(len(context.tail), 'frame')}. Shown are {len(shown)} of them, so many of each label that all can be "
        "looked at, the hardest first. A click shows the timeline there.</p>"
        + _class_filter(context.task, len(shown))
        + _buttons(context, "hardest", shown)
    )


def suspicious_frames(context: ReportContext) -> str | None:
    """Return frames whose labels may be wrong."""
    if not context.suspicious:
        return None
    words = "The head is sure of something else here than the label: look before you trust either."
    of_videos = context.task.level == "video"
    shown = _videos(context, context.suspicious) if of_videos else _buttons(context, "suspicious", context.suspicious)
    return f"<p>{words}</p>{shown}"


def _videos(context: ReportContext, positions: Sequence[int]) -> str:
    """Return videos with what is labelled, decided and lost there."""
    task, (labels, decided, _) = context.task, context.said
    videos, _ = context.frame_names
    rows = [
        [
            context.video_names[videos[one]],
            *(_said(task, of[one]) for of in (labels, decided)),
            f"{context.losses[one]:.2f}",
        ]
        for one in positions
    ]
    return table(["video", "label", "decided", "loss"], rows)


def _class_filter(task: Task, count: int) -> str:
    names = task.classes if task.exclusive or not task.has_classes else (*task.classes, "none")
    options = "".join(f'<option value="{escape(name)}">{escape(name)}</option>' for name in names)
    frames = counted(count, "frame")
    return (
        '<p class="tools"><label>Label <select class="filter"><option value="">all</option>'
        f'{options}</select></label><span class="shown" role="status">{frames}</span></p>'
    )


def _buttons(context: ReportContext, name: str, positions: Sequence[int]) -> str:
    return f'<div class="crops {name}">{"".join(_button(context, position) for position in positions)}</div>'


def _button(context: ReportContext, position: int) -> str:
    task, (labels, decided, probabilities) = context.task, context.said
    videos, numbers = context.frame_names
    video = context.video_names[videos[position]]
    sure = f" ({probabilities[position, decided[position]]:.0%})" if task.exclusive else ""
    picture = context.pictures.get(position)
    image = f'<img src="{picture}" alt="" loading="lazy">' if picture else ""
    classes = escape("|".join(classes_of(task, labels[position])))
    return (
        f'<button type="button" data-position="{position}" data-classes="{classes}">{image}'
        f"<b>{_words(task, labels[position])}</b><br>decided {_words(task, decided[position])}{sure}<br>"
        f"loss {context.losses[position]:.2f}<br>{escape(video)}, {numbers[position]}</button>"
    )


def _words(task: Task, label: Any) -> str:
    """Return what a label says, as HTML."""
    return escape(_said(task, label))


def _said(task: Task, label: Any) -> str:
    if not task.has_classes:
        return ", ".join("-" if np.isnan(value) else f"{value:.2f}" for value in label)
    gaps = 0 if task.exclusive else int((label < 0).sum())
    return ", ".join(classes_of(task, label)) + (f"; {gaps} not labelled" if gaps else "")
