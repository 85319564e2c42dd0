"""An ablation as a whole: what it writes, what it keeps and skips, how it chooses, and what it refuses."""

import csv
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import affcache
from affcache.ablation import train as grouping
from affcache.ablation.ablate import ablate
from affcache.ablation.result import AblateResult
from affcache.errors import ConfigError, InputError, StoreError
from affcache.files import locked, read_tensors
from affcache.progress import Listener
from affcache.store.reading import EmbeddingStore
from affcache.tasks.annotations import join_labels
from affcache.tasks.splits import hold_out
from affcache.tasks.tasks import TASKS
from affcache.training.learner import build_head
from affcache.training.settings import FitSettings
from tests.conftest import Heard, MakeData, frames_of, write_labels, write_store

QUICK: dict[str, Any] = {"epochs": 2, "hidden_layers": 1, "hidden_width": 16, "batch_size": 16, "dropout": 0.3}


def run(data: tuple[Path, Path], out: Path, **values: Any) -> AblateResult:
    return ablate(**{**QUICK, "store": data[0], "annotations": data[1], "out": out, "seeds": 2, **values})


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def tables(out: Path) -> dict[str, bytes]:
    """Return all that a reader of results sees."""
    files = [*out.glob("*.csv"), *out.glob("summary.*"), *out.glob("figures/*"), *out.glob("cells/*/result.json")]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def test_a_grid_ends_in_tables_pictures_and_run_folders(learnable: MakeData, tmp_path: Path) -> None:
    out, heard = tmp_path / "out", Heard()
    result = run(learnable(), out, vary={"alpha": [0.5, 1.0], "rho": [0.0, 0.05]}, listener=heard)
    assert (result.cells, result.trained) == (8, 8)
    rows = read(out / "results.csv")
    assert [(row["setting"], row["seed"]) for row in rows] == [
        (f"alpha={alpha}, rho={rho}", seed) for alpha in ("0.5", "1") for rho in ("0", "0.05") for seed in "01"
    ]
    for row in rows:
        config = json.loads((out / row["run"] / "config.json").read_text())
        assert config["settings"]["seed"] == int(row["seed"])
        assert config["settings"]["alpha"] == float(row["alpha"])
        history = [json.loads(line) for line in (out / row["run"] / "history.jsonl").read_text().splitlines()]
        assert float(row["value"]) == max(entry["macro_f1"] for entry in history)
        assert history[int(row["best_epoch"]) - 1]["macro_f1"] == float(row["value"])
    summary = read(out / "summary.csv")
    assert [row["setting"] for row in summary] == [row.variant.name for row in result.rows]
    for row in summary:
        values = [float(run["value"]) for run in rows if run["setting"] == row["setting"]]
        assert float(row["mean"]) == pytest.approx(sum(values) / 2)
        assert int(row["n"]) == 2
    figures = {path.name for path in (out / "figures").iterdir()}
    assert figures == {f"{name}.{form}" for name in ("alpha", "rho", "heatmap") for form in ("png", "svg")}
    assert sorted(result.files) == sorted(
        str(out / name)
        for name in [*(f"figures/{f}" for f in figures), "results.csv", "summary.csv", "summary.md", "summary.tex"]
    )
    assert heard.steps[-1] == (16, 16)
    assert not list((out / "groups").glob("*")), "checkpoints are gone"


def test_finished_trials_are_kept_and_a_larger_grid_trains_what_is_new(learnable: MakeData, tmp_path: Path) -> None:
    data, out = learnable(), tmp_path / "out"
    first = run(data, out, vary=("alpha=0.5,1",))
    before = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/result.json")}
    heard = Heard()
    second = run(data, out, vary=("alpha=0.3,0.5,1", "rho=0.5"), seeds=3, listener=heard)
    assert (first.trained, second.trained) == (4, 5)
    assert "3 settings x 3 seeds: 9 heads, 4 of them finished before" in heard.messages
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert run(data, out, vary=("alpha=0.3,0.5,1",), seeds=3).trained == 0
    assert run(data, out, vary=("alpha=0.5,1",), seeds=2).rows == first.rows


