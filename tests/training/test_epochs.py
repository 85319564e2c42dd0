"""A training run: what each epoch says of itself, what is saved, and when it refuses to go on."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from affcache.errors import ConfigError
from affcache.files import read_tensors
from affcache.progress import Listener
from affcache.tasks.tasks import TASKS
from affcache.training.epochs import Training, train_epoch
from affcache.training.learner import Learner
from affcache.training.run_folder import RunFolder
from affcache.training.settings import FitSettings
from tests.conftest import MakeData, frames_of

CPU = torch.device("cpu")
QUICK = FitSettings(epochs=3, hidden_layers=1, hidden_width=16, batch_size=16, rho=0.05, dropout=0.3)


def training_of(recipe: FitSettings, folder: RunFolder, task: str = "expr") -> Training:
    return Training(Learner([recipe], TASKS[task], 16, CPU), folder, {"task": task})


def test_a_diverging_run_is_an_error_that_says_what_to_change(learnable: MakeData, tmp_path: Path) -> None:
    train, validation = frames_of(learnable(), "expr")
    training = training_of(replace(QUICK, lr=1e38), RunFolder(tmp_path))
    with pytest.raises(ConfigError, match=r"diverged in epoch 1: the loss is .*Lower --lr or --rho"):
        training.run(train, validation, Listener())


def test_a_head_broken_by_the_last_step_of_an_epoch_is_not_kept(learnable: MakeData, tmp_path: Path) -> None:
    train, validation = frames_of(learnable(), "expr")
    one_batch = replace(QUICK, lr=1e38, batch_size=len(train), rho=0.0)  # its only loss is the untrained head's
    training = training_of(one_batch, RunFolder(tmp_path))
    with pytest.raises(ConfigError, match="diverged in epoch 1"):
        training.run(train, validation, Listener())
    assert not (tmp_path / "head.safetensors").exists()


def test_saved_files_hold_the_best_and_the_last_head(learnable: MakeData, tmp_path: Path) -> None:
    train, validation = frames_of(learnable(), "expr")
    folder = RunFolder(tmp_path)
    training = training_of(QUICK, folder)
    states = []

    class Keep(Listener):
        def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
            assert (done, total, unit) == (len(states) + 1, 3, "epoch")
            assert note.startswith("macro_f1 0.")
            states.append({name: tensor.clone() for name, tensor in training.learner.heads.state_dict(0).items()})

    training.run(train, validation, Keep())
    best, header = read_tensors(folder.head)
    assert header == {"task": "expr", "epoch": training.best_epoch, "macro_f1": training.best_value}
    assert all(best[name].equal(tensor) for name, tensor in states[training.best_epoch - 1].items())
    last, progress = read_tensors(folder.last)
    assert progress["epoch"] == 3
    assert all(last[f"head.{name}"].equal(tensor) for name, tensor in states[-1].items())


@pytest.mark.parametrize("task", ["expr", "au", "va"])
def test_history_says_how_the_epoch_went(learnable: MakeData, tmp_path: Path, task: str) -> None:
    train, validation = frames_of(learnable("au" if task == "au" else "expr"), task)
    training = training_of(replace(QUICK, alpha=0.3), RunFolder(tmp_path), task)
    (entry,) = train_epoch(training.learner, train, validation, 0)
    (logits,) = training.learner.predict(validation)
    losses = TASKS[task].losses(logits, validation.labels)
    assert entry["validation_loss"] == pytest.approx(float(losses.mean()))
    worst = losses.flatten().sort(descending=True).values
    tail = 0.3 * len(worst)
    weights = (tail - torch.arange(len(worst))).clamp(0, 1) / tail
    assert entry["validation_cvar"] == pytest.approx(float((weights * worst).sum()), rel=1e-5)
    decided = TASKS[task].decide(TASKS[task].probabilities(logits).numpy())
    scores = TASKS[task].score(validation.labels.numpy(), decided)
    assert entry[TASKS[task].metric] == scores.value
    assert (entry["epoch"], entry["learning_rate"]) == (1, 1e-3)
