"""What each command prints of its result, for people."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

import affcache
from affcache.progress import counted, duration_text, listed, metric_name
from affcache.training.settings import CHOSEN_ON

from .console import out, rate_text

if TYPE_CHECKING:  # scikit-learn comes with it, and takes a second to load
    from affcache.tasks.metrics import Scores
    from affcache.tasks.task import Task

STATE_STYLES = {"ok": "green", "warning": "yellow", "problem": "red"}


def faces(result: Any) -> None:
    """Print where the crops and the table of faces are, and what was found."""
    facts = {
        "out": result.out,
        "table": result.table,
        "found": f"{counted(result.faces, 'face')} of {counted(result.persons, 'person')} in "
        f"{counted(result.frames, 'frame')} of {counted(result.inputs, 'input')}",
        "without": f"{counted(result.frames_without_faces, 'frame')} without a face",
        "time": f"{duration_text(result.seconds)}, {rate_text(result.rate, 'frame')}",
    }
    if result.unreadable:
        facts["left out"] = f"{counted(len(result.unreadable), 'input')}, listed in {result.unreadable_list}"
    out(fact_table(facts), f"next: affcache predict {result.out} --run RUN --out FILE.csv, or extract --crops it")


def extract(result: Any) -> None:
    """Print the store, and what an extraction took."""
    view = "" if result.view == "plain" else f" (view {result.view}, in {result.view_store})"
    facts = {"store": result.store, "rows": _rows_text(result) + view}
    if result.engine == "ray":
        facts["cluster"] = f"workers: {result.actors}, nodes: {result.nodes}"
    if result.encoded_now:
        rate = rate_text(result.rate, "crop")
        facts["this run"] = f"{counted(result.encoded_now, 'crop')} in {duration_text(result.seconds)}, {rate}"
        facts["time"] = ", ".join(f"{stage} {share:.0%}" for stage, share in result.shares.items())
        facts["bottleneck"] = result.bottleneck
    else:
        facts["this run"] = "nothing to do: the store is complete"
    if result.converted:
        facts["converted"] = ", ".join(f"{count:,} {mode}" for mode, count in result.converted.items())
    if result.unreadable_list:
        facts["unreadable"] = f"listed in {result.unreadable_list}"
    out(fact_table(facts), _fit_next(result))


def import_(result: Any) -> None:
    """Print the store that was made, and of what."""
    facts = {"store": result.store, **_sizes(result), "from": result.imported_from}
    if result.normalised is not None:
        facts["embeddings"] = "of length 1" if result.normalised else "not normalised"
    if result.same_as_exported:
        facts["export"] = "the same rows, to the bit, as the store it was made of"
    out(fact_table(facts), _fit_next(result))


def export(result: Any) -> None:
    """Print what was written, and the way back."""
    facts = {"out": f"{result.out} ({result.format}, {result.bytes / 1e6:,.1f} MB)", **_sizes(result)}
    out(fact_table(facts), f"back: affcache import {result.out} --store FILE")


def _rows_text(result: Any) -> str:
    return f"{result.rows:,}: {result.encoded:,} encoded, {result.unreadable:,} unreadable"


def _sizes(result: Any) -> dict[str, Any]:
    return {"rows": _rows_text(result), "videos": f"{result.videos:,}", "width": result.width}


def _fit_next(result: Any) -> str:
    return f"next: affcache fit --task expr --store {result.store} --annotations DIR"


def info(result: dict[str, Any]) -> None:
    """Print what a store holds, and how it was made."""
    encoder = result.pop("encoder")
    named = {name: listed(value) if name == "columns" and value else value for name, value in encoder.items()}
    out(fact_table(result), "encoder", fact_table({f"  {name}": value for name, value in named.items()}))


def verify(result: dict[str, Any]) -> None:
    """Print that a store is sound."""
    views = f", in view {', '.join(result['views'])} too" if result["views"] else ""
    out(f"{result['store']} is sound: {counted(result['rows'], 'row')}, every block matches its checksum{views}")


def encoders(result: Any) -> None:
    """Print a line for each encoder, which ends in what selects it."""
    layout = "{:>6} {:>9}  {:<12} {}"  # names last: they are long, and to be copied
    lines = [layout.format("width", "pixels", "licence", "")]
    for one in result.encoders:
        size = " x ".join(map(str, dict.fromkeys(one.image_size)))
        words = f"--model {one.model}" + (f" --pretrained {one.pretrained}" if one.pretrained else "")
        lines.append(layout.format(one.width or "?", size, one.licence or "not known", words))
    out(*lines, f"{counted(len(result.encoders), 'encoder')}; next: affcache extract {words}")


def doctor(result: Any) -> None:
    """Print what was looked at, a line each."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for check in result.checks:
        table.add_row(Text(check.state, style=STATE_STYLES[check.state]), check.name, Text(check.finding))
    sound, broken = "next: affcache extract, with the same flags", "extract would stop at what is marked as a problem"
    out(table, sound if result.healthy else broken)