def test_other_labels_or_another_store_are_other_trials(learnable: MakeData, tmp_path: Path) -> None:
    data, out = learnable(), tmp_path / "out"
    run(data, out, vary=("alpha=0.5,1",))
    labels = next(data[1].rglob("Train_Set/*.txt"))
    lines = labels.read_text().splitlines()
    labels.write_text("\n".join([*lines[:-1], str((int(lines[-1]) + 1) % 8)]) + "\n")
    assert run(data, out, vary=("alpha=0.5,1",)).trained == 4
    other = learnable(seed=9)
    assert run(other, out, vary=("alpha=0.5,1",)).trained == 4


@pytest.mark.parametrize("task", ["expr", "au"])
def test_a_trial_equals_its_heads_trained_alone(learnable: MakeData, tmp_path: Path, task: str) -> None:
    data = learnable(task)
    result = run(data, tmp_path / "out", task=task, vary=("alpha=0.5,1",), seeds=1, dropout=0.0)
    rows = read(tmp_path / "out" / "results.csv")
    for row in rows:
        alone = affcache.fit(**QUICK | {"dropout": 0.0}, task=task, store=data[0], annotations=data[1],
                             run=tmp_path / row["alpha"], alpha=float(row["alpha"]))  # fmt: skip
        assert float(row["value"]) == pytest.approx(alone.value, abs=0.05)
        config = json.loads((tmp_path / "out" / row["run"] / "config.json").read_text())
        expected = json.loads((tmp_path / row["alpha"] / "config.json").read_text())
        assert {**config["settings"], "memory": 0} == {**expected["settings"], "memory": 0}
        assert (config["store"], config["labels"]) == (expected["store"], expected["labels"])
    assert result.rows[0].task == task


@pytest.mark.parametrize("keep", ["best", "all", "none"])
def test_heads_are_kept_as_asked_and_score_reads_them(learnable: MakeData, tmp_path: Path, keep: str) -> None:
    out = tmp_path / "out"
    result = run(learnable(), out, vary=("alpha=0.3,0.5,1",), keep=keep)
    heads = {path.parent.name for path in out.glob("cells/*/head.safetensors")}
    rows = read(out / "results.csv")
    best = max(rows, key=lambda row: float(row["value"]))
    assert (
        heads == {"best": {Path(best["run"]).name}, "all": {Path(row["run"]).name for row in rows}, "none": set()}[keep]
    )
    assert result.best[0]["value"] == float(best["value"])
    assert result.best[0]["run"] == (None if keep == "none" else str(out / best["run"]))
    for row in rows:
        if Path(row["run"]).name in heads:
            assert affcache.score(run=out / row["run"]).scores.value == float(row["value"])
            _, header = read_tensors(out / row["run"] / "head.safetensors")
            assert header["epoch"] == int(row["best_epoch"])


def test_the_best_of_a_later_call_takes_the_place_of_the_first(learnable: MakeData, tmp_path: Path) -> None:
    data, out = learnable(), tmp_path / "out"
    run(data, out, vary=("lr=1e-6,2e-6",), lr_minimum=0.0)
    result = run(data, out, vary=("lr=1e-6,2e-6,1e-2",), lr_minimum=0.0, epochs=2)
    (kept,) = out.glob("cells/*/head.safetensors")
    assert result.best[0]["setting"] == "lr=0.01"
    assert str(kept.parent) == result.best[0]["run"]


def test_the_command_to_fit_again_is_the_trials_settings(learnable: MakeData, tmp_path: Path) -> None:
    data = learnable()
    result = run(data, tmp_path / "out", vary=("alpha=0.3",), seeds=1, adaptive=True, keep="none")
    assert result.best[0]["fit"] == (
        f"affcache fit --annotations {data[1]} --epochs 2 --batch-size 16 --alpha 0.3 --adaptive --dropout 0.3 "
        f"--hidden-layers 1 --hidden-width 16 --store {data[0]}"
    )


