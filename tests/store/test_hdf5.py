"""What a store file says of its structure is believed only as far as the file bears it out."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from affcache.errors import StoreError
from affcache.store import hdf5
from affcache.store.description import fingerprint
from affcache.store.reading import EmbeddingStore
from affcache.store.writing import create_store
from tests.conftest import NAMED_ONLY, crop_list, write_store

VIDEOS = {"a": [1, 2, 3], "b_left": [4], "ü": [1]}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    features = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float16)
    return write_store(tmp_path / "s.h5", VIDEOS, features).path


def refused(path: Path, why: str) -> None:
    with pytest.raises(StoreError, match=why):
        EmbeddingStore.open(path)


def test_checksum_against_the_one_that_its_author_gives() -> None:
    assert hdf5.lookup3(b"Four score and seven years ago") == 0x17770551


@pytest.mark.parametrize("videos", [1, 8, 500])
def test_names_and_places_are_those_that_hdf5_finds(tmp_path: Path, videos: int) -> None:
    names = {f"{'é' * (video % 90)}{video:04d}": [1, 2] for video in range(videos)}
    encoder = {"model": "m" * 3000, "width": 7}
    create_store(tmp_path / "s.h5", crop_list(names), 7, encoder, fingerprint(encoder))
    store = EmbeddingStore.open(tmp_path / "s.h5")
    with h5py.File(tmp_path / "s.h5") as file:
        assert store.video_names == tuple(file["video_name"].asstr()[:])
        assert store.encoder == json.loads(file.attrs["encoder"])
        for name in ("features", "status", "frame_number", "video_start", "block_checksum"):
            array = getattr(store, name)
            assert isinstance(array, np.memmap)
            assert (array.offset, array.shape) == (file[name].id.get_offset(), file[name].shape)


def external(file: h5py.File) -> None:
    del file["video_name"]
    secret = Path(file.filename).with_name("secret")
    secret.write_bytes(b"secret")
    file.create_dataset("video_name", (6,), "S1", external=[(str(secret), 0, 6)])


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout(shape=(5,), dtype="u1")
    layout[:] = h5py.VirtualSource(file.filename, "frame_number", shape=(5,))
    del file["status"]
    file.create_virtual_dataset("status", layout)


def linked(file: h5py.File) -> None:
    del file["status"]
    file["status"] = h5py.SoftLink("/block_checksum")


def linked_elsewhere(file: h5py.File) -> None:
    del file["status"]
    file["status"] = h5py.ExternalLink("other.h5", "/status")


def packed(file: h5py.File) -> None:
    names = file["video_name"][:]
    del file["video_name"]
    file.create_dataset("video_name", data=names, compression="gzip")


@pytest.mark.parametrize("change", [external, virtual, linked, linked_elsewhere, packed])
def test_what_no_store_has_is_refused(store: Path, change: Callable[[h5py.File], None]) -> None:
    with h5py.File(store, "r+", libver="v110") as file:
        change(file)
    refused(store, "no store at all")


SHAPES = {
    "features": [(15,), (5, 3, 1), (4, 3)],
    "status": [(5, 1), (6,)],
    "frame_number": [(4,)],
    "video_start": [(5,)],
    "block_checksum": [(2,)],
    "video_name": [(2,)],
}


@pytest.mark.parametrize(("name", "shape"), [(name, shape) for name in SHAPES for shape in SHAPES[name]])
def test_lengths_and_ranks_that_do_not_belong_together(store: Path, name: str, shape: tuple[int, ...]) -> None:
    with h5py.File(store, "r+", libver="v110") as file:
        dtype = file[name].dtype
        del file[name]
        values = np.full(shape, "v", object) if name == "video_name" else np.zeros(shape, dtype)
        file.create_dataset(name, data=values, dtype=h5py.string_dtype() if name == "video_name" else dtype)
    refused(store, "of shape|the shape")


@pytest.mark.parametrize("value", [[1, 2], 1.5, "[]", "[" * 100_000, '{"model":' + "9" * 5000 + "}", np.bytes_("{}")])
def test_an_encoder_of_another_kind(store: Path, value: object) -> None:
    with h5py.File(store, "r+", libver="v110") as file:
        file.attrs["encoder"] = value
    refused(store, "can't be read as an embedding store")


def test_an_encoder_that_its_fingerprint_is_not_of(store: Path) -> None:
    contents = store.read_bytes()
    store.write_bytes(contents.replace(b'"precision":"fp32"', b'"precision":"fp16"'))
    refused(store, "the description of its encoder doesn't match its fingerprint")


def test_further_attributes_and_datasets_are_left_alone(store: Path) -> None:
    before = EmbeddingStore.open(store).features[:]
    with h5py.File(store, "r+") as file:
        file.attrs["note"] = np.arange(3)
        file.create_dataset("mine", data=np.zeros(10), chunks=True, compression="gzip")
    after = EmbeddingStore.open(store)
    after.verify()
    np.testing.assert_array_equal(after.features[:], before)


def test_one_text_named_again_and_again_is_not_read_as_often(tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    create_store(path, crop_list({f"{video:02d}" + "n" * 3000: [1] for video in range(20)}), 3, {}, NAMED_ONLY)
    with h5py.File(path) as file:
        offset, videos = file["video_name"].id.get_offset(), len(file["video_name"])
    contents = bytearray(path.read_bytes())
    contents[offset : offset + 16 * videos] = contents[offset : offset + 16] * videos
    path.write_bytes(contents)
    with path.open("rb", buffering=0) as file:
        found = hdf5.StoreFile(file)
        names = found.dataset("video_name")
        assert set(found.texts(names)) == {"00" + "n" * 3000}
        with pytest.raises(ValueError, match="more text than a store has"):
            [found.texts(names) for _ in range(10)]


def test_no_flipped_bit_of_the_structure_hangs_or_passes(store: Path) -> None:
    """Above all in the global heap, which has no checksum: there libhdf5 may loop for ever."""
    sound = store.read_bytes()
    before, start = EmbeddingStore.open(store), time.monotonic()
    heaps = [at for at in range(0, len(sound), 4096) if sound[at : at + 4] == b"GCOL"]
    assert heaps
    passed = 0
    for at in [*range(48), *(heap + byte for heap in heaps for byte in range(400)), *range(4096, 4300)]:
        changed = bytearray(sound)
        changed[at] ^= 1 << at % 8
        store.write_bytes(changed)
        try:
            opened = EmbeddingStore.open(store)
            opened.verify()
        except StoreError:
            continue
        passed += 1
        assert (opened.video_names, opened.encoder_fingerprint) == (before.video_names, before.encoder_fingerprint)
    assert passed < 600, "what is free in the heap"
    assert time.monotonic() - start < 20
