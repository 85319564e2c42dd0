"""Scoring a run: what it writes, that the files give the same value again, and which stores it refuses."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from sklearn.metrics import f1_score

from affcache.errors import InputError, StoreError
from affcache.progress import Listener
from affcache.scoring.score import score
from affcache.store.description import fingerprint
from affcache.store.reading import EmbeddingStore
from affcache.tasks.tasks import TASKS
from affcache.training.fit import fit
from affcache.training.settings import FitSettings
from tests.conftest import MakeData, spoil_features, write_labels, write_store

QUICK: dict[str, Any] = {"epochs": 3, "hidden_layers": 1, "hidden_width": 16, "batch_size": 16, "rho": 0.05}


class Warnings(Listener):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def warning(self, text: str) -> None:
        self.texts.append(text)


def fitted(data: tuple[Path, Path], run: Path, task: str = "expr", **changes: Any) -> Path:
    fit(task=task, store=data[0], annotations=data[1], run=run, **{**QUICK, **changes})
    return run


@pytest.fixture
def run(learnable: MakeData, tmp_path: Path) -> Path:
    """A finished expr run on tmp_path/expr.h5 and tmp_path/labels."""
    return fitted(learnable(), tmp_path / "run")


def rewrite_store(path: Path, change: float = 1.0, **encoder: Any) -> Path:
    """Write a store like one that is there, with one value changed, or as if by another encoder."""
    store = EmbeddingStore.open(path)
    features = store.features.copy()
    listing = {name: range(1, 41) for name in store.video_names}
    features[0, 0] += change
    path.unlink()
    write_store(path, listing, features)
    if encoder:
        with h5py.File(path, "r+") as file:
            file.attrs["encoder"] = json.dumps(described := {**json.loads(file.attrs["encoder"]), **encoder})
            file.attrs["encoder_fingerprint"] = fingerprint(described)
    return path


@pytest.mark.parametrize("task", ["expr", "au"])
def test_the_files_hold_every_frame_and_give_the_value_again(learnable: MakeData, tmp_path: Path, task: str) -> None:
    store_path, annotations = learnable(task)
    run = fitted((store_path, annotations), tmp_path / "run", task)
    result = score(run=run)
    written = json.loads((run / "scores.json").read_text())
    assert written == json.loads(json.dumps(result.to_json()))
    assert [c["name"] for c in written["classes"]] == list(TASKS[task].classes)
    assert 0 < written["value"] <= 1
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    best = history[result.epoch - 1]
    of_best = (best["validation_loss"], best["validation_cvar"], 0.5)
    assert (written["loss"], written["cvar"], written["alpha"]) == pytest.approx(of_best)
    assert written["cvar"] > written["loss"]

    store = EmbeddingStore.open(store_path)
    with h5py.File(run / "predictions.h5") as file:
        contents = {name: file[name][:] for name in file}
        attributes = dict(file.attrs)
        names = file["video_name"].asstr()[:]
    rows, labels, probabilities = contents["rows"], contents["labels"], contents["probabilities"]
    assert attributes["format"] == "affcache-predictions"
    assert (attributes["task"], attributes["split"], attributes["run"]) == (task, "validation", str(run))
    assert json.loads(attributes["classes"]) == list(TASKS[task].classes)
    assert rows.tolist() == [*range(80, 120), *range(200, 240)], "the third and the sixth video"
    assert names[contents["video"]].tolist() == [store.video_names[2]] * 40 + [store.video_names[5]] * 40
    assert contents["frame_number"].tolist() == [*range(1, 41)] * 2
    assert probabilities.dtype == np.float32
    assert probabilities.shape == (80, TASKS[task].outputs)
    assert probabilities.min() >= 0
    assert probabilities.max() <= 1
    if task == "expr":
        np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
        assert np.array_equal(contents["decided"], probabilities.argmax(axis=1))
    else:
        assert np.array_equal(contents["decided"], probabilities >= 0.5)
    again = f1_score(labels, contents["decided"], average="macro", labels=range(TASKS[task].outputs), zero_division=0)
    assert again == pytest.approx(result.scores.value)
    assert not list(run.glob("*.partial"))


def test_the_score_is_the_best_epochs_value(learnable: MakeData, tmp_path: Path) -> None:
    store, annotations = learnable()
    result = fit(store=store, annotations=annotations, run=tmp_path / "run", normalize="l2", **{**QUICK, "epochs": 6})
    scored = score(run=tmp_path / "run")
    assert scored.scores.value == result.value
    assert scored.epoch == result.best_epoch
    assert scored.frames == result.validation_frames
    assert scored.run == result.run


def test_scoring_twice_gives_the_same_files(run: Path) -> None:
    def files() -> tuple[str, list[bytes]]:
        score(run=run)
        with h5py.File(run / "predictions.h5") as file:
            return (run / "scores.json").read_text(), [file[name][:].tobytes() for name in file if name != "video_name"]

    assert files() == files()


def test_the_training_split_can_be_scored(run: Path) -> None:
    result = score(run=run, split="train")
    assert (result.split, result.frames) == ("train", 160)
    assert result.account.used == 160
    assert not (run / "predictions.h5").exists(), "the plain names are the validation split's"
    assert json.loads((run / "scores-train.json").read_text())["value"] == result.scores.value
    with h5py.File(run / "predictions-train.h5") as file:
        assert file.attrs["split"] == "train"
        assert len(file["rows"]) == 160
        assert not set(file["rows"][:]) & {*range(80, 120), *range(200, 240)}


def test_the_json_has_the_keys_others_rely_on(run: Path) -> None:
    found = score(run=run).to_json()
    assert found.keys() >= {"task", "split", "metric", "value", "classes", "frames", "epoch", "run", "store"}
    assert (found["task"], found["split"], found["metric"]) == ("expr", "validation", "macro_f1")
    assert found["value"] == pytest.approx(np.mean([c["f1"] for c in found["classes"]]))
    assert found["labels"]["used"] == found["frames"] == 80


def test_a_class_without_support_is_named(run: Path, tmp_path: Path) -> None:
    for video in ("2-30-640x360", "5-30-640x360"):
        write_labels(tmp_path / "other", "expr", "validation", {video: [0, 1, 2, 4, 5, 6] * 6})
    listener = Warnings()
    result = score(run=run, annotations=tmp_path / "other", listener=listener)
    assert result.to_json()["classes_without_support"] == ["Fear", "Other"]
    assert listener.texts == [
        "No validation frame is labelled Fear, Other: each counts as 0 in macro_f1, as the mean runs over all 8 "
        "classes."
    ]


def test_the_newest_run_is_scored_when_none_is_named(
    learnable: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = learnable()
    for index, name in enumerate(["b", "a"]):
        fitted(data, tmp_path / "runs" / name, epochs=1)
        os.utime(tmp_path / "runs" / name / "head.safetensors", (1000 + index, 1000 + index))
    assert score().run == str(Path("runs/a"))
    os.utime(tmp_path / "runs" / "b" / "head.safetensors", (3000, 3000))
    assert score().run == str(Path("runs/b"))


# Stores


def test_a_store_that_changed_since_is_refused_unless_chosen(run: Path, tmp_path: Path) -> None:
    path = rewrite_store(tmp_path / "expr.h5")
    with pytest.raises(StoreError) as caught:
        score(run=run)
    message = str(caught.value)
    assert f"The store {path} has changed since run {run} was trained on it" in message
    assert f"--store {path}" in message
    assert score(run=run, store=path).store == str(path)


def test_other_crops_of_the_same_encoder_can_be_chosen(run: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    other = tmp_path / "other.h5"
    write_store(other, {"new": [1, 3]}, random.normal(size=(2, 16)).astype(np.float16))
    annotations = write_labels(tmp_path / "new labels", "expr", "validation", {"new": [1, 2, 3]})
    result = score(run=run, store=other, annotations=annotations)
    assert (result.frames, result.account.no_crop, result.store) == (2, 1, str(other))


@pytest.mark.parametrize("chosen", [True, False])
def test_a_store_of_another_encoder_is_refused_with_the_fields(run: Path, tmp_path: Path, chosen: bool) -> None:
    path = rewrite_store(tmp_path / "expr.h5", precision="bf16", weights_sha256="1" * 64, model="renamed")
    with pytest.raises(StoreError) as caught:
        score(run=run, **({"store": path} if chosen else {}))
    message = str(caught.value)
    assert "embeddings of another encoder" in message
    assert "precision: 'fp32' against 'bf16'" in message
    assert f"weights_sha256: '{'0' * 64}' against '{'1' * 64}'" in message
    assert "renamed" not in message, "a name changes no numbers"


def test_a_store_that_is_gone_is_a_named_error(run: Path, tmp_path: Path) -> None:
    moved = (tmp_path / "expr.h5").rename(tmp_path / "moved.h5")
    with pytest.raises(StoreError, match=r"was trained on is not at .*expr\.h5 any more.*--store FILE"):
        score(run=run)
    assert score(run=run, store=moved).frames == 80, "the same embeddings elsewhere"


# Runs that are none


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no run folder that can be read"):
        score(run=tmp_path)


def test_a_damaged_or_missing_head_is_a_named_error(run: Path) -> None:
    head = run / "head.safetensors"
    whole = head.read_bytes()
    head.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StoreError, match=r"head\.safetensors can't be read .*Train again with 'affcache fit'"):
        score(run=run)
    head.unlink()
    with pytest.raises(
        StoreError, match=r"was not kept\. Expected .*head\.safetensors.*Train it again with 'affcache fit"
    ):
        score(run=run)
    assert not (run / "scores.json").exists()


def test_a_head_of_another_run_is_a_named_error(learnable: MakeData, run: Path, tmp_path: Path) -> None:
    other = fitted((tmp_path / "expr.h5", tmp_path / "labels"), tmp_path / "other", hidden_width=8, epochs=1)
    (run / "head.safetensors").write_bytes((other / "head.safetensors").read_bytes())
    with pytest.raises(StoreError, match=r"head\.safetensors .*doesn't fit"):
        score(run=run)


def test_an_unfinished_run_is_warned_of_and_its_scores_go_when_it_continues(
    learnable: MakeData, tmp_path: Path
) -> None:
    store, annotations = learnable()
    settings = FitSettings(
        store=store, annotations=annotations, run=tmp_path / "run", epochs=3, hidden_layers=1, hidden_width=8
    )

    class Impatient(Listener):
        def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(settings, listener=Impatient())
    listener = Warnings()
    score(run=tmp_path / "run", listener=listener)
    assert listener.texts[0].startswith(f"run {tmp_path / 'run'} is unfinished: 1 of 3 epochs.")
    fit(settings, resume=True)
    assert not (tmp_path / "run" / "scores.json").exists()
    assert not (tmp_path / "run" / "predictions.h5").exists()
    listener = Warnings()
    score(run=tmp_path / "run", listener=listener)
    assert [text for text in listener.texts if "unfinished" in text] == []


@pytest.mark.parametrize("chosen", [False, True], ids=["its own store", "a store named"])
def test_damaged_features_are_not_scored(run: Path, tmp_path: Path, chosen: bool) -> None:
    spoil_features(tmp_path / "expr.h5")
    with pytest.raises(StoreError, match=r"block 0 .* is corrupt: its features don't match their checksum"):
        score(run=run, store=tmp_path / "expr.h5" if chosen else None)
    assert not (run / "scores.json").exists()


def test_predictions_are_written_whole_or_not_at_all(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    score(run=run)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(InputError, match=r"predictions.h5 can't be written: Input/output error"):
        score(run=run)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
