"""A training run: what each epoch says of itself, what is saved, and when it refuses to go on."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from affcache.errors import ConfigError
from affcache.files import read_tensors
from affcache.progress import Listener
from affcache.tasks.tasks import TASKS
from affcache.training.epochs import Entry, Epochs, SavedRun, metric_of, train_epoch
from affcache.training.learner import Learner
from affcache.training.run_folder import RunFolder
from affcache.training.settings import FitSettings
from tests.conftest import MakeData, frames_of

CPU = torch.device("cpu")
QUICK = FitSettings(epochs=3, hidden_layers=1, hidden_width=16, batch_size=16, rho=0.05, dropout=0.3)


def saved_run(recipe: FitSettings, folder: RunFolder) -> SavedRun:
    return SavedRun(Epochs(Learner([recipe], TASKS["expr"], 16, CPU)), folder, {"task": "expr"})


def test_a_diverging_run_is_an_error_that_says_what_to_change(learnable: MakeData, tmp_path: Path) -> None:
    train, validation = frames_of(learnable(), "expr")
    run = saved_run(replace(QUICK, lr=1e38), RunFolder(tmp_path))
    with pytest.raises(ConfigError, match=r"diverged in epoch 1: the loss is .*Lower --lr or --rho"):
        run.train(train, validation, Listener())


def test_a_head_broken_by_the_last_step_of_an_epoch_is_not_kept(learnable: MakeData, tmp_path: Path) -> None:
    train, validation = frames_of(learnable(), "expr")
    one_batch = replace(QUICK, lr=1e38, batch_size=len(train), rho=0.0)  # its only loss is the untrained head's
    run = saved_run(one_batch, RunFolder(tmp_path))
    with pytest.raises(ConfigError, match="diverged in epoch 1"):
        run.train(train, validation, Listener())
    assert not (tmp_path / "head.safetensors").exists()


def test_saved_files_hold_the_best_and_the_last_head(learnable: MakeData, tmp_path: Path) -> None:
    train, validation = frames_of(learnable(), "expr")
    folder = RunFolder(tmp_path)
    learner = Learner([QUICK], TASKS["expr"], 16, CPU)
    run, states = SavedRun(Epochs(learner), folder, {"task": "expr"}), []

    class Keep(Listener):
        def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
            assert (done, total, unit) == (len(states) + 1, 3, "epoch")
            assert note.startswith("macro_f1 0.")
            states.append({name: tensor.clone() for name, tensor in learner.head_state(0).items()})

    run.train(train, validation, Keep())
    (found,) = run.run.best
    best, header = read_tensors(folder.head)
    assert header == {"task": "expr", "epoch": found.epoch, "macro_f1": found.value}
    assert all(best[name].equal(tensor) for name, tensor in states[found.epoch - 1].items())
    assert all(found.head[name].equal(tensor) for name, tensor in best.items())
    last, progress = read_tensors(folder.last)
    assert progress["epoch"] == 3
    assert all(last[f"head.{name}"].equal(tensor) for name, tensor in states[-1].items())


@pytest.mark.parametrize("task", ["expr", "au", "va"])
def test_history_says_how_the_epoch_went(learnable: MakeData, task: str) -> None:
    train, validation = frames_of(learnable("au" if task == "au" else "expr"), task)
    learner = Learner([replace(QUICK, alpha=0.3)], TASKS[task], 16, CPU)
    (entry,) = train_epoch(learner, train, validation, 0)
    (logits,) = learner.predict(validation)
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


# Heads side by side


def test_a_head_that_diverges_is_out_and_the_others_go_on(learnable: MakeData) -> None:
    train, validation = frames_of(learnable(), "expr")
    recipes = [replace(QUICK, seed=1), replace(QUICK, seed=2, lr=1e38)]
    both, alone = (Epochs(Learner(some, TASKS["expr"], 16, CPU)) for some in (recipes, recipes[:1]))
    assert len(list(both.run(train, validation))) == 3
    sound, broken = both.best
    assert (broken.diverged, broken.epoch, broken.history, broken.head) == (1, 0, [], {})
    assert sound.diverged is None
    assert [line["epoch"] for line in sound.history] == [1, 2, 3]
    assert sound.entry is sound.history[sound.epoch - 1]
    assert sound.value == sound.entry["macro_f1"] == max(line["macro_f1"] for line in sound.history)
    list(alone.run(train, validation))
    assert [line["train_loss"] for line in sound.history] == pytest.approx(
        [line["train_loss"] for line in alone.best[0].history], rel=1e-4
    )
    only = Epochs(Learner(recipes[1:], TASKS["expr"], 16, CPU))
    assert len(list(only.run(train, validation))) == 1, "nothing is left to train"


def test_the_best_epochs_predict(learnable: MakeData) -> None:
    train, validation = frames_of(learnable(), "expr")
    run = Epochs(Learner([replace(QUICK, seed=seed, lr=0.05) for seed in (1, 2)], TASKS["expr"], 16, CPU))
    seen = []
    for _ in run.run(train, validation):
        seen.append(run.learner.predict(validation))
    found = run.predict_best(validation)
    for head, best in enumerate(run.best):
        assert found[head].equal(seen[best.epoch - 1][head])
        assert metric_of(TASKS["expr"], found[head], validation.labels, validation.videos) == best.value


def test_without_validation_frames_the_last_epoch_is_the_best(learnable: MakeData) -> None:
    train, _ = frames_of(learnable(), "expr")
    run = Epochs(Learner([QUICK], TASKS["expr"], 16, CPU))
    entries = [entry for (entry,) in run.run(train)]
    assert all({"validation_loss", "macro_f1"}.isdisjoint(entry) for entry in entries)
    (best,) = run.best
    assert (best.epoch, best.history) == (3, entries)
    assert all(best.head[name].equal(tensor) for name, tensor in run.learner.head_state(0).items())


def test_its_state_continues_to_the_bit(learnable: MakeData) -> None:
    train, validation = frames_of(learnable(), "expr")
    recipes = [replace(QUICK, epochs=4, seed=seed, lr=lr) for seed, lr in ((1, 1e-3), (2, 1e38), (3, 0.05))]
    whole, first, second = (Epochs(Learner(recipes, TASKS["expr"], 16, CPU)) for _ in range(3))
    list(whole.run(train, validation))
    running = first.run(train, validation)
    for _ in range(2):
        next(running)
    tensors, progress = first.state()
    second.load_state({name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(progress)))
    assert len(list(second.run(train, validation))) == 2
    for one, other in zip(whole.best, second.best, strict=True):
        assert (one.value, one.epoch, one.diverged) == (other.value, other.epoch, other.diverged)
        assert timeless(one.history) == timeless(other.history)
        assert timeless([one.entry]) == timeless([other.entry])
        assert one.head.keys() == other.head.keys()
        assert all(one.head[name].equal(tensor) for name, tensor in other.head.items())


def timeless(history: list[Entry]) -> list[Entry]:
    return [{name: value for name, value in line.items() if not name.endswith("seconds")} for line in history]
