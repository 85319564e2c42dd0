"""What heads minimise: the losses of a batch, CVaR over them, and a term of the whole batch. Knows tensors only."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from affcache.tasks.losses import Option
from affcache.tasks.multitask import MultiTask
from affcache.tasks.task import Task
from affcache.training.risk import TailThreshold, cvar, stacked_rank_weights, tail_within, weighted_tail
from affcache.training.settings import FitSettings

WINDOW = 32  # batches whose losses the threshold of --cvar-level set is found over


@dataclass(frozen=True)
class ClassCounts:
    """How often each class stands in the training labels: int64 (K,), in the order of ``Task.class_of``."""

    counts: torch.Tensor
    partial: bool = False  # whether some frame lacks a label that others have
    parts: tuple["ClassCounts | None", ...] = ()  # of each task, where several train at once

    @property
    def has_gaps(self) -> bool:
        """Whether some label is missing."""
        return self.partial or any(part.has_gaps for part in self.parts if part)

    @classmethod
    def of(cls, task: Task, labels: torch.Tensor) -> "ClassCounts | None":
        """Count the classes of labels (n, ...); None for a task without classes, all of whose labels are there."""
        none = torch.zeros(0, dtype=torch.int64)
        if isinstance(task, MultiTask):
            return cls(
                none, parts=tuple(cls.of(part, of) for part, of in zip(task.parts, task.split(labels), strict=True))
            )
        labelled = task.labelled(labels)
        partial = not bool(labelled.all())
        if not task.has_classes:
            return cls(none, partial) if partial else None
        classes = task.class_of(labels)[labelled].cpu()
        return cls(torch.bincount(classes, minlength=task.class_count), partial)

    def balanced(self) -> torch.Tensor:
        """Return float64 weights (K,) that give each class present the same total; 0 for absent ones."""
        weights = 1 / self.counts.double().clamp(min=1)
        return torch.where(self.counts > 0, weights / weights[self.counts > 0].mean(), 0)


class BatchLoss(ABC):
    """The training loss of one head on a batch, or of each of H."""

    @abstractmethod
    def __call__(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        videos: torch.Tensor,
        weights: torch.Tensor | None = None,
        *,
        first_pass: bool = True,
    ) -> torch.Tensor:
        """Return the loss, () or (H,), of logits (B, C) or (H, B, C), of their labels, video numbers and weights."""

    def with_gradient(
        self, logits: torch.Tensor, *of_frames: Any, first_pass: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss (H,) of logits (H, B, C) and all else, and its gradient (H, B, C) with respect to them."""
        logits = logits.detach().requires_grad_()
        loss = self(logits, *of_frames, first_pass=first_pass)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        return loss.detach(), gradient

    @abstractmethod
    def state(self) -> dict[str, torch.Tensor]:
        """Return what a continued run needs: the tracked threshold and its window, if there is one."""

    @abstractmethod
    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take up what ``state`` returned."""


class PlainObjective(BatchLoss):
    """The training loss of one head on a batch, as it is defined; ``Objective`` is that of H heads side by side.

    ``(1 - w) * CVaR(losses) + w * batch term``, with w the weight of the pairwise AUC term (units) or of 1 - CCC
    (values), over the labels that there are; 0 for a batch without any.

    Args:
        task: gives losses and batch term.
        settings: the recipe.
        counts: classes in the training labels, and whether some are missing; None for a task without classes, all of
            whose labels are there.
        like: gives dtype and device.
    """

    def __init__(self, task: Task, settings: FitSettings, counts: ClassCounts | None, like: torch.Tensor) -> None:
        self.task, self.settings = task, settings
        self.loss = task.loss(settings.loss)
        self.knobs: dict[str, Option] = dict(settings.knobs(task))
        self.term_weight: Option = term_weight(settings, task)
        self.partial = counts is not None and counts.partial
        self.adjustment: torch.Tensor | None = None  # (C,)
        if counts is not None and settings.logit_adjustment:
            self.adjustment = (settings.logit_adjustment * task.log_prior(counts.counts)).to(like)
        self.balance: torch.Tensor | None = None  # (K,)
        if counts is not None and settings.class_weights == "balanced":
            self.balance = counts.balanced().to(like)
        self.alpha = torch.tensor([settings.alpha], dtype=torch.float64, device=like.device)  # (1,)
        self.threshold = self._new_threshold(1, like)

    def _new_threshold(self, heads: int, like: torch.Tensor) -> TailThreshold | None:
        window = WINDOW * self.settings.batch_size * self.task.losses_per_frame
        return TailThreshold(heads, window, like) if self.settings.cvar_level == "set" else None

    def __call__(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        videos: torch.Tensor,
        weights: torch.Tensor | None = None,
        *,
        first_pass: bool = True,
    ) -> torch.Tensor:
        """Return the loss, a scalar, of logits (B, C), labels (B,) or (B, C), video numbers (B,) and weights (B,)."""
        labelled = self.task.labelled(labels) if self.partial else None
        if labelled is not None:
            labels = self.task.filled(labels)
        adjusted = logits if self.adjustment is None else logits + self.adjustment
        losses = self.loss(adjusted, labels, **self.knobs)  # (B,) or (B, C)
        if weights is not None:
            assert self.settings.cvar_within == "batch", "the losses of a group count alike"
            weights = weights if losses.dim() == weights.dim() else weights.unsqueeze(-1).expand_as(losses)
        risk = self._risk(losses, labels, videos, labelled, weights, first_pass)
        if not isinstance(self.term_weight, torch.Tensor) and self.term_weight == 0:
            return risk
        counts = _product(weights, labelled)
        term = self.task.batch_term(logits, labels, self.settings.auc_margin, counts)
        return (1 - self.term_weight) * risk + self.term_weight * term

    def _risk(
        self,
        losses: torch.Tensor,
        labels: torch.Tensor,
        videos: torch.Tensor,
        labelled: torch.Tensor | None,
        weights: torch.Tensor | None,
        first_pass: bool,
    ) -> torch.Tensor:
        """Return the CVaR of losses (B,) or (B, C): of all, or the mean over classes or videos of each one's own.

        ``labelled`` and ``weights``, in their shape, say which count, and how much; None for all, and alike.
        """
        alpha, within = self.settings.alpha, self.settings.cvar_within
        shares = self._shares(labels, weights)
        if self.threshold is not None:
            shares = _product(shares, labelled)
            return self._tracked(
                losses.flatten()[None], None if shares is None else shares.flatten()[None], first_pass
            )[0]
        group = self.task.class_of(labels) if within == "class" else None
        if within == "video":
            group = per_loss(videos[None], losses[None])[0].view(losses.shape)
        there = slice(None) if labelled is None else labelled
        losses, group = losses[there], None if group is None else group[there]
        if not losses.numel():
            return losses.sum()
        if group is None:
            return cvar(losses, alpha, None if shares is None else shares[there])
        flat, group = losses.flatten(), group.flatten()
        return torch.stack([cvar(flat[group == one], alpha) for one in group.unique()]).mean()

    def _shares(self, labels: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor | None:
        """Return how much of the whole the loss of each label stands for, if it is there; None where all do alike."""
        return _product(weights, None if self.balance is None else self.balance[self.task.class_of(labels)])

    def _tracked(self, flat: torch.Tensor, shares: torch.Tensor | None, first_pass: bool) -> torch.Tensor:
        """Return the CVaR (H,) of losses (H, n) at the threshold of the last batches, which first passes update."""
        assert self.threshold is not None  # for the type checker
        shares = torch.ones_like(flat) if shares is None else shares.to(flat)
        if first_pass:
            self.threshold.update(flat.detach(), self.alpha, shares)
        return self.threshold.cvar(flat, self.alpha, shares)

    def state(self) -> dict[str, torch.Tensor]:
        return {} if self.threshold is None else self.threshold.state()

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(state[name])


class Objective(PlainObjective):
    """The training loss (H,) of each of H heads on a batch of its own: equal to ``PlainObjective``, head by head.

    Args:
        task, counts, like: as for ``PlainObjective``.
        settings: the recipe of each head; what has the form of a computation must be the same for all of them.
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
        super().__init__(task, settings[0], counts, like)
        self.alphas = [one.alpha for one in settings]
        self.alpha = torch.tensor(self.alphas, dtype=torch.float64, device=like.device)  # (H,)
        axes = 1 if task.exclusive else 2  # of a head's losses: (B,) or (B, C)
        self.knobs = {name: _option([one.knobs(task)[name] for one in settings], like, axes) for name in self.knobs}
        self.term_weight = _option([term_weight(one, task) for one in settings], like, axes=0)
        if counts is not None and any(one.logit_adjustment for one in settings):
            strength = torch.tensor([[[one.logit_adjustment]] for one in settings], dtype=torch.float64)
            self.adjustment = (strength * task.log_prior(counts.counts)).to(like)  # (H, 1, C)
        self.groups = {"batch": 0, "class": task.class_count, "video": videos}[settings[0].cvar_within]
        self.threshold = self._new_threshold(len(settings), like)
        self._ranks: dict[int, torch.Tensor] = {}  # tail weights by rank, for each size of a batch

    def _risk(
        self,
        losses: torch.Tensor,
        labels: torch.Tensor,
        videos: torch.Tensor,
        labelled: torch.Tensor | None,
        weights: torch.Tensor | None,
        first_pass: bool,
    ) -> torch.Tensor:
        """Return the CVaR (H,) of losses (H, B) or (H, B, C)."""
        flat, within = losses.flatten(1), self.settings.cvar_within  # (H, n)
        shares = _product(self._shares(labels, weights), labelled)
        shares = None if shares is None else shares.flatten(1)
        if self.threshold is not None:
            return self._tracked(flat, shares, first_pass)
        if within == "batch" and shares is None and all(alpha == 1 for alpha in self.alphas):
            return flat.mean(1)
        with torch.no_grad():  # the weights of losses in the tail, each head's with a sum of 1
            if within != "batch":
                groups = self.task.class_of(labels).flatten(1) if within == "class" else per_loss(videos, losses)
                counts = None if labelled is None else labelled.flatten(1)
                tail = tail_within(flat, self.alpha, groups, self.groups, counts)
            elif shares is not None:
                tail = weighted_tail(flat, self.alpha, shares)
            else:
                worst_first = flat.argsort(dim=1, descending=True)
                tail = torch.empty_like(flat).scatter_(1, worst_first, self._rank_weights(flat))
        return (flat * tail).sum(1)

    def _rank_weights(self, flat: torch.Tensor) -> torch.Tensor:
        count = flat.shape[1]
        if count not in self._ranks:
            self._ranks[count] = stacked_rank_weights(count, self.alphas, flat)  # (H, n)
        return self._ranks[count]


