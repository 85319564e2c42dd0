"""Stage one on real photographs with real weights, against open_clip itself."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

import affcache
from affcache.crops.folders import find_crops
from affcache.encoders.loading import load_encoder
from affcache.store.description import fingerprint
from affcache.store.reading import EmbeddingStore
from tests.conftest import REAL

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not REAL.is_dir(), reason="the real crops are not here (../shared/real)"),
]

ROWS, WIDTH = 4103, 1280


def test_every_crop_has_its_row(real_store: Path) -> None:
    store = EmbeddingStore.open(real_store)
    assert (len(store), store.width) == (ROWS, WIDTH)
    assert store.counts == {"pending": 0, "encoded": ROWS, "unreadable": 0}
    store.verify()
    rows = [
        f"{store.video_names[video]}/{frame:05d}.jpg"
        for video, frame in zip(store.video_of_rows(), store.frame_number, strict=True)
    ]
    root = REAL / "cropped_aligned"
    assert rows == sorted(path.relative_to(root).as_posix() for path in root.glob("*/*.jpg"))


def open_clips_embeddings() -> Iterator[torch.Tensor]:
    """Embed every crop with open_clip's own transform and encode_image, 16 at a time, in the order of rows."""
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{REAL / 'encoder'}")
    model = model.eval().to(memory_format=torch.channels_last)
    crops = find_crops([REAL / "cropped_aligned"])
    for first in range(0, len(crops), 16):
        paths = [crops.path(row) for row in range(first, min(first + 16, len(crops)))]
        pixels = torch.stack([preprocess(Image.open(path)) for path in paths])
        with torch.inference_mode():
            yield model.encode_image(pixels.to(memory_format=torch.channels_last))


def test_every_embedding_is_open_clips(real_store: Path) -> None:
    store = EmbeddingStore.open(real_store)
    expected = torch.cat(list(open_clips_embeddings()))
    ours = torch.from_numpy(np.array(store.features)).float()
    assert expected.shape == ours.shape
    cosine = torch.nn.functional.cosine_similarity(ours.double(), expected.double(), dim=1)
    assert cosine.min() >= 0.9999
    length = ours.norm(dim=1) / expected.norm(dim=1)
    assert (length - 1).abs().max() < 0.005


def test_the_store_knows_its_encoder(real_store: Path) -> None:
    store = EmbeddingStore.open(real_store)
    encoder = load_encoder(f"local-dir:{REAL / 'encoder'}")
    assert store.encoder_fingerprint == fingerprint(encoder.description)
    assert store.encoder["image_size"] == [224, 224]
    assert store.encoder["normalised"] is False


def test_the_same_command_finds_nothing_left_to_do(real_store: Path) -> None:
    before = real_store.read_bytes()
    result = affcache.extract(
        crops=(REAL / "cropped_aligned",), store=real_store, model=f"local-dir:{REAL / 'encoder'}", device="cpu"
    )
    assert (result.encoded, result.encoded_now) == (ROWS, 0)
    assert real_store.read_bytes() == before
