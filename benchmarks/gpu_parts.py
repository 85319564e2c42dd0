"""The parts of ``python -m benchmarks gpu``: each measures one thing on a device and says it in numbers and a note."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from affcache.devices import wait_for
from affcache.encoders.encoder import Encoder, Weights
from affcache.encoders.loading import check_faces, load_weights, smallest_cosine
from affcache.extraction.doctor import bare_encoder, batch_size_of
from affcache.extraction.tuning import tune_encoder
from affcache.progress import Listener, duration_text
from affcache.settings import MODEL
from affcache.tasks.tasks import TASKS
from affcache.training.data import Frames
from affcache.training.learner import Learner
from affcache.training.settings import FitSettings
from benchmarks.ablate import bench_ablate
from benchmarks.extract import compare, like_extract
from benchmarks.fit import (
    PAPER_EPOCHS,
    PAPER_FRAMES,
    PAPER_VALIDATION_FRAMES,
    bench_fit,
    in_turn,
    random_frames,
    steps_of,
)
from benchmarks.settings import BenchExtractSettings
from benchmarks.shared import seconds_of, temporary_folder

ROOT = Path(__file__).parents[1]
TESTS = "tests/training/test_cuda_graph.py"
WEIGHTS = "random:0"  # as fast as any, and nothing has to be fetched
EXPR = TASKS["expr"]


class SkippedPartError(Exception):
    """A part has nothing to measure here, or no time for it."""


@dataclass(frozen=True)
class Sizes:
    """How much each part measures."""

    seconds: float  # of each measurement of an encoder, about
    batch_sizes: tuple[int, ...]  # crops per call of the bare encoder
    rows: int  # embeddings that steps are made on
    width: int
    steps: int
    rounds: int
    heads: tuple[int, ...]  # side by side
    frames: int  # of a real epoch
    validation_frames: int
    published: str  # whether the reference loop runs too


FULL = Sizes(
    seconds=5,
    batch_sizes=(32, 64, 128, 256, 512, 1024),
    rows=20_000,
    width=768,
    steps=1_000,
    rounds=5,
    heads=(4, 16, 64),
    frames=PAPER_FRAMES,
    validation_frames=PAPER_VALIDATION_FRAMES,
    published="on",
)
TOY = Sizes(
    seconds=0.01,
    batch_sizes=(2, 4),
    rows=64,
    width=16,
    steps=3,
    rounds=2,
    heads=(2,),
    frames=200,
    validation_frames=100,
    published="off",
)


@dataclass(frozen=True)
class Found:
    """What a part measured: an object for gpu.json, most with rate, bare, ratio and unit, and a note for people."""

    result: dict[str, Any]
    note: str


class Bench:
    """What parts share: the device, the sizes, an encoder that is loaded once, and when time is up.

    Args:
        device: what is measured.
        sizes: how much of it.
        model: the encoder, by the name that ``extract`` knows it by.
        deadline: on the clock of ``time.perf_counter``.
    """

    def __init__(self, device: torch.device, sizes: Sizes, model: str = MODEL, deadline: float = float("inf")) -> None:
        self.device, self.sizes, self.model, self.deadline = device, sizes, model, deadline
        self._encoders: dict[tuple[str, str], Encoder] = {}

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.deadline - time.perf_counter()

    @cached_property
    def weights(self) -> Weights:
        """The encoder's weights, random ones."""
        return load_weights(self.model, WEIGHTS)

    def extract_settings(self, precision: str, compile: str = "off", **more: Any) -> BenchExtractSettings:
        """Return the settings of one comparison of the pipeline with the bare encoder."""
        return BenchExtractSettings(
            model=self.model,
            pretrained=WEIGHTS,
            precision=precision,
            compile=compile,
            device=str(self.device),
            seconds=self.sizes.seconds,
            **more,
        )

    def encoder(self, settings: BenchExtractSettings, listener: Listener) -> Encoder:
        """Return the encoder as ``extract`` would run it; one that was made for an earlier part serves again."""
        how = (settings.precision, settings.compile)
        if how not in self._encoders:
            self._encoders[how] = tune_encoder(self.weights, like_extract(settings), {}, listener)
        return self._encoders[how]


