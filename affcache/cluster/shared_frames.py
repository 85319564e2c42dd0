"""The frames of a source in memory that a machine's workers share: read by the driver, copied once a machine."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from affcache.ablation.trials import LoadedSplits
from affcache.cluster.shared_weights import as_tensor
from affcache.errors import ConfigError
from affcache.training.data import Frames, FrameSource

Arrays = tuple[npt.NDArray[Any], ...]  # embeddings, labels, videos


@dataclass(frozen=True)
class SharedSource:
    """A source whose frames are arrays, which Ray hands out without a copy."""

    rest: LoadedSplits  # without frames
    train: Arrays
    selection: Arrays | None  # None where it is validation itself
    validation: Arrays

    def loaded(self, device: torch.device) -> LoadedSplits:
        """Return the source with its frames on a device; on the CPU they stay where they are, and are read only."""
        validation = _frames(self.validation, device)
        selection = validation if self.selection is None else _frames(self.selection, device)
        return replace(self.rest, train=_frames(self.train, device), selection=selection, validation=validation)


def share_source(source: LoadedSplits) -> SharedSource:
    """Take a source apart for a journey.

    Raises:
        ConfigError: its frames are streamed from a file.
    """
    nothing = Frames(torch.empty(0), torch.empty(0), torch.empty(0))
    return SharedSource(
        replace(source, train=nothing, selection=nothing, validation=nothing),
        _arrays(source.train),
        None if source.selection is source.validation else _arrays(source.selection),
        _arrays(source.validation),
    )


def _arrays(frames: FrameSource) -> Arrays:
    if not isinstance(frames, Frames):
        raise ConfigError(
            "--engine ray keeps all embeddings in memory, on every machine of the cluster, and they don't fit "
            "--memory. Expected enough for them. Raise --memory GB, or let --engine local stream them."
        )
    return tuple(np.asarray(tensor.cpu()) for tensor in (frames.embeddings, frames.labels, frames.videos))


def _frames(arrays: Arrays, device: torch.device) -> Frames:
    return Frames(*(as_tensor(array).to(device) for array in arrays))
