"""Heads side by side are heads alone: to 1e-8 in float64, in distribution in float32, and whatever a neighbour does."""

from dataclasses import replace

import pytest
import torch
from scipy.stats import ks_2samp

from affcache.tasks.tasks import TASKS
from affcache.training.data import Frames
from affcache.training.learner import Learner, build_head, learning_rate
from affcache.training.settings import FitSettings
from affcache.training.stacked.parts import moments_of
from tests.conftest import MakeData, frames_of, record_losses

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
QUICK = FitSettings(epochs=5, hidden_layers=2, hidden_width=32, batch_size=8, rho=0.05, dropout=0.0)
STEPS = 200


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let learners be made, and take embeddings, in float64."""
    monkeypatch.setattr("affcache.training.data.Scaler.__call__", lambda scaler, embeddings: embeddings.double())
    monkeypatch.setattr("affcache.training.learner.build_head", lambda *arguments: build_head(*arguments).double())


def train(recipes: list[FitSettings], task: str, frames: Frames) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    """Make 200 steps over epochs; return the losses (passes, H) and each head's parameters and statistics."""
    learner = Learner(recipes, TASKS[task], frames.embeddings.shape[1], CPU, videos=6)
    losses = record_losses(learner)
    for epoch in range(recipes[0].epochs):
        learner.epoch(frames, [learning_rate(recipe, epoch) for recipe in recipes])
    assert len(losses) >= STEPS
    return torch.stack(losses), [learner.heads.state_dict(head) for head in range(len(recipes))]


def grid_of(task: str, rho: float, dropout: float) -> list[FitSettings]:
    """Recipes that differ in all that heads side by side may differ in."""
    first = replace(QUICK, task=task, rho=rho, dropout=dropout, epochs=10)
    second = replace(first, seed=1, alpha=0.3, rho=2 * rho, lr=3e-3, weight_decay=0.1, dropout=dropout / 2)
    third = replace(first, seed=2, alpha=1.0, lr_minimum=1e-4, lr_half_period=1.0)
    if task == "au":
        return [first, second, replace(third, auc_weight=0.2, label_smoothing=0.1)]
    if task == "va":
        return [first, second, replace(third, ccc_weight=0.1)]
    return [first, replace(second, label_smoothing=0.1), replace(third, focal_gamma=1.0)]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("rho", [0.0, 0.05])
@pytest.mark.parametrize("task", ["expr", "au", "va"])
def test_side_by_side_equals_alone_over_200_steps(learnable: MakeData, task: str, rho: float, dropout: float) -> None:
    frames, _ = frames_of(learnable("au" if task == "au" else "expr"), task)
    recipes = grid_of(task, rho, dropout)
    losses, heads = train(recipes, task, frames)
    assert losses.dtype == torch.float64
    for head, recipe in enumerate(recipes):
        losses_alone, (alone,) = train([recipe], task, frames)
        torch.testing.assert_close(losses[:, head], losses_alone[:, 0], rtol=0, atol=1e-8)
        assert float(losses[-1, head]) != float(losses[0, head])
        for name, value in alone.items():
            torch.testing.assert_close(heads[head][name], value, rtol=0, atol=1e-8)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("within", ["class", "video"])
@pytest.mark.parametrize("level", ["batch", "set"])
def test_other_forms_of_cvar_are_the_same_side_by_side(learnable: MakeData, within: str, level: str) -> None:
    frames, _ = frames_of(learnable(), "expr")
    first = (
        replace(QUICK, cvar_level=level, epochs=10) if level == "set" else replace(QUICK, cvar_within=within, epochs=10)
    )
    recipes = [first, replace(first, alpha=0.2, seed=4)]
    losses, _ = train(recipes, "expr", frames)
    for head, recipe in enumerate(recipes):
        torch.testing.assert_close(losses[:, head], train([recipe], "expr", frames)[0][:, 0], rtol=0, atol=1e-8)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("rho", [0.0, 0.05])
