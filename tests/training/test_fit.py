"""Fitting as a whole: a seed decides every bit, a killed run continues to the same bits, bad input is named."""

import errno
import json
import os
import shlex
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import affcache.training.epochs as epochs
from affcache.errors import ConfigError, InputError, StoreError
from affcache.files import read_tensors, write_tensors
from affcache.progress import Listener
from affcache.store.reading import EmbeddingStore
from affcache.store.writing import create_store
from affcache.tasks.tasks import TASKS
from affcache.training.fit import FitResult, fit
from affcache.training.run_folder import RunFolder
from affcache.training.settings import FitSettings
from tests.conftest import NAMED_ONLY, MakeData, crop_list, write_labels, write_store

QUICK: dict[str, Any] = {"epochs": 4, "hidden_layers": 1, "hidden_width": 16, "batch_size": 16, "rho": 0.05}
Fit = Callable[..., FitResult]


class Recorder(Listener):
    """Keeps what it is told; interrupts after a given number of epochs, as Ctrl-C would."""

    def __init__(self, interrupt_after: int | None = None) -> None:
        self.messages: list[str] = []
        self.warnings: list[str] = []
        self.interrupt_after = interrupt_after

    def message(self, text: str) -> None:
        self.messages.append(text)

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
        if done == self.interrupt_after:
            raise KeyboardInterrupt


@pytest.fixture
def quick_fit(learnable: MakeData, tmp_path: Path) -> Fit:
    """Fit on small data that a head can learn: quick_fit(run name, **settings)."""
    store, annotations = learnable()

    def run(name: str = "run", **changes: Any) -> FitResult:
        values = {"store": store, "annotations": annotations, "run": tmp_path / name, **QUICK}
        return fit(**{**values, **changes})

    return run


def history(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's history without the times."""
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "training_seconds")} for line in lines]


def assert_same_run(one: Path, other: Path) -> None:
    """Assert that two runs have the same history, best head and last state, to the bit."""
    assert history(one) == history(other)
    for name in ("head.safetensors", "last.safetensors"):
        (tensors, header), (expected, expected_header) = read_tensors(one / name), read_tensors(other / name)
        assert tensors.keys() == expected.keys()
        assert all(tensors[key].equal(expected[key]) for key in expected), name
        assert header == expected_header


# A whole run


@pytest.mark.parametrize("task", ["expr", "au"])
def test_a_head_learns_and_the_best_epoch_is_kept(learnable: MakeData, tmp_path: Path, task: str) -> None:
    store, annotations = learnable(task)
    run = tmp_path / "run"
    recipe = {**QUICK, "epochs": 12, "dropout": 0.1, "lr": 0.01, "hidden_width": 64}
    result = fit(task=task, store=store, annotations=annotations, run=run, **recipe)
    lines = history(run)
    values = [line[result.metric] for line in lines]
    assert result.value > 0.85
    assert result.value == max(values)
    assert result.best_epoch == 1 + int(np.argmax(values)), "the first of equals"
    assert [line["epoch"] for line in lines] == list(range(1, 13))
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    assert (result.frames, result.validation_frames, result.epochs) == (160, 80, 12)
    _, header = read_tensors(run / "head.safetensors")
    assert (header["epoch"], header[result.metric]) == (result.best_epoch, result.value)
    assert header["store"]["fingerprint"] == EmbeddingStore.open(store).fingerprint()
    config = json.loads((run / "config.json").read_text())
    assert config["task"] == task
    assert config["settings"]["epochs"] == 12
    assert config["settings"]["alpha"] == 0.5, "defaults stand there too"
    assert config["labels"]["train"]["used"] == 160
    assert {"torch", "numpy", "python"} <= config["versions"].keys()
    assert {path.name for path in run.iterdir()} == {
        "config.json", "history.jsonl", "head.safetensors", "last.safetensors"
    }  # fmt: skip
    assert json.loads(json.dumps(result.to_json()))["run"] == str(run)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(quick_fit: Fit, tmp_path: Path) -> None:
    first, second, other = (quick_fit(name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert (first.value, first.best_epoch) == (second.value, second.best_epoch)
    assert history(tmp_path / "a") != history(tmp_path / "c")
    assert other.run == str(tmp_path / "c")


def test_the_callers_random_numbers_stay_his_own(quick_fit: Fit, tmp_path: Path) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    quick_fit("a")
    assert torch.get_rng_state().equal(before)
    torch.rand(5)  # and they don't reach into the run
    quick_fit("b")
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_the_history_follows_torchs_cosine(quick_fit: Fit, tmp_path: Path) -> None:
    quick_fit(epochs=8, lr=0.004)
    optimiser = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=0.004)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=2, eta_min=1e-5)
    for line in history(tmp_path / "run"):
        assert line["learning_rate"] == pytest.approx(schedule.get_last_lr()[0], rel=1e-9)
        optimiser.step()
        schedule.step()


