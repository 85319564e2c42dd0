"""A trained head as a model of images and of embeddings: the run's own probabilities, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import f1_score

import affcache
from affcache.errors import ConfigError, InputError, StoreError
from affcache.prediction.model import Model
from affcache.scoring.rule import DecisionRule
from affcache.scoring.trained import TrainedHead
from affcache.store.reading import EmbeddingStore
from affcache.tasks.tasks import TASKS
from tests.conftest import MakeData, write_tiny_encoder

QUICK: dict[str, Any] = {"epochs": 2, "hidden_layers": 1, "hidden_width": 16, "batch_size": 16, "device": "cpu"}
HEADS = [("expr", "mlp"), ("au", "mlp"), ("va", "mlp"), ("expr", "linear"), ("au", "ridge"), ("va", "ridge")]


def predicted(run: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the rows that score predicted, and its probabilities."""
    with h5py.File(run / "predictions.h5") as file:
        return file["rows"][:], file["probabilities"][:]


@pytest.mark.parametrize(("task", "head"), HEADS)
@pytest.mark.parametrize("normalize", ["none", "l2"])
def test_embeddings_have_the_probabilities_that_score_writes(
    learnable: MakeData, tmp_path: Path, task: str, head: str, normalize: str
) -> None:
    store, annotations = learnable(task)
    run = tmp_path / "run"
    affcache.fit(task=task, head=head, store=store, annotations=annotations, run=run, normalize=normalize, **QUICK)
    affcache.score(run=run, device="cpu")
    rows, expected = predicted(run)
    store.unlink()
    features = np.random.default_rng(0).normal(size=(3, 16))
    model = affcache.load(run, device="cpu")
    with pytest.raises(StoreError, match="imported"):
        _ = model.encoder
    assert model.predict_proba(embeddings=features).dtype == np.float32
    learnable(task)
    embeddings = np.asarray(EmbeddingStore.open(store).features[rows])
    found = model.predict_proba(embeddings=embeddings)
    assert np.array_equal(found, expected), "to the bit"
    assert np.array_equal(model.predict_proba(embeddings=torch.from_numpy(embeddings)), expected)
    assert np.array_equal(model.predict_proba(embeddings=embeddings.astype(np.float64)), expected)
    assert model.classes == TASKS[task].classes
    assert model.logits(embeddings).shape == expected.shape
    assert np.array_equal(model.predict(embeddings=embeddings), TASKS[task].decide(expected))


def test_images_go_the_way_of_their_embeddings(encoded: Path, tmp_path: Path) -> None:
    model = affcache.load(encoded, device="cpu")
    store = EmbeddingStore.open(tmp_path / "faces.h5")
    paths = sorted((tmp_path / "crops" / "b").iterdir())
    images = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    embeddings = model.embed(paths)
    assert embeddings.dtype == np.float16
    np.testing.assert_allclose(embeddings.astype(float), store.features[8:].astype(float), rtol=2e-3, atol=2e-3)
    expected = model.predict_proba(embeddings=embeddings)
    np.testing.assert_allclose(expected.sum(axis=1), 1, atol=1e-6)
    for given in (paths, list(map(str, paths)), images, np.stack(images), [Image.fromarray(one) for one in images]):
        np.testing.assert_allclose(model.predict_proba(given, batch_size=8), expected, atol=1e-6)
    np.testing.assert_allclose(model.predict_proba(paths, batch_size=3), expected, atol=1e-3)
    assert model.predict_proba(paths[0]).shape == model.predict_proba(images[0]).shape == (1, 8)
    assert model.predict_proba([]).shape == model.predict_proba(embeddings=np.empty((0, 24))).shape == (0, 8)
    assert np.array_equal(model.predict(paths), expected.argmax(axis=1))
    assert repr(model).startswith(f"<Model expr of {encoded}: Neutral, ")
    assert "mlp head on local-dir:" in repr(model)


def test_the_head_opens_without_a_store(encoded: Path, tmp_path: Path) -> None:
    (tmp_path / "faces.h5").unlink()
    trained = TrainedHead.open(encoded, "cpu")
    assert (trained.width, trained.task, trained.published, trained.rule) == (24, TASKS["expr"], False, None)
    assert trained.encoder["precision"] == "fp32"
    assert trained.logits(torch.zeros(3, 24, dtype=torch.float16)).dtype == torch.float32
    assert len(affcache.load(encoded).predict_proba(np.zeros((50, 40, 3), np.uint8))) == 1


def test_another_encoder_in_its_place_is_refused_and_the_same_one_elsewhere_is_taken(
    encoded: Path, tiny_encoder: str, tmp_path: Path
) -> None:
    folder = Path(tiny_encoder.removeprefix("local-dir:"))
    moved = folder.rename(tmp_path / "moved")
    try:
        with pytest.raises(InputError, match=r"(?s)can't be loaded: There is no open_clip_config.*local-dir:FOLDER"):
            _ = affcache.load(encoded).encoder
        model = affcache.load(encoded, model=f"local-dir:{moved}", device="cpu")
        assert model.predict_proba(np.zeros((40, 40, 3), np.uint8)).shape == (1, 8)
    finally:
        moved.rename(folder)
    other = write_tiny_encoder(tmp_path, seed=1)
    with pytest.raises(StoreError, match=r"(?s)another encoder than local-dir:.*weights_sha256: "):
        affcache.load(encoded, model=other).predict_proba(np.zeros((40, 40, 3), np.uint8))


