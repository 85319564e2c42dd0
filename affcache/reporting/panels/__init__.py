"""The panels of a report: each a function from what the report knows to its HTML, None where it has nothing to say.

A further panel is a file here and a line in ``PANELS``; they are shown in this order, under these headings. Names that
a panel shows go through ``html.escape``, as ``page.table`` does; what it draws in ``scoring.figures`` is in
``context.figures``.
"""

from collections.abc import Callable

from affcache.reporting.frames import ReportContext
from affcache.reporting.panels.frames import hardest_frames, suspicious_frames
from affcache.reporting.panels.published import published_figures
from affcache.reporting.panels.run import run_settings, training
from affcache.reporting.panels.scores import curves, scores
from affcache.reporting.panels.timelines import timelines

PANELS: dict[str, Callable[[ReportContext], str | None]] = {
    "Scores": scores,
    "Published figures": published_figures,
    "Curves": curves,
    "Timelines": timelines,
    "Hardest frames": hardest_frames,
    "Labels that may be wrong": suspicious_frames,
    "Training": training,
    "Settings": run_settings,
}
OF_RUN = ("Training", "Settings")  # shown once, of a run of several tasks too