def test_alpha_1_and_rho_0_are_plain_training(quick_fit: Fit) -> None:
    listener = Recorder()
    result = quick_fit(alpha=1.0, rho=0.0, listener=listener)
    assert result.tail == 16
    assert not [text for text in listener.messages if "CVaR" in text]
    assert listener.warnings == []


def test_settings_change_the_run(quick_fit: Fit, tmp_path: Path) -> None:
    quick_fit("base", epochs=1)
    for index, change in enumerate([{"alpha": 0.4}, {"rho": 0.2}, {"normalize": "l2"}, {"dropout": 0.1}, {"lr": 0.01},
                                    {"weight_decay": 0.5}]):  # fmt: skip
        quick_fit(str(index), epochs=1, **change)
        assert history(tmp_path / str(index)) != history(tmp_path / "base"), change


def test_normalize_l2_forgets_the_length_of_embeddings(learnable: MakeData, tmp_path: Path) -> None:
    path, annotations = learnable()
    store = EmbeddingStore.open(path)
    listing = {name: range(1, 41) for name in store.video_names}
    write_store(tmp_path / "doubled.h5", listing, store.features * 2)  # exact in float16
    for name, features in (("a", path), ("b", tmp_path / "doubled.h5")):
        fit(store=features, annotations=annotations, run=tmp_path / name, normalize="l2", **QUICK)
    assert [line["train_loss"] for line in history(tmp_path / "a")] == pytest.approx(
        [line["train_loss"] for line in history(tmp_path / "b")], rel=1e-4
    )


def test_a_settings_object_and_single_values_are_the_same(quick_fit: Fit, tmp_path: Path) -> None:
    quick_fit("a")
    values = {"store": tmp_path / "expr.h5", "annotations": tmp_path / "labels", "run": tmp_path / "b", **QUICK}
    fit(FitSettings(**values))
    assert_same_run(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ConfigError, match=r"Unknown setting 'epoch' \(did you mean 'epochs'\?\)"):
        quick_fit("c", epoch=3)


# What it says


def test_it_says_the_join_the_tail_and_the_folder(quick_fit: Fit) -> None:
    listener = Recorder()
    result = quick_fit(listener=listener)
    assert listener.messages == [
        "train: 160 frames of 4 videos; left out: nothing",
        "validation: 80 frames of 2 videos; left out: nothing",
        "40 steps in all, few for dropout and SAM: more --epochs, or --dropout 0 --rho 0, may learn more",
        "CVaR at alpha 0.5 averages the worst 8 losses of each batch",
        f"run folder: {result.run}",
    ]
    assert listener.warnings == []


@pytest.mark.parametrize(
    "raising",
    [{"logit_adjustment": 1.0}, {"class_weights": "balanced"}, {"focal_gamma": 2.0}],
    ids=lambda of: next(iter(of)),
)
def test_raising_rare_frames_twice_is_warned_of(quick_fit: Fit, tmp_path: Path, raising: dict[str, Any]) -> None:
    listener = Recorder()
    quick_fit(str(tmp_path / "twice"), listener=listener, epochs=1, **raising)
    (warning,) = listener.warnings
    assert warning.startswith(f"--{next(iter(raising)).replace('_', '-')} with --alpha 0.5 raises rare and hard frames")
    for once in ({"alpha": 1.0}, {"head": "ridge", "focal_gamma": 0.0, "logit_adjustment": 0.0}):
        listener = Recorder()
        quick_fit(str(tmp_path / f"{once}"), listener=listener, **{"epochs": 1, **raising, **once})
        assert listener.warnings == []


@pytest.mark.parametrize("task", ["expr", "au", "va"])
def test_a_ridge_to_beat_is_that_of_fit(learnable: MakeData, tmp_path: Path, task: str) -> None:
    store, annotations = learnable(task)
    given: dict[str, Any] = {"task": task, "store": store, "annotations": annotations}
    weights = "balanced" if task == "expr" else "none"
    found = fit(**given, run=tmp_path / "mlp", **QUICK)
    ridge = fit(**given, run=tmp_path / "ridge", head="ridge", class_weights=weights)
    assert (found.ridge, ridge.ridge) == (ridge.value, None)


