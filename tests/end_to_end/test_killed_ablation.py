"""``affcache ablate`` killed at random moments and called again: all results are those of an uninterrupted grid."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import MakeData

KILLS = int(os.environ.get("AFFCACHE_TEST_KILLS", "4"))
REPOSITORY = Path(__file__).parents[2]
GRID = ["--vary", "alpha=0.3,0.5,1", "--vary", "rho=0,0.05,0.1", "--seeds", "3"]
RECIPE = ["--epochs", "12", "--hidden-layers", "2", "--hidden-width", "32", "--batch-size", "8", "--device", "cpu"]
# groups of four heads, a checkpoint after every epoch
PROGRAM = """
from affcache.ablation import train as grouping
grouping.SECONDS_BETWEEN_CHECKPOINTS = 0.0
grouping.MOST_HEADS["cpu"] = 4
from affcache.cli.app import main
main()
"""


def start(folder: Path, out: str, *more: str) -> "subprocess.Popen[str]":
    words = ["ablate", "--store", "expr.h5", "--annotations", "labels", "--out", out, *GRID, *RECIPE, "--json", *more]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def results(out: Path) -> dict[str, bytes]:
    """All tables, pictures and results; what a clock says is only in histories."""
    files = [*out.glob("*.csv"), *out.glob("summary.*"), *out.glob("figures/*"), *out.glob("cells/*/result.json")]
    files += [*out.glob("cells/*/*.safetensors"), *out.glob("out_of_fold/*"), out / "best.json"]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def state(out: Path) -> tuple[int, int]:
    """How many cells are finished, and when the newest checkpoint was written."""
    checkpoints = [path.stat().st_mtime_ns for path in out.glob("groups/*.safetensors") if path.exists()]
    return len(list(out.glob("cells/*/result.json"))), max(checkpoints, default=0)


@pytest.mark.kill
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
@pytest.mark.parametrize(("more", "cells"), [((), 27), (("--folds", "3", "--seeds", "2"), 54)], ids=["", "folds"])
def test_killed_at_random_moments(learnable: MakeData, tmp_path: Path, more: tuple[str, ...], cells: int) -> None:
    learnable(videos=8)
    with start(tmp_path, "whole", *more) as process:
        _, errors = process.communicate()
    assert process.returncode == 0, errors
    whole, generator, finished = results(tmp_path / "whole"), random.Random(0), []
    assert sum("result.json" in name for name in whole) == cells
    out = tmp_path / "killed"
    for _ in range(KILLS):
        with start(tmp_path, "killed", *more) as process:
            before = state(out)
            while process.poll() is None and state(out) == before:
                time.sleep(0.002)  # importing torch takes longer than the grid
            try:
                process.wait(timeout=generator.uniform(0, 0.5))
            except subprocess.TimeoutExpired:
                process.kill()
            _, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors
        finished.append(state(out)[0])
    assert finished[0] < cells, "the first kill came too late"
    with start(tmp_path, "killed", *more) as process:
        _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert results(out) == whole
    print(f"cells finished at each of {KILLS} kills: {finished}")
