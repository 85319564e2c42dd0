"""Valence and arousal from label files to scores: two continuous values a frame, by the mean CCC."""

import json
import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from affcache.cli.app import app
from affcache.errors import InputError
from affcache.extraction.extract import extract
from affcache.progress import Listener
from affcache.scoring.score import score
from affcache.store.reading import EmbeddingStore
from affcache.tasks.annotations import join_labels
from affcache.tasks.label_files import SPLIT_FOLDERS, find_label_files, read_label_file
from affcache.tasks.metrics import regression_scores
from affcache.tasks.tasks import TASKS
from affcache.training.fit import fit
from data.rendering.sample import write_sample
from tests.conftest import write_labels, write_store

VA = TASKS["va"]
SHIPPED = Path(__file__).parents[2] / "data" / "sample" / "annotations"
RECIPE: dict[str, Any] = {
    "epochs": 10, "hidden_layers": 1, "hidden_width": 32, "batch_size": 16, "dropout": 0.0, "rho": 0.02, "lr": 0.01
}  # fmt: skip
VIDEOS, FRAMES = 9, 40


class Warnings(Listener):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def warning(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Path]:
    """A store whose first two features decide valence and arousal; every tenth frame is without a label."""
    random = np.random.default_rng(0)
    names = [f"{index}-30-640x360" for index in range(VIDEOS)]
    features = random.normal(size=(VIDEOS * FRAMES, 16)).astype(np.float16)
    write_store(tmp_path / "store.h5", {name: range(1, FRAMES + 1) for name in names}, features)
    values = np.tanh(features[:, :2].astype(float))
    lines = [f"{valence:.3f},{arousal:.3f}" for valence, arousal in values]
    lines[::10] = ["-5,-5", "-5.0,0.5"] * (len(lines) // 20)
    for index, name in enumerate(names):
        split = "validation" if index % 3 == 2 else "train"
        write_labels(tmp_path / "labels", "va", split, {name: lines[index * FRAMES : (index + 1) * FRAMES]})
    return {"store": tmp_path / "store.h5", "annotations": tmp_path / "labels"}


# Labels


def test_the_task_is_the_challenge() -> None:
    assert VA.header == "valence,arousal"
    assert VA.folders == ("VA_Estimation_Challenge",)
    assert (VA.outputs, VA.values_per_line, VA.losses_per_frame, VA.metric) == (2, 2, 2, "mean_ccc")
    outputs = VA.probabilities(torch.tensor([[0.25, -3.0], [1.5, -1.0]])).numpy()
    assert outputs.tolist() == [[0.25, -1.0], [1.0, -1.0]]
    assert VA.decide(outputs).tolist() == outputs.tolist()


def test_a_file_as_the_organisers_write_it(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"valence,arousal\r\n0.041,-0.1\r\n-5,-5\r\n-5.0,0.3\r\n1,-1.000\r\n1e-3,-0.0\r\n\r\n\r\n")
    labels, valid = read_label_file(path, VA)
    assert labels.dtype == np.float32
    assert valid.tolist() == [True, False, True, True, True]
    expected = np.float32([[0.041, -0.1], [np.nan, 0.3], [1, -1], [0.001, 0]])
    assert np.array_equal(labels[valid], expected, equal_nan=True)


@pytest.mark.parametrize("line", ["1.0000001,0", "0,-1.00000001", "-5.0000001,0", "0.5", "0.1,0.2,0.3", "0,", "a,0"])
def test_a_bad_line_is_named_with_what_was_expected(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text(f"valence,arousal\n0,0\n{line}\n0,0\n")
    with pytest.raises(InputError, match=r", line 3: .* Expected 2 numbers from -1 to 1 \(or -5 where there is no"):
        read_label_file(path, VA)


@pytest.mark.parametrize("split", SPLIT_FOLDERS)
def test_the_shipped_label_files_are_read(split: str) -> None:
    files = find_label_files(SHIPPED, VA, split)
    read = [read_label_file(path, VA) for path in files.values()]
    labels, valid = np.concatenate([values for values, _ in read]), np.concatenate([flags for _, flags in read])
    assert valid.sum() > 250
    assert 0 < (~valid).sum() < 0.1 * len(valid)
    assert np.abs(labels[valid]).max() <= 1
    assert labels[valid].std(axis=0).min() > 0.25, "there is something to learn"


# A run


def test_a_head_learns_and_the_files_give_the_value_again(data: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    fitted = fit(task="va", run=run, **data, **RECIPE)
    assert fitted.metric == "mean_ccc"
    assert fitted.value > 0.8
    assert fitted.frames == 6 * FRAMES * 19 / 20, "of every twentieth frame the arousal counts"
    assert fitted.tail == 16 * 2 * 0.5, "CVaR goes over both values of each frame"
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert fitted.value == max(line["mean_ccc"] for line in history)
    assert history[-1]["train_loss"] < history[0]["train_loss"]

    listener = Warnings()
    scored = score(run=run, listener=listener)
    assert listener.texts == []
    written = json.loads((run / "scores.json").read_text())
    assert written["value"] == scored.scores.value == fitted.value
    assert written["metric"] == "mean_ccc"
    assert written["classes_without_support"] == []
    assert [c["name"] for c in written["classes"]] == ["valence", "arousal"]
    assert {"mean_rmse"} <= written.keys()
    with h5py.File(run / "predictions.h5") as file:
        contents = {name: file[name][:] for name in ("rows", "probabilities", "decided", "labels")}
    outputs = contents["probabilities"]
    assert (outputs.dtype, outputs.shape) == (np.float32, (114, 2)), "6 of them labelled in part"
    assert np.abs(outputs).max() <= 1
    assert np.array_equal(contents["decided"], outputs)
    joined = join_labels(EmbeddingStore.open(data["store"]), data["annotations"], VA, "validation")
    assert np.array_equal(contents["rows"], joined.rows)
    assert np.array_equal(contents["labels"], joined.labels, equal_nan=True)
    again = regression_scores(contents["labels"], outputs, VA.classes)
    for found, expected in zip(written["classes"], again.to_json()["classes"], strict=True):
        assert found == {**expected, "low": found["low"], "high": found["high"]}
        assert found["low"] < found["ccc"] < found["high"]


def test_a_constant_validation_split_scores_0(data: dict[str, Path], tmp_path: Path) -> None:
    for path in (data["annotations"] / "VA_Estimation_Challenge" / "Validation_Set").glob("*.txt"):
        path.write_text("valence,arousal\n" + "0.1,0.1\n" * FRAMES)
    fitted = fit(task="va", run=tmp_path / "run", **data, **{**RECIPE, "epochs": 1})
    assert (fitted.value, fitted.best_epoch) == (0, 1)
    assert score(run=tmp_path / "run").scores.value == 0


def test_the_same_seed_gives_the_same_bits_and_a_killed_run_continues_to_them(
    data: dict[str, Path], tmp_path: Path
) -> None:
    class Interrupter(Listener):
        def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
            if done == 2:
                raise KeyboardInterrupt

    recipe = {**RECIPE, "epochs": 4, "dropout": 0.2}
    fit(task="va", run=tmp_path / "whole", **data, **recipe)
    with pytest.raises(KeyboardInterrupt):
        fit(task="va", run=tmp_path / "cut", listener=Interrupter(), **data, **recipe)
    fit(task="va", run=tmp_path / "cut", resume=True, **data, **recipe)
    whole, cut = (score(run=tmp_path / name).scores for name in ("whole", "cut"))
    assert whole == cut
    outputs = []
    for name in ("whole", "cut"):
        with h5py.File(tmp_path / name / "predictions.h5") as file:
            outputs.append(file["probabilities"][:])
    assert np.array_equal(*outputs)


# The command line


def test_the_table_shows_what_continuous_values_have(data: dict[str, Path], tmp_path: Path) -> None:
    flags = ["--store", str(data["store"]), "--annotations", str(data["annotations"]), "--epochs", "1"]
    done = CliRunner().invoke(app, ["fit", "--task", "va", "--run", str(tmp_path / "run"), *flags])
    assert done.exit_code == 0, done.output
    shown = CliRunner().invoke(app, ["score", str(tmp_path / "run")])
    assert shown.exit_code == 0, shown.output
    rows = {row[0]: row[1:] for line in shown.stdout.splitlines() if (row := line.split())}
    assert rows["output"] == ["ccc", "pearson", "rmse", "95", "%", "support"]
    assert len(rows["valence"]) == len(rows["arousal"]) == 7
    (mean,) = [line for line in shown.stdout.splitlines() if re.match(r"\s*mean.ccc", line, re.IGNORECASE)]
    head = next(line for line in shown.stdout.splitlines() if "pearson" in line)
    value = json.loads((tmp_path / "run" / "scores.json").read_text())["value"]
    assert mean.split()[-3] == "to", "its range stands before the support"
    assert mean.split()[2] == f"{value:.3f}"
    assert mean.split()[-1] == "108", "108 frames have both values"
    right_edge = mean.index(f"{value:.3f}") + len(f"{value:.3f}")
    assert right_edge == head.index("ccc") + 3, "the mean stands below what it averages"
    assert not re.search("precision|recall|f1|accuracy", shown.stdout)


def test_rendered_faces_from_crops_to_scores(tiny_encoder: str, tmp_path: Path) -> None:
    write_sample(tmp_path / "sample", videos=3, frames=12)
    annotations, store = tmp_path / "sample" / "annotations", tmp_path / "store.h5"
    extract(crops=(tmp_path / "sample" / "cropped_aligned",), store=store, model=tiny_encoder, device="cpu")
    fitted = fit(task="va", store=store, annotations=annotations, run=tmp_path / "run", **{**RECIPE, "epochs": 2})
    scored = score(run=tmp_path / "run", split="train")
    assert fitted.frames == scored.frames > 15
    assert -1 <= scored.scores.value <= 1
    assert all(np.isfinite(list(one.values.values())).all() for one in scored.scores.classes)
