"""Conditional value at risk of losses, in closed form. Knows tensors only.

CVaR at level alpha of n losses is the mean of the worst ``alpha * n`` of them, the last one by its fraction:

    min over t of  t + mean(relu(losses - t)) / alpha
    = max over q of  sum(q * losses),  0 <= q <= p / alpha, sum(q) = 1

with p = 1 / n, or any weights scaled to a sum of 1 (Rockafellar and Uryasev, Optimization of conditional
value-at-risk, Journal of Risk 2, 2000). The maximising q are the *tail weights*: they are found by one sort, and they
are CVaR's gradient with respect to the losses.
"""

import math
from collections.abc import Sequence

import torch


def cvar(losses: torch.Tensor, alpha: float, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Conditional value at risk: the mean of the worst share ``alpha`` of the losses.

    Exact and without a search. The gradient is the tail's weights.

    Args:
        losses: float tensor of any shape with n >= 1 entries.
        alpha: in (0, 1]; 1 gives ``losses.mean()`` to the bit, a value of at most 1 / n the largest loss.
        weights: tensor of the same shape, each at least 0 and not all 0: how much of the whole each loss stands for;
            alpha 1 then gives the weighted mean.

    Returns:
        float scalar tensor.

    Raises:
        ValueError: no losses, alpha out of range, or weights of another shape, below 0 or all 0.
    """
    require_alpha(alpha)
    if losses.numel() == 0:
        raise ValueError("cvar of no losses; expected at least one")
    if weights is None and alpha == 1:
        return losses.mean()
    if losses.dtype.itemsize < 4:  # weights would round
        return cvar(losses.float(), alpha, weights).to(losses.dtype)
    if weights is None:
        tail = tail_size(losses.numel(), alpha)
        worst = losses.flatten().topk(math.ceil(tail)).values  # (ceil(tail),) falling
        return (worst * rank_weights(len(worst), tail, worst)).sum()
    if weights.shape != losses.shape:
        raise ValueError(
            f"weights have shape {tuple(weights.shape)}; expected that of the losses, {tuple(losses.shape)}"
        )
    if bool((weights < 0).any()) or not float(weights.sum()) > 0:
        raise ValueError("weights below 0, not a number, or all 0; expected at least 0 with a sum above 0")
    flat = losses.flatten()
    return (flat * weighted_tail(flat, torch.tensor(alpha, dtype=torch.float64), weights.flatten())).sum()


def require_alpha(alpha: float) -> None:
    """Raise ValueError unless ``alpha`` is in (0, 1]."""
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha is {alpha}; expected more than 0 and at most 1")


def tail_size(count: int, alpha: float) -> float:
    """Return how many of ``count`` losses CVaR at ``alpha`` averages; a product off by rounding alone is made whole."""
    tail = count * alpha
    nearest = round(tail)
    return float(nearest) if math.isclose(tail, nearest, rel_tol=1e-12) else tail


def rank_weights(count: int, tail: float, like: torch.Tensor) -> torch.Tensor:
    """Return the tail weights (count,) of losses sorted from the worst down, in dtype and device of ``like``.

    The first ``floor(tail)`` weigh 1 / tail each, the next one its fraction of that, the others nothing. With a tail
    below one loss all the weight is the first one's.
    """
    ranks = torch.arange(count, dtype=torch.float64, device=like.device)
    return ((tail - ranks).clamp(0, 1) / tail).to(like.dtype)


def stacked_rank_weights(count: int, alphas: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """Return ``rank_weights`` (H, count) for the alpha of each of H heads."""
    return torch.stack([rank_weights(count, tail_size(count, alpha), like) for alpha in alphas])


@torch.no_grad()
def weighted_tail(losses: torch.Tensor, alpha: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the tail weights of losses that stand for unequal shares of the whole.

    Args:
        losses: float tensor (..., n).
        alpha: tensor (...) in (0, 1].
        weights: tensor (..., n), each at least 0.

    Returns:
        float tensor (..., n) with a sum of 1: the dual's q, with p the weights scaled to a sum of 1. All 0 where all
        weights are.
    """
    order = losses.argsort(dim=-1, descending=True)
    shares = weights.to(losses.dtype).gather(-1, order).double()  # (..., n), the worst loss's first
    shares = shares / at_least_tiny(shares.sum(-1, keepdim=True))
    limit = alpha.to(losses.device).double().unsqueeze(-1)  # (..., 1)
    before = shares.cumsum(-1) - shares
    tail = torch.minimum((limit - before).clamp(min=0), shares) / limit
    tail = tail / at_least_tiny(tail.sum(-1, keepdim=True))  # rounding of the running sum
    return torch.zeros_like(losses).scatter(-1, order, tail.to(losses.dtype))


def at_least_tiny(sums: torch.Tensor) -> torch.Tensor:
    """Return sums that something can be divided by; what is 0 of nothing stays 0."""
    return sums.clamp(min=torch.finfo(sums.dtype).tiny)


@torch.no_grad()
def tail_within(
    losses: torch.Tensor,
    alpha: torch.Tensor,
    groups: torch.Tensor,
    count: int,
    counts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the weights of a mean over groups of each group's own CVaR: every group present counts the same.

    Args:
        losses: float tensor (..., n).
        alpha: tensor (...) in (0, 1].
        groups: int64 tensor (..., n) of group numbers below ``count``, such as classes or videos.
        count: how many groups there can be.
        counts: bool tensor (..., n), which losses count; None for all.

    Returns:
        float tensor (..., n) with a sum of 1, or of 0 where no loss counts.
    """
    if counts is not None:
        groups, count = torch.where(counts, groups, count), count + 1
    worst_first = losses.argsort(dim=-1, descending=True)
    by_group = groups.gather(-1, worst_first).argsort(dim=-1, stable=True)
    order = worst_first.gather(-1, by_group)  # (..., n) one group after the other, each from its worst loss down
    group = groups.gather(-1, order)
    members = losses.new_zeros((*losses.shape[:-1], count), dtype=torch.float64)
    members = members.scatter_add(-1, groups, torch.ones_like(losses, dtype=torch.float64))  # (..., count)
    first = members.cumsum(-1) - members
    if counts is not None:
        members[..., -1] = 0
    rank = torch.arange(losses.shape[-1], device=losses.device) - first.gather(-1, group)
    tail = members.gather(-1, group) * alpha.to(losses.device).double().unsqueeze(-1)
    present = (members > 0).sum(-1, keepdim=True)
    weights = (tail - rank).clamp(0, 1) / at_least_tiny(tail) / present.clamp(min=1)
    return torch.zeros_like(losses).scatter(-1, order, weights.to(losses.dtype))


class TailThreshold:
    """CVaR's threshold t tracked over the losses of the last batches, one for each of H heads.

    A batch's own tail is a biased view of the whole set's when batches are small. Here t is the minimiser of the
    Rockafellar-Uryasev form over a window of recent losses, and the loss of a batch is that form at t:
    ``t + mean(relu(losses - t)) / alpha``. A window of one batch gives that batch's own CVaR.

    Args:
        heads: H.
        window: losses to remember for each head.
        like: gives dtype and device.
    """

    def __init__(self, heads: int, window: int, like: torch.Tensor) -> None:
        self.losses = torch.full((heads, window), -torch.inf, dtype=like.dtype, device=like.device)  # -inf: empty yet
        self.shares = torch.zeros_like(self.losses)
        self.value = torch.zeros(heads, dtype=like.dtype, device=like.device)  # (H,)
        self.edge = torch.zeros_like(self.value)  # (H,) the part of losses right at the threshold that is in the tail

    @torch.no_grad()
    def update(self, losses: torch.Tensor, alpha: torch.Tensor, shares: torch.Tensor) -> None:
        """Take the losses (H, n) of a batch, with their shares (H, n), into the window in place of its oldest.

        Args:
            losses: (H, n) float.
            alpha: (H,) float64.
            shares: (H, n), how much of the whole each loss stands for.
        """
        keep = max(0, self.losses.shape[1] - losses.shape[1])
        some = (shares > 0).any(1, keepdim=True)  # (H, 1)
        for memory, now in ((self.losses, losses), (self.shares, shares.to(losses.dtype))):
            moved = torch.cat([now, memory[:, :keep]], dim=1)[:, : memory.shape[1]]
            memory.copy_(torch.where(some, moved, memory))
        ordered, order = self.losses.sort(dim=1, descending=True)
        running = self.shares.gather(1, order).double().cumsum(1)  # (H, window)
        limit = alpha.double().unsqueeze(1) * running[:, -1:]  # (H, 1)
        reached = (running < limit * (1 - 1e-12)).sum(1, keepdim=True)
        value = ordered.gather(1, reached)  # (H, 1)
        above = (self.shares * (self.losses > value)).double().sum(1, keepdim=True)
        level = (self.shares * (self.losses == value)).double().sum(1, keepdim=True)
        self.value.copy_(value.squeeze(1))
        self.edge.copy_(((limit - above) / at_least_tiny(level)).clamp(0, 1).squeeze(1))

    def cvar(self, losses: torch.Tensor, alpha: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """Return the form (H,) of losses (H, n) at the threshold as it is.

        Where a loss lies right at the threshold the form has a kink; of its gradients that one is taken which gives
        the window's tail its weight: with a window of one batch, the gradient of that batch's CVaR.
        """
        gap = losses - self.value.unsqueeze(1)  # (H, n)
        excess = gap.relu() + torch.where(gap == 0, gap * self.edge.unsqueeze(1), 0)
        found = self.value + (excess * shares).sum(1) / at_least_tiny(shares.sum(1)) / alpha.to(losses)
        return torch.where(shares.sum(1) > 0, found, 0)

    def state(self) -> dict[str, torch.Tensor]:
        """Return the window and the threshold themselves, by name, to be kept and to be written to."""
        return {name: getattr(self, name) for name in ("losses", "shares", "value", "edge")}
