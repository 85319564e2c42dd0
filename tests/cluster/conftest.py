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


def family_of(process: int) -> list[int]:
    """Return a process and everything that descends from it."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(folder.name))
    found = [process]
    for one in found:
        found += children.get(one, [])
    return found


def worker_processes(name: str = "EncodingWorker") -> list[int]:
    """Return the processes that our Ray, and no other on this machine, runs for actors of a class."""
    found = []
    for process in family_of(os.getpid()):
        try:
            title = Path(f"/proc/{process}/cmdline").read_bytes()
        except OSError:  # it has just ended
            continue
        if title.startswith(f"ray::{name}".encode()):
            found.append(process)
    return sorted(found)


def kill(process: int) -> None:
    """End a process as a lack of memory would, and see it gone."""
    os.kill(process, signal.SIGKILL)
    until = time.monotonic() + 10
    while Path(f"/proc/{process}/cmdline").exists() and time.monotonic() < until:
        time.sleep(0.02)
