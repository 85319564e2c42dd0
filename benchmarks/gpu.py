"""All that only a GPU can tell, in one command of a few minutes: part by part, each written down when it is done."""

import gc
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any

import torch

from affcache.devices import describe_machine, on_device, resolve_device
from affcache.errors import AffcacheError, ConfigError, did_you_mean
from affcache.files import shipped, write_json
from affcache.progress import Listener, Result
from affcache.settings import MODEL, build
from benchmarks import gpu_parts
from benchmarks.gpu_parts import FULL, TOY, Bench, Found, SkippedPartError
from benchmarks.settings import BenchGpuSettings

MEASURED, FAILED, SKIPPED, STOPPED = "measured", "failed", "skipped", "stopped"
HEADLINE = "extract"  # the part whose rate, bare limit and ratio stand for the whole
LONGEST_REASON = 2_000  # characters of an error that are kept


@dataclass(frozen=True)
class Part:
    """One measurement, and about how long it takes on an H100: it isn't begun with less of the budget left."""

    measure: Callable[[Bench, Listener], Found]
    seconds: float


# in order: short ones first, and last the one that nobody can say the length of
PARTS = {
    "tests": Part(gpu_parts.recorded_step_tests, 40),
    "step-fp32": Part(partial(gpu_parts.step, precision="fp32"), 45),
    "step-bf16": Part(partial(gpu_parts.step, precision="bf16"), 10),
    "recording": Part(gpu_parts.recording, 10),
    "heads-fp32": Part(partial(gpu_parts.heads, precision="fp32"), 20),
    "heads-bf16": Part(partial(gpu_parts.heads, precision="bf16"), 20),
    "epoch": Part(gpu_parts.epoch, 20),
    "extract": Part(partial(gpu_parts.extract, precision="bf16"), 60),
    "extract-one-worker": Part(partial(gpu_parts.extract, precision="bf16", workers=1, rounds=2), 25),
    "extract-fp32": Part(gpu_parts.extract_fp32, 35),
    "extract-batches": Part(gpu_parts.extract_batches, 15),
    "extract-compiled": Part(gpu_parts.extract_compiled, 60),
}


@dataclass(frozen=True)
class Outcome:
    """How a part went."""

    state: str  # measured, failed, skipped, or stopped at the end of the budget
    seconds: float
    note: str = ""  # what was found, in words
    reason: str = ""  # why nothing was
    warnings: list[str] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)  # as the benchmark of its kind gives it


@dataclass(frozen=True)
class BenchGpuResult(Result):
    """What was found, part by part."""

    rate: float | None  # these four of the part "extract"; None where that wasn't measured
    bare: float | None
    ratio: float | None
    unit: str
    device: str
    toy: bool
    gpu: str | None
    torch: str
    date: str
    seconds: float  # so far
    budget: float  # seconds
    out: str
    parts: dict[str, Outcome]
    machine: dict[str, Any]


class OverBudget(BaseException):
    """The time is up. No Exception, so that nothing takes it for a part's own failure: torch.compile's, say."""


class Noting(Listener):
    """Passes on what it hears, and keeps the warnings."""

    def __init__(self, listener: Listener) -> None:
        self.warnings: list[str] = []
        self._listener = listener

    def message(self, text: str) -> None:
        """Pass on a message."""
        self._listener.message(text)

    def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
        """Pass on how far a part is."""
        self._listener.progress(done, total, unit, note)

    def warning(self, text: str) -> None:
        """Keep a warning, and pass it on."""
        self.warnings.append(text)
        self._listener.warning(text)


