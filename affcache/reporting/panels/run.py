"""What the run is: its metric with what has to be known of it, before all panels, and its settings, after them."""

import json
from html import escape

from affcache.progress import counted, metric_name
from affcache.reporting.frames import ReportContext
from affcache.scoring.intervals import without_interval
from affcache.tasks.metrics import Scores

FLATTERS = "The epoch was chosen on these {}: the score flatters a little."
NOTICE = '<p class="notice">{}</p>'


def headline(context: ReportContext) -> str:
    """Return the metric with its interval, and what has to be known of it."""
    run, scores, rule = context.run, context.scored.scores, context.scored.rule
    few = without_interval(run.task, context.scored.statistics)
    interval = "95 % {:.3f} to {:.3f}, over videos".format(*scores.interval) if scores.interval else "no interval"
    level, videos = run.task.level, counted(len(context.scored.statistics), "video")
    frames = counted(len(context.joined), f"{escape(context.split)} {level}") + f" of {videos}" * (level == "frame")
    words = [
        f'<p class="headline">{metric_name(scores.metric)} {scores.value:.3f} <small>{interval}</small></p>',
        f"<p>{escape(run.source)}, epoch {run.epoch}; {frames}.</p>",
    ]
    if few:
        words.append(NOTICE.format(f"No interval of {metric_name(scores.metric)}: {escape(few)}."))
    if of := scores.present:
        words.append(f"<p>Over the classes that some {level} has: {of.value:.3f}.</p>")
    if context.split == "validation":
        chosen = "" if run.settings.chosen_before else FLATTERS.format(f"{level}s")
        words += [NOTICE.format(said) for said in (run.settings.trained_on_validation or chosen,) if said]
    if rule.fitted_on:
        warning = f" <b>optimistic</b>: the {level}s that are scored are among them" if rule.optimistic else ""
        words.append(NOTICE.format(f"Decided by a rule fitted on {escape(rule.fitted_on)}{warning}."))
    return "".join(words)


def headline_of_all(scores: Scores) -> str:
    """Return the metric of several tasks at once, with its interval."""
    interval = "95 % {:.3f} to {:.3f}, over videos".format(*scores.interval) if scores.interval else "no interval"
    return f'<p class="headline">{metric_name(scores.metric)} {scores.value:.3f} <small>{interval}</small></p>'


def run_settings(context: ReportContext) -> str:
    """Return the run's ``config.json``."""
    return f"<pre>{escape(json.dumps(context.run.config, indent=2))}</pre>"
