"""Weights in memory that all workers of a machine share: loaded once by the driver, and copied once to each machine.

Ray keeps arrays in shared memory and hands them out without a copy. It would copy tensors, so a tower travels as a
module without weights, and its weights as arrays of bytes.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from affcache.crops.images import Preprocessing
from affcache.encoders.encoder import Weights


@dataclass(frozen=True)
class Stored:
    """The bytes of one tensor."""

    values: npt.NDArray[np.uint8]
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class SharedWeights:
    """An image tower in a form that travels; made by ``share``, and made use of by ``weights``."""

    skeleton: torch.nn.Module  # on the meta device
    tensors: Mapping[str, Stored]
    preprocessing: Preprocessing
    description: Mapping[str, Any]

    @property
    def bytes(self) -> int:
        """How much memory they take."""
        return sum(stored.values.nbytes for stored in self.tensors.values())

    def weights(self) -> Weights:
        """Return the tower with its weights, which stay where they are: they must not be written to."""
        for name, stored in self.tensors.items():
            owner_name, _, own_name = name.rpartition(".")
            owner = self.skeleton.get_submodule(owner_name)
            if own_name in owner._parameters:
                owner._parameters[own_name] = torch.nn.Parameter(_tensor(stored), requires_grad=False)
            else:
                owner._buffers[own_name] = _tensor(stored)
        return Weights(self.skeleton, self.preprocessing, self.description)


def share(weights: Weights) -> SharedWeights:
    """Take a tower apart for a journey. Its weights are views of what was loaded; the tower itself is without any."""
    tower = weights.tower
    named = chain(tower.named_parameters(remove_duplicate=False), tower.named_buffers(remove_duplicate=False))
    tensors = {name: _stored(tensor) for name, tensor in named}
    return SharedWeights(tower.to("meta"), tensors, weights.preprocessing, weights.description)


def _stored(tensor: torch.Tensor) -> Stored:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return Stored(flat.view(torch.uint8).numpy(), tensor.dtype, tuple(tensor.shape))


def as_tensor(array: npt.NDArray[Any]) -> torch.Tensor:
    """Return a tensor of what lies in Ray's memory, which is not writable, nor is it written to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _tensor(stored: Stored) -> torch.Tensor:
    return as_tensor(stored.values).view(stored.dtype).view(stored.shape)
