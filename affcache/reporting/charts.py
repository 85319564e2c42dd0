"""Line charts as inline SVG that takes the page's colours, with a description for screen readers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 420, 260, 48, 36, 12, 10
MOST_POINTS = 160  # of a line; more can't be seen


@dataclass(frozen=True)
class Line:
    """One line of a chart, or points where ``dots`` is set."""

    name: str
    points: Sequence[tuple[float, float]]
    dots: bool = False
    dashed: bool = False


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    across: str,
    up: str,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
) -> str:
    """Return a figure element with a chart, its legend and a description.

    Args:
        lines: at least one, with points that are finite.
        title: says what is seen; also to those who can't.
        across, up: what the axes are.
        x_range, y_range: their ends; None for those of the data.
    """
    points = [point for line in lines for point in line.points]
    left, right = x_range or _range([x for x, _ in points])
    low, high = y_range or _range([y for _, y in points])

    def place(x: float, y: float) -> str:
        across_part = (x - left) / (right - left)
        up_part = (y - low) / (high - low)
        px = LEFT + across_part * (WIDTH - LEFT - RIGHT)
        py = HEIGHT - BOTTOM - up_part * (HEIGHT - BOTTOM - TOP)
        return f"{px:.1f},{py:.1f}"

    parts = [_axis(place, left, right, low, high)]
    for number, line in enumerate(lines):
        style = f'class="line line-{number % 12}"' + (' stroke-dasharray="4 4"' if line.dashed else "")
        thinned = list(line.points)[:: max(1, len(line.points) // MOST_POINTS)]
        if line.dots:
            for x, y in thinned:
                px, py = place(x, y).split(",")
                parts.append(f'<circle cx="{px}" cy="{py}" r="4" class="dot line-{number % 12}"/>')
        else:
            parts.append(f'<polyline points="{" ".join(place(x, y) for x, y in thinned)}" {style}/>')
    parts.append(f'<text x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(across)}</text>')
    parts.append(f'<text x="12" y="{HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 12 {HEIGHT / 2})">'
                 f"{escape(up)}</text>")  # fmt: skip
    names = "".join(f'<li class="line-{i % 12}">{escape(line.name)}</li>' for i, line in enumerate(lines) if line.name)
    legend = f'<ul class="legend">{names}</ul>' if names else ""
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
        f"{legend}<figcaption>{escape(title)}</figcaption></figure>"
    )


def _axis(place: Callable[[float, float], str], left: float, right: float, low: float, high: float) -> str:
    parts = []
    for step in range(5):
        x, y = left + (right - left) * step / 4, low + (high - low) * step / 4
        x = float(round(x)) if right - left >= 8 else x  # epochs are whole
        px, base = place(x, low).split(",")
        start, py = place(left, y).split(",")
        parts.append(f'<line x1="{start}" y1="{py}" x2="{WIDTH - RIGHT}" y2="{py}" class="grid"/>')
        parts.append(f'<text x="{float(start) - 4}" y="{float(py) + 4}" text-anchor="end">{y:.3g}</text>')
        parts.append(f'<text x="{px}" y="{float(base) + 14}" text-anchor="middle">{x:.3g}</text>')
    return "".join(parts)


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)
