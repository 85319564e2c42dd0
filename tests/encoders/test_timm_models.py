"""Networks of timm: timm's own embeddings of the whole crop, with the right weights, sizes and words."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from affcache.encoders.encoder import Encoder
from affcache.encoders.loading import load_encoder
from affcache.encoders.timm_models import pooling_of
from affcache.errors import ConfigError, InputError
from affcache.store.description import fingerprint

VIT, CONVNEXT, EFFICIENTNET = "vit_tiny_patch16_224", "convnext_atto", "efficientnet_lite0"
DINOV2, SIGLIP = "vit_small_patch14_dinov2", "vit_base_patch16_siglip_224"
SIZES = [(112, 112), (112, 112), (90, 130), (300, 240), (40, 40)]


@pytest.fixture(autouse=True)
def few_threads(one_thread: None) -> None:
    """Small networks: threads would wait for one another."""


def faces() -> list[npt.NDArray[np.uint8]]:
    random = np.random.default_rng(0)
    coarse = [
        random.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in SIZES
    ]  # noise alone is nearly grey when small
    return [
        np.asarray(Image.fromarray(one).resize(size[::-1], Image.Resampling.BICUBIC))
        for one, size in zip(coarse, SIZES, strict=True)
    ]


def timms_own(encoder: Encoder, name: str, seed: int, **options: Any) -> torch.Tensor:
    """Embed the faces with a network that timm made, on timm's own transform without the cut."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = timm.create_model(name, pretrained=False, num_classes=0, **options).eval()
    config = timm.data.resolve_model_data_config(network, args={"img_size": encoder.preprocessing.size[0]})
    transform = timm.data.create_transform(**{**config, "crop_pct": 1.0, "crop_mode": "squash"})
    with torch.inference_mode():
        return torch.stack([network(transform(Image.fromarray(face))[None])[0] for face in faces()])


@pytest.mark.parametrize(
    ("name", "size", "options", "width", "pooling"),
    [
        (VIT, 224, {}, 192, "token"),
        (VIT, 96, {"img_size": 96}, 192, "token"),
        (CONVNEXT, 224, {}, 320, "avg"),
        (EFFICIENTNET, 224, {}, 1280, "avg"),
        (EFFICIENTNET, 112, {}, 1280, "avg"),
        (DINOV2, 56, {"img_size": 56}, 384, "token"),
        (SIGLIP, 32, {"img_size": 32}, 768, "map"),
    ],
)
def test_embeddings_are_timms_own_of_the_whole_crop(
    name: str, size: int, options: dict[str, Any], width: int, pooling: str
) -> None:
    encoder = load_encoder(f"timm:{name}", "random:3", image_size=size, precision="fp32")
    found, expected = encoder.encode(faces()), timms_own(encoder, name, 3, **options)
    assert found.shape == (len(SIZES), width)
    assert torch.nn.functional.cosine_similarity(found.double(), expected.double()).min() >= 0.9999
    assert (found.norm(dim=1) / expected.norm(dim=1) - 1).abs().max() < 0.005
    assert encoder.description["architecture"] == {"name": name, "pooling": pooling, "output": "before the classifier"}
    assert encoder.description["image_size"] == [size, size]
    assert encoder.description["resize"].startswith("squash ")


def test_chin_and_forehead_are_seen() -> None:
    encoder = load_encoder(f"timm:{VIT}", "random:0", image_size=32, precision="fp32")
    assert timm.get_pretrained_cfg(VIT).crop_pct < 1, "timm itself would cut this network's images"
    face = np.full((112, 112, 3), 128, np.uint8)
    other = face.copy()
    other[-4:] = 0
    plain, marked = encoder.encode([face, other])
    assert (plain - marked).abs().max() > 1e-3


def test_the_size_of_dinov2_is_its_own_unless_said_and_part_of_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    from affcache.encoders import loading, timm_models

    monkeypatch.setattr(timm_models.timm, "create_model", lambda *_, **options: Recorder(options))
    (own, asked) = (loading.load_weights(f"timm:{DINOV2}.lvd142m", "", image_size=size) for size in (None, 224))
    assert own.description["image_size"] == [518, 518]
    assert own.tower.options == {"pretrained": True, "num_classes": 0}
    assert asked.tower.options == {"pretrained": True, "num_classes": 0, "img_size": (224, 224)}
    assert fingerprint(own.description) != fingerprint(asked.description)
    assert (own.description["licence"], own.description["model"]) == ("apache-2.0", f"timm:{DINOV2}.lvd142m")
    assert fingerprint({**own.description, "licence": "mit"}) == fingerprint(own.description)
    again = loading.load_weights(f"timm:{DINOV2}", "", image_size=[518, 518])  # as load_described says it
    assert again.description == own.description


class Recorder(torch.nn.Module):
    """Stands in for a network whose weights would be fetched."""

    global_pool = "token"

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))


def test_a_checkpoint_file_without_and_with_its_classifier(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        trained = timm.create_model(CONVNEXT, pretrained=False, num_classes=8)
    save_file(trained.state_dict(), tmp_path / "weights.safetensors")
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "weights.pth")
    trained.reset_classifier(0)
    save_file(trained.state_dict(), tmp_path / "without.safetensors")
    encoders = [
        load_encoder(f"timm:{CONVNEXT}.d2_in1k", str(tmp_path / name), image_size=64, precision="fp32")
        for name in ("weights.safetensors", "weights.pth", "without.safetensors")
    ]
    assert len({one.description["weights_sha256"] for one in encoders}) == 1
    state = encoders[0].network.tower.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in trained.state_dict().items())
    assert "licence" not in encoders[0].description, "a file's licence isn't that of timm's weights"