def fit(result: Any) -> None:
    """Print the run and its best epoch."""
    tried, metric = "strength" if result.head == "ridge" else "epoch", metric_name(result.metric)
    kept = f"{metric} {result.value:.3f} on validation, {tried} {result.best_epoch} of {result.epochs}"
    if result.chosen_before:
        number = "" if result.head == "ridge" else f" {result.best_epoch}"
        worth = ", which means nothing: it was trained on" if result.train_on == "all" else ""
        before = f"chosen before {CHOSEN_ON[result.chosen_on]}".rstrip()
        kept = f"{tried}{number}, {before}; {metric} {result.value:.3f} on validation{worth}"
    facts = {
        "run": result.run,
        "kept" if result.chosen_before else "best": kept,
        "time": f"{duration_text(result.seconds)} on {result.device}",
    }
    if result.ridge is not None:
        weights = " --class-weights balanced" if result.kind == "classes" else ""
        facts["to beat"] = f"{metric} {result.ridge:.3f}, of --head ridge{weights}, solved in a moment"
    last = f"score {result.run}"
    if result.train_on == "all":
        challenge = f"submit {result.run} --template FILE --store FILE"
        last = challenge if result.task in affcache.TASKS else f"predict VIDEO --run {result.run}"
    out(fact_table(facts), f"next: affcache {last}")


def score(result: Any) -> None:
    """Print the scores of all classes, and what they rest on."""
    title = f"{result.task} on {result.split}: {', '.join(result.runs)}, {_scored(result)}"
    losses = f"loss {result.loss:.3f}"
    if result.alpha < 1:
        losses += f", the worst {result.alpha:.0%} of losses {result.cvar:.3f} (CVaR)"
    if result.calibration_error is not None:
        losses += f", calibration error {result.calibration_error:.3f}"
    if result.parts:
        for part in result.parts:
            out(f"{part.task}: {_scored(part)}", score_table(part.scores, part.definition))
            _say_rule(part)
        of_parts = " + ".join(f"{value:.3f}" for value in result.scores.further.values())
        names = " + ".join(map(metric_name, result.scores.further))
        out(title, f"P {result.scores.value:.3f}{_interval(result.scores)} = {of_parts} ({names})", losses)
    else:
        out(title, score_table(result.scores, result.definition), losses)
        _say_rule(result)
    if result.note:
        out(Text(result.note, style="yellow"))
    if result.against:
        of = result.against["difference"]
        interval = ", without an interval"
        if of["low"] is not None:
            interval = f", 95 % {of['low']:+.3f} to {of['high']:+.3f}"
        shared, own = f"the {result.against['frames']:,} {result.level}s of both", f"this {result.against['own']:.3f}"
        where = f"on {shared}, where {own}" if result.against["frames"] != result.frames else ""
        out(
            f"{result.against['run']} has {result.against['value']:.3f} {where}".rstrip()
            + f": the difference is {of['value']:+.3f}{interval}"
        )
    out(f"written: {', '.join([result.scores_file, result.predictions_file, *result.figures])}")


