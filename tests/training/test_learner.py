"""The training core: its schedule, its state, heads side by side. test_written_out.py has the recipe itself."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from affcache.tasks.tasks import TASKS
from affcache.training.data import Frames, Scaler
from affcache.training.learner import Learner, build_head, generator, learning_rate, predict
from affcache.training.plain import new_learner
from affcache.training.settings import FitSettings
from tests.conftest import MakeData, frames_of

CPU = torch.device("cpu")
QUICK = FitSettings(epochs=3, hidden_layers=1, hidden_width=16, batch_size=16, rho=0.05, dropout=0.3)


@pytest.mark.parametrize("epochs", [4, 32, 40])
def test_the_learning_rate_is_torchs_cosine_with_a_quarter_of_the_epochs(epochs: int) -> None:
    optimiser = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=epochs // 4, eta_min=1e-5)
    recipe = FitSettings(epochs=epochs)
    for epoch in range(epochs):
        assert learning_rate(recipe, epoch) == pytest.approx(schedule.get_last_lr()[0], rel=1e-9)
        optimiser.step()
        schedule.step()
    assert learning_rate(recipe, 0) == 1e-3
    assert learning_rate(recipe, epochs // 4) == pytest.approx(1e-5)


def test_a_half_period_of_all_epochs_falls_once() -> None:
    recipe = FitSettings(epochs=10, lr=0.1, lr_minimum=0.01, lr_half_period=1)
    rates = [learning_rate(recipe, epoch) for epoch in range(11)]
    assert rates == sorted(rates, reverse=True)
    assert (rates[0], rates[5], rates[10]) == pytest.approx((0.1, 0.055, 0.01))


def test_a_last_batch_of_one_frame_trains(learnable: MakeData) -> None:
    train, _ = frames_of(learnable(), "expr")
    odd = Frames(train.embeddings[:33], train.labels[:33], train.videos[:33])
    learner = Learner([QUICK], TASKS["expr"], 16, CPU)
    assert bool(learner.epoch(odd, 1e-3).isfinite())
    assert learner.heads.batches == [2], "batches of 16 and 17"


def test_the_callers_random_numbers_stay_as_they_were(learnable: MakeData) -> None:
    train, _ = frames_of(learnable(), "expr")
    before = torch.get_rng_state()
    Learner([QUICK], TASKS["expr"], 16, CPU).epoch(train, 1e-3)
    assert torch.get_rng_state().equal(before)


def test_a_seed_decides_everything(learnable: MakeData) -> None:
    train, _ = frames_of(learnable(), "expr")
    runs = [Learner([replace(QUICK, seed=seed)], TASKS["expr"], 16, CPU) for seed in (1, 1, 2)]
    losses = [learner.epoch(train, 1e-3) for learner in runs]
    assert losses[0].equal(losses[1])
    assert runs[0].heads.parameters.equal(runs[1].heads.parameters)
    assert not losses[0].equal(losses[2])


def test_every_seed_and_purpose_has_a_stream_of_its_own() -> None:
    keys = [(seed, purpose) for seed in (0, 1) for purpose in ("order", "dropout")]
    drawn = [torch.rand(2, generator=generator(*key, CPU)).tolist() for key in keys]
    assert len({tuple(numbers) for numbers in drawn}) == len(keys)
    assert drawn[0] == torch.rand(2, generator=generator(0, "order", CPU)).tolist()


@pytest.mark.parametrize("task", ["expr", "au", "va"])
@pytest.mark.parametrize("level", ["batch", "set"])
def test_state_continues_to_the_bit(learnable: MakeData, task: str, level: str) -> None:
    train, _ = frames_of(learnable("au" if task == "au" else "expr"), task)
    recipe = replace(QUICK, cvar_level=level, stride=2, frames_per_epoch=30)
    whole, first, second = (Learner([recipe, replace(recipe, seed=5)], TASKS[task], 16, CPU) for _ in range(3))
    for _ in range(4):
        expected = whole.epoch(train, 1e-3)
    for _ in range(2):
        first.epoch(train, 1e-3)
    second.load_state({name: tensor.clone() for name, tensor in first.state().items()})
    for _ in range(2):
        found = second.epoch(train, 1e-3)
    assert found.equal(expected)
    assert all(second.state()[name].equal(tensor) for name, tensor in whole.state().items())


@pytest.mark.parametrize("task", ["expr", "au", "va"])
def test_factored_and_written_out_sam_steps_are_one(learnable: MakeData, task: str) -> None:
    train, _ = frames_of(learnable("au" if task == "au" else "expr"), task)
    recipes = [replace(QUICK, hidden_layers=2, seed=seed, rho=rho) for seed, rho in ((1, 0.05), (2, 0.0), (3, 0.5))]
    learners = [Learner(recipes, TASKS[task], 16, CPU) for _ in range(2)]
    learners[0].factored, learners[1].factored = True, False
    for _ in range(2):
        losses = [learner.epoch(train, 1e-3) for learner in learners]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
    first, second = (learner.heads.parameters for learner in learners)
    assert float((first - second).norm() / first.norm()) < 1e-3
    assert not first.equal(second)


def test_points_are_factored_where_that_pays() -> None:
    wide = replace(QUICK, hidden_width=128, batch_size=32)
    for recipe, factored in (
        (wide, True),
        (replace(wide, batch_size=33), False),
        (replace(wide, hidden_width=127), False),
        (replace(wide, adaptive=True), False),  # ASAM's never
    ):
        assert Learner([recipe], TASKS["expr"], 16, CPU).factored == factored


@pytest.mark.parametrize("extreme", [{"lr": 1e30}, {"rho": 1e6}, {"auc_margin": 1e6}, {"weight_decay": 1e6}])
def test_extreme_numbers_train_the_fast_way(extreme: dict[str, float]) -> None:
    # a head that will diverge would otherwise have those beside it trained by the definition, which rounds otherwise
    recipe = replace(QUICK, task="au", auc_weight=0.5, **extreme)
    learner, why = new_learner([replace(QUICK, task="au", auc_weight=0.5), recipe], TASKS["au"], 16, CPU)
    assert (type(learner), why) == (Learner, "")


@pytest.mark.parametrize("rho", [0.0, 0.05])
def test_heads_side_by_side_are_heads_alone(learnable: MakeData, rho: float) -> None:
    train, validation = frames_of(learnable(), "expr")
    recipes = [replace(QUICK, seed=1, rho=rho), replace(QUICK, seed=2, rho=2 * rho, alpha=0.3, dropout=0.0)]
    together = Learner(recipes, TASKS["expr"], 16, CPU)
    losses = together.epoch(train, 1e-3)
    for head, recipe in enumerate(recipes):
        alone = Learner([recipe], TASKS["expr"], 16, CPU)
        torch.testing.assert_close(losses[head], alone.epoch(train, 1e-3)[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            together.predict(validation)[head], alone.predict(validation)[0], rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("frames", [1, 20])
@pytest.mark.parametrize(("count", "layers"), [(heads, layers) for heads in (1, 3) for layers in (0, 1, 3)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluation_is_that_of_the_modules_to_the_bit(
    learnable: MakeData, count: int, layers: int, frames: int, precision: str
) -> None:
    train, validation = frames_of(learnable(), "expr")
    some = Frames(validation.embeddings[:frames], validation.labels[:frames], validation.videos[:frames])
    recipes = [replace(QUICK, hidden_layers=layers, precision=precision, seed=seed) for seed in range(count)]
    learner = Learner(recipes, TASKS["expr"], 16, CPU)
    for _ in range(2):
        learner.epoch(train, 1e-3)
        before = [{name: part.clone() for name, part in learner.head_state(index).items()} for index in range(count)]
        logits = learner.predict(some)
        assert logits.shape == (count, frames, 8)
        for index in range(count):
            head = build_head(recipes[index], 16, TASKS["expr"])
            head.load_state_dict(before[index])
            assert logits[index].equal(head.eval()(some.embeddings.float()))
            assert all(part.equal(before[index][name]) for name, part in learner.head_state(index).items())


def test_prediction_in_batches_is_the_prediction_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    head = build_head(QUICK, 6, TASKS["au"])
    embeddings = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).half()
    frames = Frames(embeddings, torch.zeros(50, 12), torch.zeros(50, dtype=torch.int64))
    whole = predict([head], frames, Scaler())
    assert whole.shape == (1, 50, 12)
    monkeypatch.setattr("affcache.training.data.EVALUATION_BATCH", 7)
    torch.testing.assert_close(predict([head], frames, Scaler()), whole)
    torch.testing.assert_close(whole[0], head.eval()(embeddings.float()).detach())
