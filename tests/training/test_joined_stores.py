"""Heads on several stores side by side, and on standardised embeddings."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.preprocessing import StandardScaler

from affcache.ablation.ablate import ablate
from affcache.ablation.settings import AblateSettings
from affcache.errors import ConfigError, InputError, StoreError
from affcache.files import read_tensors, write_tensors
from affcache.scoring.score import score
from affcache.scoring.trained import TrainedHead
from affcache.store.reading import EmbeddingStore
from affcache.training import data as streaming
from affcache.training.data import Scaler
from affcache.training.fit import fit
from affcache.training.run_folder import RunFolder, stores_of_run
from affcache.training.sklearn import CVaRMLPClassifier
from tests.conftest import MakeData, frames_of, write_store
from tests.training.test_fit import Recorder, assert_same_run, history

QUICK: dict[str, Any] = {"epochs": 3, "hidden_layers": 1, "hidden_width": 16, "batch_size": 16, "rho": 0.05}


@pytest.fixture
def parts(learnable: MakeData, tmp_path: Path) -> tuple[Path, Path, Path, Path]:
    """A store of width 8, its columns in stores of width 3 and 5, and labels for them."""
    whole, annotations = learnable(width=8)
    store = EmbeddingStore.open(whole)
    videos = {name: range(1, 41) for name in store.video_names}
    names = []
    for number, columns in enumerate((slice(0, 3), slice(3, 8))):
        features = np.ascontiguousarray(store.features[:, columns])
        described = {"weights_sha256": str(number) * 64, "width": features.shape[1]}
        names.append(write_store(tmp_path / f"part{number}.h5", videos, features, **described).path)
    return whole, names[0], names[1], annotations


@pytest.mark.parametrize("changes", [{}, {"normalize": "standard", "adaptive": True}, {"normalize": "l2"}])
@pytest.mark.parametrize("memory", [1.0, (80 + 2 * 40) * 16 / 1e9])
def test_two_stores_train_what_a_store_of_their_concatenation_trains(
    parts: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], memory: float
) -> None:
    monkeypatch.setattr(streaming, "SMALLEST_CHUNK", 32)
    whole, one, other, annotations = parts
    recipe = {**QUICK, **changes, "annotations": annotations, "memory": memory}
    fit(store=whole, run=tmp_path / "whole", **recipe)
    fit(store=(one, other), run=tmp_path / "both", **recipe)
    assert history(tmp_path / "whole") == history(tmp_path / "both")
    for file in ("head.safetensors", "last.safetensors"):
        ours, theirs = (read_tensors(tmp_path / run / file)[0] for run in ("both", "whole"))
        assert ours.keys() == theirs.keys()
        assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert score(run=tmp_path / "both").scores == score(run=tmp_path / "whole").scores


def test_the_order_of_stores_is_that_of_the_columns(parts: tuple[Path, ...], tmp_path: Path) -> None:
    _, one, other, annotations = parts
    for name, stores in {"there": (one, other), "back": (other, one)}.items():
        fit(store=stores, run=tmp_path / name, annotations=annotations, **QUICK)
    there, back = (score(run=tmp_path / name).scores.value for name in ("there", "back"))
    assert there != back
    assert score(run=tmp_path / "there", store=(other, one)).scores.value == there, "whatever the order they are named"


def test_a_ridge_on_two_stores_is_that_of_their_concatenation(parts: tuple[Path, ...], tmp_path: Path) -> None:
    whole, one, other, annotations = parts
    runs = {"whole": whole, "both": (one, other)}
    for normalize in ("none", "standard"):
        found = [
            fit(store=stores, run=tmp_path / f"{name}-{normalize}", annotations=annotations, head="ridge",
                normalize=normalize).value
            for name, stores in runs.items()
        ]  # fmt: skip
        assert found[0] == found[1]
        assert score(run=tmp_path / f"both-{normalize}").scores.value == found[0]


def test_the_run_knows_its_stores_and_refuses_others(parts: tuple[Path, ...], tmp_path: Path) -> None:
    _, one, other, annotations = parts
    run = tmp_path / "run"
    fit(store=(one, other), run=run, annotations=annotations, **QUICK)
    config = RunFolder(run).read_config()
    assert [store["path"] for store in stores_of_run(config)] == [str(one), str(other)]
    assert [store["fingerprint"] for store in stores_of_run(config)] == [
        EmbeddingStore.open(path).fingerprint() for path in (one, other)
    ]
    assert config["store"]["width"] == 8
    with pytest.raises(StoreError, match=r"needs embeddings by made-up, and none of the stores holds them: .*part1"):
        score(run=run, store=other)
    copy = tmp_path / "copy.h5"
    copy.write_bytes(other.read_bytes())
    with pytest.raises(ConfigError, match=r"was trained on 1 store by made-up, and 2 of those given are"):
        score(run=run, store=(one, other, copy))
    other.unlink()
    with pytest.raises(StoreError, match=r"The store that run .* was trained on is not at .*part1\.h5"):
        score(run=run)
    assert score(run=run, store=(one, copy)).frames == 80
    stores, encoders = config["store"]["stores"], config["store"]["encoder"]["stores"]
    wide = [{**one, "width": width} for one, width in zip(encoders, ("3", 5), strict=True)]
    for damage in (
        *(
            {"stores": other}
            for other in ([], ["x"], [{"path": 3}], None, stores[::-1], stores[:1], [*stores, stores[0]])
        ),
        *(
            {"encoder": {"stores": other}}
            for other in ([1, 2], ["ab", "cd"], [None, None], encoders[::-1], wide, [], 3)
        ),
        {"encoder": {"stores": [config["store"]["encoder"], encoders[0]]}},
        {"encoder_fingerprint": "0" * 64},
        {"width": 9},
    ):
        (run / "config.json").write_text(json.dumps({**config, "store": {**config["store"], **damage}}))
        with pytest.raises(InputError, match="is no run folder that can be read"):
            score(run=run, store=(one, copy))


def test_a_killed_run_on_two_stores_goes_on_to_the_bit(parts: tuple[Path, ...], tmp_path: Path) -> None:
    _, one, other, annotations = parts
    recipe = {**QUICK, "annotations": annotations, "normalize": "standard"}
    fit(store=(one, other), run=tmp_path / "whole", **recipe)
    run = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        fit(store=(one, other), run=run, listener=Recorder(interrupt_after=1), **recipe)
    fit(run=run, resume=True)
    assert_same_run(tmp_path / "whole", run)
    with pytest.raises(StoreError, match="has changed"):
        fit(run=run, resume=True, store=(other, one))


def test_a_grid_compares_stores_alone_and_side_by_side(parts: tuple[Path, ...], tmp_path: Path) -> None:
    whole, one, other, annotations = parts
    result = ablate(
        AblateSettings(**{**QUICK, "annotations": annotations}, out=tmp_path / "out", seeds=2, keep="all",
                       vary=(f"store={one},{other},{one}+{other},{whole}",))
    )  # fmt: skip
    assert [row.variant.name for row in result.rows] == ["part0", "part1", "part0+part1", "expr"]
    means = [row.mean for row in result.rows]
    assert means[2] == means[3] != means[0]
    assert all(row.difference is not None for row in result.rows[1:])
    cells = [TrainedHead.open(cell) for cell in (tmp_path / "out" / "cells").iterdir()]
    kept = [score(run=cell.folder.path).scores.value for cell in cells if len(cell.encoders) == 2]
    assert np.mean(kept) == pytest.approx(means[2])
    assert ",part0+part1," in (tmp_path / "out" / "summary.csv").read_text()


# The scaler


@pytest.mark.parametrize("size", [1, 7, 500])
def test_standardised_embeddings_are_scikit_learns(size: int) -> None:
    random = np.random.default_rng(0)
    x = (random.normal(size=(500, 6)) * [1, 100, 1e-3, 5, 1, 0] + [0, 1000, 0, -3, 0.1, 7]).astype(np.float16)
    found = Scaler.fit("standard", torch.from_numpy(x).split(size))
    peer = StandardScaler().fit(x.astype(np.float64))
    assert found.mean is not None
    assert found.deviation is not None
    np.testing.assert_allclose(found.mean, peer.mean_, rtol=1e-6)
    np.testing.assert_allclose(found.deviation, peer.scale_, rtol=1e-6)
    np.testing.assert_allclose(found(torch.from_numpy(x)), peer.transform(x.astype(np.float64)), rtol=1e-4, atol=1e-5)
    assert found(torch.from_numpy(x).double()).dtype == torch.float64


def test_what_a_head_was_standardised_by_is_kept_with_it(learnable: MakeData, tmp_path: Path) -> None:
    store, annotations = learnable()
    fit(store=store, annotations=annotations, run=tmp_path / "run", normalize="standard", held_out=0.3, **QUICK)
    tensors, _ = read_tensors(tmp_path / "run" / "head.safetensors")
    opened = EmbeddingStore.open(store)
    held = set(json.loads((tmp_path / "run" / "config.json").read_text())["labels"]["train"]["held_out_videos"])
    training = [
        n for v, n in enumerate(opened.video_names) if v % 3 != 2 and n not in held
    ]  # as ``learnable`` splits them
    rows = np.isin(np.array(opened.video_names)[opened.video_of_rows()], training)
    expected = opened.features[rows].astype(np.float64)
    np.testing.assert_allclose(tensors["scaler.mean"], expected.mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(tensors["scaler.deviation"], expected.std(axis=0), rtol=1e-5)
    head = TrainedHead.open(tmp_path / "run", "cpu")
    x = torch.from_numpy(np.array(opened.features[:5]))
    scaled = (x.float() - tensors["scaler.mean"]) / tensors["scaler.deviation"]
    torch.testing.assert_close(head.logits(x), head.head(scaled).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spoil", ["missing", "short", "zero", "negative", "float64", "int", "unasked"])
def test_a_head_with_another_scaler_is_refused(learnable: MakeData, tmp_path: Path, spoil: str) -> None:
    store, annotations = learnable()
    fit(store=store, annotations=annotations, run=tmp_path / "run", normalize="standard", **QUICK)
    path = tmp_path / "run" / "head.safetensors"
    tensors, header = read_tensors(path)
    mean, deviation = tensors.pop("scaler.mean"), tensors.pop("scaler.deviation")
    found = {
        "missing": {"scaler.deviation": deviation},
        "short": {"scaler.mean": mean[:-1].clone(), "scaler.deviation": deviation},
        "zero": {"scaler.mean": mean, "scaler.deviation": deviation * 0},
        "negative": {"scaler.mean": mean, "scaler.deviation": -deviation},
        "float64": {"scaler.mean": mean.double(), "scaler.deviation": deviation.double()},
        "int": {"scaler.mean": mean, "scaler.deviation": deviation.ceil().long()},
        "unasked": {"scaler.mean": mean, "scaler.deviation": deviation},
    }[spoil]
    write_tensors(path, {**tensors, **found}, header)
    if spoil == "unasked":
        config = (tmp_path / "run" / "config.json").read_text()
        (tmp_path / "run" / "config.json").write_text(config.replace('"standard"', '"none"'))
    with pytest.raises(StoreError, match="the head has other layers than the settings there describe"):
        score(run=tmp_path / "run")


def test_the_estimator_standardises_as_fit_does(learnable: MakeData, tmp_path: Path) -> None:
    store, annotations = learnable()
    fit(store=store, annotations=annotations, run=tmp_path / "run", normalize="standard", **{**QUICK, "epochs": 1})
    train, _ = frames_of((store, annotations), "expr")
    estimator = CVaRMLPClassifier(random_state=0, normalize="standard", **{**QUICK, "epochs": 1})
    estimator.fit(train.embeddings.numpy(), train.labels.numpy())
    tensors, _ = read_tensors(tmp_path / "run" / "head.safetensors")
    for name, array in estimator.head_.items():
        np.testing.assert_array_equal(array, tensors[name].numpy())
    x = train.embeddings.numpy()[:9]
    head = TrainedHead.open(tmp_path / "run", "cpu")
    np.testing.assert_allclose(estimator.decision_function(x), head.logits(torch.from_numpy(x)), rtol=1e-4, atol=1e-5)


def test_scales_that_differ_a_thousandfold_are_learnt_once_standardised(learnable: MakeData, tmp_path: Path) -> None:
    store, annotations = learnable(videos=9)
    opened = EmbeddingStore.open(store)
    videos = {name: range(1, 41) for name in opened.video_names}
    scaled = (opened.features.astype(np.float32) * np.where(np.arange(16) % 2, 1, 1e-3)).astype(np.float16)
    path = write_store(tmp_path / "scaled.h5", videos, scaled).path
    recipe = {**QUICK, "epochs": 8, "annotations": annotations, "rho": 0.0, "dropout": 0.0}
    plain, standard = (
        fit(store=path, run=tmp_path / name, normalize=name, **recipe).value for name in ("none", "standard")
    )
    assert standard > plain + 0.05