def _scored(result: Any) -> str:
    of_videos = f" of {counted(result.videos, 'video')}" if result.level == "frame" else ""
    return counted(result.frames, result.level) + of_videos


def _say_rule(result: Any) -> None:
    rule, names = result.rule, result.definition.classes
    if rule.fitted_on:
        note = f", optimistic: these are the {result.level}s it is scored on" if rule.optimistic else ""
        out(f"decided by a rule fitted on {rule.fitted_on}{note}: {rule.in_words(names)}")
    elif words := rule.in_words(names):
        out(f"rule: {words}")


def _interval(scores: "Scores") -> str:
    return f" ({_range(scores.interval)})" if scores.interval else ""


def predict(result: Any) -> None:
    """Print where the table is, and what it holds."""
    facts = {
        "out": result.out,
        "rows": f"{result.rows:,}, {result.faces:,} of them with a face, of {counted(result.inputs, 'input')}",
        "says": f"{', '.join(result.tasks)} by {', '.join(result.runs)}",
        "time": f"{duration_text(result.seconds)}, {rate_text(result.rate, 'row')}",
    }
    if rules := "; ".join(f"{task}: {rule}" for task, rule in result.rules.items() if rule):
        facts["rule"] = rules
    if result.unreadable:
        facts["left out"] = f"{counted(len(result.unreadable), 'input')}, listed in {result.unreadable_list}"
    pictures = [*result.overlays, *([result.page] if result.page else [])]
    if pictures:
        facts["to look at"] = ", ".join(pictures)
    out(fact_table(facts))


def ablate(result: Any) -> None:
    """Print a row a setting, and the best run of each task."""
    from affcache.ablation.tables import columns_of, headings  # with it comes torch

    table = Table(box=box.SIMPLE_HEAD)
    for heading in headings(result.rows, result.heldout):
        whole = heading == "setting"  # its name has to be read
        table.add_column(heading, justify="left" if whole else "right", overflow="fold" if whole else "ellipsis")
    for row in result.rows:
        style = "dim" if row.is_base else "bold" if row.differs else None
        table.add_row(*columns_of(row, result.heldout), style=style)
    where = ("the next fold", "the tested fold") if result.folds else ("held-out training videos", "validation")
    facts = {
        "heads": f"{result.cells:,}, {result.trained:,} trained now in "
        f"{duration_text(result.seconds)} on {result.device}",
        "epochs chosen on": where[0] if result.heldout else f"{where[1]} itself, which flatters",
        "written": f"{result.out}: results.csv, summary.csv, .md and .tex, figures/"
        + ", out_of_fold/" * bool(result.folds),
    }
    for best in result.best:
        chosen = f" ({best['selected']:.3f} where it was chosen)" if result.heldout else ""
        what, seed, of = "run", f", seed {best['seed']}", "on validation"
        if result.folds:
            what, seed, of = "setting", "", f"over all {result.folds} folds"
        name = f"best {what}, {best['task']}" if len(result.best) > 1 else f"best {what}"
        facts[name] = f"{best['setting']}{seed}: {best['value']:.3f} {of}{chosen}"
    out(table, fact_table(facts))
    for best in result.best:
        task = f" --task {best['task']}" if len(result.best) > 1 else ""
        again = f"affcache fit --train-on all --as {result.out}{task}" if result.folds else best["fit"]
        out(f"next: affcache score {best['run']}" if best["run"] else f"next: {again}")


def report(result: Any) -> None:
    """Print where the report lies, and what it shows."""
    facts = {
        "out": f"{result.out} ({result.bytes / 1e6:,.1f} MB); open it in a browser",
        "shows": f"{counted(result.frames, result.level)}, the hardest {result.hardest}, "
        + counted(result.suspicious, "doubtful label"),
        "pictures": f"{counted(result.pictures, 'crop')}",
    }
    out(fact_table(facts))


