"""Devices: which one is meant, making it the current one, how much memory it has, and what machine it is in."""

import datetime
import os
import platform
import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from affcache import __version__
from affcache.errors import ConfigError
from affcache.progress import counted

SHARE = 0.5  # of the memory is for embeddings unless said otherwise; heads, labels and other programs need some too
GIGABYTE = 10**9
UNKNOWN = 8 * GIGABYTE  # what a machine is taken to have that doesn't say
CGROUP_LIMITS = (  # of a container, of Linux's two versions
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def resolve_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:1`` into a device that is there.

    Raises:
        ConfigError: no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if name == "cpu" or name in gpus or (name == "cuda" and gpus):
        return torch.device(name)
    known = re.fullmatch(r"cuda(:\d+)?", name)
    problem = f"is not there: torch sees {counted(len(gpus), 'GPU')}" if known else "is none that affcache computes on"
    raise ConfigError(f"--device {name} {problem}. Expected {', '.join(['auto', 'cpu', *gpus])}.")


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done what it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def on_device(device: torch.device) -> AbstractContextManager[None]:
    """Make a GPU the current one for a while, so that nothing is set up on another: --device cuda:1 is obeyed."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def default_memory(device: torch.device) -> float:
    """Return the GB of embeddings that a device may hold unless said otherwise: half its memory, to the megabyte."""
    return int(device_memory(device) * SHARE / 1e6) / 1e3


def device_memory(device: torch.device) -> int:
    """Return the bytes of memory of a GPU, or of the machine, or of the container that this runs in."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return min([_machine_memory(), *(_limit(path) for path in CGROUP_LIMITS if path.is_file())])


def _machine_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # a system that doesn't say
        return UNKNOWN


def _limit(path: Path) -> int:
    """Return what a container is allowed; without a limit the file says "max", or a number beyond all memory."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 2**63


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return date, processor, cores, GPU and versions, as one JSON object."""
    facts: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "affcache": __version__,
        "processor": processor_facts().get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def processor_facts() -> dict[str, str]:
    """Return what Linux says of a processor, such as its model name and its flags; nothing on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    facts = (line.partition(":") for line in reversed(lines))
    return {name.strip(): value.strip() for name, _, value in facts}
