"""The report's page: sections of HTML around what was found. Every name goes through escaping; nothing is fetched."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np
import numpy.typing as npt

from affcache.progress import metric_name
from affcache.reporting.frames import ShownFrame
from affcache.tasks.metrics import Scores

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
CONTENTS = {
    "scores": "Scores",
    "published": "Published figures",
    "curves": "Curves",
    "timelines": "Timelines",
    "hardest": "Hardest frames",
    "suspicious": "Labels that may be wrong",
    "settings": "Settings",
}


def page(title: str, sections: Mapping[str, str], frames: Mapping[str, Any]) -> str:
    """Return the whole page.

    Args:
        title: of the report.
        sections: by name, in the order of ``CONTENTS``; empty ones are left out. "" comes first, without a heading.
        frames: what the script draws the timelines from.
    """
    own = files("affcache.reporting")
    shown = {name: heading for name, heading in CONTENTS.items() if sections.get(name)}
    links = "".join(f'<li><a href="#{name}-section">{heading}</a></li>' for name, heading in shown.items())
    body = "".join(
        f'<section id="{name}-section"><h2>{heading}</h2>{sections[name]}</section>' for name, heading in shown.items()
    )
    data = json.dumps(frames).replace("<", "\\u003c")  # nothing in it can end the element it stands in
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{(own / 'page.css').read_text(encoding='utf-8')}</style></head><body>"
        f'<h1>{escape(title)}</h1>{sections[""]}<nav aria-label="Contents"><ul>{links}</ul></nav><main>{body}</main>'
        f'<script type="application/json" id="frames">{data}</script>'
        f"<script>{(own / 'page.js').read_text(encoding='utf-8')}</script></body></html>\n"
    )


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """Return a table of text; what is given is escaped."""
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = "".join(f"<tr>{''.join(_cell(cell) for cell in row)}</tr>" for row in rows)
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="scroll"><table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(text: str) -> str:
    kind = "" if text[:1].isdigit() else ' class="text"'
    return f"<td{kind}>{escape(text)}</td>"


def score_section(scores: Scores) -> str:
    """Return the table of classes, with a bar for the value that the metric averages."""
    columns = list(scores.classes[0].values)
    name = scores.metric.rpartition("_")[2]
    rows = []
    for one in scores.classes:
        values = "".join(f"<td>{one.values[column]:.3f}</td>" for column in columns)
        span = "{:.3f} to {:.3f}".format(*one.interval) if one.interval else ""
        bar = f'<span class="bar" style="width:{max(0.0, one.values[name]) * 8:.2f}rem"></span>'
        rows.append(
            f"<tr><td>{escape(one.name)}</td>{values}<td>{span}</td><td>{one.support:,}</td>"
            f'<td class="text">{bar}</td></tr>'
        )
    heads = "".join(f'<th scope="col">{h}</th>' for h in ["class", *columns, "95 %", "frames", metric_name(name)])
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def confusion_section(counts: npt.NDArray[np.int64], names: Sequence[str]) -> str:
    """Return the confusion matrix as a table, shaded by the share of each label's frames."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    rows = []
    for name, line, share in zip(names, counts, shares, strict=True):
        cells = "".join(
            f'<td style="background:rgb(59 125 221 / {part:.2f})">{count:,}</td>'
            for count, part in zip(line, share, strict=True)
        )
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in ["label \\ decided", *names])
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def crop_grid(name: str, frames: Sequence[ShownFrame], pictures: Mapping[int, str]) -> str:
    """Return a grid of buttons, a frame each; a click shows the timeline there."""
    buttons = []
    for frame in frames:
        picture = pictures.get(frame.position)
        image = f'<img src="{picture}" alt="" loading="lazy">' if picture else ""
        sure = "" if frame.confidence is None else f" ({frame.confidence:.0%})"
        words = (
            f"<b>{escape(frame.label)}</b><br>decided {escape(frame.decided)}{sure}<br>loss {frame.loss:.2f}<br>"
            f"{escape(frame.video)}, {frame.frame_number}"
        )
        classes = escape("|".join(frame.classes), quote=True)
        buttons.append(
            f'<button type="button" data-position="{frame.position}" data-classes="{classes}">{image}{words}</button>'
        )
    return f'<div class="crops" id="{name}">{"".join(buttons)}</div>'


def class_filter(classes: Sequence[str], count: int) -> str:
    """Return the choice of a class for the hardest frames."""
    options = "".join(f'<option value="{escape(name, quote=True)}">{escape(name)}</option>' for name in classes)
    return (
        '<p class="tools"><label for="class">Label</label><select id="class"><option value="">all</option>'
        f'{options}</select><span id="shown" role="status">{count} frames</span></p>'
    )


TIMELINES = (
    '<p class="tools"><label for="video">Video</label><select id="video"></select>'
    '<button type="button" id="back" aria-label="back">◀</button>'
    '<button type="button" id="on" aria-label="on">▶</button>'
    '<button type="button" id="in" aria-label="zoom in">+</button>'
    '<button type="button" id="out" aria-label="zoom out">−</button>'
    '<input type="range" id="position" aria-label="first frame shown"></p>'
    '<canvas id="timeline" tabindex="0" role="img" aria-label="Timeline of the chosen video. Arrow keys step from '
    'frame to frame, plus and minus zoom, page keys scroll; what a frame says is read out below."></canvas>'
    '<p id="readout" role="status">Click the timeline, or focus it and use the arrow keys.</p>'
)