def test_held_out_videos_choose_and_validation_reports(learnable: MakeData, tmp_path: Path) -> None:
    data, out, heard = learnable(), tmp_path / "out", Heard()
    result = run(data, out, vary=("alpha=0.5,1",), select="heldout", held_out=0.3, keep="all", epochs=4, listener=heard)
    assert result.heldout
    assert any(re.search(r"held out to choose by: \d+ training frames of \d videos?; ", m) for m in heard.messages)
    for row in read(out / "results.csv"):
        history = [json.loads(line) for line in (out / row["run"] / "history.jsonl").read_text().splitlines()]
        assert float(row["chosen_by"]) == max(entry["macro_f1"] for entry in history)
        assert affcache.score(run=out / row["run"]).scores.value == float(row["value"]), "on validation"
    rows = read(out / "results.csv")
    assert any(row["chosen_by"] != row["value"] for row in rows)
    assert run(data, out, vary=("alpha=0.5,1",), epochs=4).trained == 4, "another way to choose is another trial"


def test_what_is_held_out_trains_nothing_and_validation_chooses_nothing(learnable: MakeData, tmp_path: Path) -> None:
    data = learnable(videos=9)
    store = EmbeddingStore.open(data[0])
    _, names = hold_out(store, join_labels(store, data[1], TASKS["expr"], "train"), 0.3)
    relabelled = {"held out": names, "validation": [file.stem for file in data[1].rglob("Validation_Set/*.txt")]}
    found = {}
    for case in ("as they are", "held out", "validation"):
        labels = shutil.copytree(data[1], tmp_path / case)
        for file in labels.rglob("*.txt"):
            if file.stem in relabelled.get(case, ()):
                header, *lines = file.read_text().splitlines()
                file.write_text("\n".join([header, *(str((int(line) + 1) % 8) for line in lines)]))
        out = tmp_path / f"{case}, trained"
        words = {"vary": ("alpha=0.5,1",), "seeds": 1, "select": "heldout", "held_out": 0.3, "keep": "all"}
        run((data[0], labels), out, **words)
        rows = read(out / "results.csv")
        kept = [read_tensors(out / row["run"] / "head.safetensors")[0]["output_layer.weight"] for row in rows]
        histories = [(out / row["run"] / "history.jsonl").read_text().splitlines() for row in rows]
        trained = [json.loads(line)["train_loss"] for lines in histories for line in lines]
        found[case] = trained, [row["chosen_by"] for row in rows], kept, [row["value"] for row in rows]
    as_they_are, held_out, validation = found.values()
    assert held_out[0] == validation[0] == as_they_are[0]
    assert held_out[1] != as_they_are[1], "they choose"
    assert validation[1] == as_they_are[1]
    assert all(one.equal(other) for one, other in zip(validation[2], as_they_are[2], strict=True))
    assert validation[3] != as_they_are[3], "it reports"


def test_one_training_video_cannot_be_held_out(tmp_path: Path) -> None:
    features = torch.randn(40, 16, generator=torch.Generator().manual_seed(0)).half().numpy()
    names = ("a_left", "a_right", "b")  # a video of two persons is one
    store = write_store(tmp_path / "s.h5", {name: range(1, 11 if name != "b" else 21) for name in names}, features)
    for name, split in (("a_left", "train"), ("a_right", "train"), ("b", "validation")):
        write_labels(tmp_path / "labels", "expr", split, {name: [i % 8 for i in range(20 if name == "b" else 10)]})
    with pytest.raises(InputError, match="All training frames are of one video, a: none can be held out"):
        run((store.path, tmp_path / "labels"), tmp_path / "out", vary=("alpha=0.5,1",), select="heldout")


def test_a_trial_that_diverges_is_reported_and_the_others_go_on(learnable: MakeData, tmp_path: Path) -> None:
    data, heard = learnable(), Heard()
    result = run(data, tmp_path / "out", vary=("lr=0.001,1e30",), listener=heard)
    assert heard.warnings == [f"lr=1e+30, seed {seed}: diverged in epoch 1" for seed in (0, 1)]
    sound, broken = result.rows
    assert (broken.count, broken.diverged, broken.mean, broken.difference) == (0, 2, None, None)
    assert [row["diverged_in_epoch"] for row in read(tmp_path / "out" / "results.csv")] == ["", "", "1", "1"]
    assert run(data, tmp_path / "out", vary=("lr=0.001,1e30",)).trained == 0, "what diverges does so again"
    alone = run(data, tmp_path / "alone", vary=("lr=0.001,0.002",))
    assert alone.rows[0].mean == sound.mean
    everything = run(data, tmp_path / "every", vary=("lr=1e30,1e31",))
    assert everything.best == []
    assert all(row.mean is None for row in everything.rows)


