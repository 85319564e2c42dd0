"""The training core: H heads of one shape trained side by side, by CVaR and SAM. Knows no files; ``fit`` is H = 1."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from affcache.tasks.tasks import Task
from affcache.training.cuda_graph import WARM_UP, RecordedStep
from affcache.training.data import EVALUATION_BATCH, Frames, FrameSource, batches, epoch_order, prepare
from affcache.training.heads import MLPHead
from affcache.training.objective import ClassCounts, Objective
from affcache.training.sam import clip_stacked_gradients, write_stacked_worst_point
from affcache.training.settings import FitSettings
from affcache.training.stacked import Point, StackedHeads

Tensors = dict[str, torch.Tensor]
FORM = (  # what heads side by side have in common; "rho" only in whether it is 0
    "task", "head", "epochs", "batch_size", "stride", "frames_per_epoch", "cvar_level", "cvar_within", "class_weights",
    "auc_margin", "adaptive", "clip_norm", "precision", "hidden_layers", "hidden_width", "normalize",
)  # fmt: skip
FACTORS_PAY = 4  # times the batch size is the width from which on SAM's point costs less in factors


class StackedAdamW:
    """A parameter group for each head: a row of the buffer. Fused, and on a GPU fit for a recorded step.

    Args:
        parameters: (H, P), updated in place.
        gradients: (H, P), read at each step where they lie.
        rates: (H,) learning rates to begin with.
        weight_decays: (H,), decoupled.
    """

    def __init__(
        self,
        parameters: torch.Tensor,
        gradients: torch.Tensor,
        rates: Sequence[float],
        weight_decays: Sequence[float],
    ) -> None:
        recorded = parameters.device.type == "cuda"  # a recorded step reads the rate where it lies
        groups = []
        for row, of_row, rate, decay in zip(parameters.split(1), gradients.split(1), rates, weight_decays, strict=True):
            row.grad = of_row
            lr = torch.tensor(rate, device=row.device) if recorded else rate
            groups.append({"params": [row], "lr": lr, "weight_decay": decay})
        self._adamw = torch.optim.AdamW(groups, fused=True, capturable=recorded)

    def set_rates(self, rates: Sequence[float]) -> None:
        """Take other learning rates (H,)."""
        for group, rate in zip(self._adamw.param_groups, rates, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def step(self) -> None:
        """Update all heads from the gradients as they are."""
        self._adamw.step()

    def state(self) -> Tensors:
        """Return the moments and the count of steps of each head: ``<head>.<name>``."""
        states = self._adamw.state_dict()["state"]
        return {f"{head}.{name}": tensor for head, state in states.items() for name, tensor in state.items()}

    def load_state(self, tensors: Tensors) -> None:
        """Take up what ``state`` returned."""
        states: dict[int, Tensors] = {}
        for key, tensor in tensors.items():
            head, _, name = key.partition(".")
            states.setdefault(int(head), {})[name] = tensor
        self._adamw.load_state_dict({"state": states, "param_groups": self._adamw.state_dict()["param_groups"]})


class Learner:
    """Heads with their optimiser, objective and generators: everything that a step changes.

    Args:
        settings: the recipe of each of the H heads. Of all settings that aren't numbers of a head alone (those that
            ``FORM`` names, and whether rho is 0) the heads share the first one's.
        task: what is predicted.
        width: D, the width of an embedding.
        device: where the heads train.
        counts: how often each class stands in the training labels; None for a task without classes.
        videos: how many videos there are, for ``cvar_within="video"``.
        factored: whether SAM's point nearby is kept as factors, whose norm is exact to rounding; otherwise it is
            written out, with float32 norms layer by layer as in the published code. None for what is faster. ASAM's
            can't be factored.
    """

    def __init__(
        self,
        settings: Sequence[FitSettings],
        task: Task,
        width: int,
        device: torch.device,
        counts: ClassCounts | None = None,
        videos: int = 0,
        factored: bool | None = None,
    ) -> None:
        first = settings[0]
        self.settings = first
        self.recipes = list(settings)  # (H,)
        self.task = task
        self.device = device
        self.heads = StackedHeads(
            [_initial_head(one, width, task) for one in settings],
            dropout=[one.dropout for one in settings],
            products=torch.bfloat16 if first.precision == "bf16" else None,
            device=device,
        )
        rates, decays = [one.lr for one in settings], [one.weight_decay for one in settings]
        self.optimiser = StackedAdamW(self.heads.parameters, self.heads.gradients, rates, decays)
        self.rho = torch.tensor([one.rho for one in settings]).to(self.heads.parameters)  # (H,)
        self.sharpness_aware = any(one.rho for one in settings)
        pays = FACTORS_PAY * first.batch_size <= first.hidden_width
        self.factored = not first.adaptive and (pays if factored is None else factored)
        self._nearby: torch.Tensor | None = None  # (H, P), room for a point that is written out
        self.objective = Objective(task, settings, counts, self.heads.parameters, videos)
        self._orders = [_generator(one.seed, "order", torch.device("cpu")) for one in settings]
        self._drops = [_generator(one.seed, "dropout", device) for one in settings]
        self._records = device.type == "cuda"
        self._recorded: RecordedStep | None = None
        self._steps_before = 0  # made one by one since the optimiser's state was set up

    def epoch(self, frames: FrameSource, rates: float | Sequence[float]) -> torch.Tensor:
        """Train one epoch at a learning rate, or at one for each head; return the mean loss (H,) of first passes."""
        self.optimiser.set_rates([rates] * self.heads.count if isinstance(rates, float) else rates)
        size, videos = self.settings.batch_size, frames.videos.cpu()
        stride, most = self.settings.stride, self.settings.frames_per_epoch
        order = torch.stack(  # (H, m)
            [epoch_order(videos, stride=stride, frames_per_epoch=most, generator=one) for one in self._orders]
        )
        losses = [
            self.step(chunk, batch) for chunk, part in frames.chunks(order, size) for batch in batches(part, size)
        ]
        return torch.stack(losses).mean(0)

    def step(self, frames: Frames, batch: torch.Tensor) -> torch.Tensor:
        """Make one step on a batch of row numbers (H, B); return the loss (H,) of its first pass, not waited for."""
        inputs = [_take(of, batch) for of in (frames.embeddings, frames.labels, frames.videos)]
        if not self._records or batch.shape[1] != self.settings.batch_size or self._steps_before < WARM_UP:
            self._steps_before += 1
            return self._step(*inputs)
        counted = self.heads.batches
        if self._recorded is None:
            self._recorded = RecordedStep(self._step, inputs, self._drops)
        loss = self._recorded(inputs)
        self.heads.batches = [batches + 1 for batches in counted]  # what Python counts, a replay doesn't
        return loss

    def _step(self, embeddings: torch.Tensor, labels: torch.Tensor, videos: torch.Tensor) -> torch.Tensor:
        """Make one step on embeddings (H, B, D) and labels (H, B, ...) of videos (H, B); return the loss (H,)."""
        prepared = prepare(embeddings, self.settings.normalize)
        factored = self.sharpness_aware and self.factored
        loss = self._gradients(prepared, labels, videos, factored=factored)
        if self.sharpness_aware:
            self._gradients(prepared, labels, videos, at=self._worst_point())
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
        *,
        at: Point | None = None,
        factored: bool = False,
    ) -> torch.Tensor:
        """Compute the gradients on embeddings (H, B, D) float32; return the loss (H,).

        At a point nearby they are those of a second pass, which no statistics count.
        """
        first_pass = at is None
        logits = self.heads.forward(embeddings, self._drops, count_batch=first_pass, at=at)  # (H, B, C)
        loss, gradient = self.objective.with_gradient(logits, labels, videos, first_pass=first_pass)
        self.heads.backward(gradient, factored=factored)
        return loss

    def predict(self, frames: FrameSource) -> torch.Tensor:
        """Return the logits (H, n, C) of all frames, as trained heads give them."""
        return predict(self.heads, frames, self.settings.normalize)

    def state(self) -> Tensors:
        """Return everything that a continued training needs, so that it equals an uninterrupted one."""
        tensors = {f"objective.{name}": tensor for name, tensor in self.objective.state().items()}
        tensors |= {f"optimiser.{name}": tensor for name, tensor in self.optimiser.state().items()}
        for head in range(self.heads.count):
            prefix = "head." if self.heads.count == 1 else f"head.{head}."
            tensors |= {f"{prefix}{name}": tensor for name, tensor in self.heads.state_dict(head).items()}
            tensors[f"generator.order.{head}"] = self._orders[head].get_state()
            tensors[f"generator.dropout.{head}"] = self._drops[head].get_state()
        return tensors

    def load_state(self, tensors: Tensors) -> None:
        """Take up what ``state`` returned."""
        self._recorded, self._steps_before = None, 0  # a recorded step changes the tensors of before
        self.objective.load_state(_with_prefix(tensors, "objective."))
        self.optimiser.load_state(_with_prefix(tensors, "optimiser."))
        for head in range(self.heads.count):
            prefix = "head." if self.heads.count == 1 else f"head.{head}."
            self.heads.load_state_dict(head, _with_prefix(tensors, prefix))
            self._orders[head].set_state(tensors[f"generator.order.{head}"].cpu())
            self._drops[head].set_state(tensors[f"generator.dropout.{head}"].cpu())


def predict(heads: StackedHeads, frames: FrameSource, normalize: str) -> torch.Tensor:
    """Return the logits (H, n, C) of all frames, as trained heads give them."""
    most = max(1, EVALUATION_BATCH // heads.count)  # frames at a time: hidden layers hold H times as many rows
    parts = (part for batch in frames.evaluation_batches() for part in batch.split(most))
    evaluate = heads.evaluator()
    return torch.cat([evaluate(prepare(part, normalize)) for part in parts], dim=1)


def _take(rows: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    """Return ``rows[batch]`` (H, B, ...), three times as fast."""
    return rows.index_select(0, batch.flatten()).unflatten(0, batch.shape)


def build_head(settings: FitSettings, width: int, task: Task) -> MLPHead:
    """Build the untrained head that the settings describe, for embeddings of the given width."""
    return MLPHead(
        width,
        task.outputs,
        hidden_layers=settings.hidden_layers if settings.head == "mlp" else 0,
        hidden_width=settings.hidden_width,
        dropout=settings.dropout,
    )


def learning_rate(settings: FitSettings, epoch: int) -> float:
    """Return the learning rate of an epoch (counted from 0): a cosine that swings between lr and its minimum."""
    phase = math.pi * epoch / (settings.lr_half_period * settings.epochs)
    return settings.lr_minimum + (settings.lr - settings.lr_minimum) * (1 + math.cos(phase)) / 2


def _initial_head(settings: FitSettings, width: int, task: Task) -> MLPHead:
    """Build a head whose weights depend on the seed alone; the caller's random numbers stay his own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return build_head(settings, width, task)


def _generator(seed: int, purpose: str, device: torch.device) -> torch.Generator:
    """Return a generator of its own for a purpose: streams begun with the same seed would be one stream."""
    words = np.random.SeedSequence([seed, *purpose.encode()]).generate_state(2, np.uint32)
    return torch.Generator(device).manual_seed(int(words[0]) << 32 | int(words[1]))


def _with_prefix(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
