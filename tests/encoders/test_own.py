"""An encoder of the user's own is one like all others; and what is wrong with it is said in words."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision

import affcache
from affcache.crops.images import Preprocessing
from affcache.encoders.loading import load_described, load_encoder
from affcache.errors import AffcacheError, ConfigError, InputError
from affcache.store.description import fingerprint
from affcache.store.reading import EmbeddingStore
from tests.conftest import write_crops, write_labels
from tests.encoders import my_encoder

HERE = "python:tests.encoders.my_encoder"


def crops(count: int = 3) -> list[np.ndarray[Any, Any]]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (40, 40, 3), dtype=np.uint8) for _ in range(count)]


def test_embeddings_are_the_modules() -> None:
    encoder = load_encoder(f"{HERE}:build", precision="fp32")
    network, prepared, _ = my_encoder.build()
    mean, std = (torch.tensor(prepared[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.inference_mode():
        expected = network((encoder.prepare(crops()).float() / 255 - mean) / std)
    assert torch.allclose(encoder.encode(crops()), expected, atol=1e-6)
    assert encoder.description["architecture"] == {"name": "my own", "version": 1}
    assert (encoder.description["licence"], encoder.description["image_size"]) == ("mit", [32, 32])
    assert encoder.description["resize"] == "squash bicubic antialias"


def test_what_changes_its_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(**more: Any) -> str:
        network, prepared, description = my_encoder.build()
        if more.pop("weights", False):
            next(network.parameters()).data += 1
        prepared = {**prepared, **more.pop("prepared", {})}
        monkeypatch.setattr(my_encoder, "another", lambda: (network, prepared, {**description, **more}), raising=False)
        return fingerprint(load_encoder(f"{HERE}:another", precision="fp32").description)

    assert said() == fingerprint(load_encoder(f"{HERE}:build", precision="fp32").description) == said(licence="gpl")
    changed = [said(version=2), said(weights=True), said(prepared={"size": 40}), said(prepared={"mean": (0, 0, 0)})]
    assert len({said(), *changed}) == 5


def test_a_preprocessing_may_be_affcaches_own(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = Preprocessing((32, 24), "squash", "bilinear", (0.5,) * 3, (0.5,) * 3)
    monkeypatch.setattr(my_encoder, "another", lambda: (my_encoder.Odd(), prepared, {}), raising=False)
    assert load_encoder(f"{HERE}:another").preprocessing == prepared


def test_a_module_that_can_not_be_cast_stays_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("affcache.encoders.loading.fast_precisions", lambda device: ("bf16",))
    assert load_encoder(f"{HERE}:exact").precision == "fp32"
    with pytest.raises(
        InputError, match=r"The module of python:.*exact failed of a tensor bfloat16.*my_encoder.py, line"
    ):
        load_encoder(f"{HERE}:exact", precision="bf16").encode(crops())


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (":nothing", ConfigError, r"has no function 'nothing'. Expected a function without arguments"),
        (":bild", ConfigError, r"has no function 'bild' \(did you mean 'build'\?\)"),
        ("_:build", ConfigError, r"Python finds no module 'tests.encoders.my_encoder_'. .*PYTHONPATH=FOLDER"),
        ("", ConfigError, r"names no function. Expected python:package.module:function"),
        (":raises", InputError, r"raises failed: RuntimeError: no weights here \(my_encoder.py, line \d+\)"),
        (":wants_more", InputError, r"wants_more failed: TypeError: wants_more\(\) missing 1 required"),
        (":alone", InputError, r"alone returned Odd. Expected .* that returns three things"),
        (":no_module", InputError, r"The first thing that .*no_module returned is function"),
        (":no_preprocessing", InputError, r"The preprocessing that .*no_preprocessing returned is dict"),
        (
            ":odd_preprocessing",
            InputError,
            r"can't be used: 'crop' is none of size, .*size is 0, .*mean is \[1, 2\], .*std is .*interpolation is 'n",
        ),
        (":no_description", InputError, r"The description that .* returned is str, which JSON can't hold"),
        (
            ":odd_description",
            InputError,
            r"The description that .* is dict, which JSON can't hold \(Object of type Tensor",
        ),
        (":tokens", InputError, r"of shape \(1, 3, 1024\) of 1 crops. Expected \(1, D\)"),
        (":rows", InputError, r"of shape \(0, 3\) of 1 crops. Expected \(1, D\)"),
        (
            ":integers",
            InputError,
            r"made a tensor int64 \(2, 3\) of a tensor float32 \(2, 3, 32, 32\). Expected a tensor",
        ),
        (":numpy", InputError, r"made ndarray of a tensor float32 \(2, 3, 32, 32\)"),
        (":noise", InputError, "makes other embeddings of the same images the second time"),
        (":of_255", ConfigError, r"which aren't of values in \[0, 1\].* Divide them by 255"),
        (":without_size", InputError, "returned is dict without size"),
    ],
)
def test_what_is_wrong_is_said(function: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_encoder(f"{HERE}{function}", precision="fp32")


def test_a_module_that_can_not_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_encoder.py").write_text("import torch\n\n1 / 0\n")
    (tmp_path / "lacking_encoder.py").write_text("import not_installed_here\n")
    monkeypatch.syspath_prepend(tmp_path)
    message = r"Importing broken_encoder failed: ZeroDivisionError: division by zero \(broken_encoder.py, line 3\)"
    with pytest.raises(InputError, match=message):
        load_encoder("python:broken_encoder:build")
    with pytest.raises(
        InputError, match=r"Importing lacking_encoder failed: ModuleNotFoundError: No module named 'not_"
    ):
        load_encoder("python:lacking_encoder:build")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 64}, "encodes images of 32 x 32 pixels, as it says itself. Expected no --image-size"),
        ({"pretrained": "random:0"}, "--pretrained is random:0, but python:"),
        ({"activation": "gelu"}, "--activation is gelu, but python:"),
    ],
)
def test_flags_that_are_not_for_it(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_encoder(f"{HERE}:build", **options)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("width", r"made embeddings of shape \(16, \d+\) of 16 crops. Expected \(16, \d+\): .* always as wide"),
        ("fails_later", r"The module of .*fails_later failed of a tensor float32 \(.*\): ValueError: no more"),
    ],
)
def test_a_module_that_goes_wrong_on_the_way(tmp_path: Path, function: str, message: str) -> None:
    crops = write_crops(tmp_path / "crops", {"a": range(1, 81)})
    with pytest.raises(InputError, match=message):
        affcache.extract(
            crops=(crops,), store=tmp_path / "s.h5", model=f"{HERE}:{function}", precision="fp32", device="cpu"
        )


def test_a_head_on_it_loads_it_only_where_it_is_named(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    crops = write_crops(tmp_path / "crops", {"a": range(1, 9), "b": range(1, 9)})
    model = f"{HERE}:build"
    affcache.extract(crops=(crops,), store=tmp_path / "s.h5", model=model, device="cpu")
    for split, video in (("train", "a"), ("validation", "b")):
        write_labels(tmp_path / "labels", "expr", split, {video: [0, 1, 2, 3, 4, 5, 6, 7]})
    given = {"store": tmp_path / "s.h5", "annotations": tmp_path / "labels", "device": "cpu"}
    affcache.fit(run=tmp_path / "run", epochs=1, hidden_layers=0, batch_size=4, **given)
    affcache.publish(run=tmp_path / "run", out=tmp_path / "head", data="noise", license="mit", onnx=True)
    assert not (tmp_path / "head" / "pixels.onnx").exists()
    card = " ".join((tmp_path / "head" / "README.md").read_text().split())
    assert "Its licence: mit (the encoder's own description)" in card
    assert "It has no public name" in card
    store = EmbeddingStore.open(tmp_path / "s.h5")
    for run in ("run", "head"):
        with pytest.raises(InputError, match=r"is code that runs here. Expected you to name it: say --model python:"):
            affcache.load(tmp_path / run, device="cpu").embed(crops / "a" / "00001.jpg")
        found = affcache.load(tmp_path / run, device="cpu", model=model).embed(crops / "a" / "00001.jpg")
        np.testing.assert_allclose(found[0], store.features[0], rtol=2e-2, atol=1e-3)
    with pytest.raises(ConfigError, match="if you trust it"):
        load_described(store.encoder)


def test_errors_of_its_own_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise StopIteration

    def ours() -> None:
        raise AffcacheError("said already")

    monkeypatch.setattr(my_encoder, "another", ours, raising=False)
    with pytest.raises(AffcacheError, match=r"^said already$"):
        load_encoder(f"{HERE}:another")
    monkeypatch.setattr(my_encoder, "another", refuse, raising=False)
    with pytest.raises(InputError, match="failed: StopIteration: StopIteration"):
        load_encoder(f"{HERE}:another")


def test_the_function_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "encoders.md").read_text(encoding="utf-8")
    block = page.partition("```python\n")[2].partition("```")[0]
    assert len([line for line in block.splitlines() if line.strip()]) <= 10
    (tmp_path / "encoder_of_the_docs.py").write_text(block)
    network = torchvision.models.resnet18()
    torch.save(network.state_dict(), tmp_path / "my_weights.pt")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    encoder = load_encoder("python:encoder_of_the_docs:build", precision="fp32")
    assert (encoder.width, encoder.description["licence"]) == (512, "mit")
