"""Cross-validation of the real crops: five folds, killed in the middle and called again."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from sklearn.metrics import f1_score

import affcache
from affcache.tasks.splits import stripped_name
from tests.conftest import REAL

REPOSITORY = Path(__file__).parents[2]
GRID = ["--folds", "5", "--seeds", "1", "--vary", "head=linear,ridge", "--epochs", "3", "--rho", "0", "--device", "cpu"]


def start(store: Path, out: Path) -> "subprocess.Popen[str]":
    words = ["ablate", "--store", str(store), "--annotations", str(REAL / "annotations"), "--out", str(out), *GRID]
    return subprocess.Popen(
        [sys.executable, "-c", "from affcache.cli.app import main; main()", *words],
        cwd=out.parent,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def results(out: Path) -> dict[str, bytes]:
    names = ("*.csv", "summary.*", "best.json", "out_of_fold/*", "figures/*", "cells/*/*.safetensors")
    return {str(path.relative_to(out)): path.read_bytes() for name in names for path in out.glob(name)}


@pytest.mark.real
@pytest.mark.kill
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_five_folds_killed_in_the_middle_end_in_the_same_tables(real_store: Path, tmp_path: Path) -> None:
    with start(real_store, tmp_path / "whole") as process:
        said, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "epochs chosen on" in said
    killed = tmp_path / "killed"
    with start(real_store, killed) as process:
        while process.poll() is None and len(list(killed.glob("cells/*/result.json"))) < 4:
            time.sleep(0.01)
        process.kill()
    assert 0 < len(list(killed.glob("cells/*/result.json"))) < 10
    with start(real_store, killed) as process:
        _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert results(killed) == results(tmp_path / "whole")
    _check(killed, real_store)
    last = affcache.fit(train_on="all", as_=killed, run=tmp_path / "last")
    assert last.frames == 3996


def _check(out: Path, store: Path) -> None:
    """Every labelled frame once, no person in two folds, and the table's figure is scikit-learn's."""
    with (out / "summary.csv").open(newline="") as file:
        best = max(csv.DictReader(file), key=lambda row: float(row["chosen_by"]))
    values = []
    for seed in range(1):
        with h5py.File(out / "out_of_fold" / f"best-seed{seed}.h5") as file:
            rows, labels, decided = (file[name][()] for name in ("rows", "labels", "decided"))
            names, folds = file["video_name"].asstr()[:][file["video"][()]], file["fold"][()]
        assert len(rows) == len(set(rows.tolist())) == 3996
        of_name: dict[str, set[int]] = {}
        for name, fold in zip(names, folds.tolist(), strict=True):
            of_name.setdefault(stripped_name(name), set()).add(fold)
        assert all(len(found) == 1 for found in of_name.values())
        assert np.bincount(folds)[1:].min() > 400, "of about as many frames each"
        values.append(f1_score(labels, decided, labels=range(8), average="macro", zero_division=0))
    assert float(best["mean"]) == pytest.approx(np.mean(values), abs=1e-9)
    assert affcache.EmbeddingStore.open(store).summary()["rows"] == 4103
