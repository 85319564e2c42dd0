"""The command ``python -m benchmarks``: one benchmark each, with flags made from its settings class."""

import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

if {"fit", "ablate", "gpu"}.intersection(sys.argv[1:2]):  # as affcache fit and ablate run
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import typer

from affcache.settings import Settings
from benchmarks import ablate, extract, fit, gpu, predict, settings, show, store
from cli.console import run, start
from cli.options import Handler, add, parameters_of

NAME = "python -m benchmarks"

app = typer.Typer(
    name=NAME,
    help="Measure a rate, and the bare limit in the same run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: its settings, what measures, what prints the result, and two examples of its flags."""

    settings: type[Settings]
    measure: Callable[..., Any]
    show: Callable[[Any], None]
    examples: tuple[str, str]


BENCHMARKS = {
    "extract": Benchmark(
        settings.BenchExtractSettings,
        extract.bench_extract,
        show.extract,
        ("", "--model ViT-B-32 --crops my/faces --device cpu --seconds 10"),
    ),
    "predict": Benchmark(
        settings.BenchPredictSettings,
        predict.bench_predict,
        show.predict,
        ("--video clip.mp4", "--video clip.mp4 --model ViT-B-32 --times 4 --json"),
    ),
    "fit": Benchmark(settings.BenchFitSettings, fit.bench_fit, show.fit, ("", "--precision bf16 --steps 500 --json")),
    "ablate": Benchmark(
        settings.BenchAblateSettings, ablate.bench_ablate, show.ablate, ("", "--heads 8 --heads 32 --json")
    ),
    "store": Benchmark(
        settings.BenchStoreSettings, store.bench_store, show.store, ("", "--rows 400000 --folder /scratch --json")
    ),
    "gpu": Benchmark(
        settings.BenchGpuSettings,
        gpu.bench_gpu,
        show.gpu,
        ("", "--parts extract --parts extract-compiled --out /scratch/gpu.json"),
    ),
}


def handler_of(benchmark: Benchmark) -> Handler:
    """Return what a benchmark's command does with its flags; affcache.toml has no say in a measurement."""

    def handle(given: dict[str, Any], as_json: bool) -> None:
        run("", as_json, lambda listener: benchmark.measure(listener=listener, **given), benchmark.show)

    return handle


for name, benchmark in BENCHMARKS.items():
    lines = [f"{NAME} {name} {flags}".rstrip() for flags in benchmark.examples]
    sentence = f"{inspect.getdoc(benchmark.settings)}"
    add(app, name, sentence, handler_of(benchmark), lines, parameters_of(benchmark.settings))


if __name__ == "__main__":
    start(app, NAME)
