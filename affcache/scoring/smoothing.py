"""Smoothing over time: each frame's values become the mean or median of those of the frames around it. Arrays only.

Windows are of frame numbers: frames without a crop are simply not there, and a gap is smoothed across by those on its
other side as far as the window reaches. Nothing is smoothed from one video to the next.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]


def smooth(
    values: npt.NDArray[Any], videos: npt.NDArray[Any], frame_numbers: npt.NDArray[Any], width: int, kind: str = "mean"
) -> Values:
    """Smooth values over the frames of each video.

    Args:
        values: float (n, C).
        videos: int (n,), rising: which video each frame is of.
        frame_numbers: int (n,), rising within a video.
        width: odd number of frame numbers in a window, the frame in its middle; 1 changes nothing.
        kind: "mean" or "median".

    Returns:
        float64 (n, C).

    Raises:
        ValueError: an even width or one below 1, or another kind.
    """
    if width < 1 or width % 2 == 0:
        raise ValueError(f"width is {width}; expected an odd number of at least 1")
    if kind not in ("mean", "median"):
        raise ValueError(f"kind is {kind!r}; expected mean or median")
    values = np.asarray(values, np.float64)
    if width == 1 or not len(values):
        return values
    first, last = _windows(np.asarray(videos), np.asarray(frame_numbers), width // 2)
    if kind == "mean":
        return _means(values, first, last)
    return np.stack([np.median(values[a:b], axis=0) for a, b in zip(first, last, strict=True)])


def _windows(
    videos: npt.NDArray[Any], frame_numbers: npt.NDArray[Any], reach: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the first position in each frame's window (n,), and the one after its last."""
    # one rising key for video and frame: videos lie further apart than any window reaches
    numbers = frame_numbers.astype(np.int64) - int(frame_numbers.min())
    key = videos.astype(np.int64) * (int(numbers.max()) + reach + 1) + numbers
    return np.searchsorted(key, key - reach, "left"), np.searchsorted(key, key + reach, "right")


def _means(values: Values, first: npt.NDArray[np.int64], last: npt.NDArray[np.int64]) -> Values:
    """Return the means (n, C) of values[first:last] by differences of running sums."""
    offset = values.mean(axis=0)  # running sums of what is left stay small
    sums = np.concatenate([np.zeros((1, values.shape[1])), (values - offset).cumsum(axis=0)])
    means = (sums[last] - sums[first]) / (last - first)[:, None] + offset
    return np.asarray(means.clip(values.min(axis=0), values.max(axis=0)))  # which rounding may pass
