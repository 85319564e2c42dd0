"""What docs/contributing.md says: a further task is an entry, a further loss a function and a line."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import affcache.cli
import affcache.data
from affcache.tasks.kinds import Classes, Units, Values
from affcache.tasks.task import Task
from affcache.tasks.tasks import TASKS
from tests.conftest import make_learnable, write_labels, write_store

NEW = (  # the natural ones that sizes written down elsewhere would break
    Classes("seven", ("calm", "glad", "sad", "cross", "scared", "sick", "struck"), folders=("SEVEN",)),
    Units("smile", ("smile",), folders=("SMILE",)),
    Values("pain", ("pain",), folders=("PAIN",), low=0, high=10),
)
LABELS: dict[str, Callable[[npt.NDArray[Any]], npt.NDArray[Any]]] = {  # from three hidden causes (n,)
    "seven": lambda cause: cause % 7,
    "smile": lambda cause: cause % 2,
    "pain": lambda cause: cause * 1.25,
}


@pytest.fixture(params=NEW, ids=lambda task: task.name)
def data(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Task, Path, Path]:
    """A new task in the table, with a store and labels that a head can learn."""
    task: Task = request.param
    monkeypatch.setitem(TASKS, task.name, task)
    random, names, frames = np.random.default_rng(0), [f"{index}-30-640x360" for index in range(6)], 40
    causes = random.integers(0, 8, len(names) * frames)
    features = random.normal(size=(8, 16))[causes] + random.normal(scale=0.3, size=(len(causes), 16))
    write_store(tmp_path / "s.h5", {name: range(1, frames + 1) for name in names}, features.astype(np.float16))
    lines = LABELS[task.name](causes)
    for index, name in enumerate(names):
        split = "validation" if index % 3 == 2 else "train"
        write_labels(tmp_path / "labels", task.name, split, {name: list(lines[index * frames : (index + 1) * frames])})
    return task, tmp_path / "s.h5", tmp_path / "labels"


@pytest.mark.parametrize("head", ["mlp", "linear", "ridge"])
def test_a_new_task_fits_scores_and_reports(data: tuple[Task, Path, Path], tmp_path: Path, head: str) -> None:
    task, store, annotations = data
    run = tmp_path / "run"
    words = {
        "hidden_layers": 1,
        "hidden_width": 32,
        "epochs": 40,
        "batch_size": 16,
        "lr": 0.01,
        "rho": 0.05,
        "dropout": 0.1,
    }
    fitted = affcache.fit(task=task.name, store=store, annotations=annotations, run=run, head=head, **words)
    assert fitted.value > (0.6 if task.kind == "classes" else 0.7), "labels are to be learnt from these embeddings"
    scored = affcache.score(run=run, figures=tmp_path / "figures")
    assert scored.scores.value == pytest.approx(fitted.value, abs=1e-6)
    assert [one.name for one in scored.scores.classes] == list(task.classes)
    if task.kind != "values":
        affcache.score(run=run, fit_on="validation", decide="fitted", calibrate=True)
    page = Path(affcache.report(run=run, out=tmp_path / "report.html").out).read_text(encoding="utf-8")
    assert all(name in page for name in task.classes)


@pytest.mark.parametrize("head", ["mlp", "ridge"])
def test_a_new_task_in_a_grid(data: tuple[Task, Path, Path], tmp_path: Path, head: str) -> None:
    task, store, annotations = data
    result = affcache.ablate(
        task=task.name, store=store, annotations=annotations, vary={"normalize": ["none", "l2"]}, seeds=2, head=head,
        epochs=2, hidden_layers=1, hidden_width=16, out=tmp_path / "grid",
    )  # fmt: skip
    assert [row.finished for row in result.rows] == [2, 2]


POLY = '''

def poly_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, *, poly_epsilon: Option = 1.0) -> torch.Tensor:
    """Cross-entropy with a first polynomial term.

    Args:
        logits: float tensor (..., B, C).
        labels: int64 tensor (..., B) of class indices.
        poly_epsilon: at least 0: Weight of the miss itself beside its logarithm.
    """
    own = functional.log_softmax(logits, dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return -own + poly_epsilon * (1 - own.exp())


'''
ESTIMATOR = """
import numpy as np
from affcache import CVaRMLPClassifier
one = CVaRMLPClassifier(loss="poly", poly_epsilon=3.0, epochs=1, hidden_layers=0)
assert one.get_params()["poly_epsilon"] == 3.0 and CVaRMLPClassifier().poly_epsilon == 1.0
one.fit(np.random.default_rng(0).normal(size=(20, 4)), np.arange(20) % 2)
"""


@pytest.mark.slow
def test_a_new_loss_brings_its_knob_everywhere(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    ignored = shutil.ignore_patterns("__pycache__")
    for name, package in {"affcache": affcache, "affcache/cli": affcache.cli, "affcache/data": affcache.data}.items():
        shutil.copytree(Path(package.__file__).parent, copy / name, ignore=ignored)
    losses = copy / "affcache" / "tasks" / "losses.py"
    text = losses.read_text(encoding="utf-8")
    line = '"classes": {"cross_entropy": cross_entropy'
    assert text.count(line) == 1
    table = text.index("# Losses by the kind")
    text = text[:table].rstrip() + POLY + text[table:].replace(line, f'{line}, "poly": poly_cross_entropy')
    losses.write_text(text, encoding="utf-8")

    def python(*words: object, succeeds: bool = True) -> str:
        environment = {**os.environ, "PYTHONPATH": str(copy), "COLUMNS": "200"}
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode == 0) == succeeds, done.stderr
        return done.stdout + done.stderr

    assert "--poly-epsilon" in python("-m", "affcache.cli", "fit", "--help")
    store, annotations = make_learnable(tmp_path)
    config = f"[fit]\nstore = '{store}'\nannotations = '{annotations}'\nloss = 'poly'\npoly_epsilon = 2.5\nepochs = 1\n"
    (tmp_path / "affcache.toml").write_text(config + "hidden_width = 16\nhidden_layers = 1\n", encoding="utf-8")
    python("-m", "affcache.cli", "fit", "--run", "a", "--poly-epsilon", 0.5)
    python("-m", "affcache.cli", "fit", "--run", "b")
    settings = [json.loads((tmp_path / run / "config.json").read_text())["settings"] for run in "ab"]
    assert [(one["loss"], one["poly_epsilon"]) for one in settings] == [("poly", 0.5), ("poly", 2.5)]
    assert "by the definition" not in python("-m", "affcache.cli", "score", "a", "--annotations", annotations)
    refused = python("-m", "affcache.cli", "fit", "--run", "c", "--poly-epsilon", -1, succeeds=False)
    assert "--poly-epsilon is -1.0; expected at least 0." in refused
    refused = python("-m", "affcache.cli", "fit", "--run", "c", "--loss", "cross_entropy", succeeds=False)
    assert "--poly-epsilon is 2.5, but the loss of task expr doesn't take it; expected 1 or --loss poly." in refused
    python("-c", ESTIMATOR)
