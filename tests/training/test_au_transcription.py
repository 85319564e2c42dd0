"""The training core against the published mathematics, written anew from the design: au, its AUC variant, and expr."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import fminbound

from affcache.tasks.tasks import TASKS
from affcache.training.data import Frames
from affcache.training.learner import Learner
from affcache.training.settings import FitSettings
from tests.conftest import record_losses

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS, BATCH, DEPTH = 100, 32, 3
PUBLISHED = FitSettings(task="au", dropout=0, hidden_width=24)  # alpha 0.5, rho 0.5, AdamW 1e-3 and 1e-4
Values = dict[str, torch.Tensor]
Losses = list[tuple[float, float]]  # of first and second passes
Risk = Callable[[torch.Tensor], torch.Tensor]


def problem(task: str, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw float64 embeddings (n, D) and labels that they tell something of, and the rows (steps, B) of batches."""
    random = np.random.default_rng(5)
    embeddings = random.normal(size=(256, width))
    scores = embeddings @ random.normal(size=(width, 12 if task == "au" else 8)) / width**0.5
    scores += random.normal(scale=0.5, size=scores.shape)
    labels = (scores > 0.6).astype(np.int64) if task == "au" else scores.argmax(axis=1)
    if task == "au":
        labels[:, 11] = np.arange(256) % 40 == 0  # rare: absent from many batches
    steps = STEPS if width < 768 else STEPS // 2
    rows = np.stack([random.permutation(256)[:BATCH] for _ in range(steps)])
    return torch.from_numpy(embeddings), torch.from_numpy(labels), torch.from_numpy(rows)


# the transcription


def head(values: Values, embeddings: torch.Tensor) -> torch.Tensor:
    """Three times Linear, BatchNorm by the batch, ReLU; then a Linear."""
    hidden = embeddings
    for layer in range(DEPTH):
        hidden = hidden @ values[f"layers.{4 * layer}.weight"].T + values[f"layers.{4 * layer}.bias"]
        hidden = (hidden - hidden.mean(0)) / torch.sqrt(hidden.var(0, unbiased=False) + 1e-5)
        hidden = hidden * values[f"layers.{4 * layer + 1}.weight"] + values[f"layers.{4 * layer + 1}.bias"]
        hidden = torch.relu(hidden)
    return hidden @ values["output_layer.weight"].T + values["output_layer.bias"]


