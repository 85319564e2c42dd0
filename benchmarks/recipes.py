"""Scores and times of the recipes in docs/results.md: several seeds of each on one store and its labels.

python benchmarks/recipes.py --store faces.h5 --annotations labels --out results.json
python benchmarks/recipes.py --store faces.h5 --annotations labels --only erm cvar --seeds 3

Every recipe is the recipe "paper" with the settings named here. A fit that --out already holds is not made again.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import affcache

PLAIN: Mapping[str, Any] = {"alpha": 1.0, "rho": 0.0}
RECIPES: dict[str, Mapping[str, Any]] = {
    "erm": PLAIN,
    "cvar": {"rho": 0.0},
    "sam": {"alpha": 1.0},
    "cvar+sam": {},
    "cvar+sam, bf16": {"precision": "bf16"},
    "cvar+sam, batch 256, lr x 8": {"batch_size": 256, "lr": 8e-3},
    "cvar+sam, batch 256, lr x 2.8": {"batch_size": 256, "lr": 2.8e-3},
    "cvar+sam, stride 4": {"stride": 4},
    "cvar+sam, stride 16": {"stride": 16},
    "cvar+sam, set level": {"cvar_level": "set"},
    "cvar+sam, balanced": {"class_weights": "balanced"},
    "linear": {"head": "linear"},
    "ridge": {"head": "ridge"},
    "ridge, balanced": {"head": "ridge", "class_weights": "balanced"},
}


def main() -> None:
    """Make the fits that are missing, one at a time, and print a table of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--annotations", type=Path, required=True)
    parser.add_argument("--task", default="expr")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--out", type=Path, default=Path("recipes.json"))
    arguments = parser.parse_args()
    found: dict[str, dict[str, Any]] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for seed in range(arguments.seeds):
        for name in arguments.only:
            if f"{name}/{seed}" in found or (RECIPES[name].get("head") == "ridge" and seed):
                continue
            with tempfile.TemporaryDirectory() as folder:
                result = affcache.fit(
                    task=arguments.task,
                    store=arguments.store,
                    annotations=arguments.annotations,
                    run=Path(folder) / "run",
                    seed=seed,
                    **RECIPES[name],
                )
            found[f"{name}/{seed}"] = {"value": result.value, "epoch": result.best_epoch, "seconds": result.seconds}
            print(f"{name}, seed {seed}: {result.value:.4f} in {result.seconds:.0f} s", flush=True)
            arguments.out.write_text(json.dumps(found, indent=1))
    print(table(found))


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a Markdown table: mean, standard deviation and range of the metric, best epochs, seconds."""
    lines = ["| recipe | mean | standard deviation | seeds | best epoch | seconds |", "|---|---|---|---|---|---|"]
    for name in RECIPES:
        runs = [run for key, run in found.items() if key.rpartition("/")[0] == name]
        if not runs:
            continue
        values = [run["value"] for run in runs]
        spread = f"{statistics.stdev(values):.4f}" if len(values) > 1 else ""
        each = ", ".join(f"{value:.3f}" for value in values)
        epochs = ", ".join(str(run["epoch"]) for run in runs)
        seconds = statistics.median(run["seconds"] for run in runs)
        lines.append(f"| {name} | {statistics.mean(values):.4f} | {spread} | {each} | {epochs} | {seconds:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
