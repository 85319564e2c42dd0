"""Training and scoring on streamed frames: to the bit, and as commands."""

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from affcache.devices import default_memory
from affcache.errors import ConfigError
from affcache.scoring.score import score
from affcache.store.prefetch import read_ahead
from affcache.store.reading import EmbeddingStore
from affcache.tasks.annotations import JoinedLabels, join_labels
from affcache.tasks.tasks import TASKS
from affcache.training import data as streaming
from affcache.training.data import Frames, FrameSource, StreamedFrames
from affcache.training.fit import FitResult, fit
from affcache.training.learner import Learner
from affcache.training.settings import FitSettings
from tests.conftest import MakeData
from tests.training.test_fit import Recorder, assert_same_run

CPU = torch.device("cpu")
RECIPE: dict[str, Any] = {"epochs": 4, "hidden_layers": 1, "hidden_width": 16, "batch_size": 16, "rho": 0.05}
QUICK = FitSettings(**RECIPE)
FRAME = 16 * 2  # bytes of an embedding that ``learnable`` makes
LITTLE = (80 + 2 * 40) * FRAME / 1e9  # GB: the 80 validation frames, and two chunks of 40 of the 160 for training
Fit = Callable[..., FitResult]


def split(data: tuple[Path, Path], name: str) -> tuple[EmbeddingStore, JoinedLabels]:
    store = EmbeddingStore.open(data[0])
    return store, join_labels(store, data[1], TASKS["expr"], name)


@pytest.fixture
def little_fit(learnable: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fit:
    """Fit with memory for half of the training frames: little_fit(run name, **settings)."""
    monkeypatch.setattr(streaming, "SMALLEST_CHUNK", 32)
    store, annotations = learnable()

    def run(name: str = "run", **changes: Any) -> FitResult:
        values = {"store": store, "annotations": annotations, "run": tmp_path / name, "memory": LITTLE, **RECIPE}
        return fit(**{**values, **changes})

    return run


# The bits


@pytest.mark.parametrize("changes", [{}, {"stride": 3}, {"frames_per_epoch": 50, "normalize": "l2"}])
def test_training_on_one_chunk_is_training_on_frames_in_memory(learnable: MakeData, changes: dict[str, Any]) -> None:
    store, train = split(learnable(), "train")
    recipes = [replace(QUICK, seed=seed, **changes) for seed in (1, 2)]
    sources: list[FrameSource] = [Frames.load(store, train, CPU), StreamedFrames(store, train, CPU, len(train))]
    learners = [Learner(recipes, TASKS["expr"], store.width, CPU) for _ in sources]
    for _ in range(2):
        losses = [learner.epoch(frames, 1e-3) for learner, frames in zip(learners, sources, strict=True)]
        assert losses[0].equal(losses[1])
    states = [learner.state() for learner in learners]
    assert all(states[0][name].equal(states[1][name]) for name in states[0])
    assert learners[0].predict(sources[0]).equal(learners[0].predict(sources[1]))


def test_training_on_several_chunks_learns_as_well(little_fit: Fit) -> None:
    recipe = {"epochs": 12, "dropout": 0.1, "lr": 0.01, "hidden_width": 64}
    streamed, resident = little_fit("a", **recipe), little_fit("b", **{**recipe, "memory": None})
    assert min(streamed.value, resident.value) > 0.85
    assert streamed.value == pytest.approx(resident.value, abs=0.06)


def test_an_error_in_training_leaves_no_thread(learnable: MakeData, monkeypatch: pytest.MonkeyPatch) -> None:
    store, train = split(learnable(), "train")
    learner = Learner([QUICK], TASKS["expr"], store.width, CPU)

    def broken(frames: Frames, batch: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    monkeypatch.setattr(learner, "step", broken)
    with pytest.raises(ZeroDivisionError) as kept:
        learner.epoch(StreamedFrames(store, train, CPU, 40), 1e-3)
    for thread in threading.enumerate():
        if thread.name.startswith("read-ahead"):
            thread.join(timeout=10)
            assert not thread.is_alive()
    assert kept.traceback, "although the error still holds the loop"


# The commands


def test_fit_says_what_it_streams_and_keeps_the_setting(little_fit: Fit, tmp_path: Path) -> None:
    listener = Recorder()
    little_fit("a", listener=listener)
    assert [text for text in listener.messages if "40 frames at a time" in text]
    assert json.loads((tmp_path / "a" / "config.json").read_text())["settings"]["memory"] == LITTLE
    little_fit("b", memory=None)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["settings"]["memory"] == default_memory(CPU)


@pytest.mark.parametrize("again", [{"memory": LITTLE}, {"memory": None}], ids=["said", "not said"])
def test_a_streamed_run_continues_to_the_same_bits(little_fit: Fit, tmp_path: Path, again: dict[str, Any]) -> None:
    little_fit("whole")
    with pytest.raises(KeyboardInterrupt):
        little_fit("cut", listener=Recorder(interrupt_after=2))
    little_fit("cut", resume=True, **again)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_a_run_is_not_continued_with_other_memory(little_fit: Fit) -> None:
    with pytest.raises(KeyboardInterrupt):
        little_fit(listener=Recorder(interrupt_after=1))
    with pytest.raises(ConfigError, match=r"can't be continued: --memory 5\.12e-06 then, 1\.0 now\."):
        little_fit(resume=True, memory=1)


def test_scoring_reads_a_few_frames_at_a_time(little_fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    little_fit()
    found, sizes = [], list[list[int]]()

    def recorded(store: EmbeddingStore, groups: Sequence[Any], device: torch.device) -> Any:
        sizes.append([len(group) for group in groups])
        return read_ahead(store, groups, device)

    monkeypatch.setattr("affcache.scoring.predict.read_ahead", recorded)
    for most in (8192, 20):
        monkeypatch.setattr("affcache.scoring.predict.EVALUATION_BATCH", most)
        result = score(run=tmp_path / "run")
        with h5py.File(tmp_path / "run" / "predictions.h5") as file:
            found.append((result.scores.value, file["probabilities"][:]))
    whole, parts = sizes
    assert whole == [sum(parts)]
    assert max(parts) == 20
    assert found[0][0] == found[1][0]
    np.testing.assert_allclose(found[0][1], found[1][1], atol=1e-6)