class SumOfObjectives(BatchLoss):
    """The training loss of several tasks at once: the weighted sum of theirs, each on its outputs and its labels."""

    def __init__(self, task: MultiTask, parts: Sequence[BatchLoss], weights: Sequence[float]) -> None:
        self.task, self.parts, self.weights = task, parts, weights

    def __call__(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        videos: torch.Tensor,
        weights: torch.Tensor | None = None,
        *,
        first_pass: bool = True,
    ) -> torch.Tensor:
        each = zip(self.weights, self.parts, self.task.outputs_of(logits), self.task.split(labels), strict=True)
        return torch.stack(
            [weight * part(of, own, videos, weights, first_pass=first_pass) for weight, part, of, own in each]
        ).sum(0)

    def state(self) -> dict[str, torch.Tensor]:
        return {f"{i}.{name}": tensor for i, part in enumerate(self.parts) for name, tensor in part.state().items()}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        for i, part in enumerate(self.parts):
            part.load_state({name: state[f"{i}.{name}"] for name in part.state()})


def plain_objective(task: Task, settings: FitSettings, counts: ClassCounts | None, like: torch.Tensor) -> BatchLoss:
    """Return the objective of one head, as ``PlainObjective``; of several tasks the sum of theirs."""
    if not isinstance(task, MultiTask):
        return PlainObjective(task, settings, counts, like)
    of_parts = counts.parts if counts else [None] * len(task.parts)
    parts = [
        plain_objective(one, of_part(settings, one), own, like) for one, own in zip(task.parts, of_parts, strict=True)
    ]
    return SumOfObjectives(task, parts, settings.weights_of(task))


