"""Frames worth a look, each a button that shows the timeline there: the hardest, and those of doubtful labels."""

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from affcache.progress import counted
from affcache.reporting.frames import ReportContext, classes_of
from affcache.tasks.kinds import Task


def hardest_frames(context: ReportContext) -> str:
    """Return frames of CVaR's tail, to be filtered by their labels."""
    shown = context.hardest
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
    words = "Frames where the head is sure of something else than the label: look before you trust either."
    return f"<p>{words}</p>" + _buttons(context, "suspicious", context.suspicious)


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
    if not task.has_classes:
        return escape(", ".join("-" if np.isnan(value) else f"{value:.2f}" for value in label))
    gaps = 0 if task.exclusive else int((label < 0).sum())
    return escape(", ".join(classes_of(task, label)) + (f"; {gaps} not labelled" if gaps else ""))
