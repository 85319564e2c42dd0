"""The definition of a training step: what stands in heads.py, losses.py, risk.py and sam.py is what trains."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import affcache
from affcache.files import read_tensors
from affcache.tasks.kinds import Classes, Units, Values
from affcache.tasks.task import Task
from affcache.tasks.tasks import TASKS
from affcache.training import heads
from affcache.training.data import Frames
from affcache.training.fit import fit
from affcache.training.learner import Learner
from affcache.training.objective import ClassCounts, Objective
from affcache.training.plain import PlainLearner, disagreement, new_learner
from affcache.training.settings import FitSettings
from tests.conftest import Heard, MakeData, frames_of, make_learnable

CPU = torch.device("cpu")
QUICK = FitSettings(epochs=2, hidden_layers=1, hidden_width=16, batch_size=16, rho=0.1, dropout=0.3)
SEVEN, ONE_VALUE, ONE_UNIT = (
    Classes("seven", tuple("abcdefg")),
    Values("one", ("x",), low=0, high=5),
    Units("u", ("u",)),
)
FORMS: list[dict[str, Any]] = [
    {}, {"alpha": 1.0}, {"alpha": 0.3, "rho": 0.0}, {"cvar_level": "set"}, {"cvar_within": "video"},
    {"cvar_within": "class"}, {"class_weights": "balanced"}, {"class_weights": "balanced", "cvar_level": "set"},
    {"label_smoothing": 0.1, "focal_gamma": 2.0}, {"logit_adjustment": 1.0}, {"adaptive": True}, {"clip_norm": 0.1},
    {"dropout": 0.0}, {"dropout": 0.95}, {"hidden_layers": 0}, {"head": "linear"}, {"batch_size": 512},
    {"auc_weight": 0.3}, {"ccc_weight": 0.0}, {"normalize": "l2"}, {"precision": "bf16"},
]  # fmt: skip


def fits(task: Task, recipe: FitSettings) -> bool:
    try:
        recipe.require_fitting(task)
    except affcache.ConfigError:
        return False
    return True


@pytest.mark.parametrize("task", [*TASKS.values(), SEVEN, ONE_VALUE, ONE_UNIT], ids=lambda task: task.name)
def test_the_fast_step_is_the_defined_one(task: Task) -> None:
    recipes = [FitSettings(task=task.name, **form) for form in FORMS]
    fitting = [recipe for recipe in recipes if fits(task, recipe)]
    assert len(fitting) >= 13
    assert {disagreement(recipe, task) for recipe in fitting} == {""}
    whole = [recipe for recipe in fitting if recipe.cvar_within == "batch"]
    for gaps in (False, True):
        assert {disagreement(recipe, task, partial=gaps, weighted=True) for recipe in whole} == {""}


def test_a_fast_step_that_forgets_weights_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    forgetful = Objective.with_gradient

    def without(
        self: Any, logits: torch.Tensor, labels: torch.Tensor, videos: torch.Tensor, *_: Any, **words: Any
    ) -> Any:
        return forgetful(self, logits, labels, videos, **words)

    monkeypatch.setattr(Objective, "with_gradient", without)
    assert disagreement(QUICK, TASKS["expr"]) == ""
    assert "give another loss" in disagreement(QUICK, TASKS["expr"], weighted=True)


MUTANTS = {  # what stands in the textbook, and something else
    "a bent ReLU": ("training/heads.py", "nn.ReLU()", "nn.GELU()"),
    "doubled logits": ("training/heads.py", "return self.output_layer(hidden)", "return 2 * self.output_layer(hidden)"),
    "dropout before BatchNorm": (
        "training/heads.py",
        "nn.Linear(width, hidden_width), nn.BatchNorm1d(hidden_width), nn.ReLU(), nn.Dropout(dropout)",
        "nn.Linear(width, hidden_width), nn.Dropout(dropout), nn.BatchNorm1d(hidden_width), nn.ReLU()",
    ),
    "another share of dropout": ("training/heads.py", "nn.Dropout(dropout)", "nn.Dropout(dropout / 2)"),
    "squared cross-entropy": (
        "tasks/losses.py",
        "return flat.view(labels.shape)",
        "return flat.view(labels.shape) ** 2",
    ),
    "the mean for CVaR": ("training/risk.py", "    require_alpha(alpha)\n    if", "    return losses.mean()\n    if"),
    "a SAM that moves nothing": (
        "training/sam.py",
        "parameter.add_(direction * scale.to(parameter))",
        "parameter.add_(0 * direction)",
    ),
    "BatchNorm that counts twice": (
        "training/sam.py",
        "layer.track_running_stats = False",
        "layer.track_running_stats = True",
    ),
}
FIT = """
import sys
from affcache.training.fit import fit
store, annotations, run = sys.argv[1:]
fit(store=store, annotations=annotations, run=run, device="cpu", epochs=2, hidden_layers=1, hidden_width=16,
    batch_size=16, rho=0.5)