def test_a_tail_under_5_is_warned_of(quick_fit: Fit) -> None:
    listener = Recorder()
    result = quick_fit(alpha=0.3, listener=listener)  # 0.3 * 16
    assert result.tail == pytest.approx(4.8)
    assert listener.warnings == [
        "CVaR's tail is 4.8 losses a batch, fewer than 5: its gradient will be noisy. Raise --batch-size or --alpha, "
        "or find the threshold over more batches with --cvar-level set."
    ]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"cvar_level": "set"},
            "CVaR at alpha 0.3 counts losses above a threshold over recent batches: 4.8 a batch on average",
        ),
        ({"cvar_within": "class"}, "CVaR at alpha 0.3 averages the worst losses of each class in a batch by itself"),
        ({"cvar_within": "video"}, "CVaR at alpha 0.3 averages the worst losses of each video in a batch by itself"),
    ],
)
def test_other_tails_are_said_as_they_are(quick_fit: Fit, more: dict[str, str], message: str) -> None:
    listener = Recorder()
    quick_fit(alpha=0.3, **more, listener=listener)
    assert message in listener.messages
    assert listener.warnings == []


def test_the_tail_counts_all_losses_of_a_batch_and_no_more_than_there_are(learnable: MakeData, tmp_path: Path) -> None:
    store, annotations = learnable("au")
    listener = Recorder()
    values = {**QUICK, "epochs": 1, "batch_size": 1000, "listener": listener}
    result = fit(task="au", store=store, annotations=annotations, run=tmp_path / "run", **values)
    assert result.tail == 160 * 12 * 0.5
    assert "CVaR at alpha 0.5 averages the worst 960 losses of each batch" in listener.messages
    few = fit(task="au", store=store, annotations=annotations, run=tmp_path / "few", **values, stride=4)
    assert few.tail == 40 * 12 * 0.5, "one frame of every four in an epoch"
    fewer = fit(task="au", store=store, annotations=annotations, run=tmp_path / "fewer", **values, frames_per_epoch=10)
    assert fewer.tail == 10 * 12 * 0.5


def test_videos_in_both_splits_are_warned_of(quick_fit: Fit, tmp_path: Path) -> None:
    lines = (tmp_path / "labels/EXPR_Recognition_Challenge/Train_Set/0-30-640x360.txt").read_text().splitlines()[1:]
    write_labels(tmp_path / "labels", "expr", "validation", {"0-30-640x360": lines})
    listener = Recorder()
    quick_fit(listener=listener)
    assert listener.warnings == ["1 video in both splits, so validation flatters: 0-30-640x360"]


# Killed and resumed


@pytest.mark.parametrize("epochs_done", [1, 2, 3, 4])
def test_interrupted_after_any_epoch_and_resumed_equals_a_whole_run(
    quick_fit: Fit, tmp_path: Path, epochs_done: int
) -> None:
    whole = quick_fit("whole")
    with pytest.raises(KeyboardInterrupt):
        quick_fit("cut", listener=Recorder(interrupt_after=epochs_done))
    assert len(history(tmp_path / "cut")) == epochs_done
    resumed = quick_fit("cut", resume=True)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    assert (resumed.value, resumed.best_epoch, resumed.epochs) == (whole.value, whole.best_epoch, 4)


def test_a_run_begun_before_a_setting_existed_goes_on_with_its_default(quick_fit: Fit, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        quick_fit("cut", listener=Recorder(interrupt_after=1))
    path = tmp_path / "cut" / "config.json"
    config = json.loads(path.read_text())
    del config["settings"]["held_out"]
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"--held-out 0\.0 then, 0\.3 now"):
        quick_fit("cut", resume=True, held_out=0.3)
    assert quick_fit("cut", resume=True).epochs == 4


