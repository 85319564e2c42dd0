"""``affcache fit`` killed at random moments and continued: history and head are those of an uninterrupted run.

AFFCACHE_TEST_KILLS=50 sets how often; five times are what CI has time for.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MakeData

KILLS = int(os.environ.get("AFFCACHE_TEST_KILLS", "5"))
REPOSITORY = Path(__file__).parents[2]
RECIPE = ["--epochs", "40", "--hidden-layers", "2", "--hidden-width", "32", "--batch-size", "8", "--rho", "0.05"]
SETTINGS = [*RECIPE, "--cvar-level", "set", "--stride", "2", "--frames-per-epoch", "60", "--device", "cpu"]


def start(folder: Path, run: str, *more: str) -> "subprocess.Popen[str]":
    words = ["fit", "--task", "au", "--store", "au.h5", "--annotations", "labels", "--run", run, *SETTINGS, *more]
    return subprocess.Popen(
        [sys.executable, "-m", "affcache.cli", *words, "--json"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def history(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's history but for what a clock says."""
    entries = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return [{name: value for name, value in entry.items() if "seconds" not in name} for entry in entries]


def finished(run: Path) -> int:
    """How many epochs the history has, whole lines that they are."""
    return (run / "history.jsonl").read_text().count("\n") if (run / "history.jsonl").exists() else 0


@pytest.mark.kill
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_killed_at_random_moments(learnable: MakeData, tmp_path: Path) -> None:
    learnable("au")
    with start(tmp_path, "whole") as process:
        _, errors = process.communicate()
    assert process.returncode == 0, errors
    generator, killed, epochs_at_kills = random.Random(0), 0, []
    while killed < KILLS:
        run = tmp_path / "killed"
        with start(tmp_path, "killed", *(["--resume"] if (run / "config.json").exists() else [])) as process:
            # from the first epoch on: importing torch takes longer than all of them
            before = finished(run)
            while process.poll() is None and not (run / "last.safetensors").exists():
                time.sleep(0.01)
            while process.poll() is None and finished(run) <= before:
                time.sleep(0.001)
            try:
                process.wait(timeout=generator.uniform(0, 0.15))
            except subprocess.TimeoutExpired:
                process.kill()
            _, errors = process.communicate()
        if process.returncode == 0:  # done before the kill: begin anew
            assert history(run) == history(tmp_path / "whole")
            for path in run.iterdir():
                path.unlink()
            continue
        assert process.returncode == -signal.SIGKILL, errors
        killed += 1
        epochs_at_kills.append(finished(run))
    with start(tmp_path, "killed", "--resume") as process:
        _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert history(tmp_path / "killed") == history(tmp_path / "whole")
    for name in ("head.safetensors", "last.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len(set(epochs_at_kills)) > 1, "all kills met the same epoch"
    print(f"epochs finished at each of {KILLS} kills: {epochs_at_kills}")
