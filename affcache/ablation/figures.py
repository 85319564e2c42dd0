"""Pictures of an ablation: the metric against each varied setting, a heat map for two, points for named settings."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from affcache.ablation.grid import Grid, stores_text
from affcache.ablation.summary import Summary
from affcache.figures import drawing, save_figures, single_axes
from affcache.progress import metric_name
from affcache.settings import as_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LINES = 6  # one for each value of the other axis; with more, the mean over them is drawn
GREY = "#777777"


@drawing()
def write_figures(folder: Path, grid: Grid, rows: Sequence[Summary]) -> list[Path]:
    """Write a picture for each varied setting, a heat map where there are two, or one of all named settings.

    Bands and bars reach one standard deviation over seeds to either side.
    """
    drawn: dict[str, Figure] = {}
    for task in dict.fromkeys(row.task for row in rows):
        of = [row for row in rows if row.task == task and row.mean is not None]
        prefix = f"{task}-" if len({row.task for row in rows}) > 1 else ""
        axes = {name: values for name, values in axes_of(grid).items() if name != "task"}
        if not of:
            continue
        for name in axes:
            drawn[f"{prefix}{name}"] = _curves(of, name, [other for other in axes if other != name], axes)
        if len(axes) == 2:
            drawn[f"{prefix}heatmap"] = _heatmap(of, axes)
        if not axes:
            drawn[f"{prefix}settings"] = _points(of)
    return save_figures(folder, drawn)


def axes_of(grid: Grid) -> Mapping[str, Sequence[Any]]:
    """Return what a grid varies freely and the values: of --vary, of a preset of one setting, and the stores."""
    if any(name for name, _ in grid.named) and len(grid.named) > 1:
        return {}
    of_preset = {name: [of[name] for _, of in grid.named] for name in grid.named[0][1] if len(grid.named) > 1}
    return {**of_preset, **grid.axes, **({"store": grid.stores} if len(grid.stores) > 1 else {})}


def _value(row: Summary, name: str) -> Any:
    return row.variant.store if name == "store" else row.variant.values[name]


def _words(value: Any) -> str:
    return stores_text(value, short=True) if isinstance(value, tuple) else as_text(value)


def _curves(rows: Sequence[Summary], name: str, others: Sequence[str], axes: Mapping[str, Sequence[Any]]) -> "Figure":
    """Draw the metric against one setting: a line for each value of the other one, or the mean over all others."""
    figure, axis = single_axes()
    values = sorted(axes[name]) if all(isinstance(v, int | float) for v in axes[name]) else list(axes[name])
    positions = _positions(axis, name, values)
    lines = [(None, rows)]
    if len(others) == 1 and len(axes[others[0]]) <= MOST_LINES:
        lines = [(value, [row for row in rows if _value(row, others[0]) == value]) for value in axes[others[0]]]
    for level, of_level in lines:
        groups = [[row for row in of_level if _value(row, name) == value] for value in values]
        at = [position for position, group in zip(positions, groups, strict=True) if group]
        means = np.array([statistics.fmean(row.mean or 0.0 for row in group) for group in groups if group])
        deviations = np.array([statistics.fmean(row.deviation or 0.0 for row in group) for group in groups if group])
        label = None if level is None else f"{others[0]} {_words(level)}"
        (line,) = axis.plot(at, means, marker="o", markersize=4, label=label)
        axis.fill_between(at, means - deviations, means + deviations, color=line.get_color(), alpha=0.18, linewidth=0)
    if any(level is not None for level, _ in lines):
        axis.legend(frameon=False)
    elif others:
        axis.set_title(f"mean over {', '.join(others)}", fontsize="medium", color=GREY)
    axis.set_xlabel(name)
    axis.set_ylabel(_metric(rows))
    return figure


def _positions(axis: "Axes", name: str, values: Sequence[Any]) -> list[float]:
    """Return where values stand on the axis: numbers that span decades and all else side by side."""
    numbers = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    spread = max(numbers, default=0) / min((n for n in numbers if n > 0), default=1)
    if len(numbers) == len(values) and spread <= 20:
        return numbers
    axis.set_xticks(range(len(values)), [_words(value) for value in values])
    return [float(position) for position in range(len(values))]


def _heatmap(rows: Sequence[Summary], axes: Mapping[str, Sequence[Any]]) -> "Figure":
    """Draw the mean of the metric for two settings."""
    across, down = axes
    figure, axis = single_axes()
    means = {(_value(row, down), _value(row, across)): row.mean for row in rows}
    table = np.array([[means.get((v, h), np.nan) for h in axes[across]] for v in axes[down]], np.float64)
    image = axis.imshow(table, cmap="viridis", aspect="auto")
    middle = statistics.fmean(image.get_clim())
    for (y, x), value in np.ndenumerate(table):
        if not np.isnan(value):
            axis.text(x, y, f"{value:.3f}", ha="center", va="center", color="white" if value < middle else "black")
    for side, name in ((axis.xaxis, across), (axis.yaxis, down)):
        side.set_ticks(range(len(axes[name])), [_words(value) for value in axes[name]])
        side.set_label_text(name)
    figure.colorbar(image, ax=axis, label=_metric(rows))
    return figure


def _points(rows: Sequence[Summary]) -> "Figure":
    """Draw the metric of named settings, the first on top."""
    figure, axis = single_axes(height=1.2 + 0.3 * len(rows))
    positions = list(range(len(rows)))
    means = [row.mean if row.mean is not None else float("nan") for row in rows]
    axis.errorbar(means, positions, xerr=[row.deviation or 0.0 for row in rows], fmt="o", markersize=5, capsize=3)
    axis.set_yticks(positions, [row.variant.name for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel(_metric(rows))
    return figure


def _metric(rows: Sequence[Summary]) -> str:
    metric = rows[0].metric
    counts = {row.count for row in rows}
    where = f"of {rows[0].folds} folds" if rows[0].folds else "on validation"
    return f"{metric_name(metric)} {where}, {'/'.join(map(str, sorted(counts)))} seed{'' if counts == {1} else 's'}"
