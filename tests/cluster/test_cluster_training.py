"""An ablation on a cluster: the tables of a local one, also when a worker is lost, and whose heads come back."""

import copy
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from affcache.ablation.ablate import ablate
from affcache.ablation.result import AblateResult
from affcache.ablation.summary import Outcome
from affcache.ablation.train import Trained
from affcache.cluster import training as training_module
from affcache.cluster.connection import Travelling
from affcache.cluster.training import ClusterTrainer, changed, wanted_heads
from affcache.errors import ConfigError
from affcache.progress import Listener
from affcache.tasks.tasks import TASKS
from affcache.training.data import StreamedFrames
from affcache.training.splits import JoinedSplits
from tests.ablation.test_ablate import QUICK, tables
from tests.conftest import Heard, MakeData

GRID: dict[str, Any] = {**QUICK, "epochs": 3, "vary": ("alpha=0.5,1", "rho=0,0.05"), "seeds": 2, "select": "heldout"}


def run(data: tuple[Path, Path], out: Path, **values: Any) -> AblateResult:
    return ablate(**{**GRID, "store": data[0], "annotations": data[1], "out": out, **values})


@pytest.fixture
def two_threads() -> Any:
    """As many as a worker has, since bits depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.cluster
def test_tables_of_a_local_run_although_a_worker_is_lost(
    cluster: Any, two_threads: None, learnable: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, heard, marker, train = learnable(), Heard(), tmp_path / "lost", training_module._train
    local = run(data, tmp_path / "local", keep="all")

    def lost_once(*arguments: Any) -> Any:
        trained = train(*arguments)
        if not marker.exists():
            marker.touch()
            os._exit(1)  # with the work done, and nobody told
        return trained

    monkeypatch.setattr(training_module, "_train", lost_once)
    result = run(data, tmp_path / "ray", keep="all", engine="ray", actors=1, listener=heard)
    assert marker.exists()
    assert tables(tmp_path / "ray") == tables(tmp_path / "local")
    assert (result.trained, result.cells) == (local.trained, local.cells) == (8, 8)
    heads = {path.parent.name: path.read_bytes() for path in (tmp_path / "local").glob("cells/*/head.safetensors")}
    assert heads == {
        path.parent.name: path.read_bytes() for path in (tmp_path / "ray").glob("cells/*/head.safetensors")
    }
    assert len(heads) == 8
    assert heard.steps[-1] == (24, 24)
    again = run(data, tmp_path / "ray", engine="ray", actors=1)
    assert again.trained == 0


@pytest.mark.cluster
def test_several_groups_at_a_time_and_the_best_head_alone(
    cluster: Any, learnable: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, heard, sizes, train = learnable(), Heard(), [], ClusterTrainer.train

    def counted(self: ClusterTrainer, groups: Any, *arguments: Any) -> Any:
        sizes.extend(len(group.trials) for group in groups)
        return train(self, groups, *arguments)

    monkeypatch.setattr(ClusterTrainer, "train", counted)
    result = run(data, tmp_path / "ray", engine="ray", actors=4, vary=("head=mlp,ridge",), seeds=4, listener=heard)
    assert sorted(sizes) == [1, 1, 1, 1, 2, 2], "ridges stand alone, and the rest is cut so that nobody idles"
    assert result.trained == 8
    assert any(message.startswith("4 groups of heads at a time, on cpu of 2 nodes") for message in heard.messages)
    (head,) = (tmp_path / "ray").glob("cells/*/head.safetensors")
    assert str(head.parent) == result.best[0]["run"]
    assert not list((tmp_path / "ray" / "groups").glob("*"))


@pytest.mark.cluster
def test_folds_are_those_of_a_local_run(cluster: Any, two_threads: None, learnable: MakeData, tmp_path: Path) -> None:
    data, grid = learnable(videos=8), {"folds": 3, "seeds": 2}
    run(data, tmp_path / "local", **grid)
    run(data, tmp_path / "ray", engine="ray", actors=1, **grid)
    assert tables(tmp_path / "ray") == tables(tmp_path / "local")
    for name in ("out_of_fold/*", "cells/*/*.safetensors"):
        local, ray = (
            {path.name + path.parent.name: path.read_bytes() for path in (tmp_path / where).glob(name)}
            for where in ("local", "ray")
        )
        assert local == ray != {}


def test_heads_that_nobody_keeps_stay_with_the_worker() -> None:
    def outcome(selected: float | None) -> Outcome:
        return Outcome(selected, selected, 1, None if selected is not None else 1, [], None, [])

    heads = [{"w": torch.full((1,), float(index))} for index in range(4)]
    trained = Trained([outcome(value) for value in (None, 0.2, 0.7, 0.7)], heads)
    assert wanted_heads(trained, "all") == heads
    assert wanted_heads(trained, "best") == [{}, {}, heads[2], {}]
    assert wanted_heads(trained, "none") == [{}] * 4
    diverged = Trained([outcome(None)] * 2, [{}, {}])
    assert wanted_heads(diverged, "best") == [{}, {}]


def test_frames_travel_as_they_are(learnable: MakeData) -> None:
    store, labels = learnable()
    joined = JoinedSplits.open((store,), TASKS["expr"], labels, Listener())
    joined = joined.holding_out(0.2, "to choose by", Listener(), select=True)
    source = joined.load(torch.device("cpu"), 1.0, Listener())
    again = copy.deepcopy(changed(source, Travelling))
    assert again.selection is not again.validation
    for name in ("train", "selection", "validation"):
        for part in ("embeddings", "labels", "videos"):
            ours, theirs = getattr(getattr(source, name), part), getattr(getattr(again, name), part)
            assert ours.dtype == theirs.dtype
            assert ours.equal(theirs)
    assert (again.width, again.videos, again.video_names) == (16, 6, source.video_names)
    assert np.array_equal(again.video_of_frame, source.video_of_frame)


def test_frames_that_do_not_fit_are_refused(learnable: MakeData) -> None:
    store, labels = learnable()
    source = JoinedSplits.open((store,), TASKS["expr"], labels, Listener())
    loaded = source.load(torch.device("cpu"), 1.0, Listener())
    streamed = replace(loaded, train=StreamedFrames(source.store, source.train, torch.device("cpu"), 4096))
    with pytest.raises(ConfigError, match=r"keeps all embeddings in memory.* Raise --memory GB"):
        changed(streamed, Travelling)


@pytest.mark.cluster
def test_a_group_that_ends_every_worker_is_an_error(
    cluster: Any, learnable: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_module, "RETRIES", 1)
    monkeypatch.setattr(training_module, "_train", die)
    with pytest.raises(Exception, match=r"heads of \w+ and beside it were lost 2 times"):
        run(learnable(), tmp_path / "out", engine="ray", actors=1)


def die(*arguments: Any) -> None:
    os._exit(1)