def test_killed_between_any_two_writes_and_resumed_equals_a_whole_run(
    quick_fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = epochs.write_tensors
    written: list[Path] = []
    stop_at = [-1]

    def stopping(path: Path, *rest: Any) -> None:
        if len(written) == stop_at[0]:
            raise KeyboardInterrupt
        written.append(path)
        write(path, *rest)

    monkeypatch.setattr(epochs, "write_tensors", stopping)
    recipe = {"epochs": 3, "task": "expr"}
    quick_fit("whole", **recipe)
    writes = len(written)
    assert writes >= 4, "last.safetensors three times, head.safetensors at least once"
    for count in range(writes):
        name = f"cut-{count}"
        written.clear()
        stop_at[0] = count
        with pytest.raises(KeyboardInterrupt):
            quick_fit(name, **recipe)
        stop_at[0] = -1
        quick_fit(name, resume=True, **recipe)
        assert_same_run(tmp_path / name, tmp_path / "whole")


@pytest.mark.parametrize(
    "more", ['{"epoch": 3, "train_loss": 9}\n', '{"epoch": 3, "tra', ""], ids=["a line", "half a line", "nothing"]
)
def test_a_line_of_history_too_many_is_dropped(quick_fit: Fit, tmp_path: Path, more: str) -> None:
    quick_fit("whole")
    with pytest.raises(KeyboardInterrupt):
        quick_fit("cut", listener=Recorder(interrupt_after=2))
    with (tmp_path / "cut" / "history.jsonl").open("a") as file:
        file.write(more)
    (tmp_path / "cut" / "last.safetensors.0a1b2c3d.partial").write_bytes(b"half a file")
    quick_fit("cut", resume=True)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    assert not list((tmp_path / "cut").glob("*.partial"))


def test_resuming_a_finished_run_trains_nothing(quick_fit: Fit, tmp_path: Path) -> None:
    first = quick_fit()
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    again = quick_fit(resume=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    assert (again.value, again.best_epoch, again.epochs) == (first.value, first.best_epoch, first.epochs)


class Elsewhere(Recorder):
    """Lets another process begin the same command while this one trains."""

    def __init__(self, quick_fit: Fit, **settings: Any) -> None:
        super().__init__()
        self.begin = partial(quick_fit, **settings)
        self.refused: list[str] = []

    def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
        with pytest.raises(ConfigError) as caught:
            self.begin()
        self.refused.append(str(caught.value))


def test_two_can_not_train_in_one_folder(quick_fit: Fit, tmp_path: Path) -> None:
    quick_fit("whole")
    first, second = Elsewhere(quick_fit, epochs=2), Elsewhere(quick_fit, resume=True)
    quick_fit(listener=first)
    (tmp_path / "run" / "last.safetensors").unlink()
    quick_fit(listener=second, resume=True)
    message = f"Another 'affcache fit' trains in {tmp_path / 'run'}. Expected to be alone there. Wait for it, or choose"
    assert len(first.refused) == len(second.refused) == 4
    assert all(text.startswith(message) for text in first.refused + second.refused)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert not (tmp_path / "run" / ".lock").exists()


def test_runs_begun_in_the_same_second_have_folders_of_their_own(
    quick_fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Noon(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Noon":
            return cls(2026, 1, 1, 12)

    monkeypatch.setattr("affcache.training.run_folder.datetime", Noon)
    monkeypatch.chdir(tmp_path)
    names = [quick_fit(run=None, epochs=1).run for _ in range(3)]
    assert names == [f"runs/expr-20260101-120000{ending}" for ending in ("", "-2", "-3")]


@pytest.mark.parametrize("head", ["mlp", "ridge"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_run_without_a_config_yet_begins_anew(quick_fit: Fit, tmp_path: Path, head: str, resume: bool) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in (".lock", "config.json.0a1b2c3d.partial"):  # what a kill leaves
        (run / name).touch()
    quick_fit(head=head, resume=resume)
    assert {path.name for path in run.iterdir()} >= {"config.json", "history.jsonl", "head.safetensors"}
    assert not any(path.name == ".lock" or path.suffix == ".partial" for path in run.iterdir())


def test_a_run_whose_first_write_fails_leaves_no_folder(
    quick_fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(InputError, match=r"config.json can't be written: No space left on device"):
            quick_fit()
    assert not (tmp_path / "run").exists()
    quick_fit()


def test_there_is_nothing_to_resume_where_no_folder_is(quick_fit: Fit, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config.json in it"):
        quick_fit(resume=True)
    assert not (tmp_path / "run").exists()


def interrupted(quick_fit: Fit) -> None:
    with pytest.raises(KeyboardInterrupt):
        quick_fit(listener=Recorder(interrupt_after=1))


def test_resume_with_other_settings_names_them(quick_fit: Fit) -> None:
    interrupted(quick_fit)
    with pytest.raises(ConfigError) as caught:
        quick_fit(resume=True, alpha=0.3, hidden_width=8)
    message = str(caught.value)
    assert "can't be continued: --alpha 0.5 then, 0.3 now; --hidden-width 16 then, 8 now. Expected" in message
    assert "begin a new run with another --run DIR" in message
    assert "dropout" not in message
    assert "cosine" not in message
    with pytest.raises(ConfigError, match=r"--epochs 4 then, 8 now\. .* the learning rate's cosine spans them all"):
        quick_fit(resume=True, epochs=8)


def test_a_run_is_continued_by_its_folder_alone(learnable: MakeData, tmp_path: Path) -> None:
    store, annotations = learnable("au")
    words = {"task": "au", "store": store, "annotations": annotations, **QUICK, "auc_weight": 0.2, "memory": 0.5}
    fit(**words, run=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt) as caught:
        fit(**words, run=tmp_path / "a cut", listener=Recorder(interrupt_after=2))
    kept, _, command = str(caught.value).partition("; this continues: ")
    assert kept == f"2 epochs of 4 kept in {tmp_path / 'a cut'}"
    assert shlex.split(command) == ["affcache", "fit", "--run", str(tmp_path / "a cut"), "--resume"]
    assert fit(run=tmp_path / "a cut", resume=True).task == "au"
    assert_same_run(tmp_path / "a cut", tmp_path / "whole")
    assert fit(run=tmp_path / "a cut", resume=True, device="cpu", store=store).epochs == 4
    for given in ({"task": "expr"}, {"memory": 0.25}, {"rho": 0.5}):  # one of them as by default
        with pytest.raises(ConfigError, match=f"can't be continued: --{next(iter(given))} "):
            fit(run=tmp_path / "a cut", resume=True, **given)


def test_resume_with_another_store_is_refused(quick_fit: Fit, tmp_path: Path) -> None:
    interrupted(quick_fit)
    store = EmbeddingStore.open(tmp_path / "expr.h5")
    changed = store.features.copy()
    changed[7, 3] += 1
    other = tmp_path / "other.h5"
    write_store(other, {name: range(1, 41) for name in store.video_names}, changed)
    with pytest.raises(StoreError, match=r"has changed: .*other\.h5 doesn't hold the embeddings that .*expr\.h5 held"):
        quick_fit(resume=True, store=other)


def test_resume_with_the_same_store_elsewhere_works(quick_fit: Fit, tmp_path: Path) -> None:
    quick_fit("whole")
    interrupted(quick_fit)
    moved = (tmp_path / "expr.h5").rename(tmp_path / "moved.h5")
    (tmp_path / "labels").rename(tmp_path / "moved labels")
    quick_fit(resume=True, store=moved, annotations=tmp_path / "moved labels")
    assert history(tmp_path / "run") == history(tmp_path / "whole")


@pytest.mark.parametrize("lines", [[-1] * 40, [3] * 40], ids=["fewer labels", "as many, others"])
def test_resume_with_other_labels_is_refused(quick_fit: Fit, tmp_path: Path, lines: Sequence[int]) -> None:
    interrupted(quick_fit)
    write_labels(tmp_path / "labels", "expr", "train", {"0-30-640x360": lines})
    with pytest.raises(ConfigError, match=r"can't be continued: the labels in .*labels"):
        quick_fit(resume=True)


def test_resume_needs_a_run(quick_fit: Fit, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no run folder"):
        quick_fit("nothing", resume=True)
    with pytest.raises(ConfigError, match=r"--resume doesn't say which run .* expected --run DIR"):
        quick_fit(resume=True, run=None)
    assert not (tmp_path / "nothing").exists()


def test_a_damaged_state_is_a_named_error(quick_fit: Fit, tmp_path: Path) -> None:
    interrupted(quick_fit)
    last = RunFolder(tmp_path / "run").last
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.raises(StoreError, match=r"last\.safetensors can't be read .* Train again"):
        quick_fit(resume=True)


# What is refused


def test_a_taken_run_folder_is_refused_and_left_alone(quick_fit: Fit, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError) as caught:
        quick_fit()
    assert "already holds something. Expected an empty or new folder" in str(caught.value)
    assert f"--run {tmp_path / 'run'} --resume" in str(caught.value)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_an_empty_run_folder_is_fine(quick_fit: Fit, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert quick_fit(epochs=1).epochs == 1


def test_an_incomplete_store_is_refused(quick_fit: Fit, tmp_path: Path) -> None:
    path = tmp_path / "pending.h5"
    create_store(path, crop_list({"0-30-640x360": range(1, 9)}), 16, {"model": "made-up"}, NAMED_ONLY)
    with pytest.raises(StoreError, match=r"is incomplete: 8 of 8 rows .* run the same 'affcache extract' again"):
        quick_fit(store=path)
    assert not (tmp_path / "run").exists()


def test_a_missing_store_says_the_two_ways(quick_fit: Fit, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no embedding store at .*with --store FILE or with store = .*affcache.toml"):
        quick_fit(store=tmp_path / "none.h5")


def test_an_unknown_task_is_refused(quick_fit: Fit) -> None:
    with pytest.raises(ConfigError, match=r"--task 'exp' is unknown \(did you mean 'expr'\?\)"):
        quick_fit(task="exp")


def test_a_single_training_frame_is_refused(quick_fit: Fit, tmp_path: Path) -> None:
    for path in (tmp_path / "labels/EXPR_Recognition_Challenge/Train_Set").iterdir():
        path.unlink()
    write_labels(tmp_path / "labels", "expr", "train", {"0-30-640x360": [2]})
    with pytest.raises(InputError, match="Only 1 training frame: expected at least 2"):
        quick_fit()


def test_divergence_is_an_error_and_keeps_the_good_epochs(quick_fit: Fit, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"diverged in epoch 1.*Lower --lr"):
        quick_fit(lr=1e38)
    assert not (tmp_path / "run" / "head.safetensors").exists()


def test_a_damaged_store_trains_nothing(learnable: MakeData, tmp_path: Path) -> None:
    store, labels = learnable()
    for dataset, change in (("features", 0.25), ("status", 63)):
        damaged = tmp_path / f"{dataset}.h5"
        damaged.write_bytes(store.read_bytes())
        with h5py.File(damaged, "r+") as file:
            file[dataset][7] = file[dataset][7] + change
        with pytest.raises(StoreError, match="is corrupt"):
            fit(task="expr", store=damaged, annotations=labels, run=tmp_path / dataset)
        assert not (tmp_path / dataset).exists()


@pytest.mark.parametrize(
    "name", ["optimiser.0.exp_avg", "optimiser.0.step", "generator.order.0", "head.layers.0.weight"]
)
@pytest.mark.parametrize("damage", ["short", "missing", "other dtype"])
def test_no_damaged_state_is_taken_up(quick_fit: Fit, tmp_path: Path, name: str, damage: str) -> None:
    """torch would read and write beyond what is too short."""
    interrupted(quick_fit)
    path = tmp_path / "run" / "last.safetensors"
    tensors, header = read_tensors(path)
    tensor = tensors.pop(name)
    if damage == "short":
        tensors[name] = tensor.reshape(-1)[:1].reshape(1, 1)
    elif damage == "other dtype":
        tensors[name] = tensor.to(torch.float64)
    write_tensors(path, tensors, header)
    with pytest.raises(StoreError, match=r"last\.safetensors can't be continued from \(.*expected torch\."):
        quick_fit(resume=True)


@pytest.mark.parametrize(
    "header", [{"epoch": 9}, {"epoch": None}, {"epoch": -1}, {"best_epoch": 5}, {"best_value": "x"}, {"epoch": 1e400}]
)
def test_no_damaged_progress_is_taken_up(quick_fit: Fit, tmp_path: Path, header: dict[str, Any]) -> None:
    interrupted(quick_fit)
    path = tmp_path / "run" / "last.safetensors"
    tensors, before = read_tensors(path)
    write_tensors(path, tensors, {**before, **header})
    with pytest.raises(StoreError, match="can't be continued from"):
        quick_fit(resume=True)


def test_folders_with_videos_on_both_sides_are_warned_of(tmp_path: Path) -> None:
    videos = {f"{person}/Visit1/Q{question}": range(1, 9) for person in (1, 2) for question in range(1, 7)}
    features = np.random.default_rng(0).normal(size=(96, 6)).astype(np.float16)
    store = write_store(tmp_path / "s.h5", videos, features).path
    folder = tmp_path / "labels" / "EXPR_Recognition_Challenge"
    for name in videos:
        split = "Validation_Set" if name.endswith("Q6") else "Train_Set"
        (folder / split / name).parent.mkdir(parents=True, exist_ok=True)
        lines = [TASKS["expr"].header, *map(str, range(8))]
        (folder / split / f"{name}.txt").write_text("\n".join(lines) + "\n")
    recorder = Recorder()
    recipe = {"epochs": 1, "hidden_layers": 0, "batch_size": 8, "held_out": 0.4}
    fit(store=store, annotations=tmp_path / "labels", run=tmp_path / "run", listener=recorder, **recipe)
    assert any("stand on both sides: whole videos are held out" in text for text in recorder.warnings), (
        recorder.messages
    )
