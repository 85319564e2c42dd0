"""The training loop: against a plain transcription of the recipe, its schedule, its batches, what it saves."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from affcache.annotations import join_labels
from affcache.errors import ConfigError
from affcache.heads import MLPHead
from affcache.listener import Listener
from affcache.risk import cvar
from affcache.runs import RunFolder, read_tensors
from affcache.settings import FitSettings
from affcache.stacked_heads import StackedHeads
from affcache.store import EmbeddingStore
from affcache.tasks import TASKS
from affcache.training import Frames, Training, _batches, build_head, learning_rate, predict, prepare
from tests.conftest import MakeData

CPU = torch.device("cpu")
QUICK = FitSettings(epochs=3, hidden_layers=1, hidden_width=16, batch_size=16, rho=0.05, dropout=0.3)


def frames_of(data: tuple[Path, Path], task: str) -> tuple[Frames, Frames]:
    store = EmbeddingStore.open(data[0])
    joined = (join_labels(store, data[1], TASKS[task], split) for split in ("train", "validation"))
    train, validation = (Frames.load(store, labels, CPU) for labels in joined)
    return train, validation


def plain_recipe(recipe: FitSettings, task: str, train: Frames) -> tuple[nn.Module, list[float]]:
    """Train as the published code does, written out: the losses of each epoch's first passes, averaged."""
    torch.manual_seed(recipe.seed)
    head = MLPHead(16, TASKS[task].outputs, hidden_layers=recipe.hidden_layers, hidden_width=recipe.hidden_width,
                   dropout=recipe.dropout)  # fmt: skip
    norms = [m for m in head.modules() if isinstance(m, nn.BatchNorm1d)]
    optimiser = torch.optim.AdamW(head.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=recipe.epochs / 4, eta_min=1e-5)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        logits, labels = head(train.embeddings[rows].float()), train.labels[rows]
        if task == "expr":
            losses = -logits.log_softmax(dim=1)[torch.arange(len(rows)), labels]
        else:
            losses = nn.functional.softplus(torch.where(labels == 1, -logits, logits)).flatten()
        worst = losses.sort(descending=True).values
        tail = recipe.alpha * len(worst)
        weights = (tail - torch.arange(len(worst))).clamp(0, 1)
        return (weights * worst).sum() / tail

    means = []
    for _ in range(recipe.epochs):
        first_passes = []
        for rows in torch.randperm(len(train)).split(recipe.batch_size):
            loss = loss_of(rows)
            optimiser.zero_grad()
            loss.backward()
            first_passes.append(loss.item())
            if recipe.rho:
                norm = torch.cat([p.grad.flatten() for p in head.parameters()]).norm()
                steps = [recipe.rho * p.grad / (norm + 1e-12) for p in head.parameters()]
                starts = [p.detach().clone() for p in head.parameters()]
                for p, step in zip(head.parameters(), steps, strict=True):
                    p.data += step
                momenta = [norm.momentum for norm in norms]
                for layer in norms:
                    layer.momentum = 0
                optimiser.zero_grad()
                loss_of(rows).backward()
                for layer, momentum in zip(norms, momenta, strict=True):
                    layer.momentum = momentum
                for p, start in zip(head.parameters(), starts, strict=True):
                    p.data = start
            optimiser.step()
        schedule.step()
        means.append(sum(first_passes) / len(first_passes))
    return head, means


@pytest.mark.parametrize(
    ("task", "recipe"),
    [
        ("expr", QUICK),
        ("au", QUICK),
        ("expr", replace(QUICK, alpha=1.0, rho=0.0)),
        ("expr", replace(QUICK, alpha=0.3, hidden_layers=3, dropout=0.6, rho=0.5)),
        ("au", replace(QUICK, alpha=1.0, batch_size=50, hidden_layers=0)),
    ],
)
def test_training_follows_the_recipe_written_out(
    learnable: MakeData, tmp_path: Path, task: str, recipe: FitSettings
) -> None:
    recipe = replace(recipe, epochs=4, seed=3)
    recipe = replace(recipe, dropout=0)  # what is dropped is drawn otherwise here: tests/test_stacked_heads.py
    train, validation = frames_of(learnable(task), task)
    expected_head, expected = plain_recipe(recipe, task, train)
    torch.manual_seed(recipe.seed)
    training = Training(recipe, TASKS[task], 16, CPU, RunFolder(tmp_path), {})
    entries = [training._one_epoch(train, validation) for _ in range(4)]
    assert [entry["train_loss"] for entry in entries] == pytest.approx(expected, rel=1e-4)
    (logits,) = predict(training.heads, validation.embeddings, "none")
    with torch.no_grad():
        expected_logits = expected_head.eval()(validation.embeddings.float())
    torch.testing.assert_close(logits, expected_logits, rtol=2e-3, atol=2e-3)
    losses = TASKS[task].losses(logits, validation.labels)
    assert entries[-1]["validation_loss"] == pytest.approx(float(losses.mean()))
    assert entries[-1]["validation_cvar"] == pytest.approx(float(cvar(losses, recipe.alpha)))


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


