"""A training step against its bare matrix products and against a stand-in for the published loop, each in turn."""

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from affcache.bench.machine import describe_machine
from affcache.bench.published_loop import PublishedProcess, write_published_file
from affcache.bench_settings import BenchFitSettings
from affcache.devices import resolve_device, wait_for
from affcache.progress import Listener
from affcache.settings import build
from affcache.tasks.tasks import EXPR
from affcache.training.data import Frames, batches
from affcache.training.learner import Learner
from affcache.training.settings import FitSettings

PAPER_FRAMES, PAPER_VALIDATION_FRAMES, PAPER_EPOCHS = 585_317, 280_532, 32  # EXPR of Aff-Wild2, 6th ABAW
WARM_UP = 20  # steps before anything is timed

Works = dict[str, tuple[Callable[[int], Any], int]]  # what takes so many steps, and how many of them are timed


@dataclass(frozen=True)
class BenchFitResult:
    """Times of a step, of its bare products and of the published loop's step; medians over rounds."""

    rate: float  # milliseconds a step
    bare: float  # milliseconds of its matrix products alone, in float32
    ratio: float  # rate / bare, the median of the rounds' ratios
    unit: str
    published: float | None  # milliseconds a step of the published loop's stand-in
    speedup: float | None  # published / rate, the median of the rounds' ratios
    evaluation: float  # seconds to evaluate a million frames
    paper_fit: float  # projected seconds of a fit at the paper's size
    rates: list[float]
    bares: list[float]
    batch_size: int
    rows: int
    width: int
    precision: str
    device: str
    machine: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the result as one JSON object."""
        return asdict(self)


def bench_fit(
    settings: BenchFitSettings | None = None, /, *, listener: Listener | None = None, **values: Any
) -> BenchFitResult:
    """Measure a step of the recipe "paper" (expr, 3 x 768, CVaR, SAM) on random embeddings in memory.

    The projection is to 32 epochs of 585,317 frames, each epoch evaluated on 280,532 frames: the expression labels of
    Aff-Wild2. On a GPU a step includes waiting for it, once for each hundred.
    """
    settings = build(BenchFitSettings, values, over=settings)
    listener = listener or Listener()
    device = resolve_device(settings.device)
    recipe = FitSettings(batch_size=settings.batch_size, precision=settings.precision)
    embeddings, frames = random_frames(settings.rows, settings.width, device)
    learner = Learner([recipe], EXPR, settings.width, device)
    works: Works = {
        "step": (steps_of(learner, frames), settings.steps),
        "bare": (_bare_products(recipe, settings.width, device), settings.steps),
    }
    with tempfile.TemporaryDirectory(prefix="affcache-bench-") as folder, ExitStack() as stack:
        if settings.published == "on":
            file = Path(folder) / "published.h5"
            write_published_file(file, embeddings.numpy())
            np.save(f"{file}.labels.npy", frames.labels.cpu().numpy())
            loop = PublishedProcess(file, EXPR.outputs, settings.batch_size, device)
            stack.callback(loop.close)
            works["published"] = (loop.steps, max(1, settings.steps // 10))
        times = in_turn(works, settings.rounds, device, listener)
    evaluation = evaluation_seconds(learner, frames, device)
    rate = statistics.median(times["step"])
    steps = PAPER_EPOCHS * -(-PAPER_FRAMES // settings.batch_size)
    published = times.get("published")
    return BenchFitResult(
        rate=rate,
        bare=statistics.median(times["bare"]),
        ratio=statistics.median(a / b for a, b in zip(times["step"], times["bare"], strict=True)),
        unit="ms a step",
        published=statistics.median(published) if published else None,
        speedup=statistics.median(b / a for a, b in zip(times["step"], published, strict=True)) if published else None,
        evaluation=evaluation * 1e6,
        paper_fit=steps * rate / 1e3 + PAPER_EPOCHS * PAPER_VALIDATION_FRAMES * evaluation,
        rates=times["step"],
        bares=times["bare"],
        batch_size=settings.batch_size,
        rows=settings.rows,
        width=settings.width,
        precision=settings.precision,
        device=str(device),
        machine=describe_machine(device),
    )


def random_frames(rows: int, width: int, device: torch.device) -> tuple[torch.Tensor, Frames]:
    """Return random float16 embeddings (n, D), and as frames on a device, with labels of expr."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(rows, width, generator=generator).half()
    labels = torch.randint(0, EXPR.outputs, (rows,), generator=generator)
    return embeddings, Frames(embeddings.to(device), labels.to(device), torch.zeros_like(labels).to(device))


def in_turn(works: Works, rounds: int, device: torch.device, listener: Listener) -> dict[str, list[float]]:
    """Return the milliseconds a step of each kind of work, for each round in which all had their turn."""
    for work, steps in works.values():
        work(min(WARM_UP, steps))
    times: dict[str, list[float]] = {name: [] for name in works}
    for done in range(rounds):
        for name, (work, steps) in works.items():
            wait_for(device)
            start = time.perf_counter()
            work(steps)
            wait_for(device)
            times[name].append((time.perf_counter() - start) / steps * 1e3)
        listener.progress(done + 1, rounds, "round")
    return times


def steps_of(learner: Learner, frames: Frames) -> Callable[[int], None]:
    """Return a function that takes so many steps of the core, on batches in a random order."""
    size = learner.settings.batch_size
    generator = torch.Generator().manual_seed(1)

    def take(count: int) -> None:
        order = torch.randint(0, len(frames), (learner.heads.count, count * size), generator=generator)
        order = order.to(frames.labels.device)
        for batch in batches(order, size):
            learner.step(frames, batch)

    return take


def _bare_products(recipe: FitSettings, width: int, device: torch.device) -> Callable[[int], None]:
    """Return a function that makes the matrix products of so many SAM steps and nothing else.

    Two passes; in each, of every hidden layer: forward, the weight's gradient, and but for the first the input's.
    In float32, as ``nn.Linear`` has them; the eight logits are left out.
    """
    inputs = [width, *[recipe.hidden_width] * (recipe.hidden_layers - 1)]
    weights = [torch.randn(recipe.hidden_width, size, device=device) for size in inputs]
    batch = [torch.randn(recipe.batch_size, size, device=device) for size in inputs]
    gradient = torch.randn(recipe.batch_size, recipe.hidden_width, device=device)
    product, of_weight = torch.empty_like(gradient), [torch.empty_like(weight) for weight in weights]
    of_input = torch.empty_like(gradient)

    def take(count: int) -> None:
        for _ in range(2 * count):
            for layer, (weight, hidden) in enumerate(zip(weights, batch, strict=True)):
                torch.mm(hidden, weight.T, out=product)
                torch.mm(gradient.T, hidden, out=of_weight[layer])
                if layer:
                    torch.mm(gradient, weight, out=of_input)

    return take


def evaluation_seconds(learner: Learner, frames: Frames, device: torch.device) -> float:
    """Return the seconds to evaluate a frame."""
    learner.predict(frames)
    wait_for(device)
    start = time.perf_counter()
    learner.predict(frames)
    wait_for(device)
    return (time.perf_counter() - start) / len(frames)
