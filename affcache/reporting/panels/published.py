"""Published figures of Aff-Wild2 beside the run's own."""

from affcache.files import shipped
from affcache.progress import metric_name
from affcache.reporting.frames import ReportContext
from affcache.reporting.page import table
from affcache.settings import read_toml

AFF_WILD2 = 100_000  # frames; its validation sets have three to four times as many, and figures of others mislead
WORDS = (
    "<p>On the validation set of Aff-Wild2. They say nothing about a run on other data: compare them with this one "
    "only if it was trained and scored on the same labels and frames. Test-set figures lie 0.03 to 0.15 lower.</p>"
)


def published_figures(context: ReportContext) -> str | None:
    """Return published figures with how each is known, the run's own among them, where they may be of the same data."""
    with shipped("published.toml") as path:
        entries = read_toml(path).get(context.task.name)
    if not entries or context.split != "validation" or len(context.joined) < AFF_WILD2:
        return None
    known = [(one["value"], one["method"], "yes" if one["frame_by_frame"] else "no", one["known"]) for one in entries]
    known.append((context.scored.scores.value, "this run, on its own data", "", "measured here"))
    rows = [[method, f"{value:.3f}", *rest] for value, method, *rest in sorted(known, key=lambda row: row[0])]
    return WORDS + table(["method", metric_name(context.task.metric), "frame by frame", "how known"], rows)