"""


def copy_of_the_library(folder: Path, mutant: tuple[str, str, str] | None) -> Path:
    """Copy affcache, with one place of it changed."""
    source = Path(affcache.__file__).parent
    shutil.copytree(source, folder / "affcache", ignore=shutil.ignore_patterns("__pycache__"))
    if mutant is not None:
        path, old, new = mutant
        text = (folder / "affcache" / path).read_text()
        assert text.count(old) == 1, f"{old!r} is not in {path} once"
        (folder / "affcache" / path).write_text(text.replace(old, new))
    return folder


def trained_by(library: Path, data: Sequence[Path]) -> tuple[torch.Tensor, str]:
    """Train with a copy of the library; return all weights of the last epoch, and what was warned of."""
    environment = {**os.environ, "PYTHONPATH": str(library), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FIT, *map(str, data), str(library / "run")]
    process = subprocess.run(command, env=environment, cwd=library, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    tensors, _ = read_tensors(library / "run" / "last.safetensors")
    weights = [of.flatten().double() for key, of in sorted(tensors.items()) if key.startswith("head.")]
    return torch.cat(weights), process.stderr


@pytest.fixture(scope="module")
def unedited(tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[Path, Path], torch.Tensor]:
    folder = tmp_path_factory.mktemp("unedited")
    data = make_learnable(folder)
    weights, warned = trained_by(copy_of_the_library(folder / "copy", None), data)
    assert warned == ""
    return data, weights


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_each_edit_of_the_textbook_changes_the_trained_head(
    unedited: tuple[tuple[Path, Path], torch.Tensor], tmp_path: Path, name: str
) -> None:
    data, before = unedited
    weights, warned = trained_by(copy_of_the_library(tmp_path / "copy", MUTANTS[name]), data)
    assert not weights.equal(before)
    if name == "squared cross-entropy":  # both forms call the very same loss
        assert warned == ""
    else:
        assert "training by the definition of a step: " in warned
    if name == "a bent ReLU":
        assert "heads.py, losses.py, risk.py or sam.py give another loss than the faster step. It takes about" in warned


@pytest.mark.parametrize("task", ["expr", "au", "va"])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form) or "plain")
def test_training_by_the_definition_is_as_good(learnable: MakeData, task: str, form: dict[str, Any]) -> None:
    """Dropout aside, it walks the same way as the fast one, whose float32 rounds differently."""
    recipe = replace(FitSettings(task=task, hidden_layers=1, hidden_width=16, batch_size=16, epochs=1), **form)
    recipe = replace(recipe, dropout=0.0, precision="fp32", batch_size=16)
    if not fits(TASKS[task], recipe):
        pytest.skip("the task has no use for it")
    train, validation = frames_of(learnable("au" if task == "au" else "expr"), task)
    train = replace(train, embeddings=train.embeddings.double())
    validation = replace(validation, embeddings=validation.embeddings.double())
    counts = ClassCounts.of(TASKS[task], train.labels)
    plain = PlainLearner([recipe], TASKS[task], 16, CPU, counts, 6)
    begun = [nn.Module.double(plain.heads[0])]
    plain = PlainLearner([recipe], TASKS[task], 16, CPU, counts, 6, heads=begun)
    fast = Learner([recipe], TASKS[task], 16, CPU, counts, 6, heads=begun)
    losses = [learner.epoch(train, 1e-3) for learner in (plain, fast)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(plain.predict(validation), fast.predict(validation), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("limit", [1e-3, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("changes", [{"head": "linear"}, {"alpha": 1.0, "rho": 0.5}, {"rho": 0.0, "auc_weight": 0.2}])
def test_small_gradients_are_clipped_alike(limit: float, changes: dict[str, Any]) -> None:
    recipe = replace(FitSettings(task="au", clip_norm=limit), **changes)
    assert disagreement(recipe, TASKS["au"]) == ""


class Residual(nn.Module):
    """A head that has no faster form."""

    def __init__(self, inputs: int, outputs: int, *, hidden_width: int, dropout: float, **others: Any) -> None:
        super().__init__()
        self.into = nn.Linear(inputs, hidden_width)
        self.across = nn.Sequential(nn.LayerNorm(hidden_width), nn.GELU(), nn.Dropout(dropout))
        self.out = nn.Linear(hidden_width, outputs)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        hidden = self.into(embeddings)
        return self.out(hidden + self.across(hidden))


@pytest.fixture
def residual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(heads.HEADS, "residual", Residual)


@pytest.mark.usefixtures("residual")
@pytest.mark.parametrize("task", ["expr", "au"])
def test_any_module_trains_scores_and_is_continued(learnable: MakeData, tmp_path: Path, task: str) -> None:
    store, annotations = learnable(task)
    words = {"task": task, "store": store, "annotations": annotations, "head": "residual", "batch_size": 16}
    words |= {"hidden_width": 32, "rho": 0.1}
    heard = Heard()
    whole = fit(**words, run=tmp_path / "whole", epochs=6, listener=heard)
    assert heard.warnings == ["training by the definition of a step: heads of kind residual have no faster one."]
    assert whole.value > 0.3, "labels are to be learnt from these embeddings"
    assert affcache.score(run=tmp_path / "whole").scores.value == pytest.approx(whole.value)

    class Stop(Heard):
        def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
            if done == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(**words, run=tmp_path / "parts", epochs=6, listener=Stop())
    resumed = fit(**words, run=tmp_path / "parts", epochs=6, resume=True)
    assert resumed.value == whole.value
    for name in ("head.safetensors", "last.safetensors"):
        tensors = [read_tensors(tmp_path / run / name)[0] for run in ("whole", "parts")]
        assert tensors[0].keys() == tensors[1].keys()
        assert all(tensors[0][key].equal(tensors[1][key]) for key in tensors[0]), name


@pytest.mark.usefixtures("residual")
def test_a_run_is_not_continued_the_other_way(learnable: MakeData, tmp_path: Path, monkeypatch: Any) -> None:
    store, annotations = learnable()
    words = {"store": store, "annotations": annotations, "run": tmp_path / "run", "epochs": 2, "hidden_width": 16}
    fit(**words)
    monkeypatch.setattr("affcache.training.plain.disagreement", lambda recipe, task, **_: "another loss")
    with pytest.raises(affcache.ConfigError, match="would go on the other way"):
        fit(**words, resume=True)


@pytest.mark.usefixtures("residual")
def test_heads_of_any_kind_in_a_grid(learnable: MakeData, tmp_path: Path) -> None:
    store, annotations = learnable()
    result = affcache.ablate(
        store=store, annotations=annotations, vary={"head": ["mlp", "residual"]}, seeds=2, epochs=9, batch_size=16,
        rho=0.1, hidden_layers=1, hidden_width=16, out=tmp_path / "grid", keep="all", listener=(heard := Heard()),
    )  # fmt: skip
    assert [text for text in heard.warnings if "definition" in text] == [
        "head=residual: trained by the definition of a step, head by head: heads of kind residual have no faster one"
    ]
    assert [row.finished for row in result.rows] == [2, 2]
    assert all(row.mean is not None and row.mean > 0.1 for row in result.rows)


def test_the_callers_random_numbers_stay_his_own() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    frames = Frames(torch.randn(32, 16), TASKS["expr"].draw_labels(32, torch.Generator()), torch.zeros(32).long())
    torch.set_rng_state(before)
    learner = PlainLearner([QUICK], TASKS["expr"], 16, CPU)
    learner.epoch(frames, 1e-3)
    assert new_learner([QUICK], TASKS["expr"], 16, CPU)[1] == ""
    assert torch.get_rng_state().equal(before)


def test_an_edited_file_that_fails_is_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> torch.Tensor:
        raise ValueError("a mistake")

    monkeypatch.setattr("affcache.training.objective.cvar", failing)
    assert disagreement(QUICK, TASKS["expr"]) == "the step on random frames fails (a mistake)"
