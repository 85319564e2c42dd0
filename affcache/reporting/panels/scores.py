"""Scores of each class, and the figures: those of the decisions beside them, all others among the curves."""

from affcache.reporting.frames import ReportContext
from affcache.reporting.page import charts, table

OF_DECISIONS = ("classes", "confusion")


def scores(context: ReportContext) -> str:
    """Return the table of classes, and what was decided in figures."""
    classes = context.scored.scores.classes
    columns = list(classes[0].values)
    rows = [
        [
            one.name,
            *(f"{one.values[column]:.3f}" for column in columns),
            "{:.3f} to {:.3f}".format(*one.interval) if one.interval else "",
            f"{one.support:,}",
        ]
        for one in classes
    ]
    figures = (context.figures[name] for name in OF_DECISIONS if name in context.figures)
    return table(["class", *columns, "95 %", f"{context.task.level}s"], rows) + charts(figures)


def curves(context: ReportContext) -> str | None:
    """Return learning curves, precision against recall, and reliability, as far as the task has them."""
    figures = [figure for name, figure in context.figures.items() if name not in OF_DECISIONS]
    return charts(figures) if figures else None
