"""How long work talks to whoever started it, without printing anything itself, and what it hands back at the end."""

import dataclasses
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

MOST_LISTED = 5  # names in a message
logger = logging.getLogger("affcache")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence other libraries' log lines and warnings for a while; what goes wrong there is an exception."""
    previous = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


class Listener:
    """Receives what long work has to say. This base class logs warnings and is otherwise silent.

    Pass an instance of a subclass to ``extract``, ``fit`` or ``score`` to show messages and progress.
    """

    def message(self, text: str) -> None:
        """One finished fact worth reading, for instance how many labels were left out of a join."""

    def warning(self, text: str) -> None:
        """Something the user should know before trusting the result."""
        logger.warning(text)

    def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
        """Report that ``done`` of ``total`` units ("crop", "epoch") are finished; ``note`` says how the work stands."""


class Result:
    """Base of the dataclasses that say what was done or found."""

    def to_json(self) -> dict[str, Any]:
        """Return all of it as one JSON object."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]  # subclasses are dataclasses


def counted(number: int, what: str) -> str:
    """Write a number of things: 0 videos, 1 video, 1,200 videos."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def listed(names: Sequence[str]) -> str:
    """Write some names, of many the first and the last."""
    return ", ".join(names if len(names) <= MOST_LISTED else [*names[:2], "...", names[-1]])


def duration_text(seconds: float) -> str:
    """Write a duration for people: 1.2 s, 40 s, 12 min, 3.4 h, 2.1 days."""
    for unit, length in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}" if length > 60 else f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"


def metric_name(metric: str) -> str:
    """Return the name of a metric as papers write it: macro F1 for macro_f1."""
    return "P" if metric == "p" else metric.replace("_", " ").replace("f1", "F1").replace("ccc", "CCC")
