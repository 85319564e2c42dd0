"""Ablations with folds: each frame is scored once by who never saw it, and all of them as one set."""

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from sklearn.metrics import f1_score

import affcache
from affcache.ablation import train as grouping
from affcache.ablation.ablate import ablate
from affcache.ablation.folds import pooled
from affcache.ablation.result import AblateResult, best_step
from affcache.ablation.summary import Outcome
from affcache.errors import ConfigError
from affcache.files import read_tensors
from affcache.scoring.intervals import metric_interval
from affcache.store.reading import EmbeddingStore
from affcache.tasks.annotations import join_labels
from affcache.tasks.splits import group_frames, stripped_name, unite
from affcache.tasks.tasks import TASKS
from affcache.training import data as frames_of_training
from affcache.training.run_folder import RunFolder
from tests.conftest import Heard, MakeData, write_labels, write_store
from tests.training.test_multitask_training import mtl_data

QUICK: dict[str, Any] = {"epochs": 3, "hidden_layers": 1, "hidden_width": 16, "batch_size": 16, "dropout": 0.3}


def run(data: tuple[Path, Path], out: Path, **values: Any) -> AblateResult:
    own = {"store": data[0], "annotations": data[1], "out": out, "seeds": 2, "folds": 4, "vary": ("alpha=0.5,1",)}
    return ablate(**{**QUICK, **own, **values})


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def predictions(path: Path) -> dict[str, Any]:
    with h5py.File(path) as file:
        return {name: file[name][()] for name in file} | dict(file.attrs)


def results(out: Path) -> dict[str, bytes]:
    """Return all that a reader of results sees."""
    names = ("*.csv", "summary.*", "best.json", "figures/*", "out_of_fold/*", "cells/*/*.json", "cells/*/*.safetensors")
    return {str(path.relative_to(out)): path.read_bytes() for name in names for path in out.glob(name)}


def concordance(x: Any, y: Any) -> float:
    """Lin's coefficient, by its formula."""
    covariance = ((x - x.mean()) * (y - y.mean())).mean()
    return float(2 * covariance / (x.var() + y.var() + (x.mean() - y.mean()) ** 2))


def oracle(task: str, labels: Any, decided: Any) -> float:
    """Return the metric by another implementation."""
    if task == "expr":
        return float(f1_score(labels, decided, labels=range(8), average="macro", zero_division=0))
    if task == "au":
        return float(f1_score(labels, decided, average="macro", zero_division=0))
    return float(np.mean([concordance(labels[:, i].astype(float), decided[:, i].astype(float)) for i in range(2)]))


@pytest.mark.parametrize("task", ["expr", "au", "va"])
def test_every_labelled_frame_is_scored_once_and_all_as_one_set(learnable: MakeData, tmp_path: Path, task: str) -> None:
    data, out = learnable(task, videos=11), tmp_path / "out"
    result = run(data, out, task=task, epochs=4, rho=0.0, lr=0.01)
    store, of_task = EmbeddingStore.open(data[0]), TASKS[task]
    every = unite(store, *(join_labels(store, data[1], of_task, split) for split in ("train", "validation")))
    (best,) = result.best
    row = next(row for row in result.rows if row.variant.name == best["setting"])
    values, sums, names = [], [], group_frames(store, every)
    for seed in range(2):
        found = predictions(out / "out_of_fold" / f"best-seed{seed}.h5")
        assert found["rows"].tolist() == every.rows.tolist(), "each once"
        assert np.array_equal(found["labels"], every.labels)
        assert (found["setting"], found["seed"], found["split"]) == (best["setting"], seed, "out of fold")
        values.append(oracle(task, found["labels"], found["decided"]))
        sums.append(of_task.sums_by_video(found["labels"], found["decided"], names[1], len(names[0])))
        assert np.array_equal(of_task.decide(found["probabilities"]), found["decided"])
        of_video: dict[str, set[int]] = {}
        for video, fold in zip(found["video"].tolist(), found["fold"].tolist(), strict=True):
            of_video.setdefault(stripped_name(store.video_names[video]), set()).add(fold)
        assert all(len(folds) == 1 for folds in of_video.values())
        assert {1, 2, 3, 4} == {fold for folds in of_video.values() for fold in folds}
    assert row.mean == pytest.approx(np.mean(values), abs=1e-9)
    expected = metric_interval(of_task, sums)
    assert row.interval is not None
    assert row.interval.value == pytest.approx(expected.value, abs=1e-9)
    assert (row.interval.bounds is None) == (expected.bounds is None)
    if expected.bounds:
        assert row.interval.bounds == pytest.approx(expected.bounds, abs=1e-6)
    of_folds = [float(one["value"]) for one in read(out / "results.csv") if one["setting"] == row.variant.name]
    assert len(of_folds) == 8
    assert (row.fold_mean, row.fold_deviation) == pytest.approx((np.mean(of_folds), np.std(of_folds, ddof=1)))
    written = {line["setting"]: line for line in read(out / "summary.csv")}[row.variant.name]
    assert float(written["mean"]) == row.mean
    assert float(written["fold_standard_deviation"]) == row.fold_deviation