def bench_gpu(
    settings: BenchGpuSettings | None = None, /, *, listener: Listener | None = None, **values: Any
) -> BenchGpuResult:
    """Measure all parts, one after the other, within a budget of time; write the results so far after each.

    A part that fails says why, and the others go on. One that would go over the budget isn't begun; one that does is
    stopped. Without a GPU, or with ``toy``, sizes are such that the numbers mean nothing: a rehearsal.

    Raises:
        ConfigError: an unknown part, or a device that isn't there.
        AffcacheError: nothing at all could be measured.
    """
    start = time.perf_counter()
    settings = build(BenchGpuSettings, values, over=settings)
    listener, device = listener or Listener(), resolve_device(settings.device)
    names = chosen(settings.parts)
    toy = settings.toy or device.type != "cuda"
    outcomes: dict[str, Outcome] = {}
    with on_device(device), shipped("practice_encoder") as practice_encoder:
        model, sizes = (f"local-dir:{practice_encoder}", TOY) if toy else (MODEL, FULL)
        bench = Bench(device, sizes, model, start + settings.budget)
        for name in names:
            outcomes[name] = attempt(PARTS[name], bench, listener, expected=0 if toy else PARTS[name].seconds)
            listener.message(f"{name}: {words(outcomes[name])}")
            result = summary(settings, outcomes, device, toy=toy, seconds=time.perf_counter() - start)
            write_json(settings.out, result.to_json())
    if not any(outcome.state == MEASURED for outcome in outcomes.values()):
        raise AffcacheError(
            f"Nothing could be measured. Of the first part, {names[0]}: {words(outcomes[names[0]])}. Expected one of "
            f"{', '.join(names)} to work. {settings.out} has the reason of each."
        )
    return result


def chosen(names: Sequence[str]) -> list[str]:
    """Return the parts to measure, in their order; all of them where none is named.

    Raises:
        ConfigError: there is no such part.
    """
    for name in names:
        if name not in PARTS:
            known = ", ".join(PARTS)
            raise ConfigError(f"Unknown part {name!r}{did_you_mean(name, PARTS)}. Expected --parts to be of: {known}.")
    return [name for name in PARTS if name in names or not names]


def attempt(part: Part, bench: Bench, listener: Listener, expected: float) -> Outcome:
    """Measure a part, whatever comes of it: not where the budget is too small for what it is expected to take."""
    if bench.left <= expected:
        return Outcome(
            SKIPPED, 0, reason=f"takes about {expected:.0f} s, {max(bench.left, 0):.0f} s of the budget are left"
        )
    noting, start = Noting(listener), time.perf_counter()
    found, state, reason = Found({}, ""), MEASURED, ""
    try:
        with at_most(bench.left):
            found = part.measure(bench, noting)
    except OverBudget:
        state, reason = STOPPED, "it went on when the budget was used up"
    except SkippedPartError as error:
        state, reason = SKIPPED, str(error)
    except Exception as error:  # a driver, a compiler, memory: anything, and the other parts are worth having
        state, reason = FAILED, f"{type(error).__name__}: {error}"[:LONGEST_REASON]
    free_memory(bench.device)
    return Outcome(state, time.perf_counter() - start, found.note, reason, noting.warnings, found.result)


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise OverBudget in here after so many seconds, where the system has a timer and this is the main thread."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise OverBudget

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def free_memory(device: torch.device) -> None:
    """Give back what a part held, so that the next one has the device for itself."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def words(outcome: Outcome) -> str:
    """Say in a line how a part went."""
    return f"{outcome.state}, {outcome.seconds:.1f} s; {(outcome.note or outcome.reason).partition(chr(10))[0]}"


def summary(
    settings: BenchGpuSettings, outcomes: dict[str, Outcome], device: torch.device, *, toy: bool, seconds: float
) -> BenchGpuResult:
    """Return what there is so far."""
    machine = describe_machine(device)
    headline = outcomes[HEADLINE].result if HEADLINE in outcomes else {}
    return BenchGpuResult(
        rate=headline.get("rate"),
        bare=headline.get("bare"),
        ratio=headline.get("ratio"),
        unit="crops/s",
        device=str(device),
        toy=toy,
        gpu=machine.get("gpu"),
        torch=machine["torch"],
        date=machine["date"],
        seconds=seconds,
        budget=settings.budget,
        out=str(settings.out),
        parts=dict(outcomes),
        machine=machine,
    )
