"""Fewer frames and other image sizes: the same frames in every run, and never two kinds in one store."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch

import affcache
from affcache.encoders.loading import load_described, load_encoder
from affcache.errors import ConfigError, InputError, StoreError
from affcache.store.description import fingerprint
from affcache.store.reading import EmbeddingStore
from tests.conftest import TINY_CONFIG, Heard, write_crops

VIDEOS = {"a": [1, 2, 3, 4, 6, 7], "b": range(1, 31), "c": [2, 3, 5]}


@pytest.fixture
def given(tmp_path: Path, tiny_encoder: str) -> dict[str, Any]:
    crops = write_crops(tmp_path / "crops", VIDEOS)
    return {"crops": (crops,), "model": tiny_encoder, "precision": "fp32", "device": "cpu", "batch_size": 4}


def test_each_kth_frame_by_its_number(given: dict[str, Any], tmp_path: Path) -> None:
    heard = Heard()
    affcache.extract(store=tmp_path / "whole.h5", **given)
    affcache.extract(store=tmp_path / "third.h5", every=3, listener=heard, **given)
    whole, third = (EmbeddingStore.open(tmp_path / f"{name}.h5") for name in ("whole", "third"))
    frames = {name: third.frame_number[slice(*third.video_start[v : v + 2])].tolist() for v, name in enumerate("ab")}
    assert third.video_names == ("a", "b")
    assert frames == {"a": [1, 4, 7], "b": list(range(1, 31, 3))}
    assert heard.warnings[-1:] == ["1 video without such a frame left out"]
    assert "each frame 1 + n x 3 of a video: 13 crops" in heard.messages
    assert (third.encoder["every"], "every" in whole.encoder) == (3, False)
    assert third.encoder_fingerprint == whole.encoder_fingerprint, "the encoder is the same"
    rows = [r for r in range(len(whole)) if (whole.frame_number[r] - 1) % 3 == 0 and whole.video_of_rows()[r] < 2]
    np.testing.assert_allclose(third.features, whole.features[rows], rtol=1e-2, atol=1e-3)


def test_another_k_is_refused_and_the_same_continues(given: dict[str, Any], tmp_path: Path) -> None:
    store = tmp_path / "s.h5"
    affcache.extract(store=store, every=3, view="flip", **given)
    content = store.read_bytes()
    for every, before in ((1, 3), (2, 3)):
        message = rf"was begun with --every {before}, and this is --every {every}: other frames.*Say --every {before}\."
        with pytest.raises(StoreError, match=message):
            affcache.extract(store=store, every=every, **given)
    assert affcache.extract(store=store, every=3, view="flip", **given).encoded_now == 0
    assert store.read_bytes() == content
    assert EmbeddingStore.open(store).view("flip").encoder["every"] == 3


def test_no_such_frame(given: dict[str, Any], tmp_path: Path) -> None:
    crops = write_crops(tmp_path / "others", {"a": [2, 3]})
    with pytest.raises(InputError, match=r"None of the 2 crops is of a frame 1, 6, 11, \.\.\..*Leave out --every"):
        affcache.extract(store=tmp_path / "s.h5", every=5, **{**given, "crops": (crops,)})


def test_positions_of_clip_are_interpolated(tiny_encoder: str) -> None:
    own, larger = (load_encoder(tiny_encoder, image_size=size, precision="fp32") for size in (None, 64))
    network = open_clip.create_model(tiny_encoder, force_image_size=64).eval()
    assert network.visual.positional_embedding.shape == (17, 64)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 64, 64), dtype=np.uint8))
    with torch.inference_mode():
        expected = network.encode_image(larger.network.normalise(pixels))
    assert torch.allclose(larger.network(pixels), expected, atol=1e-5)
    assert larger.description["image_size"] == [64, 64]
    assert larger.description["architecture"] == own.description["architecture"]
    assert fingerprint(larger.description) != fingerprint(own.description)
    for one in (own, larger):
        assert fingerprint(load_described(one.description, precision="fp32").description) == fingerprint(
            one.description
        )
    same = load_encoder(tiny_encoder, image_size=32, precision="fp32")
    assert same.description == own.description


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (40, r"--image-size 40 x 40: local-dir:.* cuts images into pieces of 16 x 16 pixels.*Expected a multiple"),
        ((64, 48), r"resizes by 'shortest' to 64x48"),
    ],
)
def test_sizes_of_clip_that_can_not_be_had(tiny_encoder: str, size: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_encoder(tiny_encoder, image_size=size)


def test_a_size_at_which_open_clip_fails(tiny_encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **options: Any) -> None:
        raise RuntimeError(f"size mismatch at {options['force_image_size']}")

    monkeypatch.setattr(open_clip, "create_model", fail)
    with pytest.raises(ConfigError, match=r"can't be had at --image-size 64 \(RuntimeError: size mismatch at 64\)"):
        load_encoder(tiny_encoder, image_size=64)


def test_a_store_of_another_size_is_refused(given: dict[str, Any], tmp_path: Path) -> None:
    store = tmp_path / "s.h5"
    affcache.extract(store=store, image_size=64, **given)
    with pytest.raises(StoreError, match=r"image_size: \[64, 64\] against \[32, 32\]"):
        affcache.extract(store=store, **given)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "--every is 0; expected at least 1"),
        ({"image_size": 8}, "--image-size is 8; expected at least 16 and at most 2048"),
        ({"mean": "0.5,0.5"}, "--mean is '0.5,0.5'; expected three numbers, such as 0.485,0.456,0.406"),
        ({"mean": "a,b,c"}, "--mean is 'a,b,c'; expected three numbers"),
        ({"std": "0,1,1"}, "--std is '0,1,1'; expected three numbers"),
        ({"std": "nan,1,1"}, "--std is 'nan,1,1'; expected three numbers"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        affcache.ExtractSettings(**settings)


def test_the_doctor_and_extract_say_what_a_large_input_costs(given: dict[str, Any], tmp_path: Path) -> None:
    heard = Heard()
    del given["model"]
    large = {**given, "model": "timm:convnext_atto", "pretrained": "random:0", "image_size": 352}
    affcache.extract(store=tmp_path / "s.h5", every=10, listener=heard, **large)
    remark = "it looks at 352 x 352 pixels, 2.5 times as many as at 224 x 224"
    assert any(text.startswith(remark) for text in heard.messages)
    large.pop("precision")
    result = affcache.doctor(store=tmp_path / "s.h5", every=10, **large)
    (finding,) = [check.finding for check in result.checks if check.name == "model"]
    assert f"; {remark}" in finding


def test_a_size_of_its_own_that_is_no_multiple_is_loaded_again(tmp_path: Path) -> None:
    config = {
        **TINY_CONFIG,
        "model_cfg": {**TINY_CONFIG["model_cfg"]},
    }  # as SigLIP's SO400M, 384 pixels in pieces of 14
    config["model_cfg"]["vision_cfg"] = {**TINY_CONFIG["model_cfg"]["vision_cfg"], "image_size": 40}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    encoder = load_encoder(f"local-dir:{tmp_path}", "random:0", precision="fp32")
    assert encoder.description["image_size"] == [40, 40]
    assert load_described(encoder.description, precision="fp32").description == encoder.description
