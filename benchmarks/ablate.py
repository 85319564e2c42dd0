"""Heads side by side against one head alone, each in turn."""

import statistics
from dataclasses import dataclass, replace
from typing import Any

from affcache.devices import describe_machine, resolve_device
from affcache.progress import Listener, Result
from affcache.settings import build
from affcache.tasks.tasks import TASKS
from affcache.training.learner import Learner
from affcache.training.settings import FitSettings
from benchmarks.fit import (
    PAPER_FRAMES,
    PAPER_VALIDATION_FRAMES,
    Works,
    evaluation_seconds,
    in_turn,
    random_frames,
    steps_of,
)
from benchmarks.settings import BenchAblateSettings

FEWEST_STEPS = 3


@dataclass(frozen=True)
class GroupTime:
    """What H heads side by side take."""

    heads: int
    step: float  # milliseconds, all heads
    evaluation: float  # seconds for a million frames, all heads
    epoch: float  # seconds at the paper's size, all heads, with its evaluation
    ratio: float  # of one head's epoch, median over rounds
    steps: list[float]  # of each round


@dataclass(frozen=True)
class BenchAblateResult(Result):
    """Times of one head and of heads side by side."""

    rate: float  # seconds an epoch for each of the largest number of heads
    bare: float  # seconds an epoch of one head alone
    ratio: float  # rate / bare
    unit: str
    groups: list[GroupTime]
    batch_size: int
    rows: int
    width: int
    precision: str
    device: str
    machine: dict[str, Any]


def bench_ablate(
    settings: BenchAblateSettings | None = None, /, *, listener: Listener | None = None, **values: Any
) -> BenchAblateResult:
    """Measure steps of the recipe "paper" (expr, 3 x 768, CVaR, SAM) for one head and for H, with seeds of their own.

    An epoch is worked out at the paper's size, evaluation included, as a grid's cells would take it.
    """
    settings = build(BenchAblateSettings, values, over=settings)
    listener = listener or Listener()
    device = resolve_device(settings.device)
    recipe = FitSettings(batch_size=settings.batch_size, precision=settings.precision)
    _, frames = random_frames(settings.rows, settings.width, device)
    counts = [1, *sorted(set(settings.heads))]
    learners = {
        heads: Learner([replace(recipe, seed=seed) for seed in range(heads)], TASKS["expr"], settings.width, device)
        for heads in counts
    }
    works: Works = {
        str(heads): (steps_of(learner, frames), max(FEWEST_STEPS, settings.steps // heads))
        for heads, learner in learners.items()
    }
    times = in_turn(works, settings.rounds, device, listener)
    evaluations = {heads: evaluation_seconds(learner, frames, device) for heads, learner in learners.items()}
    steps = -(-PAPER_FRAMES // settings.batch_size)
    epochs = {
        heads: [steps * ms / 1e3 + PAPER_VALIDATION_FRAMES * evaluations[heads] for ms in times[str(heads)]]
        for heads in counts
    }
    groups = [
        GroupTime(
            heads=heads,
            step=statistics.median(times[str(heads)]),
            evaluation=evaluations[heads] * 1e6,
            epoch=statistics.median(epochs[heads]),
            ratio=statistics.median(a / b for a, b in zip(epochs[heads], epochs[1], strict=True)),
            steps=times[str(heads)],
        )
        for heads in counts
    ]
    most = groups[-1]
    return BenchAblateResult(
        rate=most.epoch / most.heads,
        bare=groups[0].epoch,
        ratio=most.ratio / most.heads,
        unit="seconds an epoch a head",
        groups=groups,
        batch_size=settings.batch_size,
        rows=settings.rows,
        width=settings.width,
        precision=settings.precision,
        device=str(device),
        machine=describe_machine(device),
    )
