"""A cluster of several Ray nodes on this machine, listening on loopback."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # before Ray is imported: loopback only
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

ray = pytest.importorskip("ray", reason="Ray, the extra affcache[ray], is not installed")
cluster_utils = pytest.importorskip("ray.cluster_utils")


MEMORY = {"object_store_memory": 100 * 2**20}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without cores and two nodes with two cores each; this process is connected as the driver."""
    made = cluster_utils.Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **MEMORY}
    )
    for _ in range(2):
        made.add_node(num_cpus=2, **MEMORY)
    ray.init(address=made.address, logging_level="error", log_to_driver=False)
    made.wait_for_nodes()
    yield made
    ray.shutdown()
    made.shutdown()


def worker_processes(name: str = "EncodingWorker") -> list[int]:
    """Return the processes that Ray runs for actors of a class, newest last."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                title = (folder / "cmdline").read_bytes()
            except OSError:  # it has just ended
                continue
            if title.startswith(f"ray::{name}".encode()):
                found.append(int(folder.name))
    return sorted(found)


def kill(process: int) -> None:
    """End a process as a lack of memory would, and see it gone."""
    os.kill(process, signal.SIGKILL)
    until = time.monotonic() + 10
    while Path(f"/proc/{process}/cmdline").exists() and time.monotonic() < until:
        time.sleep(0.02)
