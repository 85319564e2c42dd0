"""The training step as it is defined: by heads.py, losses.py, risk.py and sam.py, with autograd, for any torch module.

``Learner`` makes the same step several times as fast, for multilayer perceptrons. When it is built it is held to this
one on random frames; where they disagree, this one trains: what stands in those files always takes effect.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace

import torch
from torch import nn

from affcache.tasks.task import Task
from affcache.training.data import Frames, FrameSource, Scaler
from affcache.training.heads import MLPHead
from affcache.training.learner import (
    BaseLearner,
    Learner,
    Tensors,
    build_head,
    factors_pay,
    generator,
    predict,
    with_prefix,
)
from affcache.training.objective import ClassCounts, plain_objective
from affcache.training.sam import SAM, frozen_batch_norm
from affcache.training.settings import FitSettings
from affcache.training.stacked.parts import load_moments, moments_of

TRIED_FRAMES, TRIED_WIDTH = 8, 12  # of the frames on which the fast step is held to the plain one
CLOSE = 1e-6  # relative; both are in float64
# rounding grows with them, and nothing else depends on how large they are
LARGEST_TRIED = {"hidden_width": 2 * TRIED_WIDTH, "lr": 1e-3, "rho": 1.0, "auc_margin": 1.0}
SHARE_OF_GAPS = 0.3
TIMED_STEPS = 3


class PlainLearner(BaseLearner):
    """Heads of any kind, each with its own autograd step, one after the other."""

    def _begin(self, heads: Sequence[nn.Module], counts: ClassCounts | None, videos: int) -> None:
        self.heads = [head.to(self.device) for head in heads]
        like = next(self.heads[0].parameters())
        self.objectives = [plain_objective(self.task, one, counts, like) for one in self.recipes]
        self.optimisers = []
        for head, one in zip(self.heads, self.recipes, strict=True):
            base = torch.optim.AdamW(head.parameters(), one.lr, weight_decay=one.weight_decay)
            self.optimisers.append(SAM(base, rho=one.rho, adaptive=one.adaptive))
        self._drawn = [generator(one.seed, "dropout", self.device).get_state() for one in self.recipes]

    def _set_rates(self, rates: Sequence[float]) -> None:
        for optimiser, rate in zip(self.optimisers, rates, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = rate

    def step(self, frames: Frames, batch: torch.Tensor) -> torch.Tensor:
        return torch.stack([self._step(head, frames, rows) for head, rows in enumerate(batch)])

    def _step(self, number: int, frames: Frames, rows: torch.Tensor) -> torch.Tensor:
        """Make one head's step on the frames of some rows (B,); return the loss of its first pass."""
        settings, head, optimiser = self.recipes[number], self.heads[number], self.optimisers[number]
        embeddings = self.scaler(frames.embeddings[rows])  # (B, D)
        labels, videos = frames.labels[rows], frames.videos[rows]
        weights = None if frames.weights is None else frames.weights[rows]

        def gradients(*, first_pass: bool) -> torch.Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                logits = head(embeddings)  # (B, C)
            loss = self.objectives[number](logits.to(embeddings), labels, videos, weights, first_pass=first_pass)
            loss.backward()
            return loss.detach()

        head.train()
        optimiser.zero_grad()
        with self._own_random_numbers(number):
            loss = gradients(first_pass=True)
            if settings.rho:
                with optimiser.perturbed(), frozen_batch_norm(head):
                    gradients(first_pass=False)
        if settings.clip_norm:
            nn.utils.clip_grad_norm_(head.parameters(), settings.clip_norm)
        optimiser.step()
        return loss

    @contextmanager
    def _own_random_numbers(self, number: int) -> Iterator[None]:
        """Let torch's numbers go on where this head's stopped, and put the caller's back."""
        cuda = self.device.type == "cuda"
        device = torch.cuda.default_generators[self.device.index or 0] if cuda else torch.default_generator
        callers = device.get_state()
        device.set_state(self._drawn[number])
        try:
            yield
        finally:
            self._drawn[number] = device.get_state()
            device.set_state(callers)

    def predict(self, frames: FrameSource) -> torch.Tensor:
        return predict(self.heads, frames, self.scaler)

    def module_state(self, head: int) -> Tensors:
        return self.heads[head].state_dict()

    def load_module(self, head: int, state: Tensors) -> None:
        self.heads[head].load_state_dict(state)

    def _own_state(self) -> Tensors:
        tensors: Tensors = {}
        for number, (optimiser, objective) in enumerate(zip(self.optimisers, self.objectives, strict=True)):
            tensors[f"plain.{number}.random"] = self._drawn[number]
            tensors |= {f"plain.{number}.adamw.{name}": of for name, of in moments_of(optimiser.base).items()}
            tensors |= {f"plain.{number}.objective.{name}": of for name, of in objective.state().items()}
        return tensors

    def _load_own_state(self, tensors: Tensors) -> None:
        for number, (optimiser, objective) in enumerate(zip(self.optimisers, self.objectives, strict=True)):
            own = with_prefix(tensors, f"plain.{number}.")
            self._drawn[number] = own["random"].cpu()
            load_moments(optimiser.base, with_prefix(own, "adamw."))
            optimiser.load_state_dict(optimiser.state_dict())  # the base has new groups, which both are to share
            objective.load_state(with_prefix(own, "objective."))


