"""Building networks: the activation a set of weights needs, seeded weights, and words for what can't be had."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import open_clip
import pytest
import torch
from open_clip.transformer import QuickGELU

from affcache.encoders import open_clip as open_clip_models
from affcache.encoders.loading import load_weights
from affcache.encoders.open_clip import build_network, preprocessing_of
from affcache.errors import ConfigError, InputError
from tests.conftest import TINY_CONFIG

TINY_NAME = "affcache-tiny"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As HF_HUB_OFFLINE=1, which counts only when it is set before the first import; and no weights from a cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(scope="module")
def tiny_name(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A tiny model among open_clip's built-in names, for a while."""
    path = tmp_path_factory.mktemp("configs") / f"{TINY_NAME}.json"
    path.write_text(json.dumps(TINY_CONFIG["model_cfg"]))
    open_clip.add_model_config(path)
    yield TINY_NAME
    open_clip.factory._MODEL_CONFIG_PATHS.remove(path)
    del open_clip.factory._MODEL_CONFIGS[TINY_NAME]
    assert TINY_NAME not in open_clip.list_models()


def has_quick_gelu(network: torch.nn.Module) -> bool:
    return any(isinstance(module, QuickGELU) for module in network.modules())


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("model", "pretrained", "quick"),
    [
        ("ViT-B-32", "openai", True),
        ("ViT-L-14", "openai", True),
        ("ViT-B-32", "metaclip_400m", True),
        ("ViT-B-32", "laion2b_s34b_b79k", False),
        ("ViT-L-14", "laion2b_s32b_b82k", False),
        ("ViT-B-32-quickgelu", "openai", True),
    ],
)
def test_a_tag_decides_the_activation(
    monkeypatch: pytest.MonkeyPatch, model: str, pretrained: str, quick: bool
) -> None:
    asked: list[dict[str, Any]] = []

    def build(model: str, pretrained: str, options: dict[str, Any]) -> torch.nn.Module:
        asked.append(options)
        return torch.nn.Identity()

    monkeypatch.setattr(open_clip_models, "_build", build)  # which would fetch the weights
    for activation, expected in (("auto", quick), ("quick_gelu", True), ("gelu", False)):
        _, config = build_network(model, pretrained, activation)
        assert config["quick_gelu"] is expected
        assert asked.pop()["quick_gelu"] is expected


@pytest.mark.parametrize(("activation", "quick"), [("auto", False), ("gelu", False), ("quick_gelu", True)])
def test_the_network_has_the_activation_that_was_decided(tiny_name: str, activation: str, quick: bool) -> None:
    network, config = build_network(tiny_name, "random:0", activation)
    assert has_quick_gelu(network) is quick
    assert config["quick_gelu"] is quick


@pytest.mark.parametrize(("activation", "quick"), [("auto", False), ("quick_gelu", True)])
def test_a_folder_of_ones_own_takes_its_configuration_or_the_flag(
    tiny_encoder: str, activation: str, quick: bool
) -> None:
    network, config = build_network(tiny_encoder, "", activation)
    assert has_quick_gelu(network) is quick
    assert config["quick_gelu"] is quick


def test_a_folder_may_say_quick_gelu_itself(tmp_path: Path, tiny_encoder: str) -> None:
    source = Path(tiny_encoder.removeprefix("local-dir:"))
    config = json.loads((source / "open_clip_config.json").read_text())
    config["model_cfg"]["quick_gelu"] = True
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    (tmp_path / "open_clip_model.safetensors").write_bytes((source / "open_clip_model.safetensors").read_bytes())
    network, built = build_network(f"local-dir:{tmp_path}", "", "auto")
    assert has_quick_gelu(network)
    assert built["quick_gelu"] is True


