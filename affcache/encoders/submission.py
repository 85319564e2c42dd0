"""One batch on its way through the device: crops there, embeddings back, and how long each part took.

On a GPU nothing here waits: copies go through pinned memory on the stream that also computes. A second stream for
copies would hide less than a hundredth, by arithmetic: 10 MB take 0.4 ms at 25 GB/s, 256 crops of ViT-L/14 some 60.
"""

import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch


def copy_to_device(
    crops: Sequence[npt.NDArray[np.uint8]], device: torch.device
) -> list[tuple[list[int], torch.Tensor]]:
    """Stack crops (height, width, 3) of equal size and start their copy to the device.

    Returns:
        For each size, the indices of its crops and a uint8 tensor (b, height, width, 3) on the device.
    """
    of_shape: dict[tuple[int, ...], list[int]] = {}
    for index, crop in enumerate(crops):
        of_shape.setdefault(crop.shape, []).append(index)
    groups = []
    for shape, indices in of_shape.items():
        batch = torch.empty((len(indices), *shape), dtype=torch.uint8, pin_memory=device.type == "cuda")
        np.stack([crops[i] for i in indices], out=batch.numpy())
        groups.append((indices, batch.to(device, non_blocking=True)))
    return groups


class Submission:
    """A batch that was handed to the device. ``wait`` gives its embeddings, ``seconds`` where its time went."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self._embeddings: torch.Tensor | None = None
        self.mark("")

    def mark(self, stage: str) -> None:
        """Say that the work handed over since the last mark belonged to a stage."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append((stage, event))
        else:
            self._marks.append((stage, time.perf_counter()))

    def fetch(self, embeddings: torch.Tensor) -> None:
        """Start the copy of embeddings (B, D) back to the host."""
        if embeddings.device.type == "cuda":
            host = torch.empty(embeddings.shape, dtype=embeddings.dtype, pin_memory=True)
            self._embeddings = host.copy_(embeddings, non_blocking=True)
        else:
            self._embeddings = embeddings

    def wait(self) -> npt.NDArray[np.float32]:
        """Wait for the device, and return the embeddings, float32 (B, D)."""
        assert self._embeddings is not None
        last = self._marks[-1][1]
        if isinstance(last, torch.cuda.Event):
            last.synchronize()
        return self._embeddings.numpy()

    def seconds(self) -> dict[str, float]:
        """Return the device's own seconds per stage, "copy" and "encode", once ``wait`` has returned."""
        spent = {"copy": 0.0, "encode": 0.0}
        for (_, before), (stage, after) in zip(self._marks, self._marks[1:], strict=False):
            if isinstance(before, torch.cuda.Event) and isinstance(after, torch.cuda.Event):
                spent[stage] += before.elapsed_time(after) / 1000
            elif isinstance(before, float) and isinstance(after, float):
                spent[stage] += after - before
        return spent
