"""What the run is: its metric with what has to be known of it, before all panels, and how it was made, after them."""

import json
from html import escape

from affcache.figures import drawing
from affcache.progress import counted, metric_name
from affcache.reporting.frames import ReportContext
from affcache.reporting.page import charts, inline_figure
from affcache.scoring.figures import learning_figure
from affcache.scoring.intervals import without_interval
from affcache.scoring.predict import TrainedRun
from affcache.tasks.metrics import Scores

NOTICE = '<p class="notice">{}</p>'


def headline(context: ReportContext) -> str:
    """Return the metric of a task with its interval, and what has to be known of it."""
    run, scores, rule = context.run, context.scored.scores, context.scored.rule
    few, alone = without_interval(run.task, context.scored.statistics), run.whole is run.task
    level, videos = run.task.level, counted(len(context.scored.statistics), "video")
    frames = counted(len(context.joined), f"{escape(context.split)} {level}") + f" of {videos}" * (level == "frame")
    of_run = f"{escape(run.source)}, epoch {run.epoch}; " if alone else ""
    words = [_metric(scores), f"<p>{of_run}{frames}.</p>"]
    if few:
        words.append(NOTICE.format(f"No interval of {metric_name(scores.metric)}: {escape(few)}."))
    if of := scores.present:
        words.append(f"<p>Over the classes that some {level} has: {of.value:.3f}.</p>")
    if context.split == "validation" and alone:
        words += _worth(run)
    if rule.fitted_on:
        warning = f" <b>optimistic</b>: the {level}s that are scored are among them" if rule.optimistic else ""
        words.append(NOTICE.format(f"Decided by a rule fitted on {escape(rule.fitted_on)}{warning}."))
    return "".join(words)


def headline_of_all(run: TrainedRun, scores: Scores, split: str, frames: int) -> str:
    """Return the metric of several tasks at once with its interval, and what it is the sum of."""
    terms = " + ".join(f"{metric_name(name)} {value:.3f}" for name, value in scores.further.items())
    words = [
        f"<p>{metric_name(scores.metric)} is {terms}, each over the frames with its label.</p>",
        f"<p>{escape(run.source)}, epoch {run.epoch}; {counted(frames, f'{escape(split)} frame')}.</p>",
    ]
    return "".join([_metric(scores), *words, *(_worth(run) if split == "validation" else [])])


def _worth(run: TrainedRun) -> list[str]:
    """Say what a score on validation is worth."""
    return [NOTICE.format(run.worth)] if run.worth else []


def _metric(scores: Scores) -> str:
    interval = "95 % {:.3f} to {:.3f}, over videos".format(*scores.interval) if scores.interval else "no interval"
    return f'<p class="headline">{metric_name(scores.metric)} {scores.value:.3f} <small>{interval}</small></p>'


def training(context: ReportContext) -> str | None:
    """Return the learning curve of several tasks at once; that of one stands among its curves."""
    run = context.run
    if run.whole is run.task:
        return None
    with drawing():
        figure = learning_figure(run.folder.read_history(), run.whole.metric)
        return None if figure is None else charts([inline_figure(figure, run.whole.name)])


def run_settings(context: ReportContext) -> str:
    """Return the run's ``config.json``."""
    return f"<pre>{escape(json.dumps(context.run.config, indent=2))}</pre>"
