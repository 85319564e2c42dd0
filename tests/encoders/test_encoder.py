"""The frozen encoder: equal to open_clip's own, in order, and known by a fingerprint of what changes its numbers."""

import json
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from affcache.encoders.encoder import DTYPES, Encoder
from affcache.encoders.loading import load_encoder
from affcache.errors import InputError
from affcache.store.description import differing_fields, fingerprint
from affcache.tasks.tasks import TASKS
from tests.conftest import TINY_CONFIG, write_store, write_tiny_encoder

SIZES = [(40, 40), (32, 32), (112, 112), (50, 40), (40, 50), (40, 40), (33, 90), (112, 112)]


def crops_of(sizes: list[tuple[int, int]], seed: int = 0) -> list[npt.NDArray[np.uint8]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def cosine(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=1)


@pytest.fixture(scope="module")
def encoder(tiny_encoder: str) -> Encoder:
    return load_encoder(tiny_encoder, precision="fp32")


def test_embeddings_equal_open_clips_own(tiny_encoder: str, encoder: Encoder) -> None:
    model, preprocess = open_clip.create_model_from_pretrained(tiny_encoder)
    crops = crops_of(SIZES)
    with torch.inference_mode():
        expected = model.eval().encode_image(torch.stack([preprocess(Image.fromarray(crop)) for crop in crops]))
    ours = encoder.encode(crops)
    assert ours.shape == (len(SIZES), 24) == (len(SIZES), encoder.width)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    assert cosine(ours, expected).min() > 0.999999
    assert (ours.norm(dim=1) - 1).abs().min() > 1e-3  # not normalised


def test_the_activation_reaches_the_embeddings(tiny_encoder: str) -> None:
    """The trap that this package closes: the same weights with QuickGELU are open_clip's with QuickGELU."""
    crops = crops_of(SIZES[:3])
    ours = load_encoder(tiny_encoder, activation="quick_gelu", precision="fp32").encode(crops)
    model, preprocess = open_clip.create_model_from_pretrained(tiny_encoder, force_quick_gelu=True)
    with torch.inference_mode():
        expected = model.eval().encode_image(torch.stack([preprocess(Image.fromarray(crop)) for crop in crops]))
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    assert (ours - load_encoder(tiny_encoder, precision="fp32").encode(crops)).abs().max() > 1e-3


def test_a_batch_of_mixed_sizes_keeps_its_order(encoder: Encoder) -> None:
    crops = crops_of(SIZES)
    one_by_one = torch.cat([encoder.encode([crop]) for crop in crops])
    torch.testing.assert_close(encoder.encode(crops), one_by_one, rtol=1e-4, atol=1e-4)
    order = [5, 0, 7, 3, 1, 6, 2, 4]
    torch.testing.assert_close(encoder.encode([crops[i] for i in order]), one_by_one[order], rtol=1e-4, atol=1e-4)


def test_nothing_is_left_to_train(encoder: Encoder) -> None:
    assert not encoder.network.training
    assert not any(parameter.requires_grad for parameter in encoder.network.parameters())
    assert not encoder.encode(crops_of([(40, 40)])).requires_grad


@pytest.mark.parametrize(("precision", "least"), [("bf16", 0.999), ("fp16", 0.9999)])
def test_lower_precision_stays_close(tiny_encoder: str, encoder: Encoder, precision: str, least: float) -> None:
    low = load_encoder(tiny_encoder, precision=precision)
    assert {parameter.dtype for parameter in low.network.parameters()} == {DTYPES[precision]}
    crops = crops_of(SIZES)
    embeddings = low.encode(crops)
    assert embeddings.dtype == torch.float32
    assert cosine(embeddings, encoder.encode(crops)).min() > least
    assert (embeddings != encoder.encode(crops)).any()


def test_coca_gives_its_pooled_embedding(tmp_path: Path) -> None:
    """Its image tower returns (pooled, tokens)."""
    config = json.loads(json.dumps(TINY_CONFIG))
    config["model_cfg"]["vision_cfg"] |= {"attentional_pool": True, "attn_pooler_heads": 1, "output_tokens": True}
    config["model_cfg"]["text_cfg"] |= {"embed_cls": True, "output_tokens": True}
    config["model_cfg"]["multimodal_cfg"] = {
        "context_length": 8, "vocab_size": 16, "width": 24, "heads": 1, "layers": 1, "attn_pooler_heads": 1
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CoCa(**config["model_cfg"])
    config["model_cfg"]["custom_text"] = True
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "open_clip_model.safetensors")
    encoder = load_encoder(f"local-dir:{tmp_path}", precision="fp32")
    crops = crops_of([(32, 32), (32, 32)])
    with torch.inference_mode():
        pixels = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)
        expected = model.eval().encode_image(encoder.network.normalise(pixels), normalize=False)
    torch.testing.assert_close(encoder.encode(crops), expected, rtol=1e-3, atol=1e-3)


def test_description_says_how_the_numbers_came_about(tiny_encoder: str, encoder: Encoder) -> None:
    description = dict(encoder.description)
    assert json.loads(json.dumps(description)) == description
    assert description["model"] == tiny_encoder
    assert description["activation"] == "gelu"
    assert description["image_size"] == [32, 32]
    assert description["resize"] == "shortest bicubic antialias"
    assert (description["mean"], description["std"]) == ([0.48, 0.46, 0.41], [0.27, 0.26, 0.28])
    assert (description["projected"], description["normalised"], description["width"]) == (True, False, 24)
    assert description["versions"]["open_clip"] == open_clip.__version__
    assert len(description["weights_sha256"]) == 64


