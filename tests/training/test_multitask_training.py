"""One trunk with three heads: the step against plain PyTorch, masks, gradients, and what one labelled part comes to."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import Ridge as SklearnRidge
from torch import nn
from torch.nn import functional

import affcache
from affcache.errors import InputError
from affcache.tasks.multitask import MultiTask
from affcache.tasks.tasks import TASKS, Task
from affcache.training.data import Frames
from affcache.training.epochs import losses_of
from affcache.training.learner import Learner
from affcache.training.objective import ClassCounts, PlainObjective, plain_objective, stacked_objective
from affcache.training.plain import disagreement
from affcache.training.ridge import STRENGTHS, Ridge
from affcache.training.settings import FitSettings
from tests.conftest import make_learnable, record_losses, write_store
from tests.tasks.challenge import write_challenge

MTL = TASKS["mtl"]
assert isinstance(MTL, MultiTask)
STEPS, BATCH, WIDTH, FRAMES = 100, 32, 16, 256
QUICK: dict[str, Any] = {"epochs": 3, "batch_size": 16, "hidden_width": 24, "hidden_layers": 2}


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw float64 embeddings, labels (n, 15) with gaps of every kind, and the rows of batches."""
    random = np.random.default_rng(7)
    embeddings = random.normal(size=(FRAMES, WIDTH))
    scores = embeddings @ random.normal(size=(WIDTH, 22)) / WIDTH**0.5
    labels = np.hstack([np.tanh(scores[:, :2]), scores[:, 2:10].argmax(1)[:, None], scores[:, 10:] > 0.5])
    labels[random.random(FRAMES) < 0.4, :2] = np.nan
    labels[random.random(FRAMES) < 0.5, 2] = np.nan
    labels[random.random((FRAMES, 15)) < [0] * 3 + [0.2] * 12] = np.nan
    labels[: FRAMES // 8, 2] = np.nan  # some batches have no expression at all
    rows = np.stack([random.permutation(FRAMES)[:BATCH] for _ in range(STEPS)])
    rows[5] = np.arange(BATCH)
    return torch.from_numpy(embeddings), torch.from_numpy(labels.astype(np.float32)), torch.from_numpy(rows)


# the transcription


class Trunk(nn.Module):
    """One trunk, and a Linear for each task."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        width = len(state["layers.0.bias"])
        self.trunk = nn.Sequential(
            nn.Linear(WIDTH, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
        ).double()
        for name, place in (("0", "0"), ("1", "1"), ("4", "3"), ("5", "4")):
            own = {key.rpartition(".")[2]: of for key, of in state.items() if key.startswith(f"layers.{name}.")}
            self.trunk[int(place)].load_state_dict(own)
        self.heads = nn.ModuleList()
        for first, last in ((0, 2), (2, 10), (10, 22)):
            head = nn.Linear(width, last - first).double()
            head.load_state_dict({k: state[f"output_layer.{k}"][first:last] for k in ("weight", "bias")})
            self.heads.append(head)


def worst_half(losses: torch.Tensor) -> torch.Tensor:
    """CVaR at 0.5 of m losses: the worst m / 2, the last one by half where m is odd; 0 of none."""
    if not len(losses):
        return losses.sum()
    worst = losses.sort(descending=True).values
    weights = torch.ones(len(losses), dtype=torch.float64)
    weights[len(losses) // 2 :] = 0
    if len(losses) % 2:
        weights[len(losses) // 2] = 0.5
    return (worst * weights).sum() / (len(losses) / 2)


def transcribed_loss(
    model: Trunk, embeddings: torch.Tensor, labels: torch.Tensor, weights: list[float]
) -> torch.Tensor:
    """Half CVaR of squared errors and half 1 - CCC; CVaR of cross-entropies; CVaR of binary ones; what is labelled."""
    hidden = model.trunk(embeddings)
    affect, expression, units = (head(hidden) for head in model.heads)
    there = ~labels.isnan()
    concordances = []
    for column in range(2):
        x, y = affect[there[:, column], column], labels[there[:, column], column].double()
        covariance = ((x - x.mean()) * (y - y.mean())).mean()
        spread = x.var(unbiased=False) + y.var(unbiased=False) + (x.mean() - y.mean()) ** 2
        concordances.append(2 * covariance / spread)
    errors = (affect[there[:, :2]] - labels[:, :2][there[:, :2]].double()) ** 2
    of_affect = 0.5 * worst_half(errors) + 0.5 * (1 - sum(concordances) / 2)
    known = there[:, 2]
    of_expression = worst_half(functional.cross_entropy(expression[known], labels[known, 2].long(), reduction="none"))
    present = labels[:, 3:][there[:, 3:]].double()
    of_units = worst_half(functional.binary_cross_entropy_with_logits(units[there[:, 3:]], present, reduction="none"))
    return weights[0] * of_affect + weights[1] * of_expression + weights[2] * of_units


def transcribed(state: dict[str, torch.Tensor], weights: list[float]) -> list[tuple[float, float]]:
    """Train with SAM and torch's AdamW; return the losses of first and second passes."""
    embeddings, labels, rows = problem()
    model = Trunk(state)
    adamw = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=1e-4)
    losses = []
    for batch in rows:
        adamw.zero_grad()
        first = transcribed_loss(model, embeddings[batch], labels[batch], weights)
        first.backward()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(parameter.grad, alpha=float(0.5 / (norm + 1e-12)))
        adamw.zero_grad()
        second = transcribed_loss(model, embeddings[batch], labels[batch], weights)
        second.backward()
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), before, strict=True):
                parameter.copy_(value)
        adamw.step()
        losses.append((first.item(), second.item()))
    return losses


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("task_weights", ["", "expr=2,va=0.25"])
def test_a_hundred_steps_equal_plain_pytorch(task_weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = FitSettings(task="mtl", task_weights=task_weights, dropout=0, hidden_width=24, hidden_layers=2)
    embeddings, labels, rows = problem()
    monkeypatch.setattr("affcache.training.data.Scaler.__call__", lambda scaler, given: given)
    torch.set_default_dtype(torch.float64)
    try:
        learner = Learner([recipe], MTL, WIDTH, torch.device("cpu"), ClassCounts.of(MTL, labels))
    finally:
        torch.set_default_dtype(torch.float32)
    expected = transcribed({name: of.clone() for name, of in learner.module_state(0).items()}, recipe.weights_of(MTL))
    frames = Frames(embeddings, labels, torch.zeros(FRAMES, dtype=torch.int64))
    seen = record_losses(learner)
    for batch in rows:
        learner.step(frames, batch[None])
    found = torch.stack(seen).view(STEPS, 2)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)
    assert expected[-1][0] < 0.9 * expected[0][0], "there was something to learn"


