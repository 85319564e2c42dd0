"""The report's page: sections of HTML around what was found. Every name goes through escaping; nothing is fetched."""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING

from affcache.figures import drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TIMELINE = '<canvas class="timeline"'  # what the script draws
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclass(frozen=True)
class Part:
    """Sections that belong together: a timeline, and the frames that are shown there."""

    sections: Mapping[str, str]  # HTML by heading
    name: str = ""  # of the part, where a page has several
    lead: str = ""  # HTML before its sections

    def id_of(self, heading: str) -> str:
        """Return what links name a section by."""
        return re.sub(r"\W+", "-", f"{self.name} {heading}".strip().lower()) + "-section"

    def links(self) -> str:
        """Return the contents."""
        items = [f'<li><a href="#{self.id_of(heading)}">{escape(heading)}</a></li>' for heading in self.sections]
        return f"<ul>{f'<li>{escape(self.name)}:</li>' if self.name else ''}{''.join(items)}</ul>"

    def html(self) -> str:
        """Return the part."""
        level = "h3" if self.name else "h2"
        head = f"<h2>{escape(self.name)}</h2>{self.lead}" if self.name else self.lead
        body = "".join(
            f'<section id="{self.id_of(heading)}"><{level}>{escape(heading)}</{level}>{html}</section>'
            for heading, html in self.sections.items()
        )
        return f"<article>{head}{body}</article>"


def page(title: str, lead: str, parts: Sequence[Part]) -> str:
    """Return the whole page.

    Args:
        title: of the report.
        lead: HTML before the contents.
        parts: of it.
    """
    own = files("affcache.reporting")
    style, script = ((own / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    links, body = ("".join(of) for of in ((part.links() for part in parts), (part.html() for part in parts)))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>"
        f'<h1>{escape(title)}</h1>{lead}<nav aria-label="Contents">{links}</nav><main>{body}</main>'
        f"{f'<script>{script}</script>' if TIMELINE in body else ''}</body></html>\n"
    )


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of text; what is given is escaped."""
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = "".join(f"<tr>{''.join(_cell(cell) for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(text: str) -> str:
    kind = "" if text.lstrip("-")[:1].isdigit() else ' class="text"'
    return f"<td{kind}>{escape(text)}</td>"


def charts(figures: Iterable[str]) -> str:
    """Return figures side by side, as many as fit."""
    return f'<div class="charts">{"".join(figures)}</div>'


def inline_figure(figure: "Figure", task: str) -> str:
    """Return a figure as SVG in the page's font and colours, black in that of text, with its label as the caption.

    Its ids are no other figure's: captions differ among those of a task.
    """
    file, caption = io.StringIO(), escape(str(figure.get_label()))
    with drawing({"svg.fonttype": "none", "font.sans-serif": "DejaVu Sans", "svg.hashsalt": f"{task} {caption}"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    drawn = file.getvalue()
    drawn = drawn[drawn.index('<g id="figure_1">') : drawn.rindex("</svg>")]  # without namespaces and metadata
    drawn = re.sub(r' id="[\w.]+_\d{1,4}"', "", drawn)  # of groups, which recur in the next figure
    drawn = drawn.replace("#000000", "currentColor")
    width, height = 72 * figure.get_size_inches()
    return (
        f'<figure><svg viewBox="0 0 {width:g} {height:g}" style="min-width:{0.75 * width:.0f}px" role="group" '
        f'aria-label="{caption}">{drawn}</svg><figcaption>{caption}</figcaption></figure>'
    )
