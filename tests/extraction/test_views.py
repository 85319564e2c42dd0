"""The flipped view: mirrored crops in a second matrix beside the first, row for row, resumable like it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from affcache import EmbeddingStore, ExtractSettings, StoreError, extract
from affcache.crops.images import mirrored
from affcache.store.description import fingerprint
from affcache.store.writing import create_store
from tests.conftest import crop_list, write_crops, write_store, write_tiny_encoder
from tests.extraction.test_extract import Recorder

VIDEOS = {"a": [1, 2, 5], "b": range(1, 26)}  # 28 rows


@pytest.fixture
def settings(tmp_path: Path, tiny_encoder: str) -> ExtractSettings:
    crops = write_crops(tmp_path / "crops", VIDEOS)
    return ExtractSettings(
        crops=(crops,), store=tmp_path / "s.h5", model=tiny_encoder, precision="fp32", batch_size=4, view="flip"
    )


def test_mirroring() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert mirrored(pixels)[1, 0].tolist() == pixels[1, 3].tolist()
    np.testing.assert_array_equal(mirrored(mirrored(pixels)), pixels)
    assert mirrored(pixels).flags.c_contiguous


def test_the_view_holds_the_embeddings_of_mirrored_crops(settings: ExtractSettings, tmp_path: Path) -> None:
    (tmp_path / "crops" / "a" / "00002.jpg").write_bytes(b"")
    result = extract(settings)
    assert (result.view, result.store) == ("flip", str(tmp_path / "s.h5"))
    assert result.view_store == str(tmp_path / "s.flip.h5")
    assert (result.rows, result.encoded, result.unreadable) == (28, 27, 1)
    store = EmbeddingStore.open(result.store)
    flipped = store.view("flip")
    store.verify()
    flipped.verify()
    assert store.views == ["flip"]
    assert store.status.tolist() == flipped.status.tolist()
    for path in (tmp_path / "crops").rglob("*.jpg"):  # mirrored on disk, without another compression
        if path.stat().st_size:
            Image.fromarray(mirrored(np.array(Image.open(path)))).save(path.with_suffix(".png"))
        else:
            path.with_suffix(".png").touch()
        path.unlink()
    extract(settings, store=tmp_path / "mirrored.h5", view="plain")
    np.testing.assert_array_equal(EmbeddingStore.open(tmp_path / "mirrored.h5").features, flipped.features)
    assert (flipped.features != store.features).any(axis=1)[store.status == 1].all()


def test_it_can_be_made_later_and_leaves_the_store_alone(settings: ExtractSettings, tmp_path: Path) -> None:
    extract(settings, view="plain")
    before = (tmp_path / "s.h5").read_bytes()
    with pytest.raises(StoreError, match=r"has no view 'flip': expected it in .*s\.flip\.h5\. Make it with"):
        EmbeddingStore.open(tmp_path / "s.h5").view("flip")
    assert extract(settings).encoded_now == 28
    assert (tmp_path / "s.h5").read_bytes() == before
    assert extract(settings).encoded_now == 0


def test_a_view_keeps_its_own_batch_size(settings: ExtractSettings, tmp_path: Path) -> None:
    extract(settings, view="plain")
    with pytest.raises(KeyboardInterrupt):
        extract(settings, batch_size=3, listener=Recorder(interrupt_at=9))
    fields = {name: value for name, value in vars(settings).items() if name != "batch_size"}
    assert extract(ExtractSettings(**fields)).batch_size == 3
    assert extract(ExtractSettings(**fields), view="plain").batch_size == 4


@pytest.mark.parametrize("stop", [8, 28, 36, 52])  # crops of both views
def test_an_interrupted_view_continues_to_the_same_bytes(settings: ExtractSettings, tmp_path: Path, stop: int) -> None:
    class StopAfter(Recorder):
        crops = 0

        def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
            self.crops += 4 * (unit == "crop")
            if self.crops >= stop:
                raise KeyboardInterrupt

    extract(settings, store=tmp_path / "whole.h5")
    with pytest.raises(KeyboardInterrupt):
        extract(settings, listener=StopAfter())
    extract(settings)
    for name in ("s", "s.flip"):
        whole = tmp_path / f"{name.replace('s', 'whole', 1)}.h5"
        assert (tmp_path / f"{name}.h5").read_bytes() == whole.read_bytes()


def test_a_view_of_something_else_is_refused(settings: ExtractSettings, tmp_path: Path) -> None:
    extract(settings)
    (tmp_path / "other").mkdir()
    extract(settings, store=tmp_path / "o.h5", model=write_tiny_encoder(tmp_path / "other", seed=1))
    (tmp_path / "o.flip.h5").replace(tmp_path / "s.flip.h5")
    with pytest.raises(StoreError, match=r"s\.flip\.h5 is no view of .*s\.h5"):
        EmbeddingStore.open(tmp_path / "s.h5").view("flip")
    with pytest.raises(StoreError, match="was made with another encoder"):
        extract(settings)
    (tmp_path / "s.h5").replace(tmp_path / "s.flip.h5")  # a plain one in its place
    extract(settings, view="plain")
    with pytest.raises(StoreError, match=r"is no view of"):
        EmbeddingStore.open(tmp_path / "s.h5").view("flip")


def test_a_view_of_other_frames_is_refused(tmp_path: Path) -> None:
    features = np.ones((3, 4), np.float16)
    write_store(tmp_path / "s.h5", {"a": [1, 2, 3]}, features)
    store = EmbeddingStore.open(tmp_path / "s.h5")
    # the made-up store's own fingerprint isn't that of its description
    store = replace(store, encoder_fingerprint=fingerprint(store.encoder))
    for frames, refused in (([1, 2, 4], True), ([1, 2, 3], False)):
        crops = crop_list({"a": frames})
        (tmp_path / "s.flip.h5").unlink(missing_ok=True)
        description = {**store.encoder, "view": "flip"}
        create_store(tmp_path / "s.flip.h5", crops, 4, description, fingerprint(description))
        if refused:
            with pytest.raises(StoreError, match="is no view of"):
                store.view("flip")
        else:
            assert len(store.view("flip")) == 3
