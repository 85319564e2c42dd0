"""The commands that measure instead of working: doctor and bench."""

from typing import Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

import affcache
from affcache.bench_settings import BenchAblateSettings, BenchExtractSettings, BenchFitSettings, BenchStoreSettings
from affcache.extraction.settings import DoctorSettings
from affcache.progress import duration_text
from affcache.settings import ConfigFile, resolve

from .commands import INPUT_ERROR, out, run
from .console import ConsoleListener
from .tables import fact_table

STATE_STYLES = {"ok": "green", "warning": "yellow", "problem": "red"}


def doctor(given: dict[str, Any], as_json: bool) -> None:
    """Handle ``affcache doctor``; exits with 2 where an extraction would not start."""
    healthy = True

    def work(listener: ConsoleListener, config: ConfigFile) -> Any:
        nonlocal healthy
        own = {**config.of("extract"), **config.of("doctor"), **given}  # it looks at what extract would do
        result = affcache.doctor(resolve(DoctorSettings, "doctor", own, config), listener=listener)
        healthy = result.healthy
        return result

    def show(result: Any) -> None:
        table = Table(box=None, show_header=False, pad_edge=False)
        for check in result.checks:
            table.add_row(Text(check.state, style=STATE_STYLES[check.state]), check.name, Text(check.finding))
        out(
            table,
            "next: affcache extract, with the same flags"
            if result.healthy
            else "extract would stop at what is marked as a problem",
        )

    run(as_json, work, show)
    if not healthy:
        raise typer.Exit(INPUT_ERROR)


def bench_extract(given: dict[str, Any], as_json: bool) -> None:
    """Handle ``affcache bench extract``."""

    def work(listener: ConsoleListener, config: ConfigFile) -> Any:
        return affcache.bench_extract(resolve(BenchExtractSettings, "bench extract", given, config), listener=listener)

    def show(result: Any) -> None:
        compiled = ", compiled" if result.compiled else ""
        out(
            fact_table(
                {
                    "pipeline": f"{result.rate:,.2f} crops/s, from files to committed rows",
                    "bare encoder": f"{result.bare:,.2f} crops/s",
                    "ratio": f"{result.ratio:.3f}, median of {len(result.rates)} rounds of {result.crops:,} crops",
                    "time": ", ".join(f"{stage} {share:.0%}" for stage, share in result.shares.items()),
                    "bottleneck": result.bottleneck,
                    "encoder": f"{result.model} in {result.precision}, {result.batch_size} crops a call{compiled}",
                    "workers": result.workers,
                    "machine": ", ".join(f"{name} {value}" for name, value in result.machine.items()),
                }
            )
        )

    run(as_json, work, show)


def bench_fit(given: dict[str, Any], as_json: bool) -> None:
    """Handle ``affcache bench fit``."""

    def work(listener: ConsoleListener, config: ConfigFile) -> Any:
        return affcache.bench_fit(resolve(BenchFitSettings, "bench fit", given, config), listener=listener)

    def show(result: Any) -> None:
        facts: dict[str, Any] = {
            "step": f"{result.rate:.2f} ms, CVaR and SAM, {result.batch_size} frames, products in {result.precision}",
            "bare products": f"{result.bare:.2f} ms, fp32",
            "ratio": f"{result.ratio:.2f}, median of {len(result.rates)} rounds",
        }
        if result.published is not None:
            facts["published loop"] = f"{result.published:.1f} ms a step, {result.speedup:.1f} times as long"
        facts["evaluation"] = f"{result.evaluation:.1f} s for a million frames"
        facts["paper-size fit"] = f"{duration_text(result.paper_fit)}: 585,317 frames, 32 epochs, each evaluated"
        facts["machine"] = ", ".join(f"{name} {value}" for name, value in result.machine.items())
        out(fact_table(facts))

    run(as_json, work, show)


def bench_ablate(given: dict[str, Any], as_json: bool) -> None:
    """Handle ``affcache bench ablate``."""

    def work(listener: ConsoleListener, config: ConfigFile) -> Any:
        return affcache.bench_ablate(resolve(BenchAblateSettings, "bench ablate", given, config), listener=listener)

    def show(result: Any) -> None:
        table = Table(box=box.SIMPLE_HEAD)
        for heading in ("heads", "a step", "an epoch", "of one head's", "each, of one's"):
            table.add_column(heading, justify="right")
        for row in result.groups:
            table.add_row(
                str(row.heads),
                f"{row.step:,.1f} ms",
                duration_text(row.epoch),
                f"{row.ratio:.2f}",
                f"{row.ratio / row.heads:.2f}",
            )
        machine = ", ".join(f"{name} {value}" for name, value in result.machine.items())
        out(table, "an epoch: 585,317 frames, evaluated on 280,532, as Aff-Wild2 has for expr", f"machine: {machine}")

    run(as_json, work, show)


def bench_store(given: dict[str, Any], as_json: bool) -> None:
    """Handle ``affcache bench store``."""

    def work(listener: ConsoleListener, config: ConfigFile) -> Any:
        return affcache.bench_store(resolve(BenchStoreSettings, "bench store", given, config), listener=listener)

    def show(result: Any) -> None:
        table = Table(box=box.SIMPLE_HEAD)
        for heading in ("layout", "4,096 random rows", "in order", "writing"):
            table.add_column(heading, justify="left" if heading == "layout" else "right")
        for name in dict.fromkeys([*result.random, *result.write]):
            table.add_row(
                name,
                f"{result.random[name]:.1f} ms" if name in result.random else "",
                f"{result.sequential[name]:.2f} GB/s" if name in result.sequential else "",
                f"{result.write[name]:.2f} GB/s" if name in result.write else "",
            )
        out(table, f"random reads: {result.ratio:.2f} of a plain numpy.memmap's rate")

    run(as_json, work, show)
