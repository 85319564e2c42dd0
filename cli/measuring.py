"""The command that looks instead of working: doctor."""

from typing import Any

import typer
from rich.table import Table
from rich.text import Text

import affcache
from affcache.extraction.settings import DoctorSettings
from affcache.settings import ConfigFile, resolve

from .commands import INPUT_ERROR, out, run
from .console import ConsoleListener

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
