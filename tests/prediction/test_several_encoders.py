"""Predicting with heads of several encoders: apart, averaged, and on embeddings side by side."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest

import affcache
from affcache.errors import ConfigError, InputError, StoreError
from affcache.store.reading import EmbeddingStore
from affcache.tasks.tasks import TASKS
from tests.conftest import Heard, write_crops, write_labels, write_tiny_encoder
from tests.faces.clips import moving, write_clip
from tests.prediction.conftest import QUICK

EXPR = [f"expr_{name}" for name in TASKS["expr"].classes]
FIRST, SECOND = {"a": range(1, 9), "b": range(1, 9)}, {"a": range(1, 9), "b": range(1, 5)}  # whole batches


@dataclass(frozen=True)
class Place:
    """Two encoders, a store of each of which the second lacks frames, and a run on each and on both."""

    root: Path
    encoders: tuple[str, str]
    stores: tuple[Path, Path]
    one: Path
    other: Path
    both: Path
    units: Path  # of another task, on the second store

    def predict(self, inputs: Any, *runs: Path, **options: Any) -> Any:
        out = self.root / "p.parquet"
        affcache.predict(inputs=inputs, run=runs, out=out, **{"device": "cpu", "batch_size": 4, **options})
        table = pq.read_table(out)
        columns = [table[name].to_numpy(zero_copy_only=False) for name in EXPR if name in table.column_names]
        return table, np.column_stack(columns) if columns else None


@pytest.fixture
def place(tiny_encoder: str, tmp_path: Path) -> Place:
    second = tmp_path / "encoder"
    second.mkdir()
    encoders = (tiny_encoder, write_tiny_encoder(second, seed=7))
    crops = write_crops(tmp_path / "crops", FIRST)
    fewer = tmp_path / "fewer"
    for name, frames in SECOND.items():
        (fewer / name).mkdir(parents=True)
        for frame in frames:
            shutil.copy(crops / name / f"{frame:05d}.jpg", fewer / name)
    labels, stores = tmp_path / "labels", (tmp_path / "one.h5", tmp_path / "two.h5")
    for store, model, root in zip(stores, encoders, (crops, fewer), strict=True):
        affcache.extract(crops=root, store=store, model=model, precision="fp32", device="cpu", batch_size=4)
    write_labels(labels, "expr", "train", {"a": range(8)})
    write_labels(labels, "expr", "validation", {"b": range(8)})
    lines = [",".join(str((frame + unit) % 2) for unit in range(12)) for frame in range(8)]
    write_labels(labels, "au", "train", {"a": lines})
    write_labels(labels, "au", "validation", {"b": lines})
    recipe = {**QUICK, "batch_size": 4, "annotations": labels}
    runs = {"one": stores[0], "other": stores[1], "both": stores}
    for name, given in runs.items():
        affcache.fit(store=given, run=tmp_path / name, normalize="standard", **recipe)
    affcache.fit(store=stores[1], run=tmp_path / "units", task="au", **recipe)
    return Place(tmp_path, encoders, stores, *(tmp_path / name for name in (*runs, "units")))


def scored(run: Path) -> dict[tuple[str, int], Any]:
    """What score wrote of each frame."""
    with h5py.File(run / "predictions.h5") as file:
        names = file["video_name"].asstr()[:]
        keys = zip(names[file["video"][:]], file["frame_number"][:].tolist(), strict=True)
        return dict(zip(keys, file["probabilities"][:], strict=True))


def test_stores_side_by_side_give_the_probabilities_of_score_to_the_bit(place: Place) -> None:
    affcache.score(run=place.both, device="cpu")
    affcache.score(run=(place.one, place.other), device="cpu")
    joined, averaged = scored(place.both), scored(place.one / "average")
    table, said = place.predict(place.stores[::-1], place.both)
    keys = list(zip(table["input"].to_pylist(), table["frame"].to_pylist(), strict=True))
    assert keys == [(name, frame) for name, frames in SECOND.items() for frame in frames], "that both stores have"
    for frame, expected in joined.items():
        assert np.array_equal(said[keys.index(frame)], expected)
    table, said = place.predict((), place.one, place.other, store=place.stores)
    keys = list(zip(table["input"].to_pylist(), table["frame"].to_pylist(), strict=True))
    assert keys == [(name, frame) for name, frames in FIRST.items() for frame in frames], "that one of them has"
    for frame, expected in averaged.items():
        assert np.array_equal(said[keys.index(frame)], expected)


def test_crops_give_what_their_stores_give(place: Place) -> None:
    for runs in ((place.both,), (place.one, place.other), (place.other, place.both, place.one)):
        table, expected = place.predict(place.stores, *runs)
        keys = list(zip(table["input"].to_pylist(), table["frame"].to_pylist(), strict=True))
        table, said = place.predict(place.root / "fewer", *runs)
        assert np.array_equal(said, expected[[key in keys and key[1] in SECOND[key[0]] for key in keys]])
        assert table["success"].to_pylist() == [True] * 12


def test_a_video_gives_what_its_crops_give(place: Place, square_faces: None, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", moving(6))
    affcache.find_faces(inputs=clip, out=tmp_path / "faces")
    runs = (place.one, place.both, place.other)
    of_video, said = place.predict(clip, *runs)
    of_crops, again = place.predict(tmp_path / "faces", *runs)
    assert len(of_video) == len(of_crops) == 6
    assert np.array_equal(said, again)
    units, _ = place.predict(clip, place.units, place.both)
    assert {"expr", "au_AU1", "au_AU26_present"} <= set(units.column_names)


def test_tasks_of_several_encoders_leave_empty_what_their_store_lacks(place: Place) -> None:
    heard = Heard()
    table, said = place.predict(place.stores, place.one, place.units, listener=heard)
    missing = [("b", frame) for frame in range(5, 9)]
    keys = list(zip(table["input"].to_pylist(), table["frame"].to_pylist(), strict=True))
    empty = [key for key, value in zip(keys, table["au_AU1"].to_pylist(), strict=True) if value is None]
    assert empty == missing
    assert np.isfinite(said).all()
    assert not any("average" in message for message in heard.messages), "of each task there is one run"


def test_weights_and_fitted_rules_count(place: Place) -> None:
    _, first = place.predict(place.stores[0], place.one)
    keys = [(name, frame) for name, frames in FIRST.items() for frame in frames]
    _, second = place.predict(place.stores[1], place.other)
    has = np.array([frame in SECOND[name] for name, frame in keys])
    _, said = place.predict(place.stores, place.one, place.other, weights="1,3")
    np.testing.assert_allclose(said[has], (first[has] + 3 * second) / 4, atol=1e-6)
    np.testing.assert_allclose(said[~has], first[~has], atol=1e-6)
    rule = affcache.score(run=(place.other, place.one), weights="fitted", fit_on="validation", device="cpu").rule
    assert rule.weights is not None
    with pytest.raises(ConfigError, match="no rule that was fitted for their average"):
        place.predict(place.stores, place.one, place.other, decide="fitted")
    fitted = affcache.score(run=(place.other, place.one), weights="0.25,0.75", device="cpu")
    assert fitted.rule.weights == (0.25, 0.75)
    with pytest.raises(ConfigError, match="--weights is '1'"):
        place.predict(place.stores, place.one, place.other, weights="1")


def test_one_store_for_heads_of_two_encoders_is_refused(place: Place) -> None:
    with pytest.raises(StoreError, match=r"other was trained on embeddings of another encoder than .*one\.h5 holds"):
        place.predict(place.stores[0], place.one, place.other)
    with pytest.raises(StoreError, match=r"both needs embeddings by .*, and none of the stores holds them"):
        place.predict(place.stores[0], place.both)
    crops, away = write_crops(place.root / "elsewhere", {"c": [1]}), place.root / "away.h5"
    affcache.extract(crops=crops, store=away, model=place.encoders[1], precision="fp32", device="cpu")
    with pytest.raises(InputError, match="share no frame"):
        place.predict((place.stores[0], away), place.one, place.other)


def test_a_published_head_on_two_encoders_is_loaded_elsewhere(place: Place) -> None:
    affcache.score(run=place.both, device="cpu")
    out = place.root / "published"
    affcache.publish(run=place.both, out=out)
    card, moved = (out / "README.md").read_text(), place.root / "moved"
    assert str(place.root) not in card + (out / "config.json").read_text()
    assert "embeddings side by side, in this order" in card
    Path(place.encoders[1].removeprefix("local-dir:")).rename(moved)
    crops = sorted((place.root / "fewer" / "b").iterdir())
    with pytest.raises(InputError, match=r"can't be loaded.*\n.*model=\[\.\.\.\], pretrained=\[\.\.\.\], one of each"):
        affcache.load(out, device="cpu").predict_proba(crops)
    there = [place.encoders[0], f"local-dir:{moved}"]
    model = affcache.load(out, model=there, device="cpu")
    store = [EmbeddingStore.open(path) for path in place.stores]
    embeddings = np.concatenate([store[0].features[8:12], store[1].features[8:]], axis=1)
    np.testing.assert_allclose(model.embed(crops, batch_size=4), embeddings, atol=2e-3)
    np.testing.assert_allclose(model.predict_proba(crops), model.predict_proba(embeddings=embeddings), atol=1e-3)
    with pytest.raises(ConfigError, match=r"says where 1 encoders are, and .* is on 2"):
        affcache.load(out, model="local-dir:x", device="cpu")
    with pytest.raises(StoreError, match="trained on embeddings of another encoder"):
        affcache.load(out, model=there[::-1], device="cpu").embed(crops)
    table, _ = place.predict(place.root / "fewer", out, model=there)
    assert table["success"].to_pylist() == [True] * 12
    with pytest.raises(ConfigError, match="--model is given 1 times, and the runs are on 2 encoders"):
        place.predict(place.root / "fewer", out, model=there[:1])


def test_two_kinds_of_crops_by_one_encoder_are_stores_alone(place: Place) -> None:
    loose, run = place.root / "loose.h5", place.root / "kinds"
    crops = write_crops(place.root / "loose", FIRST, seed=5)
    affcache.extract(crops=crops, store=loose, model=place.encoders[0], precision="fp32", device="cpu")
    recipe = {**QUICK, "batch_size": 4, "annotations": place.root / "labels"}
    affcache.fit(store=(place.stores[0], loose), run=run, **recipe)
    affcache.score(run=run, device="cpu")
    table, _ = place.predict((place.stores[0], loose), run)
    assert len(table) == 16
    with pytest.raises(InputError, match="on two stores by one encoder"):
        place.predict(place.root / "crops", run)