def test_a_fold_is_trained_chosen_and_tested_as_by_hand(learnable: MakeData, tmp_path: Path) -> None:
    data, out = learnable(videos=9), tmp_path / "out"
    run(data, out, folds=3, seeds=1, vary=(), keep="all")
    every = {path.stem: path for path in data[1].rglob("*.txt")}
    fold_of = {}
    found = predictions(out / "out_of_fold" / "best-seed0.h5")
    for video, fold in zip(found["video"], found["fold"], strict=True):
        fold_of[found["video_name"][video].decode()] = int(fold)
    for row in read(out / "results.csv"):
        tested = int(row["fold"])
        chooses = tested % 3 + 1
        labels = tmp_path / f"labels {tested}"
        for video, path in every.items():
            if fold_of[video] != tested:
                split = "validation" if fold_of[video] == chooses else "train"
                write_labels(labels, "expr", split, {video: path.read_text().splitlines()[1:]})
        alone = affcache.fit(store=data[0], annotations=labels, run=tmp_path / f"run {tested}", **QUICK)
        assert (alone.value, alone.best_epoch) == (float(row["chosen_by"]), int(row["best_epoch"]))
        ours, theirs = (read_tensors(folder / "head.safetensors")[0] for folder in (Path(alone.run), out / row["run"]))
        assert all(ours[name].equal(theirs[name]) for name in ours)
        config = json.loads((out / row["run"] / "config.json").read_text())
        assert config["fold"] == [tested, 3]
        assert config["settings"]["train_on"] == "all"


def test_epochs_chosen_on_the_tested_fold_flatter_and_it_is_said(learnable: MakeData, tmp_path: Path) -> None:
    result = run(learnable(videos=8), tmp_path / "out", folds=2, select="validation")
    assert not result.heldout
    assert all(row["value"] == row["chosen_by"] for row in read(tmp_path / "out" / "results.csv"))
    with pytest.raises(ConfigError, match=r"--folds is 2, but one fold is tested, one chooses .* at least 3, or"):
        run(learnable(videos=8), tmp_path / "two", folds=2)


class Killed(Exception):
    """Stands for a kill at some point."""


