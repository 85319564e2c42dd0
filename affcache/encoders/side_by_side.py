"""Several encoders used like one: each encodes a crop, and their embeddings stand one after the other."""

from collections import Counter
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from affcache.encoders.encoder import Crops, DeviceBatch, Encoder


@dataclass(frozen=True)
class SideBySideBatch:
    """A batch that was handed to several encoders; as ``DeviceBatch``."""

    batches: list[DeviceBatch]

    def wait(self) -> npt.NDArray[np.float32]:
        """Wait for the device, and return the embeddings, float32 (B, D), D the sum of all widths."""
        return np.concatenate([batch.wait() for batch in self.batches], axis=1)

    def seconds(self) -> dict[str, float]:
        """Return the device's own seconds per stage."""
        spent: Counter[str] = Counter()
        for batch in self.batches:
            spent.update(batch.seconds())
        return dict(spent)


@dataclass(frozen=True)
class Encoders:
    """Encoders on one device, in the order in which their embeddings stand."""

    encoders: tuple[Encoder, ...]

    @property
    def device(self) -> torch.device:
        """Where all of them run."""
        return self.encoders[0].device

    @property
    def compiled(self) -> None:
        """None of them is compiled."""

    @property
    def precision(self) -> str:
        """Their number formats."""
        return " + ".join(encoder.precision for encoder in self.encoders)

    @property
    def width(self) -> int:
        """D, the sum of their widths."""
        return sum(encoder.width for encoder in self.encoders)

    @property
    def network(self) -> torch.nn.Module:
        """All networks, to look at their parts."""
        return torch.nn.ModuleList([encoder.network for encoder in self.encoders])

    def resize_large(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Return an image as it is: each encoder has a size of its own."""
        return pixels

    def encode(self, crops: Crops) -> torch.Tensor:
        """Encode a batch of RGB crops, uint8 arrays (height, width, 3); return float32 (B, D) on the CPU."""
        return torch.from_numpy(self.submit(crops).wait())

    def submit(self, crops: Crops) -> SideBySideBatch:
        """Hand a batch of RGB crops to every encoder; as ``Encoder.submit``."""
        resized = [[encoder.resize_large(crop) for crop in crops] for encoder in self.encoders]
        return SideBySideBatch([encoder.submit(of) for encoder, of in zip(self.encoders, resized, strict=True)])


AnyEncoder: TypeAlias = Encoder | Encoders


def side_by_side(encoders: list[Encoder]) -> AnyEncoder:
    """Return encoders as one; of one, itself."""
    return encoders[0] if len(encoders) == 1 else Encoders(tuple(encoders))
