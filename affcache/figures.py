"""Figures with matplotlib, whatever its user has configured; it is imported where it is needed."""

import io
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affcache.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")


@contextmanager
def drawing(options: dict[Any, Any] | None = None) -> Iterator[None]:
    """Draw with matplotlib's own defaults: neither MPLBACKEND nor a matplotlibrc has a say. Decorates functions, too.

    Args:
        options: of matplotlib's rcParams, beside the defaults.
    """
    # nor does it load at an MPLBACKEND that isn't installed, such as a notebook's
    backend = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
    from matplotlib import rc_context, rcdefaults, rcParams

    if backend is not None:
        os.environ["MPLBACKEND"] = backend
        with suppress(ValueError):
            rcParams["backend"] = backend
    with rc_context():
        rcdefaults()
        # the same content gives the same file, and a $ in a name is a $
        rcParams.update({"svg.hashsalt": "affcache", "text.parse_math": False, **(options or {})})
        yield


def single_axes(width: float = 4.8, height: float = 3.2) -> "tuple[Figure, Axes]":
    """Return a figure of so many inches with one pair of axes, without the upper and the right line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figures(folder: Path, figures: "Mapping[str, Figure]") -> list[Path]:
    """Write figures by their names, in every format, and return the files.

    To be called within ``drawing``, in which the figures were drawn.
    """
    paths = [folder / f"{name}.{form}" for name in figures for form in FORMATS]
    for path in paths:
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        drawn = io.BytesIO()
        figures[path.stem].savefig(drawn, format=path.suffix[1:], dpi=200, metadata=metadata)
        write_bytes(path, drawn.getvalue())
    return paths
