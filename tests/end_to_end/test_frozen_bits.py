"""The bits of stores and heads, held from one commit to the next: what is only moved or renamed changes none of them.

Bits depend on the processor and on torch, so that tests/data/frozen_bits.json keeps a record for each environment in
which one was made. Make one with ``python -m tests.end_to_end.test_frozen_bits``: at a commit whose bits are trusted.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import h5py
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import REAL

RECORD = Path(__file__).parents[1] / "data" / "frozen_bits.json"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def environment() -> str:
    """Name what bits depend on."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {model}"


def affcache(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "affcache.cli", *map(str, words)], check=True, env=ENVIRONMENT)


def bits_of_store(path: Path) -> str:
    """Hash every dataset of a store; its attributes name paths and versions."""
    digest = hashlib.sha256()
    with h5py.File(path) as file:
        names: list[str] = []
        file.visit(names.append)
        for name in sorted(names):
            if isinstance(file[name], h5py.Dataset):
                array = file[name][()]
                digest.update(f"{name} {array.dtype} {array.shape}".encode())
                digest.update(repr(array.tolist()).encode() if array.dtype == object else array.tobytes())
    return digest.hexdigest()


def bits_of_head(run: Path) -> str:
    """Hash the tensors of a head; its header names paths and versions."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(run / "head.safetensors").items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def bits_of_demo(folder: Path) -> dict[str, str]:
    affcache("demo", "--out", folder / "demo")
    runs = {task: folder / "demo/runs" / task for task in ("expr", "au", "va")}
    # since then labels in part count; left out, they leave the bits of before
    settings = json.loads((runs["au"] / "config.json").read_text())["settings"] | {"partial": "drop"}
    again = {**settings, "store": str(folder / "demo/store.h5"), "run": str(folder / "au")}
    call = f"import affcache, json; affcache.fit(**json.loads({json.dumps(json.dumps(again))}))"
    subprocess.run([sys.executable, "-c", call], check=True, env=ENVIRONMENT)
    runs["au"] = folder / "au"
    heads = {f"demo's head of {task}": bits_of_head(run) for task, run in runs.items()}
    return {"demo's store": bits_of_store(folder / "demo/store.h5"), **heads}


def bits_of_real(folder: Path) -> dict[str, str]:
    store, run = folder / "real.h5", folder / "run"
    model = f"local-dir:{REAL / 'encoder'}"
    affcache("extract", "--crops", REAL / "cropped_aligned", "--model", model, "--store", store)
    affcache("fit", "--store", store, "--annotations", REAL / "annotations", "--run", run, "--epochs", 3)
    return {"real store": bits_of_store(store), "real head": bits_of_head(run)}


def recorded() -> dict[str, str]:
    record = json.loads(RECORD.read_text()).get(environment())
    if record is None:
        pytest.skip(f"no bits were recorded for {environment()}")
    return dict(record)


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    record = recorded()
    found = bits_of_demo(tmp_path)
    assert found == {name: record[name] for name in found}


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.skipif(not REAL.is_dir(), reason="the real crops are not here")
def test_real_crops(tmp_path: Path) -> None:
    record = recorded()
    found = bits_of_real(tmp_path)
    assert found == {name: record[name] for name in found}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = {**bits_of_demo(Path(folder)), **bits_of_real(Path(folder))}
    records = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    RECORD.write_text(json.dumps({**records, environment(): found}, indent=2) + "\n")
