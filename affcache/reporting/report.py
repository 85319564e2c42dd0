"""A report as a whole: a run scored, its panels asked in order, and one HTML file written."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from affcache.files import write_text
from affcache.progress import Listener, Result
from affcache.reporting.frames import ReportContext, crops_below
from affcache.reporting.page import Part, page
from affcache.reporting.panels import OF_RUN, PANELS
from affcache.reporting.panels.run import headline, headline_of_all
from affcache.reporting.settings import ReportSettings
from affcache.scoring.ensemble import Ensemble, open_runs
from affcache.scoring.together import frames_of_all, score_each, scores_of_all, whole_of
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
    runs = open_runs([settings.run] if settings.run else [], settings.store, settings.device, listener)
    run, ensembles = runs[0], Ensemble.of_each_task(runs, listener)
    whole, each = whole_of(ensembles), score_each(settings, runs, ensembles, listener)
    crops = crops_below(settings.crops)
    contexts = [ReportContext(one.runs[0], settings.split, one, crops) for one in each]
    if whole.level == "frame" and not any(context.pictures for context in contexts):
        looked = ", ".join(f"{root}{'' if root.exists() else ' (not there)'}" for root in settings.crops)
        words = f"No crops were found to show beside the frames; looked in {looked or 'no folder'}."
        listener.warning(f"{words} Say where they are with --crops DIR.")
    if whole.parts:
        lead = headline_of_all(run, scores_of_all(whole, each), settings.split, frames_of_all(each))
        of_task = [name for name in PANELS if name not in OF_RUN]
        parts = [Part(_sections(one, of_task), one.task.name, headline(one)) for one in contexts]
        parts.append(Part(_sections(contexts[0], OF_RUN)))
    else:
        lead, parts = headline(contexts[0]), [Part(_sections(contexts[0], PANELS))]
    out = settings.out or run.out.path / "report.html"
    write_text(out, page(f"{whole.name}: {Path(run.source).name}", lead, parts))
    return ReportResult(
        out=str(out),
        bytes=out.stat().st_size,
        level=whole.level,
        frames=frames_of_all(each),
        hardest=sum(len(context.hardest) for context in contexts),
        suspicious=sum(len(context.suspicious) for context in contexts),
        pictures=sum(len(context.pictures) for context in contexts),
    )


def _sections(context: ReportContext, headings: Iterable[str]) -> dict[str, str]:
    """Return what some of the panels show, by their headings."""
    level = context.task.level  # of whole videos, headings are of these
    return {heading.replace("frame", level): html for heading in headings if (html := PANELS[heading](context))}