def submit(result: Any) -> None:
    """Print what a submission holds."""
    facts = {
        "runs": ", ".join(result.runs),
        "out": result.out,
        "lines": f"{result.lines:,} of {counted(result.videos, 'video')}, all asked for; read back and checked",
        "filled": f"{counted(result.filled, 'frame')} without a crop, from their neighbours",
    }
    if result.videos_without_crops:
        facts["no crop at all"] = ", ".join(result.videos_without_crops)
    for task, rule in result.rules.items():
        if words := rule.in_words(result.classes[task]):
            facts["rule" if len(result.rules) == 1 else f"rule, {task}"] = words
    out(fact_table(facts))


def publish(result: Any) -> None:
    """Print what was published, and how it is loaded and uploaded."""
    facts = {"out": f"{result.out} ({result.bytes / 1e6:,.1f} MB): {', '.join(result.files)}", "run": result.run}
    if result.value is not None:
        rule = ", with a fitted rule" if result.rule else ""
        facts["card"] = f"{metric_name(result.metric)} {result.value:.3f} on validation{rule}"
    if result.onnx:
        far = ", ".join(f"{name} {difference:.1g}" for name, difference in result.onnx.items())
        facts["onnx"] = f"probabilities away from torch's by at most: {far}"
    out(fact_table(facts), f'next: affcache.load("{result.out}") in Python; hf upload OWNER/NAME {result.out}')


def demo(result: Any) -> None:
    """Print the scores of all tasks, and what they don't show."""
    for task, scored in result.scores.items():
        out(
            f"{task}: {counted(scored.frames, 'validation frame')} of the sample",
            score_table(scored.scores, scored.definition),
        )
    out(Text(result.notice, style="yellow"), f"written: {result.out}")
    out(f"next: affcache report {next(iter(result.scores.values())).run}")


COMMANDS = (
    faces, extract, fit, score, predict, ablate, report, submit, publish,
    info, verify, encoders, demo, import_, export, doctor,
)  # fmt: skip
SHOW: Mapping[str, Callable[[Any], None]] = {show.__name__.rstrip("_"): show for show in COMMANDS}


def score_table(scores: "Scores", task: "Task") -> Table:
    """Lay out the scores of one split: a row a class, a column for each of its values, then the task's metric."""
    columns = list(scores.classes[0].values)  # precision, recall, f1; or ccc, pearson, rmse
    table = Table(box=box.SIMPLE_HEAD, show_footer=True)
    table.add_column("class" if task.has_classes else "output", footer=metric_name(scores.metric))
    for column in columns:
        own = column == task.class_metric.lower()  # the metric stands below what it is the mean of
        table.add_column(column, justify="right", footer=f"{scores.value:.3f}" if own else "")
    labelled = sum(c.support for c in scores.classes) if task.has_classes else scores.classes[0].support
    with_intervals = scores.interval or any(row.interval for row in scores.classes)
    if with_intervals:
        table.add_column("95 %", justify="right", footer=_range(scores.interval))
    table.add_column("support", justify="right", footer=f"{labelled:,}")  # all frames have all continuous values
    for row in scores.classes:
        values = [f"{row.values[column]:.3f}" for column in columns]
        if with_intervals:
            values.append(_range(row.interval))
        table.add_row(row.name, *values, f"{row.support:,}", style="dim" if row.support == 0 else None)
    table.caption = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in scores.further.items())
    if of := scores.present:
        interval = f", 95 % {_range(of.bounds)}" if of.bounds else ""
        table.caption = (
            f"{metric_name(scores.metric)} over the classes present {of.value:.3f}{interval}\n{table.caption}"
        )
    table.caption_justify = "left"
    return table


def _range(bounds: tuple[float, float] | None) -> str:
    return "{:.3f} to {:.3f}".format(*bounds) if bounds else ""


def fact_table(facts: Mapping[str, Any]) -> Table:
    """Lay out names and values, a row each."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, str(value))
    return table
