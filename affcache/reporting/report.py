"""A report as a whole: a run scored, what is worth seeing chosen, and one HTML file written."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from sklearn.metrics import average_precision_score, precision_recall_curve

from affcache.devices import resolve_device
from affcache.files import write_text
from affcache.progress import Listener, metric_name
from affcache.reporting.charts import Line, line_chart
from affcache.reporting.frames import (
    describe,
    find_pictures,
    frame_losses,
    hardest,
    suspicious,
    tail_positions,
    timeline,
)
from affcache.reporting.page import TIMELINES, class_filter, confusion_section, crop_grid, page, score_section, table
from affcache.reporting.settings import ReportSettings
from affcache.scoring.calibration import reliability
from affcache.scoring.figures import confusion
from affcache.scoring.intervals import VideoResamples
from affcache.scoring.predict import TrainedRun
from affcache.scoring.score import Scored, score_frames, with_intervals
from affcache.settings import RUNS, build
from affcache.tasks.annotations import JoinedLabels, join_labels
from affcache.tasks.metrics import Scores
from affcache.tasks.tasks import Task
from affcache.training.run_folder import RunFolder, newest_run

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


AFF_WILD2 = 100_000  # frames; its validation sets have three to four times as many, and figures of others mislead


@dataclass(frozen=True)
class ReportResult:
    """What a report shows."""

    out: str
    bytes: int
    frames: int
    hardest: int
    suspicious: int
    pictures: int  # of these whose crop was found

    def to_json(self) -> dict[str, Any]:
        """Return the result as one JSON object."""
        return asdict(self)


def report(
    settings: ReportSettings | None = None, /, *, listener: Listener | None = None, **values: Any
) -> ReportResult:
    """Write a run's report: one HTML file that opens from disk, without a network.

    Args:
        settings: all settings, or none and single ones by name.
        listener: receives messages and warnings.

    Raises:
        InputError: no run, or labels that can't be read or that join to no crop.
        StoreError: the store has changed since the run, is of another encoder, incomplete or damaged.
        ConfigError: rules are to be fitted, but nothing was held out of the training.
    """
    settings = build(ReportSettings, values, over=settings)
    listener = listener or Listener()
    folder = RunFolder(settings.run) if settings.run else newest_run(RUNS)
    device = resolve_device(settings.device)
    run = TrainedRun.open(folder, settings.store, listener)
    task, annotations = run.task, settings.annotations or run.settings.annotations
    joined = join_labels(run.store, annotations, task, settings.split)
    listener.message(joined.account.sentence(settings.split))
    scored = score_frames(settings, [run], annotations, joined, device, listener, split=settings.split)
    scores = with_intervals(scored, task, VideoResamples(len(scored.statistics), settings.resamples))
    losses = frame_losses(task, task.losses(scored.predictions.logits, torch.from_numpy(joined.labels)).numpy())
    tail = tail_positions(losses, run.settings.alpha)
    said = (joined.labels, scored.decided, scored.probabilities)
    hard, doubtful = hardest(task, joined.labels, tail), suspicious(task, *said)
    pictures = find_pictures(settings.crops, scored.predictions, [*hard, *doubtful])
    if not pictures:
        listener.warning("No crops were found to show beside the frames. Say where they are with --crops DIR.")
    shown, doubted = (describe(task, scored.predictions, of, *said, losses) for of in (hard, doubtful))
    sections = {
        "": _headline(run, scored, scores, joined, settings.split),
        "scores": score_section(scores),
        "published": _published(task, scores) if settings.split == "validation" and len(joined) >= AFF_WILD2 else "",
        "curves": f'<div class="charts">{"".join(_charts(task, run, scored, joined))}</div>',
        "timelines": TIMELINES + _timeline_words(task),
        "hardest": _tail_words(run, len(tail), len(hard)) + class_filter(_filter_classes(task), len(hard))
        + crop_grid("hardest", shown, pictures),
        "suspicious": _doubt_words() + crop_grid("suspicious", doubted, pictures) if doubted else "",
        "settings": f"<pre>{escape(json.dumps(run.config, indent=2))}</pre>",
    }  # fmt: skip
    if task.exclusive:
        sections["scores"] += "<h3>Confusion</h3>" + confusion_section(
            confusion(joined.labels, scored.decided, task.outputs), task.classes
        )
    frames = timeline(task, scored.predictions, *said)
    out = settings.out or folder.path / "report.html"
    write_text(out, page(f"{task.name}: {folder.path.name}", sections, frames))
    return ReportResult(str(out), out.stat().st_size, len(joined), len(hard), len(doubtful), len(pictures))


def _headline(run: TrainedRun, scored: Scored, scores: Scores, joined: JoinedLabels, split: str) -> str:
    """Return the metric with its interval, and what has to be known of it."""
    low, high = scores.interval or (scores.value, scores.value)
    words = [
        f'<p class="headline">{metric_name(scores.metric)} {scores.value:.3f} <small>95 % {low:.3f} to {high:.3f}, '
        "over videos</small></p>",
        f"<p>{escape(str(run.folder.path))}, epoch {run.epoch}; {len(joined):,} {escape(split)} frames of "
        f"{len(scored.statistics)} videos.</p>",
    ]
    if split == "validation":
        words.append('<p class="notice">The epoch was chosen on these frames: the score flatters a little.</p>')
    if scored.rule.fitted_on:
        warning = " <b>optimistic</b>: the frames that are scored are among them" if scored.rule.optimistic else ""
        words.append(f'<p class="notice">Decided by a rule fitted on {escape(scored.rule.fitted_on)}{warning}.</p>')
    return "".join(words)


def _published(task: Task, scores: Scores) -> str:
    """Return published figures with how each is known, the run's own among them."""
    content = (files("affcache.data") / "published.toml").read_text(encoding="utf-8")
    entries: Sequence[Mapping[str, Any]] = tomllib.loads(content).get(task.name, [])
    if not entries:
        return ""
    rows = [
        (
            entry["value"],
            [entry["method"], f"{entry['value']:.3f}", "yes" if entry["frame_by_frame"] else "no", entry["known"]],
        )
        for entry in entries
    ]
    rows.append((scores.value, ["this run, on its own data", f"{scores.value:.3f}", "", "measured here"]))
    ordered = [cells for _, cells in sorted(rows, key=lambda row: row[0])]
    words = (
        "<p>On the validation set of Aff-Wild2. They say nothing about a run on other data: compare them with this one "
        "only if it was trained and scored on the same labels and frames. Test-set figures lie 0.03 to 0.15 lower.</p>"
    )
    return words + table(["method", metric_name(task.metric), "frame by frame", "how known"], ordered)


