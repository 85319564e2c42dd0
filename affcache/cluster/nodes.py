"""The machines of a cluster, and how many workers of what size they have room for."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from affcache.errors import ConfigError
from affcache.extraction.pipeline import default_workers


@dataclass(frozen=True)
class Node:
    """A machine that is alive."""

    id: str
    name: str
    cpus: float
    gpus: float


@dataclass(frozen=True)
class WorkerSize:
    """What each worker takes of a machine."""

    device: str  # cpu or cuda
    cpus: float  # that are reserved for it; less than one where workers share a core
    workers: int  # threads that decode

    @property
    def cores(self) -> int:
        """Threads that compute where there is no GPU."""
        return max(1, int(self.cpus))

    @property
    def options(self) -> dict[str, float]:
        """What Ray is to reserve."""
        return {"num_cpus": self.cpus, "num_gpus": 1.0 if self.device == "cuda" else 0.0}

    def room(self, nodes: Sequence[Node]) -> int:
        """Return how many such workers fit the machines."""
        if self.device == "cuda":
            return sum(int(node.gpus) for node in nodes)
        return sum(_fit(node.cpus, self.cpus) for node in nodes)


def living_nodes(ray: ModuleType) -> list[Node]:
    """Return the machines that are alive and take work."""
    nodes = []
    for entry in ray.nodes():
        resources = entry.get("Resources", {})
        cpus, gpus = float(resources.get("CPU", 0)), float(resources.get("GPU", 0))
        if entry["Alive"] and cpus + gpus > 0:
            name = f"{entry['NodeManagerHostname']} ({entry['NodeManagerAddress']})"
            nodes.append(Node(entry["NodeID"], name, cpus, gpus))
    return nodes


def worker_size(nodes: Sequence[Node], device: str, actors: int | None, workers: int | None) -> WorkerSize:
    """Return what each worker takes: a GPU where there are some, else a share of the cores.

    Args:
        nodes: the machines.
        device: --device: auto, cpu or cuda.
        actors: how many are wanted; None for one per GPU or, on a CPU, one per machine.
        workers: decoding threads of each; None for a share of the machine's cores, at most 16.

    Raises:
        ConfigError: no machine can take a worker, or the device is not one that Ray hands out.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(
            f"--device is {device}; expected auto, cpu or cuda with --engine ray, which gives each worker a GPU of its "
            "own. Limit them with --actors."
        )
    with_gpus = [node for node in nodes if node.gpus >= 1]
    if device == "cuda" and not with_gpus:
        raise ConfigError("--device is cuda, but no machine of the cluster has a GPU. Expected one, or --device cpu.")
    if device != "cpu" and with_gpus:
        share = min(node.cpus / int(node.gpus) for node in with_gpus)
        decoding = workers or max(1, min(16, int(share) or default_workers()))
        return WorkerSize("cuda", min(1.0, math.floor(share * 1e4) / 1e4), decoding)
    cpus = [node.cpus for node in nodes if node.cpus > 0]
    if not cpus:
        raise ConfigError("The cluster has no machine with a core to spare. Expected one; see 'ray status'.")
    each = min(cpus) if actors is None else largest_share(cpus, actors)
    return WorkerSize("cpu", each, workers or min(16, max(1, int(each))))


def largest_share(cpus: Sequence[float], actors: int) -> float:
    """Return the largest number of cores, whole or one over a whole number, of which ``actors`` such shares fit."""
    for share in range(int(max(cpus)), 0, -1):
        if sum(_fit(machine, share) for machine in cpus) >= actors:
            return float(share)
    parts = 2
    while sum(_fit(machine, 1 / parts) for machine in cpus) < actors:
        parts += 1
    return math.floor(1e4 / parts) / 1e4  # Ray counts in ten-thousandths


def _fit(cpus: float, share: float) -> int:
    return math.floor(cpus / share + 1e-9)


def counted(number: int, what: str) -> str:
    """Write a number of things: 1 worker, 2 workers."""
    return f"{number} {what}" + ("" if number == 1 else "s")
