"""The settings of sample."""

from collections.abc import Iterator
from dataclasses import dataclass

from affcache.settings import Settings, setting


@dataclass(frozen=True)
class SampleSettings(Settings):
    """Render practice faces with known expressions and action units, in Aff-Wild2's layout."""

    videos: int = setting(30, "Videos to render, train and validation together.")
    frames: int = setting(40, "Frames per video, about.")
    seed: int = setting(0, "Seed of identities, timelines, poses and lighting.")

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each value that is out of range."""
        yield from self.at_least("frames", 1)
        yield from self.at_least("seed", 0)
