"""The real encoder by other doors: as a checkpoint of timm, as an ONNX file, as a function; and at other sizes."""

from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

import affcache
from affcache.encoders.encoder import Encoder
from affcache.encoders.loading import load_encoder
from affcache.store.reading import EmbeddingStore
from tests.conftest import REAL

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not REAL.is_dir(), reason="the real crops are not here (../shared/real)"),
]
FACES = sorted((REAL / "cropped_aligned").glob("*/*.jpg"))[::97]


@pytest.fixture(scope="module")
def network() -> Any:
    """EfficientNet-Lite0 with real weights, as open_clip has it."""
    return open_clip.create_model(f"local-dir:{REAL / 'encoder'}").visual.eval()


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    return real_encoder().encode(FACES)


def real_encoder(**options: Any) -> Encoder:
    return load_encoder(f"local-dir:{REAL / 'encoder'}", precision="fp32", **options)


def smallest_cosine(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(ours.double(), theirs.double()).min())


def test_a_checkpoint_of_timm(network: Any, expected: torch.Tensor, tmp_path: Path) -> None:
    save_file({name: one.contiguous() for name, one in network.trunk.state_dict().items()}, tmp_path / "w.safetensors")
    said = real_encoder().preprocessing
    encoder = load_encoder(
        "timm:tf_efficientnet_lite0.in1k", str(tmp_path / "w.safetensors"),
        mean=said.mean, std=said.std, image_size=said.size, precision="fp32",
    )  # fmt: skip
    assert encoder.description["architecture"]["pooling"] == "avg"
    assert smallest_cosine(encoder.encode(FACES), expected) >= (0.9999 if said.interpolation == "bicubic" else 0.999)


def test_an_onnx_file(network: Any, expected: torch.Tensor, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    said = real_encoder().preprocessing
    torch.onnx.export(
        network, (torch.zeros(2, 3, *said.size),), tmp_path / "e.onnx", external_data=False, dynamo=True, verbose=False,
        dynamic_shapes=({0: torch.export.Dim("n", min=1)},),
    )  # fmt: skip
    encoder = load_encoder(f"onnx:{tmp_path / 'e.onnx'}", mean=said.mean, std=said.std)
    found = encoder.encode(FACES)
    assert smallest_cosine(found, expected) >= 0.999999
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("size", [112, 160])
def test_another_size_is_open_clips_own(network: Any, size: int) -> None:
    encoder = real_encoder(image_size=size)
    with torch.inference_mode():
        theirs = network(encoder.network.normalise(encoder.prepare([np.asarray(face) for face in pixels()])))
    assert smallest_cosine(encoder.encode(FACES), theirs) >= 0.99999
    assert encoder.width == 1280


def pixels() -> list[Any]:
    from affcache.crops.images import as_pixels

    return [as_pixels(face) for face in FACES]


def test_each_fifth_frame_has_the_embeddings_of_all(real_store: Path, tmp_path: Path) -> None:
    crops, model = REAL / "cropped_aligned", f"local-dir:{REAL / 'encoder'}"
    affcache.extract(crops=(crops,), store=tmp_path / "s.h5", model=model, device="cpu", every=5)
    every, fifth = EmbeddingStore.open(real_store), EmbeddingStore.open(tmp_path / "s.h5")
    kept = (every.frame_number - 1) % 5 == 0
    assert fifth.encoder_fingerprint == every.encoder_fingerprint
    assert np.array_equal(fifth.frame_number, every.frame_number[kept])
    ours, theirs = (torch.from_numpy(np.array(one)).float() for one in (fifth.features, every.features[kept]))
    assert smallest_cosine(ours, theirs) >= 0.99999