def test_stores_heads_and_tasks_are_axes(learnable: MakeData, tmp_path: Path) -> None:
    data = learnable()
    other = tmp_path / "other.h5"
    other.write_bytes(data[0].read_bytes())
    learnable("au")  # labels beside those of expr, for the same videos
    result = run(
        data, tmp_path / "out", vary=(f"store={data[0]},{other}", "task=expr,au", "head=mlp,linear,ridge"), seeds=1
    )
    assert [row.variant.name for row in result.rows][:4] == [
        "task=expr, head=mlp, expr", "task=expr, head=mlp, other",
        "task=expr, head=linear, expr", "task=expr, head=linear, other",
    ]  # fmt: skip
    assert all(row.mean is not None for row in result.rows)
    assert {row.metric for row in result.rows} == {"macro_f1", "mean_f1"}
    assert [best["task"] for best in result.best] == ["expr", "au"]
    bases = [row.variant.name for row in result.rows if row.is_base]
    assert bases == ["task=expr, head=mlp, expr", "task=au, head=mlp, expr"]
    for first, second in zip(result.rows[::2], result.rows[1::2], strict=True):
        assert first.mean == second.mean, "the stores hold the same"
    assert result.rows[1].difference is not None
    assert result.rows[1].difference.value == 0


def test_stores_of_other_frames_are_warned_of(learnable: MakeData, tmp_path: Path) -> None:
    data = learnable()
    store = EmbeddingStore.open(data[0])
    videos = {name: range(1, 21) for name in store.video_names}
    fewer = write_store(tmp_path / "fewer.h5", videos, store.read(np.flatnonzero(store.frame_number <= 20))).path
    heard = Heard()
    run(data, tmp_path / "out", vary=(f"store={data[0]},{fewer}",), seeds=1, head="ridge", listener=heard)
    assert any(f"({data[0]} 80, {fewer} 40)" in text for text in heard.warnings)


def test_a_ridge_is_chosen_and_scored_as_fit_does(learnable: MakeData, tmp_path: Path) -> None:
    data = learnable()
    run(data, tmp_path / "out", vary=("head=ridge,linear",), seeds=1, keep="all")
    ridge = read(tmp_path / "out" / "results.csv")[0]
    alone = affcache.fit(head="ridge", store=data[0], annotations=data[1], run=tmp_path / "alone")
    assert (float(ridge["value"]), int(ridge["best_epoch"])) == (alone.value, alone.best_epoch)
    assert affcache.score(run=tmp_path / "out" / ridge["run"]).scores.value == alone.value


