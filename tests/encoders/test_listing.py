"""affcache encoders: names that load, with what will come of them, and nothing fetched."""

import pytest
import timm
import torch

import affcache
from affcache.encoders import listing
from affcache.encoders.loading import load_encoder
from affcache.errors import ConfigError
from tests.conftest import Heard


@pytest.fixture(autouse=True)
def nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: object, **options: object) -> None:
        raise AssertionError("a list fetches nothing")

    monkeypatch.setattr("huggingface_hub.file_download.hf_hub_download", fetch)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)


def test_widths_sizes_and_licences() -> None:
    found = {one.model: one for one in affcache.list_encoders(word=("dinov2", "small")).encoders}
    one = found["timm:vit_small_patch14_dinov2.lvd142m"]
    assert (one.pretrained, one.width, one.image_size, one.licence) == ("", 384, (518, 518), "apache-2.0")
    assert all("dinov2" in name and "small" in name for name in found)
    (clip,) = [one for one in affcache.list_encoders(word=("OpenAI", "vit-l-14")).encoders if one.model == "ViT-L-14"]
    assert (clip.pretrained, clip.width, clip.image_size, clip.licence) == ("openai", 768, (224, 224), "MIT")


@pytest.mark.parametrize(
    "name",
    ["tf_efficientnet_lite0", "mobilenetv3_small_050", "ghostnet_100", "efficientvit_b0", "inception_next_atto",
     "swin_tiny_patch4_window7_224", "mambaout_femto", "convnext_atto", "hgnetv2_b0"],
)  # fmt: skip
def test_the_width_is_that_of_the_embeddings(name: str, one_thread: None) -> None:
    encoder = load_encoder(f"timm:{name}", "random:0", precision="fp32")
    assert listing._width(name) == encoder.width


def test_too_many_to_be_built_have_no_width() -> None:
    heard = Heard()
    result = affcache.list_encoders(listener=heard)
    assert len(result.encoders) > 1500
    assert {one.width for one in result.encoders if one.model.startswith("timm:")} == {None}
    assert all(one.width for one in result.encoders if not one.model.startswith("timm:"))
    assert heard.messages == ["widths of timm's are looked up for at most 80 networks: say a WORD"]
    assert result.to_json()["encoders"][0].keys() == {"model", "pretrained", "width", "image_size", "licence"}


def test_a_network_that_can_not_be_built_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **options: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(timm, "create_model", fail)
    assert affcache.list_encoders(word=("convnext_atto",)).encoders[0].width is None


def test_no_such_name() -> None:
    with pytest.raises(
        ConfigError, match=r"No encoder has 'dinov2' and 'clipp' in its name. Expected a part of a name"
    ):
        affcache.list_encoders(word=("dinov2", "clipp"))
    with pytest.raises(ConfigError, match="WORD is empty"):
        affcache.list_encoders(word=("",))
