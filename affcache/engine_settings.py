"""The settings that say where work is done: in this process, or in a Ray cluster."""

from collections.abc import Iterator
from dataclasses import dataclass

from affcache.settings_base import Settings, setting


@dataclass(frozen=True)
class EngineSettings(Settings):
    """What work that a cluster can do has in common."""

    engine: str = setting(
        "local",
        "What does the work: this process, or the workers of a Ray cluster, which pip install 'affcache[ray]' enables.",
        choices=("local", "ray"),
    )
    ray_address: str | None = setting(
        None,
        "Running Ray cluster to use: auto, or HOST:PORT.",
        default_text="what RAY_ADDRESS says, else one is started on this machine for the run",
    )
    actors: int | None = setting(
        None, "Workers of the Ray cluster that are used.", default_text="one per GPU; without GPUs, one per node"
    )

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each value that is out of range."""
        yield from super().problems()
        yield from self.at_least("actors", 1)
        if self.engine == "ray":
            if self.ray_address is not None and "://" in self.ray_address:
                yield (f"--ray-address is {self.ray_address}; expected auto or HOST:PORT, on a machine of the cluster.")
            return
        for name, value in (("--ray-address", self.ray_address), ("--actors", self.actors)):
            if value is not None:
                yield f"{name} is {value}, which is of use to --engine ray only. Give that too, or leave it out."
