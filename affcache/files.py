"""Figures as files: PNG and SVG, the same for the same content."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

FORMATS = ("png", "svg")


def single_axes(width: float = 4.8, height: float = 3.2) -> tuple[Figure, Axes]:
    """Return a figure of so many inches with one pair of axes, without the upper and the right line."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figures(folder: Path, figures: Mapping[str, Figure]) -> list[Path]:
    """Write figures by their names, in every format; make the folder if need be, and return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{form}" for name in figures for form in FORMATS]
    with rc_context({"svg.hashsalt": "affcache"}):  # and no date: the same content gives the same file
        for path in paths:
            metadata = {"Date": None} if path.suffix == ".svg" else {}
            figures[path.stem].savefig(path, dpi=200, metadata=metadata)
    return paths