def recorded_step_tests(bench: Bench, listener: Listener) -> Found:
    """Run the tests of recorded steps by themselves; on a GPU they hold replays to the steps they stand for."""
    with temporary_folder() as folder:
        report = Path(folder) / "tests.xml"
        # another torch's warnings are no failures, and no flag of pyproject.toml may leave tests out
        flags = ["-q", "-p", "no:cacheprovider", "-o", "addopts=", "-W", "default", f"--junit-xml={report}"]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *flags, TESTS],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode not in (0, 1):  # all passed, or some failed: others mean that none could be run
            raise RuntimeError(f"pytest {TESTS} ended with {done.returncode}: {(done.stdout + done.stderr)[-500:]}")
        counts = counts_of(report)
    note = ", ".join(f"{counts[word]} {word}" for word in ("passed", "failed", "skipped"))
    return Found(counts, "; ".join([note, *counts["names"]]))


def counts_of(report: Path) -> dict[str, Any]:
    """Return how many tests of a JUnit report passed, failed and were skipped, and the names of those that failed."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case.get("name", "") for case in cases if {"failure", "error"} & {child.tag for child in case}]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "passed": len(cases) - len(failed) - skipped,
        "failed": len(failed),
        "skipped": skipped,
        "names": failed,
    }


def step(bench: Bench, listener: Listener, *, precision: str) -> Found:
    """Measure a step, recorded where there is a GPU, against its bare products; in fp32 the reference loop too."""
    sizes = bench.sizes
    result = bench_fit(
        rows=sizes.rows,
        width=sizes.width,
        steps=sizes.steps,
        rounds=sizes.rounds,
        precision=precision,
        published=sizes.published if precision == "fp32" else "off",
        device=str(bench.device),
        listener=listener,
    )
    notes = [f"a fit at the paper's size {duration_text(result.paper_fit)}"]
    if result.published is not None:
        notes.append(f"the reference loop {result.published:.1f} ms, {result.speedup:.1f} times as long")
    return Found(result.to_json(), "; ".join(notes))


def recording(bench: Bench, listener: Listener) -> Found:
    """Measure what recording a step as a CUDA graph buys: the same steps replayed, and made one by one."""
    if bench.device.type != "cuda":
        raise SkippedPartError("steps are recorded on a GPU alone")
    sizes = bench.sizes
    _, frames = random_frames(sizes.rows, sizes.width, bench.device)
    recorded, plain = (Learner([FitSettings()], EXPR, sizes.width, bench.device) for _ in range(2))
    plain._records = False
    works = {name: (steps_of(of, frames), sizes.steps) for name, of in (("recorded", recorded), ("plain", plain))}
    times = in_turn(works, sizes.rounds, bench.device, listener)
    result = against(times["recorded"], times["plain"], "ms a step")
    return Found(result, "against the same steps made one by one, without the graph")


def against(ours: list[float], theirs: list[float], unit: str) -> dict[str, Any]:
    """Return the medians of two measurements that took turns, and the median of their ratios."""
    return {
        "rate": statistics.median(ours),
        "bare": statistics.median(theirs),
        "ratio": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
        "unit": unit,
        "rates": ours,
        "bares": theirs,
    }


def epoch(bench: Bench, listener: Listener) -> Found:
    """Train one epoch of the paper's size and evaluate it, against what its steps alone come to.

    Raises:
        SkippedPartError: the steps say that it would go over the budget.
    """
    device, recipe = bench.device, FitSettings()
    frames = frames_on(device, bench.sizes.frames, bench.sizes.width)
    learner = Learner([recipe], EXPR, bench.sizes.width, device)
    works = {"step": (steps_of(learner, frames), bench.sizes.steps)}
    (times,) = in_turn(works, 3, device, Listener()).values()
    expected = -(-len(frames) // recipe.batch_size) * statistics.median(times) / 1e3
    if expected > bench.left:
        raise SkippedPartError(f"an epoch takes {expected:.0f} s, {bench.left:.0f} s of the budget are left")
    listener.message(f"an epoch of {len(frames):,} frames, about {duration_text(expected)}")
    seconds = waited(device, lambda: learner.epoch(frames, 1e-3))
    some = Frames(*(of[: bench.sizes.validation_frames] for of in (frames.embeddings, frames.labels, frames.videos)))
    evaluation = waited(device, lambda: learner.predict(some))
    fit = PAPER_EPOCHS * (seconds + evaluation)
    result = {"rate": seconds, "bare": expected, "ratio": seconds / expected, "unit": "s an epoch"}
    sizes = {"frames": len(frames), "validation_frames": len(some)}
    note = f"{len(frames):,} frames against its steps alone; evaluated in {evaluation:.2f} s: "
    return Found(
        {**result, "evaluation": evaluation, "fit": fit, **sizes}, f"{note}{PAPER_EPOCHS} epochs {duration_text(fit)}"
    )


def frames_on(device: torch.device, rows: int, width: int) -> Frames:
    """Return random frames of expr that were drawn where they lie: at the paper's size they have 0.9 GB."""
    generator = torch.Generator(device).manual_seed(0)
    embeddings = torch.randn(rows, width, device=device, generator=generator, dtype=torch.float16)
    labels = torch.randint(0, EXPR.outputs, (rows,), device=device, generator=generator)
    return Frames(embeddings, labels, torch.zeros_like(labels))


