"""Write the tables of docs/results.md anew: ablations of a store and its labels, or of the sample that ships.

python docs/make_results.py sample
python docs/make_results.py real --store faces.h5 --annotations labels
python docs/make_results.py two-encoders --store one.h5 --store other.h5 --annotations labels

Of several stores: heads on each alone, on all side by side, and those on each averaged.

The tables go between the lines "<!-- begin NAME -->" and "<!-- end NAME -->". What is finished in --out is kept, so
that the script can be interrupted and called again.
"""

import argparse
import csv
import datetime
import math
import os
import statistics
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does: waiting threads sleep,
os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # but not at once

import h5py
import numpy as np
import torch

import affcache
from affcache.ablation.tables import markdown
from affcache.devices import describe_machine
from affcache.files import shipped
from affcache.progress import metric_name
from affcache.scoring.intervals import FEWEST_VIDEOS, metric_interval
from affcache.tasks.metrics import Table
from affcache.tasks.splits import stripped_name
from affcache.tasks.tasks import find_task

DOCS = Path(__file__).parent
VARIANTS = DOCS / "variants.toml"


def main() -> None:
    """Train what is missing and put the tables in their place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="which tables: a name that docs/results.md has")
    parser.add_argument("--store", type=Path, action="append", help="the embedding store; for the sample it is made")
    parser.add_argument("--annotations", type=Path)
    parser.add_argument("--task", default="expr")
    parser.add_argument("--seeds", type=int, default=5, help="of erm, cvar, sam; the variants have 3")
    parser.add_argument("--out", type=Path, default=Path("ablations"))
    arguments = parser.parse_args()
    with shipped("sample") as sample:
        stores, annotations = arguments.store, arguments.annotations
        if stores is None:
            annotations = sample / "annotations"
            stores = [sample_store(sample, arguments.out / "sample.h5")]
        make = tables if len(stores) == 1 else of_several
        text = make(arguments, stores, annotations)
    put(DOCS / "results.md", arguments.name, text)


def sample_store(sample: Path, store: Path) -> Path:
    """Encode the shipped sample as the demo does."""
    store.parent.mkdir(parents=True, exist_ok=True)
    with shipped("practice_encoder") as encoder:
        model = f"local-dir:{encoder}"
        affcache.extract(crops=(sample / "cropped_aligned",), store=store, model=model, pretrained="random:0")
    return store


def tables(arguments: argparse.Namespace, stores: list[Path], annotations: Path) -> str:
    """Return the Markdown of both ablations."""
    common = {"task": arguments.task, "store": stores, "annotations": annotations, "keep": "none"}
    folder = arguments.out / arguments.name
    paper = affcache.ablate(preset="paper", seeds=arguments.seeds, out=folder / "paper", **common)
    parts = [f"CVaR and SAM, {arguments.seeds} seeds:\n", markdown(paper.rows, heldout=False)]
    if arguments.task == "expr":  # variants.toml has settings that only classes have
        variants = affcache.ablate(list=VARIANTS, seeds=3, out=folder / "variants", **common)
        parts += ['Variants of the recipe "paper", 3 seeds:\n', markdown(variants.rows, heldout=False)]
    return "\n".join([*parts, made_with()])


def of_several(arguments: argparse.Namespace, stores: list[Path], annotations: Path) -> str:
    """Return the Markdown of heads on each store, on all side by side, and of the average of those on each."""
    each = [*map(str, stores), "+".join(map(str, stores))]
    grid = affcache.ablate(
        task=arguments.task, annotations=annotations, vary=f"store={','.join(each)}", normalize="standard",
        seeds=arguments.seeds, keep="all", out=arguments.out / arguments.name,
    )  # fmt: skip
    with (Path(grid.out) / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    runs = {name: [Path(grid.out, row["run"]) for row in rows if row["setting"] == name] for name in names_of(stores)}
    alone = list(runs.values())[: len(stores)]
    chosen = {name: [(run,) for run in of] for name, of in runs.items()}
    chosen["averaged"] = list(zip(*alone, strict=True))
    task = find_task(arguments.task)
    found = {name: [scored(run, task) for run in of] for name, of in chosen.items()}
    base = [sums for _, sums in next(iter(found.values()))]
    common = task.videos_of_outputs(base[0]) >= FEWEST_VIDEOS  # (C,)
    outputs = np.flatnonzero(common).tolist()
    text = [
        f"| stores | {metric_name(task.metric)} | s.d. | difference, classes in 3 videos | 95 % |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, of in found.items():
        values = [value for value, _ in of]
        line = [name, f"{statistics.fmean(values):.3f}", f"{statistics.stdev(values):.3f}", "base", ""]
        if name != next(iter(found)):
            difference = metric_interval(task, [sums for _, sums in of], base, outputs)
            low, high = difference.bounds or (math.nan, math.nan)
            line[3:] = f"{difference.value:+.3f}", f"{low:+.3f} to {high:+.3f}"
        text.append(f"| {' | '.join(line)} |")
    left_out = ", ".join(name for name, there in zip(task.classes, common, strict=True) if not there) or "none"
    return "\n".join([*text, "", f"{arguments.seeds} seeds; left out of the differences: {left_out}. {made_with()}"])


def names_of(stores: list[Path]) -> list[str]:
    """Return what the grid calls each store, and all side by side."""
    return [*(store.stem for store in stores), "+".join(store.stem for store in stores)]


def scored(runs: tuple[Path, ...], task: affcache.Task) -> tuple[float, Table]:
    """Return the metric of runs that are averaged, and the sums (G, C, S) of validation's videos."""
    result = affcache.score(run=runs)
    with h5py.File(result.predictions_file) as file:
        names = np.array([stripped_name(name) for name in file["video_name"].asstr()[:]])[file["video"][:]]
        found, video = np.unique(names, return_inverse=True)
        return result.scores.value, task.sums_by_video(file["labels"][:], file["decided"][:], video, len(found))


def made_with() -> str:
    """Say when and on what machine a table was made."""
    machine = describe_machine(torch.device("cpu"))
    where = f"torch {machine['torch']}, {machine['cores']} cores of {machine['processor']}"
    return f"Made on {datetime.date.today()} with {where}.\n"


def put(page: Path, name: str, text: str) -> None:
    """Put a text between the lines of a name in a page, and print it."""
    content, begin, end = page.read_text(encoding="utf-8"), f"<!-- begin {name} -->\n", f"<!-- end {name} -->\n"
    if begin not in content or end not in content:
        raise SystemExit(f"docs/{page.name} has no lines {begin.strip()} and {end.strip()}. Expected both. Add them.")
    before, _, rest = content.partition(begin)
    page.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
