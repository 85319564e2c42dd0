"""The training core: H heads of one shape trained side by side, by CVaR and SAM. Knows no files; ``fit`` is H = 1.

``Learner`` is the fast one, for multilayer perceptrons; ``affcache.training.plain`` has the one that defines a step.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from affcache.errors import ConfigError, did_you_mean
from affcache.tasks.task import Task
from affcache.training.data import Frames, FrameSource, Scaler, batches, epoch_order, without_scaler
from affcache.training.heads import HEADS
from affcache.training.objective import ClassCounts, stacked_objective
from affcache.training.settings import FitSettings
from affcache.training.stacked.heads import StackedHeads
from affcache.training.stacked.parts import (
    WARM_UP,
    Point,
    RecordedStep,
    StackedAdamW,
    clip_stacked_gradients,
    like,
    load_moments,
    moments_of,
    require_generator_state,
    write_stacked_worst_point,
)

Tensors = dict[str, torch.Tensor]
FORM = (  # what heads side by side have in common; "rho" only in whether it is 0
    "task", "head", "pool", "loss", "epochs", "batch_size", "stride", "frames_per_epoch", "cvar_level", "cvar_within",
    "class_weights", "task_weights", "auc_margin", "adaptive", "clip_norm", "precision", "hidden_layers",
    "hidden_width", "normalize",
)  # fmt: skip
FACTORS_PAY = 4  # times the batch size is the width from which on SAM's point costs less in factors


class BaseLearner(ABC):
    """H heads in training: whatever makes the steps, epochs, orders of frames and saved states are the same.

    Args:
        settings: the recipe of each of the H heads. Of all settings that aren't numbers of a head alone (those that
            ``FORM`` names, and whether rho is 0) the heads share the first one's.
        task: what is predicted.
        width: D, the width of an embedding.
        device: where the heads train.
        counts: how often each class stands in the training labels; None for a task without classes.
        videos: how many videos there are, for ``cvar_within="video"``.
        heads: untrained heads to begin with; None for those that the settings describe.
        scaler: what is done to embeddings first; None where that needs no training frames.
    """

    def __init__(
        self,
        settings: Sequence[FitSettings],
        task: Task,
        width: int,
        device: torch.device,
        counts: ClassCounts | None = None,
        videos: int = 0,
        heads: Sequence[nn.Module] | None = None,
        scaler: Scaler | None = None,
    ) -> None:
        self.settings = settings[0]
        self.scaler = (scaler or Scaler(self.settings.normalize)).to(device)
        self.recipes = list(settings)  # (H,)
        self.task = task
        self.device = device
        self._orders = [generator(one.seed, "order", torch.device("cpu")) for one in settings]
        self._begin(heads or [initial_head(one, width, task) for one in settings], counts, videos)

    @abstractmethod
    def _begin(self, heads: Sequence[nn.Module], counts: ClassCounts | None, videos: int) -> None:
        """Set up what trains these heads."""

    def epoch(self, frames: FrameSource, rates: float | Sequence[float]) -> torch.Tensor:
        """Train one epoch at a learning rate, or at one for each head; return the mean loss (H,) of first passes."""
        self._set_rates([rates] * len(self.recipes) if isinstance(rates, float) else rates)
        size, videos = self.settings.batch_size, frames.videos.cpu()
        stride, most = self.settings.stride, self.settings.frames_per_epoch
        order = torch.stack(  # (H, m)
            [epoch_order(videos, stride=stride, frames_per_epoch=most, generator=one) for one in self._orders]
        )
        losses = [
            self.step(chunk, batch) for chunk, part in frames.chunks(order, size) for batch in batches(part, size)
        ]
        return torch.stack(losses).mean(0)

    @abstractmethod
    def _set_rates(self, rates: Sequence[float]) -> None:
        """Take other learning rates (H,)."""

    @abstractmethod
    def step(self, frames: Frames, batch: torch.Tensor) -> torch.Tensor:
        """Make one step on a batch of row numbers (H, B); return the loss (H,) of its first pass, not waited for."""

    @abstractmethod
    def predict(self, frames: FrameSource) -> torch.Tensor:
        """Return the logits (H, n, C) of all frames, as trained heads give them."""

    def head_state(self, head: int) -> Tensors:
        """Return one head's parameters and statistics, under the names of its module, and the scaler's."""
        own = {name: tensor.clone() for name, tensor in self.scaler.tensors().items()}  # files hold no tensor twice
        return {**self.module_state(head), **own}

    def load_head(self, head: int, state: Tensors) -> None:
        """Take up what ``head_state`` returned."""
        self.load_module(head, without_scaler(state))
        self.scaler = Scaler.of_state(self.settings.normalize, state).to(self.device)

    @abstractmethod
    def module_state(self, head: int) -> Tensors:
        """Return one head's parameters and statistics, under the names of its module."""

    @abstractmethod
    def load_module(self, head: int, state: Tensors) -> None:
        """Take up what ``module_state`` returned."""

    @abstractmethod
    def _own_state(self) -> Tensors:
        """Return what a continued training needs beside the heads and the orders of frames."""

    @abstractmethod
    def _load_own_state(self, tensors: Tensors) -> None:
        """Take up what ``_own_state`` returned."""

    def state(self) -> Tensors:
        """Return everything that a continued training needs, so that it equals an uninterrupted one."""
        tensors = self._own_state()
        for head in range(len(self.recipes)):
            prefix = "head." if len(self.recipes) == 1 else f"head.{head}."
            tensors |= {f"{prefix}{name}": tensor for name, tensor in self.head_state(head).items()}
            tensors[f"generator.order.{head}"] = self._orders[head].get_state()
        return tensors

    def load_state(self, tensors: Tensors) -> None:
        """Take up what ``state`` returned. Names, shapes and dtypes are compared first: torch would write beyond them.

        Raises:
            ConfigError: it is of heads that trained in another way, plain or stacked.
            ValueError: it is damaged.
        """
        own = self.state()
        if any(name.startswith("plain.") for name in own) != any(name.startswith("plain.") for name in tensors):
            raise ConfigError(
                "The run began with the step that heads.py, losses.py, risk.py and sam.py define, or without it, and "
                "would go on the other way. Undo the change to these files, or begin a new run with another --run DIR."
            )
        for name, tensor in own.items():
            found = like(tensor, tensors, name)
            if "generator." in name or name.endswith(".random"):
                require_generator_state(name, found)
        self._load_own_state(tensors)
        for head in range(len(self.recipes)):
            self.load_head(head, with_prefix(tensors, "head." if len(self.recipes) == 1 else f"head.{head}."))
            self._orders[head].set_state(tensors[f"generator.order.{head}"].cpu())


