"""Labels of whole videos: heads on pooled videos and on their frames, against scikit-learn and numpy; and grids."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.linear_model import Ridge as PeerRidge
from sklearn.metrics import f1_score
from sklearn.preprocessing import StandardScaler

from affcache.ablation.ablate import ablate
from affcache.errors import ConfigError, InputError
from affcache.files import read_tensors
from affcache.scoring.score import score
from affcache.store.reading import EmbeddingStore
from affcache.tasks.kinds import Values
from affcache.tasks.metrics import mean_by_video
from affcache.tasks.task import Task
from affcache.tasks.tasks import TASKS
from affcache.training.fit import fit
from tests.conftest import Heard, write_store
from tests.training.test_fit import Recorder, assert_same_run
from tests.whole_videos import BAH, PAIN, SIGNS, Videos, make_videos

QUICK: dict[str, Any] = {"epochs": 3, "hidden_layers": 1, "hidden_width": 16, "batch_size": 8, "rho": 0.05}
POOLED = {"mean": 1, "mean+std": 2, "mean+std+quantiles": 5}


def pooled(videos: Videos, split: str, pool: str) -> npt.NDArray[np.float64]:
    """What numpy pools of each readable video of a split, in the store's order."""
    found = []
    for name in videos.names(split):
        frames = videos.frames(name).astype(np.float64)
        found.append([frames.mean(0), frames.std(0), *np.quantile(frames, (0.1, 0.5, 0.9), axis=0)])
    return np.stack([np.concatenate(each[: POOLED[pool]]) for each in found])


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


def fitted(videos: Videos, run: Path, **values: Any) -> Path:
    fit(task=videos.task.name, store=videos.store, run=run, device="cpu", **{**QUICK, **values})
    return run


@pytest.mark.parametrize("pool", POOLED)
@pytest.mark.parametrize("task", [BAH, SIGNS, PAIN])
def test_a_ridge_on_pooled_videos_is_scikit_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: Task, pool: str
) -> None:
    videos = make_videos(tmp_path, monkeypatch, task)
    run = fitted(videos, tmp_path / "run", head="ridge", pool=pool)
    x, y = (pooled(videos, split, pool) for split in ("train", "validation"))
    labels = videos.labels("train").astype(float)
    targets = {"classes": np.eye(2)[labels.astype(int) if labels.ndim == 1 else 0] * 2 - 1, "units": labels * 2 - 1}
    head, _ = read_tensors(run / "head.safetensors")
    best = max(lines(run), key=lambda entry: entry[task.metric])
    scaler = StandardScaler().fit(x)
    peer = PeerRidge(alpha=best["strength"] * len(x)).fit(scaler.transform(x), targets.get(task.kind, labels))
    ours = y @ head["output_layer.weight"].numpy().T.astype(float) + head["output_layer.bias"].numpy()
    half, middle = (task.half, task.middle) if isinstance(task, Values) else (1, 0)
    assert ours * half + middle == pytest.approx(peer.predict(scaler.transform(y)), abs=2e-5 * half)
    if task.has_classes:
        decided = ours.argmax(1) if task.exclusive else (ours >= 0).astype(int)
        expected = f1_score(videos.labels("validation"), decided, average="macro", zero_division=0)
        assert best[task.metric] == pytest.approx(expected)


@pytest.mark.parametrize("head", ["linear", "mlp", "ridge"])
@pytest.mark.parametrize("task", [BAH, SIGNS])
def test_inherited_labels_choose_and_score_by_the_mean_of_a_videos_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: Task, head: str
) -> None:
    videos = make_videos(tmp_path, monkeypatch, task)
    run = fitted(videos, tmp_path / "run", head=head, pool="none")
    result = score(run=run, device="cpu")
    assert result.frames == len(videos.names("validation"))
    assert result.scores.value == max(entry[task.metric] for entry in lines(run)), "chosen by what is scored"
    if head == "mlp":
        return
    tensors, _ = read_tensors(run / "head.safetensors")
    means = []
    for name in videos.names("validation"):
        logits = torch.from_numpy(videos.frames(name).astype(np.float32)) @ tensors["output_layer.weight"].T
        means.append(task.probabilities(logits + tensors["output_layer.bias"]).double().mean(0).numpy())
    decided = np.stack(means).argmax(1) if task.exclusive else (np.stack(means) >= 0.5).astype(int)
    expected = f1_score(videos.labels("validation"), decided, average="macro", zero_division=0)
    assert result.scores.value == pytest.approx(expected)


