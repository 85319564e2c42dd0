"""What a benchmark ran on, so that its figures can be compared."""

import datetime
import os
import platform
from pathlib import Path
from typing import Any

import torch

import affcache


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return date, processor, cores, GPU and versions, as one JSON object."""
    facts: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "affcache": affcache.__version__,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
