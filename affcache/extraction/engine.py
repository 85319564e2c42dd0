"""What can encode crops: this process, or a cluster. Whoever fills a store needs to know no more than this."""

import os
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from affcache.crops.crop_list import CropList
from affcache.encoders.encoder import Encoder
from affcache.extraction.commit import Encoded
from affcache.extraction.decoding import Rows
from affcache.extraction.pipeline import Pipeline
from affcache.extraction.stats import Account
from affcache.progress import Listener


class Encoding(Protocol):
    """Crops being encoded."""

    account: Account

    def encode(self, pending: Rows) -> Generator[tuple[Rows, Encoded], None, None]:
        """Yield consecutive rows with their float16 features (n, D) and status (n,), in any order of the yields."""

    def note(self) -> str:
        """Return how it stands, in a few words."""

    def bottleneck(self) -> str:
        """Return one sentence on what holds the run up and which flag to turn."""


class Engine(Protocol):
    """Something that has an encoder and can run it."""

    @property
    def description(self) -> Mapping[str, Any]:
        """What a store keeps of the encoder, batch_size and compiled with it."""

    def encoding(self, crops: CropList, listener: Listener, batch_size: int, *, mirror: bool) -> Encoding:
        """Return what encodes rows of a list of crops, as they are or mirrored."""

    def facts(self) -> dict[str, Any]:
        """Return device, workers, actors and nodes, for the result."""


@dataclass(frozen=True)
class LocalEngine:
    """Encodes in this process."""

    encoder: Encoder
    workers: int  # threads that decode

    @property
    def description(self) -> Mapping[str, Any]:
        """What a store keeps of the encoder."""
        return self.encoder.description

    def encoding(self, crops: CropList, listener: Listener, batch_size: int, *, mirror: bool) -> Pipeline:
        """Return the pipeline for a list of crops."""
        return Pipeline(crops, self.encoder, listener, batch_size, self.workers, mirror)

    def facts(self) -> dict[str, Any]:
        """Return where it runs."""
        return {"engine": "local", "device": str(self.encoder.device), "workers": self.workers, "actors": 0, "nodes": 1}


def default_workers() -> int:
    """Return how many threads decode unless said otherwise: one per core, at most 16."""
    return min(16, os.cpu_count() or 1)