@pytest.mark.parametrize("at", [1, 5, 9, 14])
def test_interrupted_anywhere_all_is_the_same(
    learnable: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    data, grid = learnable(videos=8), {"folds": 3, "vary": ("alpha=0.5,1", "head=mlp,ridge")}
    run(data, tmp_path / "whole", **grid)
    monkeypatch.setattr(grouping, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)

    class Kill(Heard):
        def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
            super().progress(done, total, unit, note)
            if len(self.steps) == at:
                raise Killed

    with pytest.raises(Killed):
        run(data, tmp_path / "killed", listener=Kill(), **grid)
    run(data, tmp_path / "killed", **grid)
    assert results(tmp_path / "killed") == results(tmp_path / "whole")
    assert run(data, tmp_path / "killed", **grid).trained == 0
    assert results(tmp_path / "killed") == results(tmp_path / "whole")


@pytest.mark.parametrize("keep", ["best", "all", "none"])
def test_what_is_kept(learnable: MakeData, tmp_path: Path, keep: str) -> None:
    data, out = learnable(videos=8), tmp_path / "out"
    result = run(data, out, folds=3, vary=("lr=1e-9,1e-2,1e-8",), lr_minimum=0.0, keep=keep)
    heads, said = (
        {path.parent.name for path in out.glob(f"cells/*/{name}.safetensors")} for name in ("head", "probabilities")
    )
    rows = read(out / "results.csv")
    cells = {name: {Path(row["run"]).name for row in rows if row["setting"] == name} for name in
             ("lr=1e-09", "lr=0.01", "lr=1e-08")}  # fmt: skip
    every, base, best = set().union(*cells.values()), cells["lr=1e-09"], cells[result.best[0]["setting"]]
    assert heads == {"best": best, "all": every, "none": set()}[keep]
    assert said == {"best": best | base, "all": every, "none": set()}[keep]
    files = {path.name for path in out.glob("out_of_fold/*")}
    assert ("best-seed0.h5" in files) == (keep != "none")
    heard = Heard()
    run(data, out, folds=3, vary=("lr=1e-8,1e-7",), lr_minimum=0.0, keep=keep, listener=heard)
    lost = [text for text in heard.warnings if "its predictions were not kept" in text]
    assert bool(lost) == (keep == "best"), "of a setting that was neither base nor best then"


def test_a_larger_grid_trains_what_is_new_and_other_folds_are_other_trials(learnable: MakeData, tmp_path: Path) -> None:
    data, out = learnable(videos=8), tmp_path / "out"
    assert run(data, out, folds=3).trained == 12
    assert run(data, out, folds=3, vary=("alpha=0.3,0.5,1",)).trained == 6
    assert run(data, out, folds=4).trained == 16
    assert run(data, out, folds=4, select="validation").trained == 16
    assert run(data, out, folds=None).trained == 4, "none at all"
    assert run(data, out, folds=3).trained == 0


def test_stores_side_by_side_and_compared(learnable: MakeData, tmp_path: Path) -> None:
    data = learnable(videos=8)
    other = shutil.copy(data[0], tmp_path / "other.h5")
    result = run(data, tmp_path / "out", folds=3, seeds=1, vary=(f"store={data[0]},{data[0]}+{other}",), head="linear")
    assert [row.difference is None for row in result.rows] == [True, False]
    found = predictions(tmp_path / "out" / "out_of_fold" / "best-seed0.h5")
    assert found["rows"].tolist() == list(range(320))


def test_frames_may_stream(learnable: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames_of_training, "SMALLEST_CHUNK", 4)
    data, heard = learnable(videos=9), Heard()
    run(data, tmp_path / "out", folds=3, seeds=1, head="ridge", memory=6e-6, listener=heard)
    assert any("read from the store as they are needed" in text for text in heard.messages)
    run(data, tmp_path / "whole", folds=3, seeds=1, head="ridge")
    values = [[row["value"] for row in read(tmp_path / name / "results.csv")] for name in ("out", "whole")]
    assert values[0] == values[1]


def test_folders_stay_together_where_asked_for(tmp_path: Path) -> None:
    names = [f"{person}/visit{visit}" for person in "abcdef" for visit in range(2)]
    random = np.random.default_rng(0)
    store = write_store(
        tmp_path / "s.h5", {name: range(1, 21) for name in names}, random.normal(size=(240, 8)).astype(np.float16)
    ).path
    for name in names:
        (tmp_path / "labels" / "EXPR_Recognition_Challenge" / "Train_Set" / name).parent.mkdir(
            parents=True, exist_ok=True
        )
        (tmp_path / "labels" / "EXPR_Recognition_Challenge" / "Validation_Set" / name).parent.mkdir(
            parents=True, exist_ok=True
        )
        write_labels(
            tmp_path / "labels",
            "expr",
            "validation" if name[0] == "f" else "train",
            {name: random.integers(0, 8, 20).tolist()},
        )
    for by, warned in (("video", True), ("folder", False)):
        heard, out = Heard(), tmp_path / by
        run((store, tmp_path / "labels"), out, folds=3, seeds=1, vary=(), fold_by=by, listener=heard)
        assert any("--fold-by folder" in text for text in heard.warnings) == warned
        found = predictions(out / "out_of_fold" / "best-seed0.h5")
        person = np.array([found["video_name"][video].decode()[0] for video in found["video"]])
        assert all(len(set(found["fold"][person == one].tolist())) == 1 for one in "abcdef") == (not warned)


def test_what_cannot_be_learned_is_named(learnable: MakeData, tmp_path: Path) -> None:
    data, heard = learnable(videos=6), Heard()
    files = sorted(data[1].rglob("*.txt"))
    for number, path in enumerate(files):
        lines = path.read_text().splitlines()
        lines[1:] = [str(int(line) % 7) for line in lines[1:]]
        path.write_text("\n".join([*lines[:-1], "7" if number == 0 else "0"]) + "\n")
    run(data, tmp_path / "out", folds=3, seeds=1, vary=(), listener=heard)
    assert any("Labelled in a fold and in none of the frames that its heads train on: Other (fold" in text
               for text in heard.warnings)  # fmt: skip


def test_a_fold_that_diverges_leaves_its_seed_out(learnable: MakeData, tmp_path: Path) -> None:
    result = run(learnable(videos=8), tmp_path / "out", folds=3, vary=("lr=0.001,1e30",))
    sound, broken = result.rows
    assert (sound.count, broken.count, broken.diverged, broken.mean) == (2, 0, 2, None)
    assert [path.name for path in sorted((tmp_path / "out" / "out_of_fold").iterdir())] == [
        "best-seed0.h5", "best-seed1.h5"
    ]  # fmt: skip


def outcome(value: float, history: Sequence[float] = ()) -> Outcome:
    sums = np.ones((2, 8, 3))
    return Outcome(value, value / 2, 1, None, [{"macro_f1": one} for one in history], sums, ["a", "b"])


def test_folds_are_pooled() -> None:
    both = pooled([outcome(0.2), outcome(0.6)], TASKS["expr"])
    assert both.value == 1.0, "all frames are right"
    assert both.selected == pytest.approx(0.2)
    assert both.of_folds == (0.2, 0.6)
    assert both.statistics is not None
    assert both.statistics.shape == (4, 8, 3)
    assert pooled([outcome(0.2), Outcome(None, None, 0, 3, [], None, [])], TASKS["expr"]).diverged == 3


def test_the_epoch_is_that_at_which_the_mean_is_best() -> None:
    histories = [outcome(0, one).history for one in ((0.1, 0.4, 0.2), (0.5, 0.1, 0.5), (0.3, 0.3, 0.2))]
    assert best_step(histories, "macro_f1") == 1
    assert best_step(histories[:1], "macro_f1") == 2


def test_the_last_fit_takes_what_the_folds_chose(learnable: MakeData, tmp_path: Path) -> None:
    data, out = learnable(videos=8), tmp_path / "out"
    result = run(data, out, folds=3, vary=("lr=1e-9,1e-2",), lr_minimum=0.0)
    heard = Heard()
    last = affcache.fit(train_on="all", as_=out, run=tmp_path / "last", seed=3, listener=heard)
    config = RunFolder(tmp_path / "last").read_config()
    histories = [
        [json.loads(line)["macro_f1"] for line in (out / row["run"] / "history.jsonl").read_text().splitlines()]
        for row in read(out / "results.csv")
        if row["setting"] == result.best[0]["setting"]
    ]
    epoch = int(np.mean(histories, axis=0).argmax()) + 1
    assert (last.best_epoch, last.frames, config["settings"]["keep_epoch"]) == (epoch, 320, epoch)
    assert (config["settings"]["lr"], config["settings"]["seed"]) == (0.01, 3)
    assert f"--train-on all --keep-epoch {epoch}" in result.best[0]["fit"]


def test_a_fold_scored_on_validation_says_that_it_was_trained_on(learnable: MakeData, tmp_path: Path) -> None:
    run(learnable(videos=8), tmp_path / "out", folds=3, keep="all", vary=())
    heard = Heard()
    affcache.score(run=tmp_path / "out" / read(tmp_path / "out" / "results.csv")[0]["run"], listener=heard)
    assert any("its score there means nothing" in text for text in heard.warnings)


def test_settings_of_folds_are_checked() -> None:
    with pytest.raises(ConfigError, match="--folds is 1; expected at least 2"):
        affcache.AblateSettings(folds=1)
    with pytest.raises(ConfigError, match="--fold-by is folder without --folds"):
        affcache.AblateSettings(fold_by="folder")


def test_several_tasks_at_once_and_frames_with_some_of_their_labels(tmp_path: Path) -> None:
    data, out = mtl_data(tmp_path, count=9), tmp_path / "out"
    result = run((data["store"], data["annotations"]), out, task="mtl", folds=3, seeds=1, vary=("head=mlp,ridge",))
    found = predictions(out / "out_of_fold" / "best-seed0.h5")
    assert len(found["rows"]) == len(set(found["rows"].tolist())) > 300
    task = TASKS["mtl"]
    best = max(result.rows, key=lambda row: row.selected or 0)
    assert best.mean == pytest.approx(task.score(found["labels"], found["decided"]).value, abs=1e-9)
    last = affcache.fit(as_=out, train_on="all", run=tmp_path / "last")
    assert (last.task, last.frames) == ("mtl", len(found["rows"]))


def test_what_validation_lacks_train_has(tmp_path: Path) -> None:
    data, heard = mtl_data(tmp_path, count=9), Heard()
    path = next((tmp_path / "labels").glob("*alid*"))
    header, *lines = path.read_text().splitlines()
    without = [",".join([image, "-5", "-5", *rest]) for image, _, _, *rest in (line.split(",") for line in lines)]
    path.write_text("\n".join([header, *without]) + "\n")
    pair, out = (data["store"], data["annotations"]), tmp_path / "out"
    result = run(pair, out, task="mtl", folds=3, seeds=1, vary=("task=mtl,va",), listener=heard)
    assert {row.task for row in result.rows} >= {"mtl", "va"}
    assert not any("neither trained nor scored" in text for text in heard.warnings), "frames of all folds have each"
    assert any("No validation label of task va belongs to a crop" in text for text in heard.warnings)
    last = affcache.fit(as_=out, task="mtl", train_on="all", run=tmp_path / "last")
    assert json.loads((tmp_path / "last" / "config.json").read_text())["classes"][0] == "valence"
    assert np.isfinite(last.value)


def test_a_ridge_has_no_tail_and_videos_have_no_frames(learnable: MakeData, tmp_path: Path) -> None:
    store, heard = EmbeddingStore.open(learnable(videos=8)[0]), Heard()
    rows = [
        f"{name},{'validation' if i % 4 == 3 else 'train'},{'ab'[i % 2]}" for i, name in enumerate(store.video_names)
    ]
    (tmp_path / "labels.csv").write_text("\n".join(["video,split,label", *rows]) + "\n")
    (tmp_path / "mine.toml").write_text(
        'kind = "classes"\nlevel = "video"\nnames = ["a", "b"]\nlabels = "labels.csv"\n'
    )
    ablate(task=str(tmp_path / "mine.toml"), store=store.path, folds=4, seeds=1, head="ridge", vary=("alpha=0.3,0.5",),
           out=tmp_path / "out", listener=heard)  # fmt: skip
    assert not any("CVaR" in text for text in heard.warnings)
    assert "4 folds, of videos: 2, 2, 2, 2" in heard.messages


@pytest.mark.parametrize("says", [True, False])
def test_a_task_of_ones_own_may_say_its_folds(learnable: MakeData, tmp_path: Path, says: bool) -> None:
    store = EmbeddingStore.open(learnable(videos=8)[0])
    lines = [f"video,frame,split,label{',fold' * says}"]
    for video, name in enumerate(store.video_names):
        split = "validation" if video % 4 == 3 else "train"
        for row in range(store.video_start[video], store.video_start[video + 1]):
            word = "high" if store.features[row, 0] > 0 else "low"
            line = f"{name},{store.frame_number[row]},{split},{word}"
            lines.append(f"{line},{'abc'[video % 3]}" if says else line)
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "mine.toml").write_text('kind = "classes"\nnames = ["low", "high"]\nlabels = "labels.csv"\n')
    out, own = tmp_path / "out", {"task": str(tmp_path / "mine.toml"), "store": store.path, "folds": 3, "seeds": 1}
    ablate(**QUICK, **own, out=out, vary=("alpha=0.5,1",))  # type: ignore[arg-type]
    found = predictions(out / "out_of_fold" / "best-seed0.h5")
    assert len(found["rows"]) == 320
    assert (found["fold"] == found["video"] % 3 + 1).all() == says
    (tmp_path / "mine.toml").unlink()
    last = affcache.fit(as_=out, train_on="all", run=tmp_path / "last")
    assert (last.task, last.frames) == ("mine", 320)
    again = affcache.fit(as_=tmp_path / "last", run=tmp_path / "again")
    assert again.value == last.value
