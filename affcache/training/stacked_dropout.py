"""Which units of stacked heads are dropped. Knows tensors only."""

from collections.abc import Sequence

import torch


class StackedDropout:
    """Drops units: sixteen random bits decide each, four units to a draw of 64.

    Args:
        probabilities: of dropping a unit, for each of H heads, in [0, 1); rounded to 1 / 65536.
        like: gives dtype and device.
    """

    def __init__(self, probabilities: Sequence[float], like: torch.Tensor) -> None:
        dropped = torch.tensor([round(p * 65536) for p in probabilities]).clamp(max=65535)
        self._none = not bool(dropped.any())
        last = (dropped - 32769).tolist()  # the last of the 65536 values that drops
        self._shared = last[0] if len(set(last)) == 1 else None
        self._last = torch.tensor(last, dtype=like.dtype, device=like.device)[:, None, None]  # (H, 1, 1)
        gain = 65536 / (65536 - dropped.double())
        self.gain = gain.to(like)[:, None, None]  # (H, 1, 1), by which units that stay make up for those dropped

    def draw(
        self, layers: int, width: int, frames: int, generators: Sequence[torch.Generator] | None
    ) -> Sequence[torch.Tensor]:
        """Return int16 (H, W, B) for each layer, for ``drop``; none where nothing is dropped."""
        if self._none or not layers:
            return []
        heads, units = len(self.gain), layers * width * frames
        words = torch.empty(heads, -(-units // 4), dtype=torch.int64, device=self.gain.device)
        for head in range(heads):
            words[head].random_(-(2**63), None, generator=generators[head] if generators else None)
        return words.view(torch.int16)[:, :units].view(heads, layers, width, frames).unbind(1)

    def drop(self, units: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        """Return units (H, W, B) with 0 where one is dropped."""
        values = drawn.to(units.dtype)
        if self._shared is not None:
            return torch.ops.aten.threshold_backward(units, values, self._shared)  # 0 up to the last that drops
        return torch.ops.aten.threshold_backward(units, values - self._last, 0)
