"""Which units of stacked heads are dropped. Knows tensors only."""

from collections.abc import Sequence

import torch


class StackedDropout:
    """Draws which units are dropped: sixteen random bits decide each, four units to a draw of 64.

    Args:
        probabilities: of dropping a unit, for each of H heads, in [0, 1); rounded to 1 / 65536.
        like: gives dtype and device.
    """

    def __init__(self, probabilities: Sequence[float], like: torch.Tensor) -> None:
        dropped = torch.tensor([round(p * 65536) for p in probabilities]).clamp(max=65535)
        self._none = not bool(dropped.any())
        bounds = torch.stack([dropped - 32769, dropped - 32768])  # the last that drops, the first that stays
        bounds[:, dropped == 0] = 0  # nothing drops: all are clamped to what stays
        self._lower, self._upper = bounds.to(like.device, torch.int16)[:, :, None, None]  # (H, 1, 1) each
        first = bounds[:, 0].tolist()
        self._same = first if bool((bounds == bounds[:, :1]).all()) else None  # numbers are many times faster
        gain = 65536 / (65536 - dropped.double())
        self.gain = gain.to(like)[:, None, None]  # (H, 1, 1), by which units that stay make up for those dropped

    def draw(
        self, layers: int, width: int, frames: int, generators: Sequence[torch.Generator] | None
    ) -> list[torch.Tensor | None]:
        """Return int16 (H, W, B) for each layer: 1 where a unit stays, 0 where it drops; None where none does."""
        if self._none or not layers:
            return [None] * layers
        heads, units = len(self.gain), layers * width * frames
        words = torch.empty(heads, -(-units // 4), dtype=torch.int64, device=self.gain.device)
        for head in range(heads):
            words[head].random_(-(2**63), None, generator=generators[head] if generators else None)
        bits = words.view(torch.int16)[:, :units].view(heads, layers, width, frames)
        lower, upper = self._same or (self._lower, self._upper)
        # as fast as a copy, which a comparison is not; layer by layer, which is too little to wake a thread for
        return [of_layer.clamp(lower, upper).sub_(upper - 1) for of_layer in bits.unbind(1)]