def test_a_checkpoint_file_of_a_model_with_both_kinds_of_weights_must_say(tmp_path: Path) -> None:
    checkpoint = tmp_path / "weights.pt"
    checkpoint.touch()
    message = (
        f"The checkpoint {checkpoint} doesn't say whether it needs QuickGELU, and published weights of ViT-B-32 exist "
        "with either; the wrong one gives wrong embeddings without an error. Say --activation quick_gelu (weights of "
        "OpenAI, DFN, MetaCLIP) or --activation gelu (LAION-2B, DataComp)."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        build_network("ViT-B-32", str(checkpoint), "auto")


def test_a_checkpoint_file_is_loaded(tiny_name: str, tmp_path: Path) -> None:
    trained, _ = build_network(tiny_name, "random:5", "auto")
    torch.save(trained.state_dict(), tmp_path / "weights.pt")
    network, config = build_network(tiny_name, str(tmp_path / "weights.pt"), "auto")
    assert same_weights(network, trained)
    assert config["quick_gelu"] is False


def test_a_checkpoint_file_that_is_none(tiny_name: str, tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(b"no weights")
    with pytest.raises(InputError, match=rf"^The checkpoint .*weights.pt doesn't fit {TINY_NAME} \("):
        build_network(tiny_name, str(tmp_path / "weights.pt"), "auto")


def test_a_checkpoint_file_of_another_model_says_which_keys_and_shapes(tiny_name: str, tmp_path: Path) -> None:
    network, _ = build_network(tiny_name, "random:5", "auto")
    weights = network.state_dict()
    weights["visual.proj"] = torch.zeros(3, 3)
    weights["visual.more"] = torch.zeros(1)
    del weights["logit_scale"]
    torch.save(weights, tmp_path / "weights.pt")
    with pytest.raises(InputError) as caught:
        build_network(tiny_name, str(tmp_path / "weights.pt"), "auto")
    message = str(caught.value)
    for part in ('Missing key(s) in state_dict: "logit_scale"', '"visual.more"', "visual.proj: ", "[3, 3]", "[64, 24]"):
        assert part in message
    assert message.endswith("Expected a file of open_clip weights of that very model. Check --model and --pretrained.")
    assert "hub" not in message


DIFFERENT = [
    (
        "ViT-L-14",
        "gelu",
        "laion400m_e31 has mean (0.48145466, 0.4578275, 0.40821073), std ",
        "laion2b_s32b_b82k has mean",
    ),
    ("ViT-H-14", "quick_gelu", "metaclip_fullcc has resize_mode shortest", "dfn5b has resize_mode squash"),
    ("ViT-H-14-quickgelu", "auto", "metaclip_fullcc has resize_mode shortest", "dfn5b has resize_mode squash"),
]


@pytest.mark.parametrize(("model", "activation", "one", "other"), DIFFERENT)
def test_a_checkpoint_file_of_a_model_whose_weights_differ_in_preprocessing_must_say(
    tmp_path: Path, model: str, activation: str, one: str, other: str
) -> None:
    (tmp_path / "weights.pt").touch()
    with pytest.raises(ConfigError) as caught:
        build_network(model, str(tmp_path / "weights.pt"), activation)
    message = str(caught.value)
    assert one in message
    assert other in message
    assert message.endswith(f"or was trained from, with --pretrained TAG:{tmp_path / 'weights.pt'}.")


@pytest.mark.parametrize(
    ("model", "pretrained", "activation", "expected"),
    [
        ("ViT-L-14", "laion2b_s32b_b82k:", "auto", {"mean": (0.5, 0.5, 0.5), "quick_gelu": False}),
        ("ViT-L-14", "openai:", "auto", {"mean": (0.48145466, 0.4578275, 0.40821073), "quick_gelu": True}),
        ("ViT-L-14", "", "quick_gelu", {"mean": (0.48145466, 0.4578275, 0.40821073), "quick_gelu": True}),
        ("ViT-H-14", "dfn5b:", "auto", {"resize_mode": "squash", "quick_gelu": True}),
        ("ViT-H-14", "", "gelu", {"resize_mode": "shortest", "quick_gelu": False}),
    ],
)
def test_a_tag_beside_a_checkpoint_file_says_what_the_file_does_not(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    pretrained: str,
    activation: str,
    expected: dict[str, Any],
) -> None:
    (tmp_path / "weights.pt").touch()
    asked: list[Any] = []

    def build(model: str, pretrained: str, options: dict[str, Any]) -> torch.nn.Module:
        asked.extend((pretrained, {**options, **options["force_preprocess_cfg"]}))
        return torch.nn.Identity()

    monkeypatch.setattr(open_clip_models, "_build", build)
    build_network(model, f"{pretrained}{tmp_path / 'weights.pt'}", activation)
    assert asked[0] == str(tmp_path / "weights.pt")
    assert expected.items() <= asked[1].items()
    with pytest.raises(ConfigError, match=r"has no pretrained tag 'dfn5|neither a pretrained tag"):
        build_network(model, f"dfn5:{tmp_path / 'weights.pt'}", activation)


@pytest.mark.parametrize("pretrained", ["random:0", ""])
def test_a_text_half_that_lacks_its_package(
    tiny_name: str, tiny_encoder: str, monkeypatch: pytest.MonkeyPatch, pretrained: str
) -> None:
    def lacks(*_: Any, **options: Any) -> None:
        raise RuntimeError("Please `pip install transformers` to use pre-trained HuggingFace models")

    monkeypatch.setattr(open_clip_models.open_clip, "create_model", lacks)
    with pytest.raises(InputError, match=r"package transformers.*Install it with 'pip install transformers'"):
        build_network(tiny_name if pretrained else tiny_encoder, pretrained, "auto")


def test_a_seed_decides_the_weights(tiny_name: str) -> None:
    first, again, other = (build_network(tiny_name, f"random:{seed}", "auto")[0] for seed in (3, 3, 4))
    assert same_weights(first, again)
    assert not same_weights(first, other)


def test_seeded_weights_leave_the_global_generator_alone(tiny_name: str) -> None:
    before = torch.random.get_rng_state()
    build_network(tiny_name, "random:3", "auto")
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("seed", ["", "x", "-1", "1.5", str(2**63)])
def test_a_seed_that_is_none(tiny_name: str, seed: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--pretrained random:{seed}: expected random:SEED with a whole number"):
        build_network(tiny_name, f"random:{seed}", "auto")


def test_an_unknown_model_has_a_suggestion() -> None:
    with pytest.raises(ConfigError) as caught:
        build_network("ViT-B-33", "openai", "auto")
    assert str(caught.value) == (
        "open_clip has no model 'ViT-B-33' (did you mean 'ViT-B-32'?). Expected one that 'affcache encoders WORD' "
        "lists, hf-hub:owner/name, local-dir:path, timm:NAME, onnx:FILE or python:module:function."
    )


@pytest.mark.parametrize("model", ["resnet10t.c3_in1k", "/data/face.onnx", "face.onnx#pooled", "my_encoder:build"])
def test_a_name_of_another_kind_is_known_for_it(model: str) -> None:
    kind = "timm" if model.startswith("resnet") else "onnx" if ".onnx" in model else "python"
    with pytest.raises(ConfigError, match=rf"open_clip has no model .*did you mean '{kind}:{model}'\?"):
        load_weights(model, "random:0")


def test_an_unknown_tag_has_a_suggestion_and_the_choice() -> None:
    with pytest.raises(ConfigError) as caught:
        build_network("ViT-B-32", "laion2b_s34b_b79", "auto")
    assert "neither a pretrained tag of ViT-B-32 (did you mean 'laion2b_s34b_b79k'?) nor a file" in str(caught.value)
    assert "Expected one of openai, " in str(caught.value)
    assert str(caught.value).endswith("the path of a checkpoint, or random:SEED.")


def test_a_model_without_published_weights(tiny_name: str) -> None:
    with pytest.raises(ConfigError, match=r"Expected one of \(this model has none\), the path of a checkpoint"):
        build_network(tiny_name, "openai", "auto")


WAYS_OUT = (
    "Without a network, fetch the weights elsewhere and say --pretrained FILE with an open_clip checkpoint, or "
    "--model local-dir:FOLDER with open_clip_config.json and the weights in it."
)


@pytest.mark.parametrize("missing", ["folder", "configuration", "weights"])
def test_a_local_folder_that_lacks_something(tmp_path: Path, missing: str) -> None:
    folder = tmp_path / "encoder"
    if missing != "folder":
        folder.mkdir()
    if missing == "weights":
        (folder / "open_clip_config.json").write_text(json.dumps(TINY_CONFIG))
    with pytest.raises(InputError) as caught:
        build_network(f"local-dir:{folder}", "", "auto")
    message = str(caught.value)
    if missing == "weights":
        assert message.startswith(f"The weights of local-dir:{folder} could not be loaded (")
        assert message.endswith(WAYS_OUT)
    else:
        assert message.startswith(f"There is no open_clip_config.json in the folder of --model local-dir:{folder}. ")


@pytest.mark.parametrize(("model", "pretrained"), [("ViT-B-32", "openai"), ("hf-hub:nobody/nothing", "")])
def test_weights_that_no_network_brings(model: str, pretrained: str) -> None:
    with pytest.raises(InputError) as caught:
        build_network(model, pretrained, "auto")
    what = f"{model} / {pretrained}" if pretrained else model
    assert str(caught.value).startswith(f"The weights of {what} could not be loaded (")
    assert str(caught.value).endswith(WAYS_OUT)


def with_preprocessing(network: torch.nn.Module, **values: object) -> torch.nn.Module:
    config = {**open_clip.get_model_preprocess_cfg(network), **values}
    open_clip.factory.set_model_preprocess_cfg(network, config)
    return network


def test_preprocessing_is_read_from_the_network(tiny_encoder: str) -> None:
    network, _ = build_network(tiny_encoder, "", "auto")
    preprocessing = preprocessing_of(network)
    assert preprocessing.size == (32, 32)
    assert (preprocessing.resize_mode, preprocessing.interpolation) == ("shortest", "bicubic")
    assert (preprocessing.mean, preprocessing.std) == ((0.48, 0.46, 0.41), (0.27, 0.26, 0.28))


@pytest.mark.parametrize(("said", "meant"), [("bilinear", "bilinear"), ("bicubic", "bicubic"), ("random", "bicubic")])
def test_interpolation_as_open_clip_reads_it(tiny_name: str, said: str, meant: str) -> None:
    network = with_preprocessing(build_network(tiny_name, "random:0", "auto")[0], interpolation=said)
    assert preprocessing_of(network).interpolation == meant


@pytest.mark.parametrize(("mode", "size"), [("longest", (32, 32)), ("shortest", (32, 48))])
def test_resizing_that_affcache_does_not_do(tiny_name: str, mode: str, size: tuple[int, int]) -> None:
    network = with_preprocessing(build_network(tiny_name, "random:0", "auto")[0], resize_mode=mode, size=size)
    with pytest.raises(ConfigError, match=f"^This model resizes by '{mode}' to {size[0]}x{size[1]}, which affcache"):
        preprocessing_of(network)


def test_squash_may_have_two_sizes(tiny_name: str) -> None:
    network = with_preprocessing(build_network(tiny_name, "random:0", "auto")[0], resize_mode="squash", size=(32, 48))
    assert preprocessing_of(network).size == (32, 48)