def test_a_fitted_rule_decides_and_leaves_probabilities_as_they_are(learnable: MakeData, tmp_path: Path) -> None:
    store, annotations = learnable("expr", videos=9)
    run = tmp_path / "run"
    affcache.fit(store=store, annotations=annotations, run=run, held_out=0.3, **{**QUICK, "epochs": 3})
    affcache.score(run=run, decide="fitted", calibrate=True, smooth="mean", device="cpu")
    written = json.loads((run / "scores-fitted.json").read_text())["rule"]
    model = affcache.load(run, device="cpu")
    assert model.rule is not None
    assert json.loads(json.dumps(model.rule.to_json())) == written
    embeddings = EmbeddingStore.open(store).features[:50]
    probabilities = model.predict_proba(embeddings=embeddings)
    logits = model.logits(embeddings)
    assert np.array_equal(probabilities, torch.softmax(logits, -1).numpy())
    tempered = torch.log_softmax(logits.double() / model.rule.temperature, -1).numpy()
    expected = (tempered + np.asarray(model.rule.offsets)).argmax(axis=1)
    assert np.array_equal(model.predict(embeddings=embeddings), expected)
    assert not np.array_equal(expected, probabilities.argmax(axis=1))
    labels = np.arange(50) % 8
    assert f1_score(labels, expected, average="macro") >= 0


@pytest.mark.parametrize(
    "change",
    [
        {"width": 2}, {"width": "3"}, {"temperature": 0}, {"temperature": float("nan")}, {"offsets": [0.0] * 7},
        {"offsets": ["a"] * 8}, {"smooth": "most"}, {"fitted_on": 3}, {"optimistic": None},
    ],
)  # fmt: skip
def test_a_damaged_rule_is_refused(encoded: Path, change: dict[str, Any]) -> None:
    rule = replace(DecisionRule(), fitted_on="somewhere", offsets=(0.0,) * 8).to_json()
    epoch = TrainedHead.open(encoded).epoch
    path = encoded / "scores-fitted.json"
    path.write_text(json.dumps({"task": "expr", "epoch": epoch, "rule": rule}))
    assert affcache.load(encoded).rule == replace(DecisionRule(), fitted_on="somewhere", offsets=(0.0,) * 8)
    path.write_text(json.dumps({"task": "expr", "epoch": epoch + 1, "rule": rule}))
    assert affcache.load(encoded).rule is None, "it is of another head"
    path.write_text(json.dumps({"task": "expr", "epoch": epoch, "rule": {**rule, **change}}))
    with pytest.raises(StoreError, match=r"scores-fitted\.json has no rule that can be read"):
        _ = affcache.load(encoded).rule


def broken_embeddings() -> np.ndarray[Any, Any]:
    values = np.zeros((9000, 24))
    values[8500, 3] = np.nan
    return values


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, r"Neither images nor embeddings were given\. Expected one"),
        ({"images": [], "embeddings": np.zeros((1, 24))}, r"Both images and embeddings were given"),
        ({"embeddings": np.zeros((1, 23))}, r"of shape \(1, 23\)\. Expected .* shape \(n, 24\), of .*: local-dir:"),
        ({"embeddings": np.zeros(24)}, r"of shape \(24,\)"),
        ({"embeddings": np.zeros((1, 24), np.uint8)}, r"Embeddings are uint8 .*images go without the name"),
        ({"embeddings": broken_embeddings()}, r"nan or inf in it, the first is embedding 8,500"),
        ({"images": ["nowhere.jpg"]}, r"nowhere\.jpg can't be read: No such file"),
        ({"images": [np.zeros((9, 9))]}, r"A crop is float64 of shape \(9, 9\)"),
    ],
)
def test_what_is_no_input_is_refused(encoded: Path, given: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        affcache.load(encoded, device="cpu").predict_proba(**given)


def test_what_is_no_model_is_refused(encoded: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no run folder that can be read"):
        affcache.load(tmp_path / "none")
    with pytest.raises(ConfigError, match="--device tpu"):
        affcache.load(encoded, device="tpu")
    with pytest.raises(ConfigError, match=r"batch_size is 0\. Expected at least 1"):
        affcache.load(encoded).predict_proba([], batch_size=0)
    assert isinstance(affcache.load(str(encoded)), Model)


def test_the_card_of_a_run_says_what_is_known(encoded: Path) -> None:
    assert "Not measured: the run was not scored" in affcache.load(encoded).card
    scores = affcache.score(run=encoded, device="cpu").scores
    card = affcache.load(encoded).card
    assert card.startswith("---\nlicense: unknown\nlibrary_name: affcache\n")
    assert f"macro F1 **{scores.value:.3f}**" in card
    assert all(f"| {name} |" in card for name in TASKS["expr"].classes)
    assert str(encoded.parent) not in card, "no folder of this machine"


@pytest.mark.parametrize("head", ["mlp", "linear"])
def test_a_face_is_said_the_same_of_whatever_stands_beside_it(learnable: MakeData, tmp_path: Path, head: str) -> None:
    store, annotations = learnable()
    affcache.fit(
        head=head, store=store, annotations=annotations, run=tmp_path / "run", **{**QUICK, "hidden_width": 200}
    )
    model = affcache.load(tmp_path / "run", device="cpu")
    embeddings = np.random.default_rng(0).normal(size=(3000, 16)).astype(np.float16)
    expected = model.predict_proba(embeddings=embeddings)
    for rows in ([7], [2999, 0, 1500], list(range(100, 400)), list(range(2999, -1, -1))):
        assert np.array_equal(model.predict_proba(embeddings=embeddings[rows]), expected[rows]), len(rows)