def worst_half(losses: torch.Tensor) -> torch.Tensor:
    """CVaR at 0.5 as the mean of the worse half: the batches here have an even number of losses."""
    worst, _ = torch.sort(losses, descending=True)
    return worst[: len(losses) // 2].mean()


def searched(losses: torch.Tensor) -> torch.Tensor:
    """CVaR at 0.5 as the published code finds it: a search for the threshold, then the mean excess over it."""
    values = losses.detach().numpy()

    def form(t: float) -> float:
        return t + float(np.maximum(values - t, 0).mean()) / 0.5

    threshold = float(fminbound(form, values.min(), values.max(), xtol=1e-10))
    return threshold + torch.relu(losses - threshold).mean() / 0.5


def unit_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the B x 12 binary cross-entropies."""
    present = torch.log1p(torch.exp(-logits))
    absent = torch.log1p(torch.exp(logits))
    return torch.where(labels == 1, present, absent).flatten()


def class_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.stack(
        [torch.log(torch.exp(row - row[label]).sum()) for row, label in zip(logits, labels, strict=True)]
    )


def auc_term(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Margin 0.6, power 2, on raw logits: the sum over the units with both signs in the batch, by 12 always."""
    units = []
    for unit in range(12):
        present, absent = logits[labels[:, unit] == 1, unit], logits[labels[:, unit] == 0, unit]
        if len(present) and len(absent):
            units.append((torch.relu(0.6 - (present[:, None] - absent[None, :])) ** 2).mean())
    return torch.stack(units).sum() / 12


def transcribed(task: str, start: Values, width: int, risk: Risk, auc_weight: float) -> tuple[Losses, Values]:
    """Train with SAM (rho 0.5) and AdamW (lr 1e-3, betas 0.9 and 0.999, decay 1e-4), both written out."""
    embeddings, labels, rows = problem(task, width)
    values = {name: value.clone() for name, value in start.items() if value.is_floating_point()}
    trained = [name for name in values if "running" not in name]
    first_moment = {name: torch.zeros_like(values[name]) for name in trained}
    second_moment = {name: torch.zeros_like(values[name]) for name in trained}

    def loss_and_gradients(at: Values, batch: torch.Tensor) -> tuple[float, Values]:
        leaves = {name: at[name].detach().requires_grad_() for name in trained}
        logits = head(leaves, embeddings[batch])
        if task == "au":
            loss = risk(unit_losses(logits, labels[batch]))
            if auc_weight:
                loss = (1 - auc_weight) * loss + auc_weight * auc_term(logits, labels[batch])
        else:
            loss = risk(class_losses(logits, labels[batch]))
        return loss.item(), dict(zip(trained, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    losses = []
    for step, batch in enumerate(rows, 1):
        first, gradients = loss_and_gradients(values, batch)
        norm = torch.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))
        perturbed = {name: values[name] + 0.5 * gradients[name] / (norm + 1e-12) for name in trained}
        second, gradients = loss_and_gradients(perturbed, batch)
        losses.append((first, second))
        for name, gradient in gradients.items():
            first_moment[name] = 0.9 * first_moment[name] + 0.1 * gradient
            second_moment[name] = 0.999 * second_moment[name] + 0.001 * gradient**2
            size = torch.sqrt(second_moment[name] / (1 - 0.999**step)) + 1e-8
            values[name] = values[name] * (1 - 1e-3 * 1e-4) - 1e-3 * first_moment[name] / (1 - 0.9**step) / size
    return losses, values


# the core


def core(
    recipes: list[FitSettings], task: str, width: int, monkeypatch: pytest.MonkeyPatch, factored: bool | None = None
) -> Learner:
    """Build a learner in float64, and let it take float64 embeddings."""
    monkeypatch.setattr("affcache.training.data.Scaler.__call__", lambda scaler, embeddings: embeddings)
    torch.set_default_dtype(torch.float64)
    try:
        learner = Learner(recipes, TASKS[task], width, torch.device("cpu"))
        learner.factored = learner.factored if factored is None else factored
        return learner
    finally:
        torch.set_default_dtype(torch.float32)


def trained(learner: Learner, task: str, width: int) -> list[Losses]:
    """Make the steps; return the losses of each head."""
    embeddings, labels, rows = problem(task, width)
    frames = Frames(embeddings, labels, torch.zeros(len(labels), dtype=torch.int64))
    seen = record_losses(learner)
    for batch in rows:
        learner.step(frames, batch.expand(learner.heads.count, -1))
    values = torch.stack(seen).view(len(rows), 2, -1)
    return [[(first, second) for first, second in values[:, :, head].tolist()] for head in range(learner.heads.count)]


@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("risk", [worst_half, searched])
@pytest.mark.parametrize(("task", "auc_weight"), [("au", 0.0), ("au", 0.2), ("expr", 0.0)])
def test_a_hundred_steps_are_the_published_mathematics(
    task: str, auc_weight: float, risk: Risk, factored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = core([replace(PUBLISHED, task=task, auc_weight=auc_weight)], task, 16, monkeypatch, factored)
    start = {name: value.clone() for name, value in learner.heads.state_dict(0).items()}
    expected, values = transcribed(task, start, 16, risk, auc_weight)
    (found,) = trained(learner, task, 16)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert expected[-1][0] < 0.8 * expected[0][0], "there was something to learn"
    for name, value in learner.heads.state_dict(0).items():
        if name in values and "running" not in name:
            torch.testing.assert_close(value, values[name], rtol=0, atol=1e-8)


def test_heads_side_by_side_each_follow_their_own_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [0.0, 0.2, 0.5]
    recipes = [replace(PUBLISHED, seed=seed, auc_weight=weight) for seed, weight in enumerate(weights)]
    learner = core(recipes, "au", 16, monkeypatch, factored=True)
    starts = [{n: v.clone() for n, v in learner.heads.state_dict(index).items()} for index in range(3)]
    expected = [transcribed("au", s, 16, worst_half, w)[0] for s, w in zip(starts, weights, strict=True)]
    np.testing.assert_allclose(trained(learner, "au", 16), expected, rtol=1e-9)


def test_the_published_width_follows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = core([replace(PUBLISHED, hidden_width=768, auc_weight=0.2)], "au", 768, monkeypatch)
    assert learner.factored, "by default"
    start = {name: value.clone() for name, value in learner.heads.state_dict(0).items()}
    expected, _ = transcribed("au", start, 768, worst_half, 0.2)
    (found,) = trained(learner, "au", 768)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