def _charts(task: Task, run: TrainedRun, scored: Scored, joined: JoinedLabels) -> list[str]:
    """Return learning curves, precision against recall, and reliability, where the task has them."""
    charts, history = [], run.folder.read_history()
    if len(history) > 1 and "train_loss" in history[0]:
        losses = [Line(name.replace("_", " "), [(e["epoch"], e[name]) for e in history])
                  for name in ("train_loss", "validation_loss")]  # fmt: skip
        charts.append(line_chart(losses, title="Losses over epochs", across="epoch", up="loss"))
        metric = Line(metric_name(task.metric), [(e["epoch"], e[task.metric]) for e in history])
        charts.append(line_chart([metric], title=f"{metric.name} over epochs", across="epoch", up=metric.name))
    if not task.has_classes:
        return charts
    lines = []
    for column, name in enumerate(task.classes):
        present = joined.labels == column if task.exclusive else joined.labels[:, column] == 1
        if present.any():
            precision, recall, _ = precision_recall_curve(present, scored.probabilities[:, column])
            average = average_precision_score(present, scored.probabilities[:, column])
            lines.append(Line(f"{name} {average:.2f}", list(zip(recall.tolist(), precision.tolist(), strict=True))))
    unit = {"x_range": (0.0, 1.0), "y_range": (0.0, 1.0)}
    title = "Precision against recall, with average precision"
    charts.append(line_chart(lines, title=title, across="recall", up="precision", **unit))
    found = reliability(scored.probabilities, joined.labels)
    filled = np.flatnonzero(found.share > 0)
    points = [(float(found.confidence[i]), float(found.frequency[i])) for i in filled]
    diagonal = Line("as said", [(0, 0), (1, 1)], dashed=True)
    title = f"Calibration: error {found.error:.3f}"
    charts.append(
        line_chart(
            [Line("so", points, dots=True), diagonal], title=title, across="confidence", up="how often so", **unit
        )
    )
    return charts


def _filter_classes(task: Task) -> Sequence[str]:
    return (*task.classes, "none") if task.has_classes and not task.exclusive else task.classes


def _timeline_words(task: Task) -> str:
    if not task.has_classes:
        return "<p>Coloured: the outputs; plain: the labels; from -1 at the bottom to 1.</p>"
    return "<p>The stronger a colour, the larger the probability; the line below a row is the label.</p>"


def _tail_words(run: TrainedRun, tail: int, shown: int) -> str:
    return (
        f"<p>CVaR at the run's alpha {run.settings.alpha:g} is the mean loss of the hardest {tail:,} frames. Shown are "
        f"{shown} of them, so many of each label that all can be looked at, the hardest first. A click shows the "
        "timeline there.</p>"
    )


def _doubt_words() -> str:
    return "<p>Frames where the head is sure of something else than the label: look before you trust either.</p>"
