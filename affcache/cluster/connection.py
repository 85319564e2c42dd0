"""A Ray cluster: one that runs already, or one started here for as long as the work takes; and what it has room for."""

import logging
import math
import os
import secrets
import socket
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain, count
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy.typing as npt
import torch

from affcache.errors import ConfigError, first_line
from affcache.extraction.pipeline import default_workers
from affcache.progress import Listener

LOCAL = "local"
LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # Ray's name for it; with 0 it uses loopback on any system
SECONDS_TO_ANSWER = 10.0
SMALLEST_STORE = 256 * 2**20  # bytes of Ray's shared memory


def require_ray(address: str | None = None) -> None:
    """Refuse what can't work, before anything that takes long. Ray isn't imported: see ``_prefer_loopback``.

    Args:
        address: where a cluster is to be; HOST:PORT is knocked at, since Ray would wait there for minutes.

    Raises:
        ConfigError: Ray isn't installed, or nothing listens at the address.
    """
    if find_spec("ray") is None:
        raise ConfigError(
            "--engine ray needs Ray, which is not installed: install it with pip install 'affcache[ray]'."
        )
    host, _, port = (address or os.environ.get("RAY_ADDRESS") or LOCAL).rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS_TO_ANSWER).close()
        except OSError as error:
            raise _no_cluster(f"{host}:{port}", error.strerror or str(error)) from None


def _no_cluster(address: str, reason: str) -> ConfigError:
    what = "No Ray could be started here" if address == LOCAL else f"No Ray cluster could be reached at {address}"
    return ConfigError(
        f"{what}: {reason.rstrip('.')}. Expected a machine of a running cluster, with the same Ray and Python. Look at "
        "it with 'ray status', start one with 'ray start --head', or leave --ray-address and RAY_ADDRESS out to use "
        "this machine alone."
    )


@contextmanager
def connected(address: str | None, shared_bytes: int, listener: Listener) -> Iterator[ModuleType]:
    """Give Ray, connected to a cluster; one that is started here listens on loopback alone, and ends with the work.

    Args:
        address: auto, HOST:PORT, or None for what RAY_ADDRESS says, or for a cluster on this machine.
        shared_bytes: what workers will have in shared memory; the size of that of a cluster started here.
        listener: hears which cluster it is.

    Raises:
        ConfigError: Ray isn't installed, there is no cluster at the address, or none can be started.
    """
    require_ray(address)
    listener.message("connecting to Ray; each worker takes some seconds to start, and loads the encoder or frames")
    address = address or os.environ.get("RAY_ADDRESS") or LOCAL
    if address == LOCAL:
        _prefer_loopback()
        keep_token_private()
    import ray

    if ray.is_initialized():  # a Python program that connected by itself
        yield ray
        return
    started: dict[str, Any] = {"include_dashboard": False, "object_store_memory": max(SMALLEST_STORE, shared_bytes)}
    own = started if address == LOCAL else {}
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **own)
        if own:
            _require_loopback(ray, listener)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise _no_cluster(address, first_line(error)) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _prefer_loopback() -> None:
    """Have Ray's ports open on loopback only; it reads this when it is imported, and its processes inherit it."""
    if "ray" not in sys.modules:
        os.environ.setdefault(LOOPBACK_ONLY, "0")
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # others on this machine reach loopback; Ray makes a token
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def keep_token_private() -> None:
    """Write the token that Ray would write, and leave to the umask, as a file that nobody else may read.

    Raises:
        ConfigError: it can't be written, or belongs to another user.
    """
    if os.environ.get("RAY_AUTH_MODE") != "token" or {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        return
    path = Path("~/.ray/auth_token")
    try:
        path = path.expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            suppress(FileExistsError),
            os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file,
        ):
            file.write(secrets.token_hex(32))
        path.chmod(0o600)
    except (OSError, RuntimeError) as error:  # a user without a home
        raise _no_cluster(LOCAL, f"the token in {path} can't be kept from others: {first_line(error)}") from None


def _require_loopback(ray: ModuleType, listener: Listener) -> None:
    """Say so when others can reach the ports, as where Ray was imported before with other settings."""
    addresses = [str(node["NodeManagerAddress"]) for node in ray.nodes()]
    if not all(address.startswith("127.") or address == "::1" for address in addresses):
        listener.warning(
            f"Ray listens on {', '.join(addresses)}, where whoever reaches its ports can run programs as you. Set "
            f"{LOOPBACK_ONLY}=0 before Ray is imported, or see docs/scale.md."
        )


class Travelling:
    """A tensor on its way to workers, which is a tensor again when it arrives, and must not be written to then.

    Ray keeps arrays in memory that the workers of a machine share: copied once to each, and handed out without a copy.
    It would copy tensors, so each travels as its bytes.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __reduce__(self) -> tuple[Any, ...]:
        tensor = self.tensor
        values = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        return _arrived, (values, tensor.dtype, tuple(tensor.shape), isinstance(tensor, torch.nn.Parameter))


def _arrived(values: npt.NDArray[Any], dtype: torch.dtype, shape: tuple[int, ...], parameter: bool) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(values).view(dtype).view(shape)
    return torch.nn.Parameter(tensor, requires_grad=False) if parameter else tensor


def result_or_loss(ray: ModuleType, reference: Any) -> tuple[Any, str]:
    """Return what a call returned, and "", or None, and why its process is lost; a bug in it is shown as one."""
    try:
        return ray.get(reference), ""
    except ray.exceptions.RayTaskError:
        raise
    except ray.exceptions.RayError as error:
        return None, first_line(error)


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


def require_handed_out(device: str) -> None:
    """Refuse a --device that isn't auto, cpu or cuda."""
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(
            f"--device is {device}; expected auto, cpu or cuda with --engine ray, which gives each worker a GPU of its "
            "own. Limit them with --actors."
        )


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
    require_handed_out(device)
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
    shares = chain((float(whole) for whole in range(int(max(cpus)), 0, -1)), (1 / parts for parts in count(2)))
    share = next(share for share in shares if sum(_fit(machine, share) for machine in cpus) >= actors)
    return math.floor(share * 1e4 + 1e-6) / 1e4  # Ray counts in ten-thousandths


def _fit(cpus: float, share: float) -> int:
    return math.floor(cpus / share + 1e-9)
