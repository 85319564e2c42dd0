"""What heads minimise: the losses of a batch, CVaR over them, and a term of the whole batch. Knows tensors only."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from affcache.tasks.losses import Option
from affcache.tasks.tasks import Task
from affcache.training.risk import TailThreshold, stacked_rank_weights, tail_within, weighted_tail
from affcache.training.settings import FitSettings

WINDOW = 32  # batches whose losses the threshold of --cvar-level set is found over


@dataclass(frozen=True)
class ClassCounts:
    """How often each class stands in the training labels: int64 (K,), in the order of ``Task.class_of``."""

    counts: torch.Tensor

    @classmethod
    def of(cls, task: Task, labels: torch.Tensor) -> "ClassCounts | None":
        """Count the classes of labels (n, ...); None for a task without classes."""
        if task.class_of is None:
            return None
        return cls(torch.bincount(task.class_of(labels).flatten().cpu(), minlength=task.class_count))

    def balanced(self) -> torch.Tensor:
        """Return float64 weights (K,) that give each class present the same total; 0 for absent ones."""
        weights = 1 / self.counts.double().clamp(min=1)
        return torch.where(self.counts > 0, weights / weights[self.counts > 0].mean(), 0)

    def log_prior(self, task: Task) -> torch.Tensor:
        """Return float64 (C,): the log share of each class, or the log odds of each action unit; counts start at 1."""
        counts = self.counts.double() + 1
        if task.class_count == task.outputs:
            return (counts / counts.sum()).log()
        absent, present = counts.view(-1, 2).unbind(1)
        return (present / absent).log()


class Objective:
    """The training loss of each of H heads on a batch of its own.

    ``(1 - w) * CVaR(losses) + w * batch term``, with w the weight of the pairwise AUC term (au) or of 1 - CCC (va).

    Args:
        task: gives losses and batch term.
        settings: the recipe of each head; what has the form of a computation must be the same for all of them.
        counts: classes in the training labels, None for a task without.
        like: gives dtype and device.
        videos: how many videos there are, for ``--cvar-within video``.
    """

    def __init__(
        self,
        task: Task,
        settings: Sequence[FitSettings],
        counts: ClassCounts | None,
        like: torch.Tensor,
        videos: int = 0,
    ) -> None:
        first = settings[0]
        self.task = task
        self.alphas = [one.alpha for one in settings]
        self.alpha = torch.tensor(self.alphas, dtype=torch.float64, device=like.device)  # (H,)
        self.options = _loss_options(task, settings, counts, like)
        self.balance: torch.Tensor | None = None
        if counts is not None and first.class_weights == "balanced":
            self.balance = counts.balanced().to(like)  # (K,)
        self.within = first.cvar_within
        self.groups = {"batch": 0, "class": task.class_count, "video": videos}[self.within]
        self.term_weight = _option([task.batch_term_weight(one) for one in settings], like, axes=0)
        self.margin = first.auc_margin
        self.closed_form = (
            task.losses_with_gradients is not None
            and first.cvar_level == "batch"
            and not any(one.focal_gamma or task.batch_term_weight(one) for one in settings)
        )
        self.threshold: TailThreshold | None = None
        if first.cvar_level == "set":
            window = WINDOW * first.batch_size * task.losses_per_frame
            self.threshold = TailThreshold(len(settings), window, like)
        self._ranks: dict[int, torch.Tensor] = {}  # tail weights by rank, for each size of a batch

    def __call__(
        self, logits: torch.Tensor, labels: torch.Tensor, videos: torch.Tensor | None, *, first_pass: bool = True
    ) -> torch.Tensor:
        """Return the loss (H,) of logits (H, B, C), labels (H, B) or (H, B, C), and video numbers (H, B)."""
        losses = self.task.losses(logits, labels, **self.options)
        risk = self._risk(losses, labels, videos, first_pass)
        if isinstance(self.term_weight, float) and self.term_weight == 0:
            return risk
        assert self.task.batch_term is not None  # the weight would be 0
        term = self.task.batch_term(logits, labels, self.margin)  # (H,)
        return (1 - self.term_weight) * risk + self.term_weight * term

    def with_gradient(
        self, logits: torch.Tensor, labels: torch.Tensor, videos: torch.Tensor | None, *, first_pass: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss (H,), as a call does, and its gradient (H, B, C) with respect to the logits.

        Where the task's losses have a closed form of their gradient it takes a quarter of autograd's time: CVaR's
        gradient with respect to the losses is the tail's weights.
        """
        if not self.closed_form:
            logits = logits.detach().requires_grad_()
            loss = self(logits, labels, videos, first_pass=first_pass)
            (gradient,) = torch.autograd.grad(loss.sum(), logits)
            return loss.detach(), gradient
        assert self.task.losses_with_gradients is not None
        losses, gradients = self.task.losses_with_gradients(logits, labels, **self.options)  # (H, B), (H, B, C)
        tail = self._tail(losses, labels, videos)
        return self._weighted(losses, tail), gradients * tail.unsqueeze(2)

    def _risk(
        self, losses: torch.Tensor, labels: torch.Tensor, videos: torch.Tensor | None, first_pass: bool
    ) -> torch.Tensor:
        """Return the CVaR (H,) of losses (H, B) or (H, B, C)."""
        if self.threshold is None:
            return self._weighted(losses, self._tail(losses, labels, videos))
        flat = losses.flatten(1)  # (H, n)
        shares = torch.ones_like(flat) if self.balance is None else self.balance[self._classes(labels)]
        if first_pass:
            self.threshold.update(flat.detach(), self.alpha, shares)
        return self.threshold.cvar(flat, self.alpha, shares)

    def _weighted(self, losses: torch.Tensor, tail: torch.Tensor) -> torch.Tensor:
        """Return the sum (H,) of the tail's losses by their weights."""
        flat = losses.flatten(1)  # (H, n)
        plain = self.within == "batch" and self.balance is None and all(alpha == 1 for alpha in self.alphas)
        return flat.mean(1) if plain else (flat * tail).sum(1)

    @torch.no_grad()
    def _tail(self, losses: torch.Tensor, labels: torch.Tensor, videos: torch.Tensor | None) -> torch.Tensor:
        """Return the weights (H, n) of losses (H, B) or (H, B, C) in the CVaR of a batch; each head's sum to 1."""
        flat = losses.flatten(1)  # (H, n)
        if self.within != "batch":
            groups = self._classes(labels) if self.within == "class" else _per_loss(videos, losses)
            assert groups is not None  # settings are checked before
            return tail_within(flat, self.alpha, groups, self.groups)
        if self.balance is not None:
            return weighted_tail(flat, self.alpha, self.balance[self._classes(labels)])
        worst_first = flat.argsort(dim=1, descending=True)
        return torch.empty_like(flat).scatter_(1, worst_first, self._rank_weights(flat))

    def _classes(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the class (H, n) of each loss."""
        assert self.task.class_of is not None  # settings are checked before
        return self.task.class_of(labels).flatten(1)

    def _rank_weights(self, flat: torch.Tensor) -> torch.Tensor:
        count = flat.shape[1]
        if count not in self._ranks:
            self._ranks[count] = stacked_rank_weights(count, self.alphas, flat)  # (H, n)
        return self._ranks[count]

    def state(self) -> dict[str, torch.Tensor]:
        """Return what a continued run needs: the tracked threshold and its window, if there is one."""
        if self.threshold is None:
            return {}
        return {name: getattr(self.threshold, name) for name in ("losses", "shares", "value", "edge")}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take up what ``state`` returned."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])


def _loss_options(
    task: Task, settings: Sequence[FitSettings], counts: ClassCounts | None, like: torch.Tensor
) -> dict[str, Any]:
    """Return what the task's losses are called with beside logits and labels; nothing where everything is off."""
    options: dict[str, Any] = {
        "label_smoothing": _option([one.label_smoothing for one in settings], like),
        "focal_gamma": _option([one.focal_gamma for one in settings], like),
    }
    if counts is not None and any(one.logit_adjustment for one in settings):
        strength = torch.tensor([[one.logit_adjustment] for one in settings], dtype=torch.float64)
        options["adjustment"] = (strength * counts.log_prior(task)).to(like)  # (H, C)
    return {name: value for name, value in options.items() if isinstance(value, torch.Tensor)}


def _option(values: Sequence[float], like: torch.Tensor, axes: int = 1) -> Option:
    """Return 0.0 where the option is off for every head, else its values (H,) with ``axes`` further axes."""
    if not any(values):
        return 0.0
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, *[1] * axes)


def _per_loss(videos: torch.Tensor | None, losses: torch.Tensor) -> torch.Tensor | None:
    """Return the video (H, n) of each loss of each frame."""
    if videos is None or losses.dim() == 2:
        return videos
    return videos.unsqueeze(2).expand_as(losses).flatten(1)