def new_learner(
    settings: Sequence[FitSettings],
    task: Task,
    width: int,
    device: torch.device,
    counts: ClassCounts | None = None,
    videos: int = 0,
    scaler: Scaler | None = None,
    *,
    weighted: bool = False,
) -> tuple[BaseLearner, str]:
    """Return what trains H heads: ``Learner`` where it makes the step that is defined, else ``PlainLearner``.

    Args:
        settings, task, width, device, counts, videos, scaler: as for ``Learner``.
        weighted: whether frames have weights.

    Returns:
        The learner; and why it is not the fast one and what that costs, a sentence, or "" where it is.
    """
    why = ""
    partial = counts is not None and counts.has_gaps
    for recipe in {replace(one, seed=0): None for one in settings}:
        why = why or disagreement(recipe, task, partial=partial, weighted=weighted)
    if not why:
        return Learner(settings, task, width, device, counts, videos, scaler=scaler), ""
    plain = PlainLearner(settings, task, width, device, counts, videos, scaler=scaler)
    return plain, f"training by the definition of a step: {why}{_cost(settings, task, width, device, counts)}"


def disagreement(recipe: FitSettings, task: Task, *, partial: bool = False, weighted: bool = False) -> str:
    """Say how the fast step of a recipe differs from the defined one on random frames, in float64; "" if it doesn't.

    One step is made of each, with the same units dropped: logits, loss, gradients at SAM's point, and the update.
    ``partial`` says whether some labels are missing, ``weighted`` whether frames have weights.
    """
    factors = not recipe.adaptive and factors_pay(recipe)  # as in the shape that trains
    largest = {name: min(getattr(recipe, name), most) for name, most in LARGEST_TRIED.items()}
    recipe = replace(recipe, precision="fp32", **largest)
    drawn = torch.Generator().manual_seed(0)
    head = _random_head(recipe, task, drawn)
    if type(head) is not MLPHead:
        return f"heads of kind {recipe.head} have no faster one"
    embeddings = torch.randn(TRIED_FRAMES, TRIED_WIDTH, dtype=torch.float64, generator=drawn)
    labels = task.draw_labels(TRIED_FRAMES, drawn)
    if partial:
        gaps = torch.rand(labels.shape, generator=drawn) < SHARE_OF_GAPS
        labels = labels.masked_fill(gaps, torch.nan if labels.is_floating_point() else -1)
    frames = Frames(embeddings, labels, torch.randint(3, (TRIED_FRAMES,), generator=drawn))
    frames = replace(frames, weights=torch.rand(TRIED_FRAMES, generator=drawn)) if weighted else frames
    cpu, counts, rows = torch.device("cpu"), ClassCounts.of(task, labels), torch.arange(TRIED_FRAMES)[None]
    scaler = Scaler.fit(recipe.normalize, [embeddings])
    try:
        fast = Learner([recipe], task, TRIED_WIDTH, cpu, counts, 3, [deepcopy(head)], scaler)
        fast.factored = factors
    except Exception:  # the edited module has other parts
        return f"heads of kind {recipe.head} have other parameters than the faster ones"
    try:
        plain = PlainLearner([recipe], task, TRIED_WIDTH, cpu, counts, 3, [head], scaler)
        with _units_dropped_alike(plain, fast):
            losses = [learner.step(frames, rows) for learner in (plain, fast)]
    except Exception as error:  # whatever an edited file raises is raised again where it trains
        return f"the step on random frames fails ({error})"
    gradients = fast.heads.gradients_of(0)
    pairs: dict[str, tuple[torch.Tensor | None, torch.Tensor]] = {"loss": (losses[0], losses[1])}
    pairs |= {f"gradient of {name}": (p.grad, gradients[name]) for name, p in plain.heads[0].named_parameters()}
    pairs |= {name: (of, fast.module_state(0)[name]) for name, of in plain.module_state(0).items()}
    unlike = [name for name, (one, other) in pairs.items() if not _alike(one, other)]
    return f"heads.py, losses.py, risk.py or sam.py give another {unlike[0]} than the faster step" if unlike else ""


