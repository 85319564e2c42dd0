"""A training step against its bare matrix products and against the reference loop, each in turn."""

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from affcache.devices import describe_machine, resolve_device, wait_for
from affcache.progress import Listener, Result
from affcache.settings import build
from affcache.tasks.tasks import TASKS
from affcache.training.data import Frames, batches
from affcache.training.learner import Learner
from affcache.training.settings import FitSettings
from benchmarks.reference_loop import ReferenceProcess, write_reference_file
from benchmarks.settings import BenchFitSettings
from benchmarks.shared import temporary_folder

PAPER_FRAMES, PAPER_VALIDATION_FRAMES, PAPER_EPOCHS = 585_317, 280_532, 32  # EXPR of Aff-Wild2, 6th ABAW
WARM_UP = 20  # steps before anything is timed

Works = dict[str, tuple[Callable[[int], Any], int]]  # what takes so many steps, and how many of them are timed


@dataclass(frozen=True)
class BenchFitResult(Result):
    """Times of a step, of its bare products and of the reference loop's step; medians over rounds."""

    rate: float  # milliseconds a step
    bare: float  # milliseconds of the matrix products that it needs alone, in its number format
    products: int  # how many these are
    ratio: float  # rate / bare, the median of the rounds' ratios
    unit: str
    published: float | None  # milliseconds a step of the reference loop, a stand-in for the published code's
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


def bench_fit(
    settings: BenchFitSettings | None = None, /, *, listener: Listener | None = None, **values: Any
) -> BenchFitResult:
    """Measure a step of the recipe "paper" (expr, 3 x 768, CVaR, SAM) on random embeddings in memory.

    The projection is to 32 epochs of 585,317 frames, each epoch evaluated on 280,532 frames: the expression labels of
    Aff-Wild2. A GPU is waited for at the end of each measurement.
    """
    settings = build(BenchFitSettings, values, over=settings)
    listener = listener or Listener()
    device = resolve_device(settings.device)
    recipe = FitSettings(batch_size=settings.batch_size, precision=settings.precision)
    embeddings, frames = random_frames(settings.rows, settings.width, device)
    learner = Learner([recipe], TASKS["expr"], settings.width, device)
    works: Works = {
        "step": (steps_of(learner, frames), settings.steps),
        "bare": (bare_products(recipe, settings.width, device), settings.steps),
    }
    with temporary_folder() as folder, ExitStack() as stack:
        if settings.published == "on":
            file = Path(folder) / "published.h5"
            write_reference_file(file, embeddings.numpy())
            np.save(f"{file}.labels.npy", frames.labels.cpu().numpy())
            loop = ReferenceProcess(file, TASKS["expr"].outputs, settings.batch_size, device)
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
        products=products_needed(recipe.hidden_layers),
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
    labels = torch.randint(0, TASKS["expr"].outputs, (rows,), generator=generator)
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


def products_needed(layers: int) -> int:
    """Return how many products with hidden layers a SAM step can't do without; two plain passes have 6 L - 2.

    Each pass needs a layer's product with the batch and, but for the first layer, with the gradient that comes back;
    the second pass the weights' gradients. Those of the first pass only say where the second one runs, and where a
    batch is far smaller than a layer they can stay factors. The first layer's product is known from the first pass.
    """
    return 5 * layers - 3


def bare_products(recipe: FitSettings, width: int, device: torch.device) -> Callable[[int], None]:
    """Return a function that makes the products that so many SAM steps need and nothing else.

    With weights in the recipe's number format, the weights' gradients in float32, as a step has them; the eight logits
    are left out. On a GPU they are replayed from a graph, as steps are.
    """
    inputs = [width, *[recipe.hidden_width] * (recipe.hidden_layers - 1)]
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    weights = [torch.randn(recipe.hidden_width, size, device=device, dtype=dtype) for size in inputs]
    batch = [torch.randn(recipe.batch_size, size, device=device) for size in inputs]
    gradient = torch.randn(recipe.batch_size, recipe.hidden_width, device=device)
    operands, come_back = [hidden.to(dtype) for hidden in batch], gradient.to(dtype)
    product, of_weights = torch.empty_like(come_back), [weight.float() for weight in weights]

    def once() -> None:
        for second_pass in (False, True):
            for layer, weight in enumerate(weights):
                if layer or not second_pass:
                    torch.mm(operands[layer], weight.T, out=product)
                if layer:
                    torch.mm(come_back, weight, out=product)
                if second_pass:
                    torch.mm(gradient.T, batch[layer], out=of_weights[layer])

    make = _recorded(once) if device.type == "cuda" else once

    def take(count: int) -> None:
        for _ in range(count):
            make()

    return take


def _recorded(work: Callable[[], None]) -> Callable[[], None]:
    """Return what replays some work as a CUDA graph."""
    work()  # libraries set themselves up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def evaluation_seconds(learner: Learner, frames: Frames, device: torch.device) -> float:
    """Return the seconds to evaluate a frame."""
    learner.predict(frames)
    wait_for(device)
    start = time.perf_counter()
    learner.predict(frames)
    wait_for(device)
    return (time.perf_counter() - start) / len(frames)
