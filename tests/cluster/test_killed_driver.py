"""The driver killed by SIGKILL, on a cluster that the command itself started on loopback, and run again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from affcache.store.reading import EmbeddingStore
from tests.cluster.conftest import family_of
from tests.conftest import write_crops

pytest.importorskip("ray", reason="Ray, the extra affcache[ray], is not installed")

REPOSITORY = Path(__file__).parents[2]
ROWS, BATCH, COMMIT = 600, 16, 32
LISTENING = "0A"
LOOPBACK = ("0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000")
ENDED_BY_A_KILL = ("EncodingWorker", "raylet/raylet", "gcs_server")  # Ray's small agents see it later

# the command itself, with frequent commits, and a driver that takes its time to hand out shards
COMMAND = f"""
import sys, time
from affcache.extraction import extract as extraction
from affcache.cluster import encoding
extraction.COMMIT_ROWS = {COMMIT}
take = encoding.ShardQueue.take
encoding.ShardQueue.take = lambda self, rows: (time.sleep(0.05), take(self, {COMMIT}))[1]
from affcache.cli.app import main
main()
"""


def start(folder: Path, store: str, model: str, *flags: str) -> "subprocess.Popen[str]":
    words = ["extract", "--crops", "crops", "--store", store, "--model", model, "--batch-size", str(BATCH)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *words, "--device", "cpu", "--json", *flags],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def committed(path: Path) -> int:
    return EmbeddingStore.open(path).counts["encoded"] if path.exists() else 0


def listening_addresses(processes: list[int]) -> set[str]:
    """Return the addresses, as the kernel writes them, on which some processes listen."""
    sockets = set()
    for process in processes:
        for descriptor in Path(f"/proc/{process}/fd").glob("*"):
            try:
                sockets.add(str(descriptor.readlink()))
            except OSError:
                continue
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING and f"socket:[{fields[9]}]" in sockets:
                addresses.add(fields[1].partition(":")[0])
    return addresses


@pytest.mark.cluster
@pytest.mark.kill
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="this system has no /proc")
def test_the_driver_killed_and_run_again(tmp_path: Path, tiny_encoder: str) -> None:
    write_crops(tmp_path / "crops", {f"v{video}": range(1, 101) for video in range(6)})
    with start(tmp_path, "local.h5", tiny_encoder) as process:
        assert process.communicate()[0].startswith("{")
    store = tmp_path / "ray.h5"
    ray_flags = ("--engine", "ray", "--actors", "2")
    with start(tmp_path, "ray.h5", tiny_encoder, *ray_flags) as process:
        while process.poll() is None and committed(store) < 3 * COMMIT:
            time.sleep(0.02)
        family = family_of(process.pid)
        addresses = listening_addresses(family)
        modes = {mode for one in family if "raylet/raylet" in title_of(one) for mode in environment_of(one)}
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert len(family) > 4  # Ray's own processes and the workers
    assert addresses
    assert addresses <= set(LOOPBACK)  # nothing that another machine could reach
    assert "RAY_AUTH_MODE=token" in modes, "others on this machine reach loopback"
    kept = committed(store)
    assert 3 * COMMIT <= kept < ROWS
    with start(tmp_path, "ray.h5", tiny_encoder, *ray_flags) as process:
        output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert json.loads(output)["encoded_now"] == ROWS - kept
    assert store.read_bytes() == (tmp_path / "local.h5").read_bytes()
    assert not [name for one in family if any(kind in (name := title_of(one)) for kind in ENDED_BY_A_KILL)]


def environment_of(process: int) -> list[str]:
    return Path(f"/proc/{process}/environ").read_bytes().decode().split("\0")


def title_of(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().decode()
    except OSError:
        return ""
