"""Heads on labels of whole videos used: on stores, crops, clips and arrays, run and published alike."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import affcache
from affcache.errors import ConfigError, InputError
from affcache.prediction.whole_videos import require_one_level
from affcache.scoring.score import score
from affcache.store.pooled import PooledStore
from affcache.store.reading import EmbeddingStore
from affcache.tasks.tasks import TASKS
from tests.conftest import write_crops
from tests.faces.clips import moving, picture, write_clip, write_photo
from tests.prediction.conftest import QUICK
from tests.whole_videos import BAH, label

COLUMNS = ["bah_without", "bah_with"]
FRAMES = {"a": range(1, 9), "b_left": range(1, 6), "b_right": [3, 7], "c": [1], "d": range(2, 5)}
OF_FRAMES = ("frame", "timestamp", "box_x", "confidence")


@pytest.fixture
def store(tiny_encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of tmp_path/crops by the tiny encoder, whose videos have labels; of c none can be read."""
    write_crops(tmp_path / "crops", FRAMES)
    (tmp_path / "crops" / "c" / "00001.jpg").write_bytes(b"no picture")
    path = tmp_path / "faces.h5"
    affcache.extract(crops=tmp_path / "crops", store=path, model=tiny_encoder, precision="fp32", device="cpu")
    label(monkeypatch, BAH, {"train": {"a": 0, "b_left": 1, "d": 1}, "validation": {"b_right": 1, "a": 0}})
    return path


def fitted(store: Path, run: Path, **values: Any) -> Path:
    affcache.fit(task="bah", store=store, run=run, **{**QUICK, "batch_size": 2, **values})
    return run


def said(path: Path) -> dict[str, list[Any]]:
    return dict(pq.read_table(path).to_pydict())


@pytest.mark.parametrize("pool", ["auto", "none"])
def test_a_store_its_crops_and_arrays_say_the_same(store: Path, tmp_path: Path, pool: str) -> None:
    run, out = fitted(store, tmp_path / "run", pool=pool), tmp_path / "p.parquet"
    result = affcache.predict(inputs=store, run=run, out=out, device="cpu")
    assert (result.rows, result.faces) == (5, 4)
    table = said(out)
    assert table["input"] == ["a", "b_left", "b_right", "c", "d"]
    assert table["success"] == [True, True, True, False, True]
    assert all(set(table[name]) == {None} for name in OF_FRAMES)
    assert (table["bah"][3], table["bah_with"][3]) == (None, None)
    affcache.predict(inputs=tmp_path / "crops", run=run, out=out, device="cpu")
    of_crops = said(out)
    assert [Path(name).name for name in of_crops["input"]] == table["input"]
    model, opened = affcache.load(run, device="cpu"), EmbeddingStore.open(store)
    for video, name in enumerate(opened.video_names):
        if name == "c":
            continue
        rows = PooledStore.of(opened, "none").frames_of(np.array([video]))[0]
        found = model.predict_proba(embeddings=opened.features[rows])
        assert found.shape == (1, 2)
        assert [table[column][video] for column in COLUMNS] == pytest.approx(found[0], abs=1e-6)
        assert [of_crops[column][video] for column in COLUMNS] == pytest.approx(found[0], abs=1e-6)
        assert table["bah"][video] == BAH.classes[int(model.predict(embeddings=opened.features[rows])[0])]
    images = sorted((tmp_path / "crops" / "a").iterdir())
    assert model.predict_proba(images)[0] == pytest.approx([table[column][0] for column in COLUMNS], abs=1e-6)
    with pytest.raises(InputError, match="no frame of a video, of which task bah is"):
        model.predict_proba(embeddings=np.empty((0, opened.width), np.float16))
    with pytest.raises(InputError, match=rf"Expected floating-point numbers of shape \(n, {opened.width}\)"):
        model.predict_proba(embeddings=np.zeros((3, 2 * opened.width), np.float32))