def test_positions_of_a_checkpoint_are_interpolated(tmp_path: Path) -> None:
    network = timm.create_model(VIT, pretrained=False, num_classes=0)
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    name = f"timm:{VIT}.augreg_in21k"
    small, large = (load_encoder(name, str(tmp_path / "weights.safetensors"), image_size=s) for s in (64, None))
    assert small.network.tower.pos_embed.shape == (1, 17, 192)
    assert torch.equal(large.network.tower.pos_embed.float(), network.pos_embed.to(torch.bfloat16).float()) or (
        large.precision == "fp32"
    )
    assert small.description["weights_sha256"] != large.description["weights_sha256"]


@pytest.mark.parametrize("damage", ["missing", "another", "none"])
def test_a_checkpoint_that_does_not_fit(tmp_path: Path, damage: str) -> None:
    state = timm.create_model(CONVNEXT, pretrained=False, num_classes=8).state_dict()
    if damage == "missing":
        del state["stages.0.blocks.0.norm.weight"]
    if damage == "another":
        state = timm.create_model(VIT, pretrained=False).state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    if damage == "none":
        (tmp_path / "weights.safetensors").write_bytes(b"no weights")
    with pytest.raises(
        InputError, match=rf"weights.safetensors doesn't fit timm:{CONVNEXT}.*a classifier may be in it"
    ):
        load_encoder(f"timm:{CONVNEXT}.d2_in1k", str(tmp_path / "weights.safetensors"))


@pytest.mark.parametrize(
    ("name", "pretrained", "options", "message"),
    [
        (
            "vit_tiny_patch16_225",
            "",
            {},
            r"no network 'vit_tiny_patch16_225' \(did you mean 'vit_tiny_patch16_224'\?\)",
        ),
        ("convnext_atto.d2_in1", "", {}, r"no weights 'd2_in1' of convnext_atto \(did you mean 'd2_in1k'\?\)"),
        (
            "vit_tiny_patch16_224",
            "",
            {},
            r"timm has \d+ sets of weights of vit_.*Expected one to be said: timm:.*augreg_in21k",
        ),
        ("vit_tiny_patch16_224", "openai", {}, r"timm has \d+ sets of weights"),
        ("coatnet_0_224", "", {}, "timm has 0 sets of weights of coatnet.*be said: --pretrained FILE or random:SEED"),
        ("vit_tiny_patch16_224", "augreg_in21k", {}, "augreg_in21k is no file.*of timm's weights the name tells which"),
        ("vit_tiny_patch16_224", "random:x", {}, "expected random:SEED with a whole number"),
        ("vit_tiny_patch16_224", "random:0", {"image_size": 100}, "pieces of 16 x 16 pixels.*Expected a multiple"),
        ("vit_tiny_patch16_224", "random:0", {"activation": "gelu"}, "--activation is gelu, but timm:"),
        ("tf_efficientnet_lite0", "random:0", {"mean": (1, 2)}, "mean is .*expected three numbers"),
        ("tf_efficientnet_lite0", "random:0", {"std": (1, 2, 0)}, "std is .*expected three numbers"),
    ],
)
def test_what_can_not_be_had_is_said(name: str, pretrained: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_encoder(f"timm:{name}", pretrained, **options)


def test_a_checkpoint_says_what_it_was_trained_from_where_timms_weights_differ(tmp_path: Path) -> None:
    (tmp_path / "weights.pth").touch()
    with pytest.raises(ConfigError, match=r"has mean .* std .*; .*Say the weights that it is, or was trained from"):
        load_encoder("timm:vit_base_patch16_224", str(tmp_path / "weights.pth"))


def test_a_size_that_the_network_refuses_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **options: Any) -> None:
        raise AssertionError("no such size")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(ConfigError, match=r"can't be had at --image-size \(64, 64\) \(AssertionError: no such size\)"):
        load_encoder(f"timm:{VIT}", "random:0", image_size=64)
    with pytest.raises(InputError, match=r"could not be loaded \(AssertionError.*--pretrained FILE"):
        load_encoder(f"timm:{VIT}.augreg_in21k")


def test_a_network_that_takes_no_such_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def small(*_: Any, **options: Any) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 40), torch.nn.Flatten())

    monkeypatch.setattr(timm, "create_model", small)
    with pytest.raises(ConfigError, match=r"takes no images of 32 x 32 pixels \(RuntimeError.*Leave out --image-size"):
        load_encoder(f"timm:{CONVNEXT}", "random:0", image_size=32)


def test_tokens_that_are_not_pooled_are_no_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    build = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **options: build(*a, **{**options, "global_pool": ""}))
    with pytest.raises(InputError, match=r"of shape \(1, 5, 192\) of 1 crops\. Expected \(1, D\): a pooled embedding"):
        load_encoder(f"timm:{VIT}", "random:0", image_size=32)


def test_normalisation_may_be_said() -> None:
    usual = load_encoder(f"timm:{CONVNEXT}", "random:0", image_size=32, precision="fp32")
    said = load_encoder(f"timm:{CONVNEXT}", "random:0", image_size=32, mean=(0, 0, 0), std=(1, 1, 1), precision="fp32")
    assert (said.description["mean"], said.preprocessing.std) == ([0, 0, 0], (1, 1, 1))
    assert all(isinstance(value, float) for value in said.description["mean"]), "as the command line says them"
    assert fingerprint(said.description) != fingerprint(usual.description)
    assert not torch.allclose(said.encode(faces()), usual.encode(faces()))


def test_pooling_is_named_wherever_it_lies() -> None:
    assert pooling_of(torch.nn.Flatten()) == "of its own"
    assert pooling_of(Recorder({})) == "token"
