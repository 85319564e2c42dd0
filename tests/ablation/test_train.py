"""Which trials train side by side, that finished groups leave the others as they are, and how long a grid takes."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from affcache.ablation import train as grouping
from affcache.ablation.train import LocalTrainer, form_of, group_trials, most_heads, require_asked_for
from affcache.errors import ConfigError
from affcache.progress import Listener
from affcache.tasks.tasks import TASKS
from affcache.training.settings import FitSettings
from affcache.training.splits import JoinedSplits
from tests.conftest import MakeData

CPU = torch.device("cpu")
PLENTY = 1e12  # bytes
SMALL = FitSettings(hidden_layers=1, hidden_width=8)
SPLITS = SimpleNamespace(task=TASKS["expr"], store=SimpleNamespace(width=16), validation=range(100))


def trials_of(recipes: list[FitSettings]) -> list[Any]:
    return [SimpleNamespace(settings=recipe, splits=SPLITS, name=str(index)) for index, recipe in enumerate(recipes)]


def test_numbers_of_a_head_alone_share_a_group_and_forms_do_not() -> None:
    alone = {"seed": 5, "alpha": 0.3, "rho": 2.0, "lr": 0.1, "lr_minimum": 0.0, "lr_half_period": 1.0, "dropout": 0.1,
             "weight_decay": 0.5, "label_smoothing": 0.1, "focal_gamma": 2.0, "logit_adjustment": 1.0,
             "store": (Path("x.h5"),), "ccc_weight": 0.1, "held_out": 0.2}  # fmt: skip
    for name, value in alone.items():
        assert form_of(replace(SMALL, **{name: value})) == form_of(SMALL), name
    forms = {"rho": 0.0, "epochs": 3, "batch_size": 64, "stride": 2, "frames_per_epoch": 10, "cvar_level": "set",
             "cvar_within": "video", "class_weights": "balanced", "adaptive": True, "clip_norm": 1.0,
             "precision": "bf16", "hidden_layers": 2, "hidden_width": 9, "normalize": "l2", "head": "linear",
             "auc_margin": 0.1, "task": "au", "loss": "cross_entropy", "task_weights": "au=2",
             "pool": "mean"}  # fmt: skip
    for name, value in forms.items():
        assert form_of(replace(SMALL, **{name: value})) != form_of(SMALL), name
    named = {*alone, *forms, "auc_weight", "annotations", "partial", "run", "resume", "device", "memory",
             "train_on", "keep_epoch", "strength", "as_"}  # fmt: skip
    assert named == set(SMALL.__dataclass_fields__), "every setting is one or the other"


def test_every_ridge_stands_alone() -> None:
    ridges = [replace(SMALL, head="ridge", seed=seed, alpha=alpha) for seed in range(3) for alpha in (0.3, 1.0)]
    assert [len(group) for group in group_trials(trials_of(ridges), CPU, PLENTY)] == [1] * 6


@settings(max_examples=60, deadline=None)
@given(kinds=st.lists(st.integers(0, 3), min_size=1, max_size=60), most=st.integers(1, 7), done=st.integers(0, 8))
def test_what_is_left_after_finished_groups_falls_into_the_same_groups(kinds: list[int], most: int, done: int) -> None:
    trials = trials_of([replace(SMALL, hidden_width=8 + kind, seed=index) for index, kind in enumerate(kinds)])
    before = grouping.MOST_HEADS["cpu"]
    grouping.MOST_HEADS["cpu"] = most
    try:
        groups = [[trial.name for trial in group] for group in group_trials(trials, CPU, PLENTY)]
        finished = {name for group in groups[:done] for name in group}
        left = [trial for trial in trials if trial.name not in finished]
        again = [[trial.name for trial in group] for group in group_trials(left, CPU, PLENTY)] if left else []
    finally:
        grouping.MOST_HEADS["cpu"] = before
    assert sorted(name for group in groups for name in group) == sorted(trial.name for trial in trials)
    assert all(len(group) <= most for group in groups)
    assert all(len({kinds[int(name)] for name in group}) == 1 for group in groups)
    assert again == groups[done:]


@pytest.mark.parametrize("task", sorted(TASKS))
def test_memory_bounds_a_group(task: str) -> None:
    paper = FitSettings(task=task)
    assert most_heads(paper, TASKS[task], 768, 1000, 1.0, CPU) == 1, "one always trains"
    sizes = [most_heads(paper, TASKS[task], 768, 1000, budget, CPU) for budget in (2e8, 5e8, 1e12)]
    assert sizes[0] < sizes[1] < sizes[2] == grouping.MOST_HEADS["cpu"]
    parameters = sum(p.numel() for p in grouping.build_head(paper, 768, TASKS[task]).parameters())
    assert 2e8 / (4 * 12 * parameters) < sizes[0] < 2e8 / (4 * 5 * parameters)
    assert most_heads(paper, TASKS[task], 768, 10_000_000, 5e8, CPU) < sizes[1], "logits of all frames take room too"


def test_a_day_is_the_limit() -> None:
    require_asked_for(10, 86_400, asked=False)
    require_asked_for(10, 1e9, asked=True)
    with pytest.raises(ConfigError, match=r"10 heads to train: about 24.0 h\. Expected at most a day unless --yes"):
        require_asked_for(10, 86_401, asked=False)


def test_more_epochs_and_frames_take_longer_in_proportion(learnable: MakeData) -> None:
    store, labels = learnable()
    splits = JoinedSplits.open((store,), TASKS["expr"], labels, Listener()).load(CPU, 1.0, Listener())
    recipe = FitSettings(hidden_layers=1, hidden_width=16, batch_size=16, epochs=10)
    one = LocalTrainer(CPU).project([recipe] * 5, splits)
    many = LocalTrainer(CPU).project([replace(recipe, epochs=1000)] * 5, splits)
    assert 20 < many / one < 500, "about a hundred times"
    before = torch.get_rng_state()
    LocalTrainer(CPU).project([recipe], splits)
    assert torch.get_rng_state().equal(before), "the caller's random numbers stay his own"
    assert LocalTrainer(CPU).project([replace(recipe, head="ridge")], splits) == 1.0
