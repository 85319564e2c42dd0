"""Training against the recipe written out: by the fast step, by the one that defines it, and by the whole command."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from affcache.tasks.tasks import TASKS
from affcache.training.data import Frames
from affcache.training.fit import fit
from affcache.training.heads import MLPHead
from affcache.training.learner import BaseLearner, Learner, generator, initial_head, learning_rate
from affcache.training.objective import ClassCounts
from affcache.training.plain import PlainLearner
from affcache.training.settings import FitSettings
from tests.conftest import Heard, MakeData, frames_of

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
# what is dropped is drawn otherwise here: test_stacked.py
QUICK = FitSettings(epochs=4, hidden_layers=1, hidden_width=16, batch_size=16, rho=0.05, dropout=0.0, seed=3)
FORMS: dict[str, dict[str, Any]] = {
    "plain": {"alpha": 1.0, "rho": 0.0},
    "paper": {},
    "deep": {"alpha": 0.3, "hidden_layers": 3, "rho": 0.5},
    "linear": {"alpha": 1.0, "batch_size": 50, "hidden_layers": 0},
    "clipped": {"rho": 0.0, "clip_norm": 2.0},
    "clipped SAM": {"rho": 0.5, "clip_norm": 3.0},
    "ASAM": {"rho": 1.0, "adaptive": True},
    "l2": {"normalize": "l2"},
    "balanced": {"class_weights": "balanced"},
}
UNITS_LIMITS = {"clipped": {"clip_norm": 0.5}, "clipped SAM": {"clip_norm": 0.6}}  # their gradients are shorter


@dataclass
class Found:
    """What the recipe written out gives."""

    losses: list[float]  # of each epoch's first passes, averaged
    logits: torch.Tensor  # (n, C) of the validation frames
    clipped: set[bool]  # whether steps were


def written_out(recipe: FitSettings, task: str, train: Frames, validation: Frames) -> Found:
    """Train as the published code does, with clipping, ASAM, lengths of 1, class weights and frames' own beside."""
    torch.manual_seed(recipe.seed)
    orders = generator(recipe.seed, "order", CPU)
    head = MLPHead(16, TASKS[task].outputs, hidden_layers=recipe.hidden_layers, hidden_width=recipe.hidden_width,
                   dropout=0).double()  # fmt: skip
    norms = [m for m in head.modules() if isinstance(m, nn.BatchNorm1d)]
    optimiser = torch.optim.AdamW(head.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=recipe.epochs / 4, eta_min=1e-5)
    times = torch.stack([(train.labels == one).sum(0) for one in range(TASKS[task].outputs if task == "expr" else 2)])

    def inputs(frames: Frames) -> torch.Tensor:
        values = frames.embeddings.double()
        return values / values.square().sum(1, keepdim=True).sqrt() if recipe.normalize == "l2" else values

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        logits, labels = head(inputs(train)[rows]), train.labels[rows]
        if task == "expr":
            losses, count = -logits.log_softmax(dim=1)[torch.arange(len(rows)), labels], times[labels]
        else:
            losses = nn.functional.softplus(torch.where(labels == 1, -logits, logits)).flatten()
            count = torch.where(labels == 1, times[1], times[0]).flatten()
        shares = 1 / count.double() if recipe.class_weights == "balanced" else torch.ones(len(losses)).double()
        if train.weights is not None:
            shares = shares * train.weights[rows].double().repeat_interleave(len(losses) // len(rows))
        worst = losses.argsort(descending=True)
        shares = (shares / shares.sum())[worst]
        tail = (recipe.alpha - (shares.cumsum(0) - shares)).clamp(min=0).minimum(shares)
        return (tail * losses[worst]).sum() / recipe.alpha

    means, clipped = [], set()
    for _ in range(recipe.epochs):
        first_passes = []
        for rows in torch.randperm(len(train), generator=orders).split(recipe.batch_size):
            loss = loss_of(rows)
            optimiser.zero_grad()
            loss.backward()
            first_passes.append(loss.item())
            if recipe.rho:
                sizes = [p.detach().abs() if recipe.adaptive else torch.ones_like(p) for p in head.parameters()]
                scaled = [size * p.grad for size, p in zip(sizes, head.parameters(), strict=True)]
                norm = torch.cat([each.flatten() for each in scaled]).norm()
                starts = [p.detach().clone() for p in head.parameters()]
                for p, size, each in zip(head.parameters(), sizes, scaled, strict=True):
                    p.data += recipe.rho * size * each / (norm + 1e-12)
                momenta = [norm.momentum for norm in norms]
                for layer in norms:
                    layer.momentum = 0
                optimiser.zero_grad()
                loss_of(rows).backward()
                for layer, momentum in zip(norms, momenta, strict=True):
                    layer.momentum = momentum
                for p, start in zip(head.parameters(), starts, strict=True):
                    p.data = start
            if recipe.clip_norm:
                length = float(torch.cat([p.grad.flatten() for p in head.parameters()]).norm())
                clipped.add(length > recipe.clip_norm)
                for p in head.parameters():
                    p.grad *= min(1, recipe.clip_norm / length)
            optimiser.step()
        schedule.step()
        means.append(sum(first_passes) / len(first_passes))
    with torch.no_grad():
        return Found(means, head.eval()(inputs(validation)), clipped)


@pytest.mark.parametrize("kind", [Learner, PlainLearner])
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(("task", "weighted"), [("expr", False), ("au", False), ("expr", True), ("au", True)])
def test_learning_is_the_recipe_written_out(
    learnable: MakeData, task: str, weighted: bool, name: str, kind: type[BaseLearner]
) -> None:
    limits = UNITS_LIMITS.get(name, {}) if task == "au" else {}
    recipe = replace(QUICK, task=task, **{**FORMS[name], **limits})
    train, validation = frames_of(learnable(task), task)
    if weighted:
        train = replace(train, weights=torch.rand(len(train), generator=torch.Generator().manual_seed(1)) ** 2)
    expected = written_out(recipe, task, train, validation)
    train, validation = (replace(part, embeddings=part.embeddings.double()) for part in (train, validation))
    counts, begun = ClassCounts.of(TASKS[task], train.labels), initial_head(recipe, 16, TASKS[task]).double()
    learner = kind([recipe], TASKS[task], 16, CPU, counts, heads=[begun])
    losses = [float(learner.epoch(train, learning_rate(recipe, epoch))[0]) for epoch in range(4)]
    assert losses == pytest.approx(expected.losses, rel=1e-7)
    torch.testing.assert_close(learner.predict(validation)[0], expected.logits, rtol=1e-5, atol=1e-5)
    assert expected.clipped == ({True, False} if recipe.clip_norm else set()), "both are to be seen"


@pytest.mark.parametrize(("task", "name"), [*(("expr", name) for name in FORMS), ("au", "paper"), ("au", "balanced")])
def test_fit_trains_the_fast_way_what_its_settings_say(
    learnable: MakeData, tmp_path: Path, task: str, name: str
) -> None:
    (store, annotations), heard = learnable(task), Heard()
    recipe = replace(QUICK, task=task, store=store, annotations=annotations, run=tmp_path / "run", **FORMS[name])
    fit(recipe, listener=heard)
    assert not [text for text in heard.warnings if "by the definition" in text]
    train, validation = frames_of((store, annotations), task)
    expected = written_out(recipe, task, train, validation)
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert [entry["train_loss"] for entry in history] == pytest.approx(expected.losses, rel=2e-5)
    loss = float(TASKS[task].losses(expected.logits, validation.labels).mean())
    assert history[-1]["validation_loss"] == pytest.approx(loss, rel=2e-4)