def waited(device: torch.device, work: Callable[[], Any]) -> float:
    """Return the seconds until a device has done some work."""
    wait_for(device)
    start = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - start


def heads(bench: Bench, listener: Listener, *, precision: str) -> Found:
    """Measure heads side by side against one alone."""
    sizes = bench.sizes
    result = bench_ablate(
        heads=sizes.heads,
        rows=sizes.rows,
        width=sizes.width,
        steps=sizes.steps * 3,  # of one head; 64 make a 64th of them
        rounds=sizes.rounds,
        precision=precision,
        device=str(bench.device),
        listener=listener,
    )
    steps = ", ".join(f"{group.heads} heads {group.step:.2f}" for group in result.groups)
    return Found(result.to_json(), f"each of {result.groups[-1].heads} against one alone; ms a step: {steps}")


def extract(bench: Bench, listener: Listener, *, precision: str, workers: int | None = None, rounds: int = 3) -> Found:
    """Measure the pipeline against the bare encoder."""
    settings = bench.extract_settings(precision, workers=workers, rounds=rounds)
    result = compare(bench.encoder(settings, listener), settings, listener)
    return Found(
        result.to_json(),
        f"{result.precision}, {result.batch_size} crops a call, decoding threads: {result.workers}; "
        f"{result.bottleneck}",
    )


def extract_fp32(bench: Bench, listener: Listener) -> Found:
    """Measure the pipeline in fp32, and how near the faces' embeddings in bf16 come to it."""
    found = extract(bench, listener, precision="fp32", rounds=2)
    exact = bench.encoder(bench.extract_settings("fp32"), listener)
    fast = bench.encoder(bench.extract_settings("bf16"), listener)
    cosine = smallest_cosine(fast.encode(check_faces()), exact.encode(check_faces()))
    return Found({**found.result, "bf16_cosine": cosine}, f"{found.note}; bf16 agrees to a cosine of {cosine:.6f}")


def extract_compiled(bench: Bench, listener: Listener) -> Found:
    """Measure the pipeline with a compiled encoder, what compiling takes, and what it buys the encoder alone.

    Raises:
        RuntimeError: torch.compile did not work, or changed the embeddings; a warning says which.
    """
    settings = bench.extract_settings("bf16", compile="on")
    plain = bench.encoder(bench.extract_settings("bf16"), listener)
    start = time.perf_counter()
    encoder = bench.encoder(settings, listener)
    compiling = time.perf_counter() - start
    if encoder.compiled is None:
        raise RuntimeError("the encoder could not be compiled; see the warnings")
    result = compare(encoder, settings, listener)
    uncompiled = bare_rate(plain, bench.sizes.seconds)
    gain = result.bare / uncompiled
    more = {"preparing": compiling, "uncompiled": uncompiled, "gain": gain}
    note = f"ready in {compiling:.0f} s; the bare encoder {gain:.3f} times as fast as uncompiled; {result.bottleneck}"
    return Found({**result.to_json(), **more}, note)


def extract_batches(bench: Bench, listener: Listener) -> Found:
    """Measure the bare encoder at several numbers of crops a call, against the number that ``extract`` takes."""
    encoder = bench.encoder(bench.extract_settings("bf16"), listener)
    usual = batch_size_of(encoder)
    rates = {
        size: bare_rate(replace(encoder, description={**encoder.description, "batch_size": size}), bench.sizes.seconds)
        for size in sorted({*bench.sizes.batch_sizes, usual})
    }
    best = max(rates, key=lambda size: rates[size])
    result = {"rate": rates[best], "bare": rates[usual], "ratio": rates[best] / rates[usual], "unit": "crops/s"}
    listed = ", ".join(f"{size}: {rate:,.0f}" for size, rate in rates.items())
    return Found({**result, "rates": rates, "usual": usual}, f"bare, {best} a call against {usual}; {listed}")


def bare_rate(encoder: Encoder, seconds: float) -> float:
    """Return the crops a second of the bare encoder, measured for a fifth of so many seconds, about."""
    run = bare_encoder(encoder)
    batches = max(2, round(seconds / 5 / seconds_of(lambda: run(1))))
    return batches * batch_size_of(encoder) / seconds_of(lambda: run(batches))