def _alike(one: torch.Tensor | None, other: torch.Tensor) -> bool:
    one = torch.zeros_like(other) if one is None else one
    return one.shape == other.shape and torch.allclose(one.double(), other.double(), rtol=CLOSE, atol=CLOSE * 1e-2)


def _random_head(recipe: FitSettings, task: Task, drawn: torch.Generator) -> nn.Module:
    """Build a head in float64 whose parameters and statistics are all random, also those that start at 0 or 1."""
    with torch.random.fork_rng(devices=[]):
        head = build_head(recipe, TRIED_WIDTH, task).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, dtype=torch.float64, generator=drawn))
        for statistic in head.buffers():
            if statistic.is_floating_point():
                statistic.copy_(torch.rand(statistic.shape, dtype=torch.float64, generator=drawn) + 0.5)
    return head


@contextmanager
def _units_dropped_alike(plain: PlainLearner, fast: Learner) -> Iterator[None]:
    """Let the plain head drop what the fast one will: the masks of both passes, in the order of its layers."""
    copies = [torch.Generator().set_state(drawn.get_state()) for drawn in fast.dropout_generators]
    shape, dropout = fast.heads.shape, fast.heads.dropout
    kept = (
        dropout.kept(layer)[0].mT.double()  # (B, W)
        for _ in range(2)
        for layer in dropout.draw(shape.layers, shape.width, TRIED_FRAMES, copies)
    )
    hooks = [  # of a probability in 1 / 65536, as the fast heads have it
        module.register_forward_hook(lambda of, inputs, _: inputs[0] * next(kept) / (1 - round(of.p * 65536) / 65536))
        for module in plain.heads[0].modules()
        if isinstance(module, nn.Dropout) and module.p
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _cost(
    settings: Sequence[FitSettings], task: Task, width: int, device: torch.device, counts: ClassCounts | None
) -> str:
    """Say how much longer a plain step takes than a fast one, tried on random frames; nothing where none is fast."""
    drawn = torch.Generator().manual_seed(0)
    size = settings[0].batch_size
    frames = Frames(torch.randn(size, width, generator=drawn), task.draw_labels(size, drawn), torch.zeros(size).long())
    frames = Frames(*(part.to(device) for part in (frames.embeddings, frames.labels, frames.videos)))
    batch = torch.arange(size, device=device).expand(len(settings), -1)
    try:
        alike = [replace(one, normalize="none") for one in settings]
        learners = [kind(alike, task, width, device, counts, 1) for kind in (PlainLearner, Learner)]
        seconds = [_seconds(learner, frames, batch) for learner in learners]
    except Exception:  # there is nothing to compare with
        return ""
    return f". It takes about {seconds[0] / seconds[1]:.1f} times as long"


def _seconds(learner: BaseLearner, frames: Frames, batch: torch.Tensor) -> float:
    learner.step(frames, batch)
    start = time.perf_counter()
    for _ in range(TIMED_STEPS):
        float(learner.step(frames, batch).sum())  # waits for a GPU
    return time.perf_counter() - start
