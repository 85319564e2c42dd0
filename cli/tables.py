"""Results as tables for people."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from affcache.progress import metric_name

if TYPE_CHECKING:  # scikit-learn comes with it, and takes a second to load
    from affcache.ablation.summary import Summary
    from affcache.scoring.postprocess import DecisionRule
    from affcache.tasks.metrics import Scores


def score_table(scores: "Scores") -> Table:
    """Lay out the scores of one split: a row a class, a column for each of its values, then the task's metric."""
    columns = list(scores.classes[0].values)  # precision, recall, f1; or ccc, pearson, rmse
    classified = "f1" in columns
    table = Table(box=box.SIMPLE_HEAD, show_footer=True)
    metric = metric_name(scores.metric)
    averaged = scores.metric.rpartition("_")[2]  # macro_f1 stands below f1, mean_ccc below ccc
    footers = {averaged if averaged in columns else columns[-1]: f"{scores.value:.3f}"}
    table.add_column("class" if classified else "output", footer=metric)
    for column in columns:
        table.add_column(column, justify="right", footer=footers.get(column, ""))
    labelled = sum(c.support for c in scores.classes) if classified else scores.classes[0].support
    if scores.interval:
        table.add_column("95 %", justify="right", footer="{:.3f} to {:.3f}".format(*scores.interval))
    table.add_column("support", justify="right", footer=f"{labelled:,}")  # all frames have all continuous values
    for row in scores.classes:
        values = [f"{row.values[column]:.3f}" for column in columns]
        if scores.interval:
            values.append("{:.3f} to {:.3f}".format(*row.interval) if row.interval else "")
        table.add_row(row.name, *values, f"{row.support:,}", style="dim" if row.support == 0 else None)
    table.caption = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in scores.further.items())
    table.caption_justify = "left"
    return table


def rule_text(rule: "DecisionRule") -> str:
    """Say what a fitted rule does."""
    parts = []
    if rule.smooth != "none":
        parts.append(f"{rule.smooth} over {rule.width} frame numbers")
    if rule.temperature != 1:
        parts.append(f"temperature {rule.temperature:.2f}")
    if rule.offsets:
        parts.append("offsets " + ", ".join(f"{offset:.2f}" for offset in rule.offsets))
    return "; ".join(parts)


def ablation_table(rows: "Sequence[Summary]", heldout: bool) -> Table:
    """Lay out an ablation: a row a setting, the base dim, differences whose interval leaves out 0 bold."""
    from affcache.ablation.tables import columns_of, headings  # with it comes torch

    table = Table(box=box.SIMPLE_HEAD)
    for heading in headings(rows, heldout):
        table.add_column(heading, justify="left" if heading == "setting" else "right")
    for row in rows:
        of = row.difference
        clear = of is not None and (of.low > 0 or of.high < 0)
        table.add_row(*columns_of(row, heldout), style="dim" if row.is_base else "bold" if clear else None)
    return table


def fact_table(facts: Mapping[str, Any]) -> Table:
    """Lay out names and values, a row each."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, str(value))
    return table