def test_each_head_is_clipped_by_its_own_norm(learnable: MakeData, rho: float) -> None:
    frames, _ = frames_of(learnable(), "expr")
    first = replace(QUICK, rho=rho, clip_norm=2.0, epochs=10)
    recipes = [first, replace(first, alpha=0.1, seed=4)]
    losses, _ = train(recipes, "expr", frames)
    for head, recipe in enumerate(recipes):
        torch.testing.assert_close(losses[:, head], train([recipe], "expr", frames)[0][:, 0], rtol=0, atol=1e-8)


@pytest.mark.parametrize("level", ["batch", "set"])
@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("task", ["expr", "au", "va"])
def test_a_head_that_diverges_leaves_the_bits_of_the_others(
    learnable: MakeData, task: str, factored: bool, level: str
) -> None:
    frames, validation = frames_of(learnable("au" if task == "au" else "expr"), task)
    sound = [replace(QUICK, seed=seed, rho=0.05 * (seed + 1), cvar_level=level, dropout=0.3) for seed in range(3)]
    broken = [sound[0], replace(sound[1], lr=1e30), sound[2]]
    states = []
    for recipes in (sound, broken):
        learner = Learner(recipes, TASKS[task], 16, CPU)
        learner.factored = factored
        for epoch in range(3):
            losses = learner.epoch(frames, [learning_rate(recipe, epoch) for recipe in recipes])
        states.append((learner, losses, learner.predict(validation)))
    (one, losses_of_one, logits_of_one), (other, losses_of_other, logits_of_other) = states
    assert losses_of_one.isfinite().all()
    assert not losses_of_other[1].isfinite()
    for head in (0, 2):
        assert losses_of_one[head].equal(losses_of_other[head])
        assert logits_of_one[head].equal(logits_of_other[head])
        state = other.heads.state_dict(head)
        assert all(state[name].equal(value) for name, value in one.heads.state_dict(head).items())
    moments = [moments_of(learner.optimiser.adamw) for learner in (one, other)]
    assert all(moments[0][f"{head}.exp_avg"].equal(moments[1][f"{head}.exp_avg"]) for head in (0, 2))


def final_metrics(recipes: list[FitSettings], train: Frames, validation: Frames, together: bool) -> list[float]:
    """Return each recipe's metric on validation after its last epoch."""
    task, values = TASKS["expr"], []
    for group in [recipes] if together else [[recipe] for recipe in recipes]:
        learner = Learner(group, task, 16, CPU)
        for epoch in range(group[0].epochs):
            learner.epoch(train, [learning_rate(recipe, epoch) for recipe in group])
        for logits in learner.predict(validation):
            decided = task.decide(task.probabilities(logits).numpy())
            values.append(task.score(validation.labels.numpy(), decided).value)
    return values


def test_with_dropout_final_metrics_have_one_distribution_over_twenty_seeds(learnable: MakeData) -> None:
    train, validation = frames_of(learnable(), "expr")
    recipe = replace(QUICK, dropout=0.5, epochs=8, lr=3e-3, lr_half_period=1.0)
    together = final_metrics([replace(recipe, seed=seed) for seed in range(20)], train, validation, together=True)
    alone = final_metrics([replace(recipe, seed=seed) for seed in range(20, 40)], train, validation, together=False)
    assert ks_2samp(together, alone).pvalue > 0.01
    slow = replace(recipe, lr=3e-4)  # what another distribution looks like
    other = final_metrics([replace(slow, seed=seed) for seed in range(20)], train, validation, together=True)
    assert ks_2samp(other, alone).pvalue < 1e-4


def test_rates_may_be_one_for_all_or_one_for_each(learnable: MakeData) -> None:
    frames, _ = frames_of(learnable(), "expr")
    recipes = [QUICK, replace(QUICK, seed=1)]
    learners = [Learner(recipes, TASKS["expr"], 16, CPU) for _ in range(3)]
    for learner, rates in zip(learners, (2e-3, [2e-3, 2e-3], [2e-3, 0.0]), strict=True):
        learner.epoch(frames, rates)
    first, second, third = (learner.heads.parameters for learner in learners)
    assert first.equal(second)
    assert first[0].equal(third[0])
    start = Learner(recipes, TASKS["expr"], 16, CPU).heads.parameters
    assert third[1].equal(start[1]), "at a rate of 0 nothing moves"
