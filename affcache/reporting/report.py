"""A report as a whole: a run scored, its panels asked in order, and one HTML file written."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from affcache.files import write_text
from affcache.progress import Listener, Result
from affcache.reporting.frames import ReportContext
from affcache.reporting.page import page
from affcache.reporting.panels import PANELS
from affcache.reporting.panels.run import headline
from affcache.reporting.settings import ReportSettings
from affcache.scoring.score import open_split, score_frames
from affcache.settings import command


@dataclass(frozen=True)
class ReportResult(Result):
    """What a report shows."""

    out: str
    bytes: int
    level: str  # what is shown: frames or whole videos
    frames: int  # or videos: how many of these
    hardest: int
    suspicious: int
    pictures: int  # of these whose crop was found


@command(ReportSettings)
def report(settings: ReportSettings, listener: Listener) -> ReportResult:
    """Write a run's report: one HTML file that opens from disk, without a network.

    Raises:
        InputError: no run, or labels that can't be read or that join to no crop.
        StoreError: the store has changed since the run, is of another encoder, incomplete or damaged.
        ConfigError: rules are to be fitted, but nothing was held out of the training.
    """
    runs, annotations, joined = open_split(settings, [settings.run] if settings.run else [], listener)
    run = runs.first
    scored = score_frames(settings, runs, annotations, joined, listener)
    losses = scored.losses.numpy().reshape(len(joined), -1).mean(axis=1, dtype=np.float64)
    context = ReportContext(run, settings.split, joined, scored, losses, settings.crops)
    if not context.pictures and run.task.level == "frame":
        looked = ", ".join(f"{root}{'' if root.exists() else ' (not there)'}" for root in settings.crops)
        words = f"No crops were found to show beside the frames; looked in {looked or 'no folder'}."
        listener.warning(f"{words} Say where they are with --crops DIR.")
    said = {heading: html for heading, panel in PANELS.items() if (html := panel(context))}
    sections = {heading.replace("frame", run.task.level): html for heading, html in said.items()}
    out = settings.out or run.out.path / "report.html"
    write_text(out, page(f"{run.task.name}: {Path(run.source).name}", headline(context), sections))
    return ReportResult(
        out=str(out),
        bytes=out.stat().st_size,
        level=run.task.level,
        frames=len(joined),
        hardest=len(context.hardest),
        suspicious=len(context.suspicious),
        pictures=len(context.pictures),
    )
