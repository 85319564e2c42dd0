"""Losses per frame, and CVaR over them. Knows tensors only; nothing here reads files."""

import math

import torch
from torch.nn import functional


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each frame.

    Args:
        logits: float tensor (B, C).
        labels: int64 tensor (B,) of class indices.

    Returns:
        float tensor (B,), each at least 0.
    """
    return functional.cross_entropy(logits, labels, reduction="none")  # (B,)


def binary_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of each frame and action unit.

    Args:
        logits: float tensor (B, C).
        labels: tensor (B, C) of 0 and 1.

    Returns:
        float tensor (B, C), each at least 0.
    """
    return functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")  # (B, C)


def cvar(losses: torch.Tensor, alpha: float) -> torch.Tensor:
    """Conditional value at risk: the mean of the worst ``alpha * n`` of n losses, the last one by its fraction.

    Exact and without a search. It equals ``min over t of t + mean(relu(losses - t)) / alpha`` (Rockafellar and
    Uryasev, Optimization of conditional value-at-risk, Journal of Risk 2, 2000). The gradient is the tail's weights.

    Args:
        losses: float tensor of any shape with n >= 1 entries.
        alpha: in (0, 1]; 1 gives ``losses.mean()`` to the bit, a value of at most 1 / n the largest loss.

    Returns:
        float scalar tensor.

    Raises:
        ValueError: no losses, or alpha out of range.
    """
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha is {alpha}; expected more than 0 and at most 1")
    if losses.numel() == 0:
        raise ValueError("cvar of no losses; expected at least one")
    if alpha == 1:
        return losses.mean()
    tail = tail_size(losses.numel(), alpha)
    worst = losses.flatten().topk(max(1, math.ceil(tail))).values  # (ceil(tail),) falling
    if tail <= 1:
        return worst[0]
    whole = math.floor(tail)
    total = worst[:whole].sum()
    if whole < len(worst):
        total = total + (tail - whole) * worst[whole]
    return total / tail


def tail_size(count: int, alpha: float) -> float:
    """Return how many of ``count`` losses CVaR at ``alpha`` averages; a product off by rounding alone is made whole."""
    tail = count * alpha
    nearest = round(tail)
    return float(nearest) if math.isclose(tail, nearest, rel_tol=1e-12) else tail