@pytest.mark.parametrize("pool", ["mean+std+quantiles", "none"])
def test_a_clip_has_a_row_a_person(store: Path, tmp_path: Path, square_faces: None, pool: str) -> None:
    run, out = fitted(store, tmp_path / "run", pool=pool), tmp_path / "p.parquet"
    frames = moving(8)
    frames[2] = picture()
    clip = write_clip(tmp_path / "clip.mp4", frames)
    photos = [write_photo(tmp_path / f"{n}.png", picture((8, 8 + 20 * n))) for n in range(2)]
    empty = write_photo(tmp_path / "empty.png", picture())
    both = write_photo(tmp_path / "both.png", picture((8, 8), (8, 70)))
    inputs, drawn = [clip, *photos, both, empty], tmp_path / "drawn"
    result = affcache.predict(inputs=inputs, run=run, out=out, overlay=drawn, device="cpu")
    assert len(result.overlays) == len(inputs)
    table = said(out)
    rows = {Path(name).name: [n for n, other in enumerate(table["input"]) if other == name] for name in table["input"]}
    assert {name: len(of) for name, of in rows.items()} == {
        "clip.mp4": 1, "0.png": 1, "1.png": 1, "both.png": 2, "empty.png": 1
    }  # fmt: skip
    assert (result.rows, result.faces) == (6, 5)
    assert [table["success"][row] for row in rows["empty.png"]] == [False]
    affcache.find_faces(inputs=[clip], out=tmp_path / "found")
    crops = sorted((tmp_path / "found").rglob("*.jpg"))
    assert len(crops) == 7
    expected = affcache.load(run, device="cpu").predict_proba(crops)
    assert [table[column][rows["clip.mp4"][0]] for column in COLUMNS] == pytest.approx(expected[0], abs=1e-6)
    affcache.predict(inputs=[tmp_path / "found"], run=run, out=out, device="cpu")
    assert [said(out)[column] for column in COLUMNS] == [[pytest.approx(one, abs=1e-6)] for one in expected[0]]


@pytest.mark.parametrize("pool", ["auto", "none"])
def test_a_published_head_says_what_its_run_says(store: Path, tmp_path: Path, pool: str) -> None:
    run = fitted(store, tmp_path / "run", pool=pool, normalize="standard")
    scored = score(run=run, device="cpu")
    affcache.publish(run=run, out=tmp_path / "head", data="noise", license="mit")
    config = json.loads((tmp_path / "head" / "config.json").read_text())
    assert config["settings"]["pool"] == ("mean+std" if pool == "auto" else "none")
    card = (tmp_path / "head" / "README.md").read_text()
    assert "All images are the faces of one video." in card
    assert f"**{scored.scores.value:.3f}**" in card
    assert "2 videos." in card
    frames = EmbeddingStore.open(store).features[:8]
    ours, theirs = (
        affcache.load(path, device="cpu").predict_proba(embeddings=frames) for path in (run, tmp_path / "head")
    )
    assert np.array_equal(ours, theirs)
    with pytest.raises(ConfigError, match="--onnx writes graphs of frames, and task bah says one thing of a whole"):
        affcache.publish(run=run, out=tmp_path / "other", onnx=True)


def test_tasks_of_frames_and_of_videos_stand_in_no_table() -> None:
    require_one_level([BAH, BAH], smooth="none", page=False)
    require_one_level([TASKS["expr"], TASKS["au"]], smooth="mean", page=True)
    with pytest.raises(ConfigError, match="Task expr is of frames, and task bah of whole videos: a table has a row"):
        require_one_level([TASKS["expr"], BAH], smooth="none", page=False)


def test_what_is_of_frames_is_refused(store: Path, tmp_path: Path) -> None:
    run = fitted(store, tmp_path / "run")
    given: dict[str, Any] = {"inputs": store, "out": tmp_path / "p.csv", "device": "cpu"}
    with pytest.raises(ConfigError, match="--smooth median is over frames of a video"):
        affcache.predict(run=run, smooth="median", smooth_width=3, **given)
    with pytest.raises(ConfigError, match="--page shows frames one after the other, and task bah says one thing"):
        affcache.predict(run=run, page=tmp_path / "p.html", **given)
