"""Crops to scores through the command line: extract, fit and score both tasks on rendered faces."""

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from typer.testing import CliRunner

import affcache
from affcache.cli.app import app
from affcache.tasks.tasks import TASKS
from data.rendering.sample import SampleSummary, write_sample


def call(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> SampleSummary:
    """A small rendered draw in Aff-Wild2's layout, with gaps, invalid labels and a row too many."""
    return write_sample(tmp_path_factory.mktemp("pipeline") / "sample", videos=6, frames=12, seed=1)


@pytest.fixture(scope="module")
def extracted(sample: SampleSummary, tiny_encoder: str) -> dict[str, Any]:
    """What extract says of the sample's store."""
    crops, store = sample.folder / "cropped_aligned", sample.folder / "store.h5"
    return call("extract", "--crops", crops, "--store", store, "--model", tiny_encoder, "--pretrained", "")


def test_extract_encodes_every_crop(sample: SampleSummary, extracted: dict[str, Any]) -> None:
    assert extracted["rows"] == extracted["encoded"] == sample.crops
    assert extracted["unreadable"] == 0
    store = affcache.EmbeddingStore.open(extracted["store"])
    store.verify()
    assert store.features.shape == (sample.crops, 24)
    assert set(store.video_names) == {
        path.name for path in (sample.folder / "cropped_aligned").iterdir() if path.is_dir()
    }


@pytest.mark.parametrize("task", ["expr", "au"])
def test_fit_and_score(sample: SampleSummary, extracted: dict[str, Any], tmp_path: Path, task: str) -> None:
    run = tmp_path / "run"
    annotations = sample.folder / "annotations"
    recipe = ("--epochs", 2, "--hidden-width", 16, "--batch-size", 16)
    store = extracted["store"]
    recipe += ("--partial", "drop")  # as the summary of the sample counts them
    fitted = call("fit", "--task", task, "--store", store, "--annotations", annotations, "--run", run, *recipe)
    scored = call("score", run)
    assert {path.name for path in run.iterdir()} == {
        "config.json", "history.jsonl", "head.safetensors", "last.safetensors", "scores.json", "predictions.h5"
    }  # fmt: skip
    assert scored == json.loads((run / "scores.json").read_text())
    assert (scored["task"], scored["split"], scored["store"]) == (task, "validation", store)
    assert (scored["value"], scored["metric"]) == (fitted["value"], fitted["metric"])
    assert (scored["epoch"], scored["frames"]) == (fitted["best_epoch"], fitted["validation_frames"])
    assert [c["name"] for c in scored["classes"]] == list(TASKS[task].classes)
    assert scored["value"] == pytest.approx(np.mean([c["f1"] for c in scored["classes"]]))

    # the frames are those that the sample says have a valid label and a crop
    expected = [
        sum(split.expression_frames.values()) if task == "expr" else split.action_unit_frames
        for split in (sample.train, sample.validation)
    ]
    assert [fitted["frames"], fitted["validation_frames"]] == expected
    support = {"expr": sample.validation.expression_frames, "au": sample.validation.action_unit_positives}[task]
    assert {c["name"]: c["support"] for c in scored["classes"]} == support

    with h5py.File(run / "predictions.h5") as file:
        names = file["video_name"].asstr()[:][file["video"][:]]
        keys = list(zip(names, file["frame_number"][:], strict=True))
        labels = file["labels"][:]
    for (video, frame), label in list(zip(keys, labels, strict=True))[:: max(1, len(keys) // 10)]:
        assert (sample.folder / "cropped_aligned" / video / f"{frame:05d}.jpg").is_file()
        lines = (annotations / TASKS[task].folders[0] / "Validation_Set" / f"{video}.txt").read_text().splitlines()
        assert [int(value) for value in lines[frame].split(",")] == np.atleast_1d(label).tolist(), "line i is frame i"


def test_extracting_again_encodes_nothing(extracted: dict[str, Any], sample: SampleSummary, tiny_encoder: str) -> None:
    before = Path(extracted["store"]).read_bytes()
    crops = sample.folder / "cropped_aligned"
    again = call("extract", "--crops", crops, "--store", extracted["store"], "--model", tiny_encoder)
    assert (again["encoded_now"], again["encoded"]) == (0, sample.crops)
    assert Path(extracted["store"]).read_bytes() == before