@pytest.mark.parametrize("pool", ["auto", "none"])
def test_a_run_keeps_how_it_pools_and_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: str) -> None:
    videos = make_videos(tmp_path, monkeypatch)
    values = {"dropout": 0.2, "normalize": "standard", "pool": pool}
    whole, cut = fitted(videos, tmp_path / "whole", **values), tmp_path / "cut"
    config = json.loads((whole / "config.json").read_text())
    assert config["settings"]["pool"] == ("mean+std" if pool == "auto" else "none")
    assert config["store"]["width"] == 6, "of a frame's embedding"
    with pytest.raises(KeyboardInterrupt):
        fitted(videos, cut, **values, listener=Recorder(interrupt_after=1))
    fit(run=cut, resume=True)
    assert_same_run(whole, cut)


def test_messages_count_videos_or_their_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    videos, heard = make_videos(tmp_path, monkeypatch), Heard()
    train, lost = len(videos.names("train")), len(videos.splits["train"]) - len(videos.names("train"))
    assert lost == 1
    fitted(videos, tmp_path / "pooled", listener=heard)
    assert heard.messages[0] == f"train: {train} videos; left out: 1 unreadable video"
    heard = Heard()
    fitted(videos, tmp_path / "frames", pool="none", listener=heard)
    frames = sum(len(videos.frames(name)) for name in videos.names("train"))
    assert heard.messages[0].startswith(f"train: {frames} frames of {train + lost} videos; left out: ")
    assert "without a crop" not in heard.messages[0]


def test_frames_that_have_labels_are_not_pooled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    videos = make_videos(tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match="--pool is mean, but a label of task expr is of a frame; expected none"):
        fit(task="expr", store=videos.store, pool="mean", run=tmp_path / "run")
    with pytest.raises(ConfigError, match="--pool is 'median'; expected one of auto, none, mean, "):
        fit(task="bah", store=videos.store, pool="median", run=tmp_path / "run")


def test_a_video_without_a_readable_frame_alone_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    videos = make_videos(tmp_path, monkeypatch)
    last = sorted(videos.splits["train"])[-1]
    for split in (videos.splits["train"], videos.splits["validation"]):
        for name in [name for name in split if name != last]:
            del split[name]  # type: ignore[attr-defined]
    videos.splits["validation"][last] = 0  # type: ignore[index]
    with pytest.raises(InputError, match="train: 0 videos; left out: 1 unreadable video"):
        fitted(videos, tmp_path / "run")


def test_pools_are_compared_in_a_grid_with_other_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    videos, vary = make_videos(tmp_path, monkeypatch), ("pool=none,mean,mean+std", "head=linear,ridge")
    values: dict[str, Any] = {**QUICK, "task": "bah", "store": videos.store, "seeds": 2, "keep": "all", "device": "cpu"}
    result = ablate(vary=vary, out=tmp_path / "out", **values)
    assert [row.variant.values["pool"] for row in result.rows] == ["none"] * 2 + ["mean"] * 2 + ["mean+std"] * 2
    assert all(row.difference is not None for row in result.rows[1:]), "all are scored on the same videos"
    for folder in (tmp_path / "out" / "cells").iterdir():
        found = json.loads((folder / "result.json").read_text())
        assert score(run=folder, device="cpu").scores.value == pytest.approx(found["value"])
    assert ablate(vary=vary, out=tmp_path / "out", **values).trained == 0
    (best,) = result.best
    assert f"--pool {best['setting'].split(',')[0].removeprefix('pool=')}" in best["fit"]
    held = ablate(vary=("alpha=0.5,1",), select="heldout", out=tmp_path / "held", **values)
    assert held.rows[0].selected is not None