def test_groups_cut_to_memory_give_the_same_heads(
    learnable: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, sizes = learnable(), []
    whole = run(data, tmp_path / "whole", vary=("alpha=0.3,0.5,1",), dropout=0.0)
    of = grouping.train_group

    def counted(group: Any, *arguments: Any) -> Any:
        sizes.append(len(group.trials))
        return of(group, *arguments)

    monkeypatch.setattr(grouping, "train_group", counted)
    monkeypatch.setitem(grouping.MOST_HEADS, "cpu", 4)
    cut = run(data, tmp_path / "cut", vary=("alpha=0.3,0.5,1",), dropout=0.0)
    assert sizes == [4, 2]
    for one, other in zip(whole.rows, cut.rows, strict=True):
        assert one.mean == pytest.approx(other.mean, abs=0.05)


def test_a_tail_of_few_losses_is_warned_of_once(learnable: MakeData, tmp_path: Path) -> None:
    heard = Heard()
    run(learnable(), tmp_path / "out", vary=("alpha=0.1,0.2,1",), listener=heard)
    (warning,) = heard.warnings
    assert "for 2 settings: alpha=0.1 (1.6), alpha=0.2 (3.2)" in warning


def test_what_takes_more_than_a_day_has_to_be_asked_for(
    learnable: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = learnable(), tmp_path / "out"
    with pytest.raises(ConfigError, match=r"has 1,000,000 heads to train: about .* (days|h)\. .*--yes"):
        run(data, out, vary=("alpha=0.5,1",), seeds=500_000, epochs=1000)
    monkeypatch.setattr("affcache.ablation.train.LONGEST", 0.0)
    with pytest.raises(ConfigError, match="has 4 heads to train"):
        run(data, out, vary=("alpha=0.5,1",))
    assert not out.exists(), "a refused grid leaves nothing behind"
    assert run(data, out, vary=("alpha=0.5,1",), yes=True).trained == 4
    assert run(data, out, vary=("alpha=0.5,1",)).trained == 0, "what is finished takes no time"


def test_a_mistake_in_one_setting_is_found_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Setting alpha=2 of the grid"):
        run((tmp_path / "no.h5", tmp_path), tmp_path / "out", vary=("alpha=1,2",))
    with pytest.raises(ConfigError, match="--base is 'alpha=3'"):
        run((tmp_path / "no.h5", tmp_path), tmp_path / "out", vary=("alpha=1,0.5",), base="alpha=3")
    assert not (tmp_path / "out").exists()


def test_a_store_without_the_tasks_labels_is_named(learnable: MakeData, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No train labels of task va found"):
        run(learnable(), tmp_path / "out", task="va", vary=("alpha=1,0.5",))


def test_two_at_work_in_one_folder_are_one_too_many(learnable: MakeData, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with (
        locked(out / ".lock", ConfigError(""), Listener()),
        pytest.raises(ConfigError, match="Another 'affcache ablate' is at work"),
    ):
        run(learnable(), out, vary=("alpha=1,0.5",))


def test_a_damaged_result_is_named(learnable: MakeData, tmp_path: Path) -> None:
    data, out = learnable(), tmp_path / "out"
    run(data, out, vary=("alpha=1,0.5",))
    damaged = next(out.glob("cells/*/result.json"))
    damaged.write_text('{"value": 1')
    with pytest.raises(StoreError, match=f"The result in {damaged.parent} can't be read .*Delete that folder"):
        run(data, out, vary=("alpha=1,0.5",))


def test_results_are_the_same_to_the_byte_when_run_again(learnable: MakeData, tmp_path: Path) -> None:
    data = learnable()
    for name in ("one", "two"):
        run(data, tmp_path / name, vary=("alpha=0.5,1", "rho=0,0.05"))
    assert tables(tmp_path / "one") == tables(tmp_path / "two")


class Killed(Exception):
    """Stands for a kill at some point."""


@pytest.mark.parametrize(("at", "normalize"), [(1, "none"), (2, "standard"), (3, "l2"), (4, "none"), (5, "standard")])
def test_interrupted_after_any_epoch_the_tables_are_the_same(
    learnable: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, normalize: str
) -> None:
    vary = ("alpha=0.3,0.5,1", "rho=0,0.05")
    data, grid = learnable(), {"vary": vary, "epochs": 3, "dropout": 0.5, "normalize": normalize}
    run(data, tmp_path / "whole", **grid)
    monkeypatch.setattr(grouping, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)

    class Kill(Heard):
        def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
            super().progress(done, total, unit, note)
            if len(self.steps) == at:
                raise Killed

    with pytest.raises(Killed):
        run(data, tmp_path / "killed", listener=Kill(), **grid)
    heard = Heard()
    run(data, tmp_path / "killed", listener=heard, **grid)
    assert tables(tmp_path / "killed") == tables(tmp_path / "whole")
    assert heard.steps[-1][0] == heard.steps[-1][1]


def test_a_checkpoint_of_other_trials_or_a_broken_one_is_passed_over(
    learnable: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = learnable(), tmp_path / "out"
    monkeypatch.setattr(grouping, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    monkeypatch.setattr(grouping.Group, "discard_checkpoint", lambda group: None)
    run(data, out, vary=("alpha=0.5,1",))
    (checkpoint,) = out.glob("groups/*.safetensors")
    whole = tables(out)
    for result in out.glob("cells/*/result.json"):
        result.unlink()
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    run(data, out, vary=("alpha=0.5,1",))
    assert tables(out) == whole
    for result in list(out.glob("cells/*/result.json")):
        result.unlink()
    assert run(data, out, vary=("alpha=0.5,1",), seeds=3).trained == 6, "begins with the same trial, has others too"


def test_the_result_is_one_json_object(learnable: MakeData, tmp_path: Path) -> None:
    result = json.loads(json.dumps(run(learnable(videos=12), tmp_path / "out", vary=("alpha=0.5,1",)).to_json()))
    own = {"out", "select", "folds", "cells", "trained", "seconds", "device", "best", "files", "settings"}
    assert set(result) == own
    base, other = result["settings"]
    assert base["is_base"]
    assert base["difference"] is None
    assert other["difference"]["low"] <= other["difference"]["value"] <= other["difference"]["high"]
    assert other["difference"]["value"] == pytest.approx(other["mean"] - base["mean"], abs=1e-9)
    assert other["values"] == {"alpha": 1.0}
    assert math.isfinite(other["deviation"])


def test_a_saved_head_is_the_best_epochs_and_not_the_last(learnable: MakeData, tmp_path: Path) -> None:
    data, out = learnable(), tmp_path / "out"
    run(data, out, vary=("alpha=0.5,1",), keep="all", epochs=5)
    _, validation = frames_of(data, "expr")
    task = TASKS["expr"]
    for row in read(out / "results.csv"):
        tensors, _ = read_tensors(out / row["run"] / "head.safetensors")
        recipe = replace(FitSettings(), hidden_layers=1, hidden_width=16)
        head = build_head(recipe, 16, task)
        head.load_state_dict(tensors)
        logits = head.eval()(validation.embeddings.float()).detach()
        decided = task.decide(task.probabilities(logits).numpy())
        assert task.score(validation.labels.numpy(), decided).value == float(row["value"])


def test_of_epochs_that_are_alike_the_first_is_the_best(learnable: MakeData, tmp_path: Path) -> None:
    result = run(learnable(), tmp_path / "out", vary=("lr=1e-30,1e-31",), lr_minimum=0.0, epochs=4, head="linear")
    assert all(row["best_epoch"] == "1" for row in read(tmp_path / "out" / "results.csv"))
    assert result.best[0]["setting"] == "lr=1e-30", "and of settings the first in the grid"


def test_a_folder_shows_the_last_calls_grid_alone(learnable: MakeData, tmp_path: Path) -> None:
    data, out = learnable(), tmp_path / "out"
    run(data, out, vary=("alpha=0.5,1", "rho=0,0.05"))
    result = run(data, out, vary=("alpha=0.5,1",))
    assert {path.name for path in (out / "figures").iterdir()} == {"alpha.png", "alpha.svg"}
    assert len(read(out / "results.csv")) == 4
    assert all(Path(file).is_file() for file in result.files)


def test_by_default_each_question_has_a_folder_of_its_own(
    learnable: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = learnable()
    monkeypatch.chdir(tmp_path)
    common = {**QUICK, "store": data[0], "annotations": data[1], "seeds": 1, "epochs": 1}
    (tmp_path / "mine.toml").write_text("[a]\n[b]\nalpha = 1\n")
    for more, name in (
        ({"preset": "paper"}, "expr-paper"),
        ({"vary": ("alpha=0.5,1", "rho=0,0.05")}, "expr-alpha-rho"),
        ({"list": tmp_path / "mine.toml", "vary": ("lr=0.1,0.01",)}, "expr-mine-lr"),
        ({"vary": ("alpha=0.5,1",), "select": "heldout"}, "expr-alpha-heldout"),
    ):
        assert ablate(**common, **more).out == str(Path("ablations") / name)  # type: ignore[arg-type]


def test_a_head_that_was_not_kept_says_how_it_is_trained_again(learnable: MakeData, tmp_path: Path) -> None:
    data, heard = learnable(), Heard()
    run(data, tmp_path / "out", vary=("alpha=0.5,1",), keep="none")
    trial = tmp_path / "out" / read(tmp_path / "out" / "results.csv")[3]["run"]
    with pytest.raises(StoreError, match=r"was not kept\. .*Train it again with 'affcache fit .*--alpha 1 .*--seed 1'"):
        affcache.score(run=trial)
    run(data, tmp_path / "out", vary=("alpha=0.5,1",), keep="all", listener=heard)
    assert any("4 heads finished before were not kept then" in text for text in heard.warnings)