class Learner(BaseLearner):
    """Multilayer perceptrons side by side in one buffer, their steps written out: equal to the plain ones, and faster.

    SAM's point nearby is kept as factors where that is faster: their norm is exact to rounding. Otherwise, and for ASAM
    always, it is written out, with float32 norms layer by layer as in the published code.
    """

    def _begin(self, heads: Sequence[nn.Module], counts: ClassCounts | None, videos: int) -> None:
        first, settings, device = self.settings, self.recipes, self.device
        self._module = copy.deepcopy(heads[0]).to(device)  # of the form of all, to evaluate with
        self.heads = StackedHeads(
            heads,
            dropout=[one.dropout for one in settings],
            products=torch.bfloat16 if first.precision == "bf16" else None,
            device=device,
        )
        rates, decays = [one.lr for one in settings], [one.weight_decay for one in settings]
        self.optimiser = StackedAdamW(self.heads.parameters, self.heads.gradients, rates, decays)
        self.rho = torch.tensor([one.rho for one in settings]).to(self.heads.parameters)  # (H,)
        self.sharpness_aware = any(one.rho for one in settings)
        self.factored = not first.adaptive and factors_pay(first)
        self._nearby: torch.Tensor | None = None  # (H, P), room for a point that is written out
        self.objective = stacked_objective(self.task, settings, counts, self.heads.parameters, videos)
        self.dropout_generators = [generator(one.seed, "dropout", device) for one in settings]
        self._records = device.type == "cuda"
        self._recorded: RecordedStep | None = None
        self._steps_before = 0  # made one by one since the optimiser's state was set up

    def _set_rates(self, rates: Sequence[float]) -> None:
        self.optimiser.set_rates(rates)

    def step(self, frames: Frames, batch: torch.Tensor) -> torch.Tensor:
        held = (frames.embeddings, frames.labels, frames.videos, frames.weights)
        inputs = [_take(of, batch) for of in held if of is not None]
        if not self._records or batch.shape[1] != self.settings.batch_size or self._steps_before < WARM_UP:
            self._steps_before += 1
            return self._step(*inputs)
        counted = self.heads.batches
        if self._recorded is None:
            self._recorded = RecordedStep(self._step, inputs, self.dropout_generators)
        loss = self._recorded(inputs)
        self.heads.batches = [batches + 1 for batches in counted]  # what Python counts, a replay doesn't
        return loss

    def _step(self, embeddings: torch.Tensor, *labelled: torch.Tensor) -> torch.Tensor:
        """Make one step on embeddings (H, B, D) with labels, videos and weights; return the loss (H,)."""
        prepared = self.scaler(embeddings)
        factored = self.sharpness_aware and self.factored
        loss = self._gradients(prepared, *labelled, factored=factored)
        if self.sharpness_aware:
            self._gradients(prepared, *labelled, at=self._worst_point())
        if self.settings.clip_norm:
            clip_stacked_gradients(self.heads.gradients, self.settings.clip_norm)
        self.optimiser.step()
        return loss

    def _worst_point(self) -> Point:
        """Return where SAM's second pass runs, from the gradients of the first."""
        if self.factored:
            return self.heads.worst_point(self.rho)
        if self._nearby is None:
            self._nearby = torch.empty_like(self.heads.parameters)
            self._near = self.heads.point(self._nearby)
        parameters, gradients, pieces = self.heads.parameters, self.heads.gradients, self.heads.shape.lengths
        adaptive = self.settings.adaptive
        write_stacked_worst_point(parameters, gradients, self.rho, self._nearby, adaptive=adaptive, pieces=pieces)
        return self._near

    def _gradients(
        self,
        embeddings: torch.Tensor,
        labels: torch.Tensor,
        videos: torch.Tensor,
        weights: torch.Tensor | None = None,
        *,
        at: Point | None = None,
        factored: bool = False,
    ) -> torch.Tensor:
        """Compute the gradients on embeddings (H, B, D) float32 and what frames (H, B) have; return the loss (H,).

        At a point nearby they are those of a second pass, which no statistics count.
        """
        first_pass = at is None
        logits = self.heads.forward(embeddings, self.dropout_generators, count_batch=first_pass, at=at)  # (H, B, C)
        loss, gradient = self.objective.with_gradient(logits, labels, videos, weights, first_pass=first_pass)
        self.heads.backward(gradient, factored=factored)
        return loss

    def predict(self, frames: FrameSource) -> torch.Tensor:
        # by their modules: to the bit what score makes of them
        modules = [copy.deepcopy(self._module) for _ in self.recipes]
        for number, module in enumerate(modules):
            module.load_state_dict(self.module_state(number))
        return predict(modules, frames, self.scaler)

    def module_state(self, head: int) -> Tensors:
        return self.heads.state_dict(head)

    def load_module(self, head: int, state: Tensors) -> None:
        self.heads.load_state_dict(head, state)

    def _own_state(self) -> Tensors:
        tensors = {f"objective.{name}": tensor for name, tensor in self.objective.state().items()}
        tensors |= {f"optimiser.{name}": tensor for name, tensor in moments_of(self.optimiser.adamw).items()}
        for head, drawn in enumerate(self.dropout_generators):
            tensors[f"generator.dropout.{head}"] = drawn.get_state()
        return tensors

    def _load_own_state(self, tensors: Tensors) -> None:
        self._recorded, self._steps_before = None, 0  # a recorded step changes the tensors of before
        self.objective.load_state(with_prefix(tensors, "objective."))
        load_moments(self.optimiser.adamw, with_prefix(tensors, "optimiser."))
        for head, drawn in enumerate(self.dropout_generators):
            drawn.set_state(tensors[f"generator.dropout.{head}"].cpu())


