"""A Ray cluster to work with: one that runs already, or one started on this machine for as long as the work takes."""

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from affcache.errors import ConfigError, first_line
from affcache.progress import Listener

LOCAL = "local"
LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # Ray's name for it; with 0 it uses loopback on any system
SECONDS_TO_ANSWER = 10.0
SMALLEST_OBJECT_STORE = 256 * 2**20  # bytes


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
    import ray

    if ray.is_initialized():  # a Python program that connected by itself
        yield ray
        return
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        if address == LOCAL:
            memory = max(SMALLEST_OBJECT_STORE, shared_bytes)
            ray.init(address=LOCAL, include_dashboard=False, object_store_memory=memory, **quiet)
            _require_loopback(ray, listener)
        else:
            ray.init(address=address, **quiet)
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


def _require_loopback(ray: ModuleType, listener: Listener) -> None:
    """Say so when others can reach the ports, as where Ray was imported before with other settings."""
    addresses = [str(node["NodeManagerAddress"]) for node in ray.nodes()]
    if not all(address.startswith("127.") or address == "::1" for address in addresses):
        listener.warning(
            f"Ray listens on {', '.join(addresses)}, where whoever reaches its ports can run programs as you. Set "
            f"{LOOPBACK_ONLY}=0 before Ray is imported, or see docs/scale.md."
        )
