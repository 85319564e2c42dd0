"""The results of an ablation as files: a row a run, a row a setting, and the latter for Markdown and LaTeX."""

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from affcache.ablation.grid import stores_text
from affcache.ablation.summary import Outcome, Summary, Trial
from affcache.files import write_text
from affcache.progress import metric_name
from affcache.settings import as_text


def write_results(
    path: Path, runs: Sequence[tuple[Trial, Outcome]], varied: Sequence[str], *, folds: bool = False
) -> None:
    """Write results.csv: a row for each finished run, in the order of the grid. What it took isn't in it."""
    names = [
        "setting", "store", *varied, "seed", *(["fold"] if folds else []), "metric", "value", "chosen_by",
        "best_epoch", "diverged_in_epoch", "run",
    ]  # fmt: skip
    rows = [
        [
            trial.variant.name,
            stores_text(trial.variant.store, short=True),
            *(as_text(trial.variant.values[name]) for name in varied),
            trial.settings.seed,
            *(trial.splits.fold or ())[:1],
            trial.splits.task.metric,
            outcome.value,
            outcome.selected,
            outcome.best_epoch,
            outcome.diverged,
            f"cells/{trial.name}",
        ]
        for trial, outcome in runs
    ]
    _write_csv(path, names, rows)


def write_summary(path: Path, rows: Sequence[Summary], varied: Sequence[str]) -> None:
    """Write summary.csv: a row for each setting."""
    names = [
        "setting", "store", *varied, "metric", "n", "diverged", "mean", "standard_deviation",
        "difference", "difference_low", "difference_high", "chosen_by",
    ]  # fmt: skip
    folds = any(row.folds for row in rows)
    names += ["low", "high", "fold_mean", "fold_standard_deviation"] if folds else []
    table = []
    for row in rows:
        of = row.difference
        interval = of.to_json().values() if of else (None, None, None)
        varying = (as_text(row.variant.values[name]) for name in varied)
        own = [row.variant.name, stores_text(row.variant.store, short=True), *varying, row.metric]
        table.append([*own, row.count, row.diverged, row.mean, row.deviation, *interval, row.selected])
        if folds:
            bounds = (row.interval and row.interval.bounds) or (None, None)
            table[-1] += [*bounds, row.fold_mean, row.fold_deviation]
    _write_csv(path, names, table)


def headings(rows: Sequence[Summary], heldout: bool) -> list[str]:
    """Return the headings of a table for people; the rows' columns are those of ``columns_of``."""
    metrics = list(dict.fromkeys(row.metric for row in rows))
    metric = metric_name(metrics[0]) if len(metrics) == 1 else "metric"
    chosen = ["held out"] if heldout else []
    folds = ["95 %", "a fold (s.d.)"] if any(row.folds for row in rows) else []
    return ["setting", "n", *chosen, metric, "s.d.", *folds, "difference", "95 % interval"]


def columns_of(row: Summary, heldout: bool) -> list[str]:
    """Return the columns of a setting's row, for people: three decimals, empty where there is nothing to say."""
    count = f"{row.count} ({row.diverged} diverged)" if row.diverged else str(row.count)
    of = row.difference
    difference = ["base" if row.is_base else "", ""]
    if of is not None:
        difference = [f"{of.value:+.3f}", "{:+.3f} to {:+.3f}".format(*of.bounds) if of.bounds else ""]
    chosen, folds = [_rounded(row.selected)] if heldout else [], []
    if row.folds:
        bounds = row.interval.bounds if row.interval else None
        interval = "{:.3f} to {:.3f}".format(*bounds) if bounds else ""
        spread = "" if row.fold_deviation is None else f" ({row.fold_deviation:.3f})"
        folds = [interval, _rounded(row.fold_mean) + spread]
    return [row.variant.name, count, *chosen, _rounded(row.mean), _rounded(row.deviation), *folds, *difference]


def markdown(rows: Sequence[Summary], heldout: bool) -> str:
    """Return the summary as a Markdown table."""
    heads = headings(rows, heldout)
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *(columns_of(row, heldout) for row in rows)]
    return "".join(f"| {' | '.join(text.replace('|', chr(92) + '|') for text in line)} |\n" for line in lines)


def latex(rows: Sequence[Summary], heldout: bool) -> str:
    """Return the summary as a LaTeX tabular, for the package booktabs."""
    heads = headings(rows, heldout)
    body = [" & ".join(map(_escaped, columns_of(row, heldout))) + r" \\" for row in rows]
    lines = [
        f"\\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}",
        r"\toprule",
        " & ".join(map(_escaped, heads)) + r" \\",
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


_SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
}  # fmt: skip


def _escaped(text: str) -> str:
    """Write text for LaTeX; numbers with a sign become formulas, so that a minus is one."""
    escaped = "".join(_SPECIAL.get(letter, letter) for letter in text).replace(r"95 \%", r"95\,\%")
    return re.sub(r"(?<!\S)([+-]\d\.\d+)(?!\S)", r"$\1$", escaped)


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _write_csv(path: Path, names: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write rows in full precision, empty where there is nothing to say."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([names, *rows])
    write_text(path, text.getvalue())