@torch.no_grad()
def predict(heads: Sequence[nn.Module], frames: FrameSource, scaler: Scaler) -> torch.Tensor:
    """Return the logits (H, n, C) of all frames, as trained heads of any kind give them."""
    for head in heads:
        head.eval()
    parts = (scaler(part) for part in frames.evaluation_batches())
    return torch.cat([torch.stack([head(part) for head in heads]) for part in parts], dim=1)


def factors_pay(settings: FitSettings) -> bool:
    """Say whether SAM's point costs less in factors than written out."""
    return FACTORS_PAY * settings.batch_size <= settings.hidden_width


def _take(rows: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    """Return ``rows[batch]`` (H, B, ...), three times as fast."""
    return rows.index_select(0, batch.flatten()).unflatten(0, batch.shape)


def find_head(name: str) -> Callable[..., nn.Module]:
    """Return what builds heads of a kind.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in HEADS:
        raise ConfigError(
            f"--head {name!r} is unknown{did_you_mean(name, HEADS)}. Expected {' or '.join(HEADS)}, as in "
            "affcache/training/heads.py."
        )
    return HEADS[name]


def build_head(settings: FitSettings, width: int, task: Task) -> nn.Module:
    """Build the untrained head that the settings describe, for embeddings of the given width."""
    return find_head(settings.head)(
        width,
        task.outputs,
        hidden_layers=settings.hidden_layers,
        hidden_width=settings.hidden_width,
        dropout=settings.dropout,
    )


def learning_rate(settings: FitSettings, epoch: int) -> float:
    """Return the learning rate of an epoch (counted from 0): a cosine that swings between lr and its minimum."""
    phase = math.pi * epoch / (settings.lr_half_period * settings.epochs)
    return settings.lr_minimum + (settings.lr - settings.lr_minimum) * (1 + math.cos(phase)) / 2


def initial_head(settings: FitSettings, width: int, task: Task) -> nn.Module:
    """Build a head whose weights depend on the seed alone; the caller's random numbers stay his own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return build_head(settings, width, task)


def generator(seed: int, purpose: str, device: torch.device) -> torch.Generator:
    """Return a generator of its own for a purpose: streams begun with the same seed would be one stream."""
    words = np.random.SeedSequence([seed, *purpose.encode()]).generate_state(2, np.uint32)
    return torch.Generator(device).manual_seed(int(words[0]) << 32 | int(words[1]))


def with_prefix(tensors: Tensors, prefix: str) -> Tensors:
    """Return the tensors whose names begin so, without that beginning."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