@pytest.mark.parametrize("pool", ["mean", "none"])
def test_folds_decide_each_video_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: str) -> None:
    videos = make_videos(tmp_path, monkeypatch)
    values: dict[str, Any] = {"head": "ridge", "seeds": 1, "pool": pool, "vary": ("normalize=none,l2",)}
    result = ablate(task="bah", store=videos.store, folds=3, out=tmp_path / "out", **values)
    names = sorted([*videos.names("train"), *videos.names("validation")])
    labels = {**videos.splits["train"], **videos.splits["validation"]}
    (path,) = (tmp_path / "out" / "out_of_fold").glob("*.h5")  # of the best setting
    with h5py.File(path) as file:
        contents = {name: file[name][:] for name in file}
    stored = EmbeddingStore.open(videos.store).video_names
    assert [stored[video] for video in contents["video"]] == names
    assert contents["labels"].tolist() == [labels[name] for name in names]
    assert contents["decided"].tolist() == contents["probabilities"].argmax(axis=1).tolist()
    assert set(contents["fold"]) == {1, 2, 3}
    value = f1_score(contents["labels"], contents["decided"], average="macro")
    assert value in [pytest.approx(row.mean) for row in result.rows]


def test_two_stores_pool_as_one_of_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    videos = make_videos(tmp_path, monkeypatch)
    store = EmbeddingStore.open(videos.store)
    starts, lost = store.video_start, np.flatnonzero(store.status != 1).tolist()
    listing = {n: store.frame_number[starts[v] : starts[v + 1]].tolist() for v, n in enumerate(store.video_names)}
    parts = []
    for number, cut in enumerate((slice(0, 2), slice(2, 6))):
        features, of = np.ascontiguousarray(store.features[:, cut]), {"weights_sha256": str(number) * 64}
        path = tmp_path / f"part{number}.h5"
        write_store(path, listing, features, lost, width=features.shape[1], **of)
        parts.append(path)
    for pool in ("mean+std", "none"):
        runs = [tmp_path / f"{name}-{pool}" for name in ("whole", "parts")]
        for run, stores in zip(runs, ((videos.store,), tuple(parts)), strict=True):
            fitted(replace(videos, store=stores), run, pool=pool, head="mlp")
        if pool == "none":  # pooled, a video's values stand in another order: all of one store, then of the other's
            assert [one["macro_f1"] for one in lines(runs[0])] == [one["macro_f1"] for one in lines(runs[1])]
        assert score(run=runs[1], device="cpu").scores.value == max(one["macro_f1"] for one in lines(runs[1]))


@pytest.mark.parametrize("task", [TASKS["expr"], TASKS["au"], TASKS["va"]])
def test_means_over_videos_are_numpys_and_frames_stay(task: Task) -> None:
    logits, videos = torch.randn(20, task.outputs), torch.tensor([3] * 7 + [0] + [9] * 12)
    probabilities, where = task.scored(logits, videos)
    assert np.array_equal(probabilities, task.probabilities(logits).numpy())
    assert where == slice(None)
    means, first = replace(task, level="video").scored(logits, videos)
    assert first.tolist() == [0, 7, 8]
    expected = [task.probabilities(logits[of]).double().mean(0).numpy() for of in (slice(7), slice(7, 8), slice(8, 20))]
    assert means == pytest.approx(np.stack(expected))
    assert task.probabilities(task.logits_of_videos(logits, videos.numpy())).numpy() == pytest.approx(means)
    assert mean_by_video(probabilities[:0], np.empty(0, np.int64))[0].shape == (0, task.outputs)