def stacked_objective(
    task: Task, settings: Sequence[FitSettings], counts: ClassCounts | None, like: torch.Tensor, videos: int = 0
) -> BatchLoss:
    """Return the objective of heads side by side, as ``Objective``; of several tasks the sum of theirs."""
    if not isinstance(task, MultiTask):
        return Objective(task, settings, counts, like, videos)
    parts = [
        stacked_objective(one, [of_part(recipe, one) for recipe in settings], own, like, videos)
        for one, own in zip(task.parts, counts.parts if counts else [None] * len(task.parts), strict=True)
    ]
    return SumOfObjectives(task, parts, settings[0].weights_of(task))


def of_part(settings: FitSettings, part: Task) -> FitSettings:
    """Return the recipe for one of several tasks: what it has no use for is off."""
    off: dict[str, object] = {} if part.accepts(settings.loss) else {"loss": ""}
    if not part.has_classes:
        within = "batch" if settings.cvar_within == "class" else settings.cvar_within
        off |= {"logit_adjustment": 0.0, "class_weights": "none", "cvar_within": within}
    return replace(settings, **off)  # type: ignore[arg-type]


def _product(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    """Return how much losses count by both; None where by neither."""
    if one is None or other is None:
        return other if one is None else one
    return one * other


def term_weight(settings: FitSettings, task: Task) -> float:
    """Return the share in the loss of the task's term of whole batches; 0 where it has none."""
    return float(getattr(settings, task.batch_term_weight)) if task.batch_term_weight else 0.0


def _option(values: Sequence[float], like: torch.Tensor, axes: int) -> Option:
    """Return 0.0 where the option is off for every head, else its values (H,) with ``axes`` further axes."""
    if not any(values):
        return 0.0
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, *[1] * axes)


def per_loss(videos: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
    """Return the video (H, n) of each loss (H, B) or (H, B, C), by those of frames (H, B)."""
    if losses.dim() == 2:
        return videos
    return videos.unsqueeze(2).expand_as(losses).flatten(1)
