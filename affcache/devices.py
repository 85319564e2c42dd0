"""Devices: which one is meant, and making it the current one."""

from contextlib import AbstractContextManager, nullcontext

import torch

from affcache.errors import ConfigError


def resolve_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:1`` into a device that is there.

    Raises:
        ConfigError: no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"Unknown --device {name!r}. Expected auto, cpu, cuda, or cuda:1 and so on.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {name} is not there: torch sees {torch.cuda.device_count()} CUDA devices. Use --device cpu or "
            "auto, or check the driver with nvidia-smi."
        )
    return device


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done what it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def on_device(device: torch.device) -> AbstractContextManager[None]:
    """Make a GPU the current one for a while, so that nothing is set up on another: --device cuda:1 is obeyed."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