@given(st.integers(1, 300), st.integers(2, 64))
def test_batches_are_a_shuffle_without_a_last_one_of_one(frames: int, size: int) -> None:
    torch.manual_seed(frames)
    batches = list(_batches(frames, size))
    assert sorted(torch.cat(batches).tolist()) == list(range(frames))
    assert all(len(batch) == size for batch in batches[:-1])
    if frames > 1:
        assert 2 <= len(batches[-1]) <= size + 1
    assert (len(batches[-1]) == size + 1) == (frames > size and frames % size == 1)


def test_a_last_batch_of_one_frame_trains(learnable: MakeData, tmp_path: Path) -> None:
    train, validation = frames_of(learnable(), "expr")
    odd = Frames(train.embeddings[:33], train.labels[:33], train.videos[:33])
    training = Training(QUICK, TASKS["expr"], 16, CPU, RunFolder(tmp_path), {})
    assert math.isfinite(training._one_epoch(odd, validation)["train_loss"])
    assert training.heads.batches == [2], "batches of 16 and 17"


def test_prediction_in_batches_is_the_prediction_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    head = build_head(QUICK, 6, TASKS["au"])
    embeddings = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).half()
    heads = StackedHeads([head], dropout=[0.3])
    whole = predict(heads, embeddings, "none")
    assert whole.shape == (1, 50, 12)
    monkeypatch.setattr("affcache.training.EVALUATION_BATCH", 7)
    torch.testing.assert_close(predict(heads, embeddings, "none"), whole)
    torch.testing.assert_close(whole[0], head.eval()(embeddings.float()).detach())


def test_l2_scales_to_length_1_and_none_leaves_as_stored() -> None:
    embeddings = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-600.0, 800.0]], dtype=torch.float16)
    torch.testing.assert_close(prepare(embeddings, "l2"), torch.tensor([[0.6, 0.8], [0.0, 0.0], [-0.6, 0.8]]))
    assert prepare(embeddings, "none").equal(embeddings.float())


def test_frames_are_the_joined_rows(learnable: MakeData) -> None:
    store_path, annotations = learnable(videos=3, frames=5)
    store = EmbeddingStore.open(store_path)
    joined = join_labels(store, annotations, TASKS["expr"], "validation")
    frames = Frames.load(store, joined, CPU)
    assert len(frames) == 5
    assert frames.embeddings.dtype == torch.float16
    assert frames.embeddings.numpy().tobytes() == store.features[10:15].tobytes()
    assert frames.labels.tolist() == joined.labels.tolist()


def test_a_diverging_run_is_an_error_that_says_what_to_change(learnable: MakeData, tmp_path: Path) -> None:
    train, validation = frames_of(learnable(), "expr")
    training = Training(replace(QUICK, lr=1e38), TASKS["expr"], 16, CPU, RunFolder(tmp_path), {"task": "expr"})
    with pytest.raises(ConfigError, match=r"diverged in epoch 1: the loss is .*Lower --lr or --rho"):
        training.run(train, validation, Listener())


def test_a_head_broken_by_the_last_step_of_an_epoch_is_not_kept(learnable: MakeData, tmp_path: Path) -> None:
    train, validation = frames_of(learnable(), "expr")
    one_batch = replace(QUICK, lr=1e38, batch_size=len(train), rho=0.0)  # its only loss is the untrained head's
    training = Training(one_batch, TASKS["expr"], 16, CPU, RunFolder(tmp_path), {"task": "expr"})
    with pytest.raises(ConfigError, match="diverged in epoch 1"):
        training.run(train, validation, Listener())
    assert not (tmp_path / "head.safetensors").exists()


def test_saved_files_hold_the_best_and_the_last_head(learnable: MakeData, tmp_path: Path) -> None:
    train, validation = frames_of(learnable(), "expr")
    torch.manual_seed(0)
    folder = RunFolder(tmp_path)
    training = Training(QUICK, TASKS["expr"], 16, CPU, folder, {"task": "expr"})
    states = []

    class Keep(Listener):
        def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
            assert (done, total, unit) == (len(states) + 1, 3, "epoch")
            assert note.startswith("macro_f1 0.")
            states.append({name: tensor.clone() for name, tensor in training.heads.state_dict(0).items()})

    training.run(train, validation, Keep())
    best, header = read_tensors(folder.head)
    assert header == {"task": "expr", "epoch": training.best_epoch, "macro_f1": training.best_value}
    assert all(best[name].equal(tensor) for name, tensor in states[training.best_epoch - 1].items())
    last, progress = read_tensors(folder.last)
    assert progress["epoch"] == 3
    assert all(last[f"head.{name}"].equal(tensor) for name, tensor in states[-1].items())
