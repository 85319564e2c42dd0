"""A head as ONNX: what onnxruntime makes of it is what torch makes of it, and what isn't is refused."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import affcache
from affcache.errors import ConfigError, InputError, StoreError
from affcache.prediction import onnx_export
from affcache.prediction.model import Model
from affcache.prediction.onnx_export import HeadGraph, export_graphs
from affcache.tasks.tasks import TASKS
from affcache.training.learner import build_head
from affcache.training.settings import FitSettings
from tests.conftest import Heard, make_learnable, write_crops, write_labels

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
QUICK: dict[str, Any] = {"epochs": 1, "hidden_layers": 2, "hidden_width": 16, "batch_size": 16, "device": "cpu"}


def answers(path: Path, array: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    """Return what onnxruntime makes of an array."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return list(session.run(None, {given.name: array}))


@pytest.fixture(scope="module")
def published(tiny_encoder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with crops, a store, a run of the tiny encoder, and its head with its graphs in head/."""
    folder = tmp_path_factory.mktemp("graphs")
    crops = write_crops(folder / "crops", {"a": range(1, 9), "b": range(1, 9)})
    affcache.extract(crops=crops, store=folder / "f.h5", model=tiny_encoder, precision="fp32", device="cpu")
    for split, video in (("train", "a"), ("validation", "b")):
        write_labels(folder / "labels", "expr", split, {video: [0, 1, 2, 3, 4, 5, 6, 7]})
    given = {"store": folder / "f.h5", "annotations": folder / "labels"}
    affcache.fit(run=folder / "run", **given, **{**QUICK, "epochs": 3, "batch_size": 4})
    affcache.publish(run=folder / "run", out=folder / "head", onnx=True)
    return folder


@pytest.mark.parametrize(
    ("task", "head", "normalize"),
    [("expr", "mlp", "l2"), ("au", "mlp", "none"), ("va", "linear", "l2"), ("au", "ridge", "none")],
)
def test_embeddings_have_the_heads_probabilities(tmp_path: Path, task: str, head: str, normalize: str) -> None:
    store, annotations = make_learnable(tmp_path, task)
    given = {"task": task, "head": head, "normalize": normalize, "store": store, "annotations": annotations}
    affcache.fit(run=tmp_path / "run", **given, **QUICK)
    listener = Heard()
    result = affcache.publish(run=tmp_path / "run", out=tmp_path / "head", onnx=True, listener=listener)
    assert list(result.onnx) == ["embeddings.onnx"]
    assert any("There is no pixels.onnx: what made the embeddings isn't known" in text for text in listener.warnings)
    assert 0 <= result.onnx["embeddings.onnx"] <= 1e-5
    embeddings = np.random.default_rng(1).normal(size=(100, 16)).astype(np.float16).astype(np.float32)
    expected = affcache.load(tmp_path / "run", device="cpu").predict_proba(embeddings=embeddings)
    assert np.abs(expected).max() > 0.01
    for count in (1, 7, 100):
        (found,) = answers(tmp_path / "head" / "embeddings.onnx", embeddings[:count])
        assert found.shape == (count, TASKS[task].outputs)
        np.testing.assert_allclose(found, expected[:count], rtol=0, atol=1e-5)


def test_pixels_have_the_models_probabilities(published: Path) -> None:
    head, model = published / "head", affcache.load(published / "run", device="cpu")
    images = [np.asarray(Image.open(path)) for path in sorted((published / "crops").rglob("*.jpg"))]
    pixels = model.encoder.prepare(images).contiguous().numpy()
    assert (pixels.dtype, pixels.shape) == (np.uint8, (16, 3, 32, 32))
    for count in (1, 3, 16):
        probabilities, embeddings = answers(head / "pixels.onnx", pixels[:count])
        np.testing.assert_allclose(probabilities, model.predict_proba(images[:count]), rtol=0, atol=1e-5)
        assert np.array_equal(embeddings, embeddings.astype(np.float16)), "rounded, as a store's"
        np.testing.assert_allclose(embeddings, model.embed(images[:count]), rtol=2e-3, atol=1e-4)
    config = json.loads((head / "config.json").read_text())["onnx"]
    assert config["pixels.onnx"]["input"] == {"shape": ["n", 3, 32, 32], "type": "uint8"}
    assert config["embeddings.onnx"]["input"] == {"shape": ["n", 24], "type": "float32"}
    assert all(0 <= facts["largest_difference"] <= 1e-5 for facts in config.values())
    assert config["pixels.onnx"]["smallest_cosine_of_embeddings"] > 0.9999
    card = (head / "README.md").read_text()
    assert "- `pixels.onnx`: uint8 (n, 3, 32, 32) to probabilities (n, C); at most " in card


def test_pixels_onnx_is_an_encoder_by_itself(published: Path) -> None:
    encoder = affcache.load_encoder(f"onnx:{published / 'head' / 'pixels.onnx'}")
    model = affcache.load(published / "run", device="cpu")
    images = sorted((published / "crops").rglob("*.jpg"))
    np.testing.assert_allclose(encoder.encode(images).numpy(), model.embed(images), rtol=2e-3, atol=1e-4)
    assert encoder.description["resize"] == model.encoder.description["resize"]
    assert encoder.preprocessing.size == (32, 32)


def test_a_head_on_an_onnx_file_has_no_pixels_onnx(published: Path, tmp_path: Path) -> None:
    model = f"onnx:{published / 'head' / 'pixels.onnx'}"
    crops, labels = published / "crops", published / "labels"
    affcache.extract(crops=crops, store=tmp_path / "f.h5", model=model, device="cpu")
    affcache.fit(run=tmp_path / "run", store=tmp_path / "f.h5", annotations=labels, **{**QUICK, "batch_size": 4})
    heard = Heard()
    result = affcache.publish(run=tmp_path / "run", out=tmp_path / "head", onnx=True, listener=heard)
    assert list(result.onnx) == ["embeddings.onnx"]
    assert "There is no pixels.onnx: its encoder is an ONNX file already." in heard.warnings
    path = crops / "a" / "00001.jpg"
    expected = affcache.load(tmp_path / "run", device="cpu").predict_proba(path)
    assert np.array_equal(affcache.load(tmp_path / "head", device="cpu", model=model).predict_proba(path), expected)
    assert str(published) not in (tmp_path / "head" / "config.json").read_text()
    with pytest.raises(InputError, match=r'(?s)There is no ONNX file pixels.onnx.*model="onnx:FILE"'):
        affcache.load(tmp_path / "head", device="cpu").embed(path)


def test_graphs_say_nothing_of_this_machine(published: Path, tiny_encoder: str) -> None:
    names = [str(published), tiny_encoder.partition(":")[2], str(Path(affcache.__file__).parents[1]), sys.prefix]
    for path in (published / "head").iterdir():
        assert not [name for name in names if name.encode() in path.read_bytes()], path


def test_a_head_from_a_folder_without_a_public_name_says_how_its_encoder_is_given(
    published: Path, tiny_encoder: str
) -> None:
    model = affcache.load(published / "head", model=tiny_encoder, device="cpu")
    path = published / "crops" / "a" / "00001.jpg"
    run = affcache.load(published / "run", device="cpu")
    assert np.array_equal(model.predict_proba(path), run.predict_proba(path))
    assert "Say where they lie on your machine" in " ".join(model.card.split())


@pytest.mark.parametrize("name", ["embeddings.onnx", "pixels.onnx"])
@pytest.mark.parametrize("where", [0.2, 0.99])
def test_a_changed_byte_of_a_graph_is_an_error_that_names_it(published: Path, name: str, where: float) -> None:
    path = published / "head" / name
    content = path.read_bytes()
    position = int(where * len(content))
    try:
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        with pytest.raises(StoreError, match=rf"{name} is not as it was published: its sha256 is"):
            affcache.load(published / "head")
        path.unlink()
        with pytest.raises(StoreError, match=rf"{name} is not as it was published: it is missing"):
            affcache.load(published / "head")
    finally:
        path.write_bytes(content)
    affcache.load(published / "head")


def test_graphs_are_not_fetched_from_the_hub(published: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("README.md", "config.json", "head.safetensors"):
        (tmp_path / name).write_bytes((published / "head" / name).read_bytes())
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **options: str(tmp_path))
    assert affcache.load("hf-hub:a/b").classes == TASKS["expr"].classes
    (tmp_path / "pixels.onnx").write_bytes(b"another")
    with pytest.raises(StoreError, match=r"pixels\.onnx is not as it was published"):
        affcache.load("hf-hub:a/b")


class Wrong(HeadGraph):
    """Another head than it says."""

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        return super().forward(embeddings) + (1e-4 if torch.compiler.is_exporting() else 0)


@pytest.mark.parametrize("encoder", [False, True])
def test_a_graph_that_differs_from_torch_is_not_published(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder: bool
) -> None:
    if encoder:  # the alone one is right, the one behind the encoder isn't
        made: list[Any] = [HeadGraph, Wrong]
        monkeypatch.setattr(onnx_export, "HeadGraph", lambda trained: made.pop(0)(trained))
    else:
        monkeypatch.setattr(onnx_export, "HeadGraph", Wrong)
    name = "pixels" if encoder else "embeddings"
    with pytest.raises(
        ConfigError, match=rf"{name}\.onnx computes something else than torch: a probability is 0\.0001"
    ):
        affcache.publish(run=published / "run", out=tmp_path / "out", onnx=True)
    assert not list(tmp_path.iterdir())


def test_an_encoder_that_differs_from_torch_is_not_published(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "smallest_cosine", lambda ours, theirs: float("nan"))
    with pytest.raises(ConfigError, match=r"pixels\.onnx computes .*: an embedding has a cosine of nan"):
        affcache.publish(run=published / "run", out=tmp_path / "out", onnx=True)


def test_what_torch_can_not_export_is_said(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, embeddings: torch.Tensor) -> torch.Tensor:
        return embeddings if embeddings.sum() > 0 else -embeddings

    monkeypatch.setattr(HeadGraph, "forward", forward)
    with pytest.raises(ConfigError, match=r"embeddings\.onnx can't be made: .*Publish without --onnx"):
        affcache.publish(run=published / "run", out=tmp_path / "out", onnx=True)


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_without_the_extra_it_says_how_to_install_it(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=r"--onnx asks for packages .*pip install 'affcache\[onnx\]'"):
        affcache.publish(run=published / "run", out=tmp_path / "out", onnx=True)
    assert not list(tmp_path.iterdir())
    affcache.publish(run=published / "run", out=tmp_path / "out")


def test_many_weights_lie_beside_the_graph(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "LARGEST_FILE", 100_000)
    result = affcache.publish(run=published / "run", out=tmp_path / "head", onnx=True)
    beside = tmp_path / "head" / "pixels.onnx.data"
    assert {"pixels.onnx", beside.name} <= set(result.files)
    images = [np.asarray(Image.open(published / "crops" / "a" / "00001.jpg"))]
    model = affcache.load(published / "run", device="cpu")
    moved = (tmp_path / "head").rename(tmp_path / "moved")
    found = answers(moved / "pixels.onnx", model.encoder.prepare(images).contiguous().numpy())[0]
    np.testing.assert_allclose(found, model.predict_proba(images), rtol=0, atol=1e-5)
    affcache.load(moved)
    (moved / beside.name).write_bytes(b"")
    with pytest.raises(StoreError, match=r"pixels\.onnx\.data is not as it was published"):
        affcache.load(moved)


def test_the_head_may_be_as_large_as_the_published_one(published: Path, tmp_path: Path) -> None:
    """768 units, and the values that a trained one has."""
    from dataclasses import replace

    trained = affcache.load(published / "run", device="cpu").trained
    torch.manual_seed(0)
    large = build_head(FitSettings(), trained.width, trained.task)
    large.train()(torch.randn(64, trained.width) * 3)
    facts = export_graphs(Model(replace(trained, head=large.eval())), tmp_path)
    assert all(of["largest_difference"] <= 1e-5 for of in facts.values())