# masks


RECIPES = [
    {}, {"alpha": 1.0}, {"alpha": 0.3, "cvar_within": "class"}, {"cvar_within": "video"}, {"class_weights": "balanced"},
    {"cvar_level": "set"}, {"auc_weight": 0.2, "ccc_weight": 0.7}, {"focal_gamma": 1.0, "logit_adjustment": 0.5},
]  # fmt: skip


NOT_OF_VALUES = ("class_weights", "focal_gamma", "auc_weight")


@pytest.mark.parametrize("task", [TASKS["au"], TASKS["va"], MTL], ids=lambda task: task.name)
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_the_fast_step_with_gaps_is_the_defined_one(task: Task, recipe: dict[str, Any]) -> None:
    if task.kind == "values":
        recipe = {name: value for name, value in recipe.items() if name not in NOT_OF_VALUES and value != "class"}
        recipe.pop("logit_adjustment", None)
    settings = FitSettings(task=task.name, batch_size=8, dropout=0.2, **recipe)
    settings.require_fitting(task)
    assert disagreement(settings, task, partial=True) == ""


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_label_that_is_missing_changes_no_loss_whatever_the_logit_says(recipe: dict[str, Any]) -> None:
    drawn = torch.Generator().manual_seed(3)
    labels = MTL.draw_labels(24, drawn)
    labels[torch.rand(labels.shape, generator=drawn) < 0.4] = torch.nan
    settings, videos = FitSettings(task="mtl", **recipe), torch.randint(3, (1, 24), generator=drawn)
    counts, logits = ClassCounts.of(MTL, labels), torch.randn(1, 24, 22, generator=drawn, dtype=torch.float64)
    loss, gradient = stacked_objective(MTL, [settings], counts, logits, 3).with_gradient(logits, labels[None], videos)
    gaps = torch.cat(
        [MTL.labelled(labels)[:, :2], MTL.labelled(labels)[:, 2:3].expand(-1, 8), MTL.labelled(labels)[:, 3:]], 1
    )
    assert (gradient[0][~gaps] == 0).all()
    assert (gradient[0][gaps] != 0).any()
    other = torch.where(gaps, logits, logits + 3)
    assert torch.allclose(stacked_objective(MTL, [settings], counts, other, 3)(other, labels[None], videos), loss)