def test_the_same_weights_have_the_same_fingerprint_wherever_they_lie(
    tmp_path: Path, tiny_encoder: str, encoder: Encoder
) -> None:
    shutil.copytree(tiny_encoder.removeprefix("local-dir:"), tmp_path / "copy")
    copy = load_encoder(f"local-dir:{tmp_path / 'copy'}", precision="fp32")
    assert copy.description["model"] != encoder.description["model"]
    assert fingerprint(copy.description) == fingerprint(encoder.description)
    assert differing_fields(copy.description, encoder.description) == []


def test_versions_and_names_are_not_in_the_fingerprint(encoder: Encoder) -> None:
    for field in ("versions", "model", "pretrained"):
        assert fingerprint({**encoder.description, field: "another"}) == fingerprint(encoder.description)


def test_every_other_field_is_in_the_fingerprint(encoder: Encoder) -> None:
    for field in encoder.description.keys() - {"versions", "model", "pretrained"}:
        changed = {**encoder.description, field: "another"}
        assert fingerprint(changed) != fingerprint(encoder.description)
        assert differing_fields(changed, encoder.description) == [
            f"{field}: 'another' against {encoder.description[field]!r}"
        ]


def test_fingerprint_does_not_hang_on_the_order_of_fields(encoder: Encoder) -> None:
    assert fingerprint(dict(reversed(encoder.description.items()))) == fingerprint(encoder.description)


@pytest.mark.parametrize(
    ("options", "field"), [({"activation": "quick_gelu"}, "activation"), ({"precision": "bf16"}, "precision")]
)
def test_options_that_change_the_numbers(
    tiny_encoder: str, encoder: Encoder, options: dict[str, str], field: str
) -> None:
    other = load_encoder(tiny_encoder, **{"precision": "fp32", **options})
    assert fingerprint(other.description) != fingerprint(encoder.description)
    differences = [line.partition(":")[0] for line in differing_fields(encoder.description, other.description)]
    assert differences == [field]


def test_other_weights_change_the_fingerprint(tmp_path: Path, encoder: Encoder) -> None:
    other = load_encoder(write_tiny_encoder(tmp_path, seed=1), precision="fp32")
    (line,) = differing_fields(encoder.description, other.description)
    assert line.startswith("weights_sha256: '")
    assert fingerprint(other.description) != fingerprint(encoder.description)


def test_one_changed_weight_changes_the_fingerprint(tmp_path: Path, encoder: Encoder) -> None:
    name = write_tiny_encoder(tmp_path, seed=0)
    assert fingerprint(load_encoder(name, precision="fp32").description) == fingerprint(encoder.description)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = open_clip.CLIP(**TINY_CONFIG["model_cfg"]).state_dict()
    state["visual.proj"][0, 0] = torch.nextafter(state["visual.proj"][0, 0], torch.tensor(9.0))
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "open_clip_model.safetensors")
    assert fingerprint(load_encoder(name, precision="fp32").description) != fingerprint(encoder.description)


def test_weights_of_the_text_tower_do_not_matter(tmp_path: Path, encoder: Encoder) -> None:
    name = write_tiny_encoder(tmp_path, seed=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = open_clip.CLIP(**TINY_CONFIG["model_cfg"]).state_dict()
    state["token_embedding.weight"] += 1
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "open_clip_model.safetensors")
    assert fingerprint(load_encoder(name, precision="fp32").description) == fingerprint(encoder.description)


def test_missing_weights_are_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(json.dumps(TINY_CONFIG))
    with pytest.raises(InputError, match=r"could not be loaded .*--pretrained FILE .*--model local-dir:FOLDER"):
        load_encoder(f"local-dir:{tmp_path}")


def test_paths_and_pil_images_are_encoded_as_their_pixels(tiny_encoder: str, tmp_path: Path) -> None:
    encoder = load_encoder(tiny_encoder)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "lying.png", exif=exif)
    expected = encoder.encode([pixels, pixels[::-1].swapaxes(0, 1).copy()])
    found = encoder.encode([image, Image.open(tmp_path / "lying.png")])
    assert found.equal(expected)
    assert encoder.encode([tmp_path / "a.png", str(tmp_path / "lying.png")]).equal(expected)
    for single in (image, tmp_path / "a.png", str(tmp_path / "a.png")):
        assert torch.allclose(encoder.encode(single), expected[:1], atol=1e-5)
    (tmp_path / "no.png").touch()
    for wrong, message in (
        (tmp_path / "none.png", "none.png can't be read: No such file"),
        (tmp_path / "no.png", r"no.png can't be read: the file is empty \(0 bytes\)"),
        (pixels.astype(np.float32), r"A crop is float32 of shape \(40, 30, 3\). Expected a uint8 array"),
        (3, "A crop is int. Expected a uint8 array"),
    ):
        with pytest.raises(InputError, match=message):
            encoder.encode([wrong])


def test_what_is_shown_of_stores_encoders_and_tasks_is_readable(tiny_encoder: str, tmp_path: Path) -> None:
    assert repr(load_encoder(tiny_encoder, precision="fp32")) == f"<Encoder {tiny_encoder}: D = 24, fp32 on cpu>"
    store = write_store(tmp_path / "s.h5", {"a": [1, 2], "b": [1]}, np.ones((3, 4), np.float16), unreadable=[1])
    counts = "2 encoded, 1 unreadable of 3 x 4"
    assert repr(store) == f"<EmbeddingStore {tmp_path / 's.h5'}: {counts}, videos: 2, by made-up>"
    assert repr(TASKS["va"]) == "<task va: values valence, arousal; mean_ccc>"
    assert len(repr(TASKS)) < 500
