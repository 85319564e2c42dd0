"""What a person sees: messages and progress on standard error, results on standard output, and the exit code."""

import json
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, redirect_stdout
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from affcache.errors import AffcacheError
from affcache.progress import Listener, counted, duration_text

SECONDS_BETWEEN_LINES = 30.0  # where there is no terminal to draw a bar on

INPUT_ERROR, INTERRUPTED = 2, 130
CONTINUE = ("extract", "ablate", "faces", "predict")  # with the same command


class RateColumn(ProgressColumn):
    """Units a second, or seconds a unit where that reads better."""

    def render(self, task: Task) -> Text:
        """Return the rate of the last half minute."""
        return Text(rate_text(task.finished_speed or task.speed, task.fields["unit"]))


def rate_text(speed: float | None, unit: str) -> str:
    """Write a rate for people: 57 crops/s, 3.1 s/epoch."""
    if not speed:
        return ""
    return f"{speed:,.1f} {unit}s/s" if speed >= 1 else f"{1 / speed:,.1f} s/{unit}"


class ConsoleListener(Listener, AbstractContextManager["ConsoleListener"]):
    """Shows messages, warnings and a progress bar with rate and time left on standard error."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, emoji=False)
        self._bar: Progress | None = None
        self._shown = (-1, "")
        self._last_line = 0.0
        self._began = (0, 0.0)  # what was done then, and when

    def __exit__(self, *error: object) -> None:
        self._end_bar()

    def message(self, text: str) -> None:
        """Print one line."""
        self._end_bar()
        self.console.print(escape(text), soft_wrap=True)

    def warning(self, text: str) -> None:
        """Print one line that stands out."""
        self._end_bar()
        self.console.print(f"[yellow]warning:[/yellow] {escape(text)}", soft_wrap=True)

    def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
        """Move the bar, or print a line now and then where there is no terminal."""
        if not self.console.is_terminal:
            self._line(done, total, unit, note)
            return
        if self._bar is None or (total, unit) != self._shown:
            self._end_bar()
            self._bar = Progress(
                BarColumn(),
                TextColumn("{task.completed:,}/{task.total:,}"),
                RateColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=self.console,
            )
            self._bar.add_task("", total=total, completed=done, note="", unit=unit)
            self._bar.start()
            self._shown = (total, unit)
        self._bar.update(self._bar.task_ids[0], completed=done, note=note)
        if done >= total:
            self._end_bar()

    def _line(self, done: int, total: int, unit: str, note: str) -> None:
        """Print a line half a minute after the last one, with the rate since the work began and the time left."""
        now = time.monotonic()
        if (total, unit) != self._shown:
            self._shown, self._began = (total, unit), (done, now)
        if done < total and now - self._last_line < SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        speed = (done - self._began[0]) / max(now - self._began[1], 1e-9)
        left = (
            f", {rate_text(speed, unit)}, {duration_text((total - done) / speed)} left"
            if done < total and speed
            else ""
        )
        self.console.print(escape(f"{done:,} of {counted(total, unit)}{left}  {note}"), soft_wrap=True)

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def start(app: typer.Typer, name: str) -> None:
    """Run a command line. With --json, a wrong flag or value is one JSON object on standard output too."""
    if "--json" not in sys.argv:
        app(prog_name=name)
    try:
        sys.exit(app(prog_name=name, standalone_mode=False) or 0)
    except Exception as error:
        show, message = getattr(error, "show", None), getattr(error, "format_message", None)
        if show is None or message is None:  # what Typer raises at words that it can't parse has both
            raise
        show()
        print(json.dumps({"error": "UsageError", "message": message()}))
        sys.exit(INPUT_ERROR)


def interrupted(name: str, said: str) -> str:
    """Say what a command that was interrupted leaves, unless it said so itself, and how it is continued."""
    if name in CONTINUE:
        said = f"what was finished is kept; this continues: {shlex.join(['affcache', *sys.argv[1:]])}"
    return f"Interrupted: {said or 'the same command begins anew'}"


def run(name: str, as_json: bool, work: Callable[[Listener], Any], show: Callable[[Any], None]) -> Any:
    """Do a command's work, print its result and return it; what went wrong becomes a message and an exit code."""
    with ConsoleListener() as listener:
        try:
            with redirect_stdout(sys.stderr):  # Ray prints what it has to say of lost workers
                result = work(listener)
        except (AffcacheError, KeyboardInterrupt) as error:
            failed = isinstance(error, AffcacheError)
            kind = type(error).__name__ if failed else "Interrupted"
            message = str(error) if failed else interrupted(name, str(error))
            listener.message(f"Error: {message}" if failed else message)
            if as_json:
                print(json.dumps({"error": kind, "message": message}))
            raise typer.Exit(INPUT_ERROR if failed else INTERRUPTED) from None
    if as_json:
        print(json.dumps(result if isinstance(result, dict) else result.to_json()))
    else:
        show(result)
    return result


def out(*things: Any) -> None:
    """Print for people on standard output."""
    console = Console(highlight=False, markup=False, emoji=False)  # a path may hold [brackets] and :colons:
    for thing in things:
        console.print(thing, soft_wrap=isinstance(thing, str))