@pytest.mark.parametrize("name", ["expr", "au", "va"])
def test_a_batch_without_any_label_costs_nothing(name: str) -> None:
    task = TASKS[name]
    labels = torch.full((6,) if task.exclusive else (6, task.outputs), torch.nan if name == "va" else -1)
    counts = ClassCounts(torch.ones(task.class_count, dtype=torch.int64), partial=True)
    logits = torch.randn(6, task.outputs, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for settings in (FitSettings(task=name, ccc_weight=0), FitSettings(task=name, ccc_weight=0, alpha=1)):
        for objective in (
            PlainObjective(task, settings, counts, logits),
            stacked_objective(task, [settings], counts, logits),
        ):
            stacked = type(objective) is not PlainObjective
            loss = objective(
                logits[None] if stacked else logits, labels[None] if stacked else labels, torch.zeros(1, 6).long()
            )
            assert loss.sum() == 0
            (gradient,) = torch.autograd.grad(loss.sum(), logits)
            assert (gradient == 0).all()


def test_the_sum_of_parts_is_that_of_each_on_its_own_labels() -> None:
    drawn = torch.Generator().manual_seed(3)
    labels, logits = MTL.draw_labels(16, drawn), torch.randn(16, 22, generator=drawn)
    settings = FitSettings(task="mtl", task_weights="au=3")
    whole = plain_objective(MTL, settings, ClassCounts.of(MTL, labels), logits)(logits, labels, torch.zeros(16).long())
    each = [
        PlainObjective(part, settings, None, logits)(of, own, torch.zeros(16).long())
        for part, of, own in zip(MTL.parts, MTL.outputs_of(logits), MTL.split(labels), strict=True)
    ]
    assert float(whole) == pytest.approx(float(each[0] + each[1] + 3 * each[2]), rel=1e-6)


# runs


def mtl_data(tmp_path: Path, *, only: str = "", count: int = 6) -> dict[str, Path]:
    """Write a store, and challenge files whose labels embeddings tell; with ``only`` those of one task alone."""
    random, videos, frames = np.random.default_rng(0), [f"{i}-30-640x360" for i in range(count)], 40
    features = random.normal(size=(len(videos) * frames, WIDTH)).astype(np.float16)
    write_store(tmp_path / "s.h5", {name: range(1, frames + 1) for name in videos}, features)
    scores = features.astype(float) @ random.normal(size=(WIDTH, 22))
    splits: dict[str, Any] = {"train": {}, "validation": {}}
    for i, row in enumerate(scores):
        has = random.random(3) < 0.7 if not only else [only == name for name in ("va", "expr", "au")]
        affect = np.tanh(row[:2] / 4).round(3).tolist() if has[0] else (None, None)
        expression = int(row[2:10].argmax()) if has[1] and random.random() < 0.9 else None
        units = (row[10:] > 2).astype(int).tolist() if has[2] else None
        split = "validation" if i // frames % 3 == 2 else "train"
        splits[split][(videos[i // frames], i % frames + 1)] = (*affect, expression, units)
    for split, lines in splits.items():
        write_challenge(tmp_path / "labels", split, lines)
    return {"store": tmp_path / "s.h5", "annotations": tmp_path / "labels"}


@pytest.mark.parametrize("head", ["mlp", "ridge"])
@pytest.mark.parametrize("name", ["expr", "au", "va"])
def test_with_one_part_labelled_it_trains_to_the_bit_what_that_task_trains(
    tmp_path: Path, name: str, head: str
) -> None:
    data = mtl_data(tmp_path, only=name)
    runs = [affcache.fit(task=task, run=tmp_path / task, head=head, **data, **QUICK) for task in ("mtl", name)]
    heads = [load_file(Path(run.run) / "head.safetensors") for run in runs]
    assert heads[0].keys() == heads[1].keys()
    assert all(torch.equal(heads[0][tensor], heads[1][tensor]) for tensor in heads[1])
    assert (runs[0].value, runs[0].best_epoch, runs[0].frames) == (runs[1].value, runs[1].best_epoch, runs[1].frames)
    histories = [
        [json.loads(line) for line in (Path(run.run) / "history.jsonl").read_text().splitlines()] for run in runs
    ]
    for ours, theirs in zip(*histories, strict=True):
        assert ours["p"] == theirs[TASKS[name].metric]
        if head == "mlp":
            assert ours["train_loss"] == theirs["train_loss"]
            assert ours["validation_loss"] == theirs["validation_loss"]


def test_one_trunk_learns_all_three_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    data, run = mtl_data(tmp_path), tmp_path / "run"
    recipe = {**QUICK, "epochs": 30, "lr": 0.01, "rho": 0.05, "dropout": 0.1, "task_weights": "expr=2"}
    fitted = affcache.fit(task="mtl", run=run, **data, **recipe)
    assert fitted.metric == "p"
    assert fitted.value > 1.2, "labels are to be learnt from these embeddings"
    assert load_file(run / "head.safetensors")["output_layer.weight"].shape == (22, 24)
    assert fitted.ridge is not None
    config = json.loads((run / "config.json").read_text())
    assert config["labels"]["train"]["partial"] > 0
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    scored, best = affcache.score(run=run), lines[fitted.best_epoch - 1]
    of_parts = np.array([(2 if part.task == "expr" else 1) * np.array([part.loss, part.cvar]) for part in scored.parts])
    assert [scored.loss, scored.cvar] == pytest.approx(of_parts.sum(axis=0))
    assert [best["validation_loss"], best["validation_cvar"]] == pytest.approx(of_parts.sum(axis=0))

    class Killed(affcache.Listener):
        def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
            if (done, unit) == (11, "epoch"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        affcache.fit(task="mtl", run=tmp_path / "again", listener=Killed(), **data, **recipe)
    affcache.fit(run=tmp_path / "again", resume=True)
    assert (tmp_path / "again" / "head.safetensors").read_bytes() == (run / "head.safetensors").read_bytes()


def test_a_task_without_labels_counts_nothing_in_the_loss() -> None:
    logits, labels = torch.randn(9, MTL.outputs), torch.full((9, MTL.values_per_line), torch.nan)
    recipe = FitSettings(task="mtl", alpha=0.4, task_weights="va=3")
    assert losses_of(MTL, logits, labels, recipe) == (0, 0)
    labels[:, :2] = torch.rand(9, 2)
    loss, tail = losses_of(TASKS["va"], logits[:, :2], labels[:, :2], recipe)
    assert losses_of(MTL, logits, labels, recipe) == (3 * loss, 3 * tail)
    assert tail > loss > 0


def test_a_ridge_solves_each_task_over_the_frames_that_have_its_label(tmp_path: Path) -> None:
    embeddings, labels, _ = problem()
    frames = Frames(embeddings.float(), labels, torch.zeros(FRAMES, dtype=torch.int64))
    ridge = Ridge(FitSettings(task="mtl", head="ridge"), MTL, WIDTH)
    heads = ridge._solve(frames)
    strength, head = STRENGTHS[6], heads[6]
    x = embeddings.float().double().numpy()
    for output, column in ((0, 0), (1, 1), (10, 3), (21, 14)):
        has = ~labels[:, column].isnan().numpy()
        z = (x[has] - x[has].mean(0)) / x[has].std(0)
        y = labels[has, column].double().numpy()
        y = y if column < 2 else 2 * y - 1
        solved = SklearnRidge(alpha=strength * has.sum()).fit(z, y)
        ours = head(torch.from_numpy(x[has]).float())[:, output].detach().numpy()
        np.testing.assert_allclose(ours, solved.predict(z), atol=1e-4)


def test_labels_of_no_task_in_both_splits_are_refused(tmp_path: Path) -> None:
    store, _ = make_learnable(tmp_path)
    write_challenge(tmp_path / "mtl", "train", {("a", 1): (0, 0, None, None)})
    write_challenge(tmp_path / "mtl", "validation", {("a", 1): (None, None, 1, None)})
    videos = affcache.EmbeddingStore.open(store).video_names
    for split, line in (("train", (0, 0, None, None)), ("validation", (None, None, 1, None))):
        write_challenge(tmp_path / "mtl", split, {(videos[0], i): line for i in range(1, 6)})
    with pytest.raises(InputError, match="None of the tasks va, expr, au is labelled in all splits"):
        affcache.fit(task="mtl", store=store, annotations=tmp_path / "mtl", run=tmp_path / "run", **QUICK)


def test_partial_rows_count_or_are_dropped(tmp_path: Path) -> None:
    data = mtl_data(tmp_path)
    kept, dropped = (
        affcache.fit(task="mtl", partial=partial, run=tmp_path / partial, **data, **QUICK)
        for partial in ("keep", "drop")
    )
    assert kept.frames > dropped.frames > 10
    assert replace(kept, run="") != replace(dropped, run="")


def test_an_output_without_labels_is_absent_of_a_ridge_and_the_others_are_solved() -> None:
    embeddings, labels, _ = problem()
    labels[:, 14], labels[:, 1] = torch.nan, torch.nan
    labels[0, 1] = 0.5  # one isn't enough
    frames = Frames(embeddings.float(), labels, torch.zeros(FRAMES, dtype=torch.int64))
    head = Ridge(FitSettings(task="mtl", head="ridge"), MTL, WIDTH)._solve(frames)[6]
    logits = head(embeddings.float())
    assert (logits[:, 21] == -1).all()
    assert (logits[:, 1] == 0).all()
    assert logits[:, 20].std() > 0.1
    nothing = Frames(embeddings.float(), labels * torch.nan, frames.videos)
    with pytest.raises(InputError, match="needs at least 2 frames with a label, and there are 0"):
        Ridge(FitSettings(task="mtl", head="ridge"), MTL, WIDTH)._solve(nothing)


def test_a_batch_without_any_label_moves_no_tracked_threshold() -> None:
    task, settings = TASKS["expr"], FitSettings(cvar_level="set", batch_size=6)
    counts = ClassCounts(torch.ones(8, dtype=torch.int64), partial=True)
    logits, videos = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 6).long()
    objective = stacked_objective(task, [settings], counts, logits)
    assert objective(logits, torch.arange(6)[None], videos) > 0
    before = {name: tensor.clone() for name, tensor in objective.state().items()}
    assert objective(logits, torch.full((1, 6), -1), videos) == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in objective.state().items())
