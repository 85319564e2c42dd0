"""The store's format as other programs see it, what is refused, and what verify finds."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

import h5py
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from affcache.errors import StoreError
from affcache.store.description import fingerprint
from affcache.store.reading import BLOCK_ROWS, EmbeddingStore, block_bounds, block_crc
from affcache.store.writing import StoreWriter, create_store
from tests.conftest import NAMED_ONLY, crop_list, write_store

VIDEOS = {"a": range(1, 6001), "b_left": range(0, 4000, 2), "c": [7, 9, 2**31 - 1]}  # 8003 rows, two blocks
ROWS, WIDTH = 8003, 3
UNREADABLE_ROWS = (0, 4096, 8002)
GOLDEN = Path(__file__).parents[1] / "data" / "golden-store-format-1.h5"


def features_of(rows: int, width: int, seed: int = 0) -> npt.NDArray[np.float16]:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float16)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store of two blocks; tests that change it take a copy."""
    path = tmp_path_factory.mktemp("store") / "sound.h5"
    write_store(path, VIDEOS, features_of(ROWS, WIDTH), UNREADABLE_ROWS)
    return path


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(sound, tmp_path / "copy.h5"))


@pytest.fixture
def pending(tmp_path: Path) -> Path:
    path = tmp_path / "pending.h5"
    create_store(path, crop_list({"a": range(10)}), 4, {"model": "m"}, NAMED_ONLY)
    return path


def flip(path: Path, dataset: str, index: int, difference: int = 0x55) -> None:
    """Change one byte of a dataset, behind everybody's back."""
    with path.open("r+b") as file:
        position = getattr(EmbeddingStore.open(path), dataset).offset + index
        file.seek(position)
        value = file.read(1)[0]
        file.seek(position)
        file.write(bytes([value ^ difference]))


def test_format_1_seen_with_plain_h5py(sound: Path) -> None:
    features = features_of(ROWS, WIDTH)
    features[list(UNREADABLE_ROWS)] = 0
    with h5py.File(sound, "r") as file:
        assert set(file.attrs) == {"format", "format_version", "encoder", "encoder_fingerprint", "index_sha256"}
        assert file.attrs["format"] == "affcache-embeddings"
        assert file.attrs["format_version"] == 1
        assert json.loads(file.attrs["encoder"])["model"] == "made-up"
        assert file.attrs["encoder_fingerprint"] == fingerprint(json.loads(file.attrs["encoder"]))
        expected = {
            "features": ("<f2", (ROWS, WIDTH)),
            "status": ("u1", (ROWS,)),
            "frame_number": ("<i4", (ROWS,)),
            "video_start": ("<i8", (4,)),
            "block_checksum": ("<u4", (2,)),
        }
        assert set(file) == {*expected, "video_name"}
        for name, (dtype, shape) in expected.items():
            assert file[name].dtype == np.dtype(dtype)
            assert file[name].shape == shape
            assert file[name].chunks is None
            assert file[name].id.get_offset() % 4096 == 0
        np.testing.assert_array_equal(file["features"][:], features)
        statuses = np.ones(ROWS, dtype=np.uint8)
        statuses[list(UNREADABLE_ROWS)] = 2
        np.testing.assert_array_equal(file["status"][:], statuses)
        np.testing.assert_array_equal(file["frame_number"][:], np.concatenate([np.array(v) for v in VIDEOS.values()]))
        assert file["video_name"].asstr()[:].tolist() == ["a", "b_left", "c"]
        assert file["video_start"][:].tolist() == [0, 6000, 8000, 8003]
        blocks = [features[:4096].tobytes(), features[4096:].tobytes()]
        assert file["block_checksum"][:].tolist() == [crc32(block) for block in blocks]


def test_encoder_is_canonical_json(tmp_path: Path) -> None:
    create_store(tmp_path / "s.h5", crop_list({"a": [1]}), 2, {"b": [1, 2.5], "a": {"d": None, "c": "é"}}, NAMED_ONLY)
    with h5py.File(tmp_path / "s.h5", "r") as file:
        assert file.attrs["encoder"] == '{"a":{"c":"\\u00e9","d":null},"b":[1,2.5]}'


def test_a_new_store_is_all_pending_and_all_zero(pending: Path) -> None:
    with h5py.File(pending, "r") as file:
        assert not file["features"][:].any()
        assert not file["status"][:].any()
        assert not file["block_checksum"][:].any()
        assert file["frame_number"][:].tolist() == list(range(10))


def test_reading_through_the_memory_map_equals_hdf5(sound: Path) -> None:
    store = EmbeddingStore.open(str(sound))
    with h5py.File(sound, "r") as file:
        for name in ("features", "status", "frame_number", "video_start", "block_checksum"):
            array = getattr(store, name)
            assert isinstance(array, np.memmap)
            assert not array.flags.writeable
            np.testing.assert_array_equal(array, file[name][:])
            assert array.dtype == file[name].dtype
        assert store.video_names == tuple(file["video_name"].asstr()[:])
        assert store.encoder == json.loads(file.attrs["encoder"])
        assert store.encoder_fingerprint == file.attrs["encoder_fingerprint"]


def test_what_a_store_says_of_itself(sound: Path) -> None:
    store = EmbeddingStore.open(sound)
    assert (len(store), store.width) == (ROWS, WIDTH)
    assert store.counts == {"pending": 0, "encoded": 8000, "unreadable": 3}
    np.testing.assert_array_equal(store.video_of_rows(), np.repeat([0, 1, 2], [6000, 2000, 3]))
    summary = store.summary()
    assert summary == json.loads(json.dumps(summary))
    assert (summary["rows"], summary["width"], summary["videos"]) == (ROWS, WIDTH, 3)
    assert (summary["encoded"], summary["unreadable"], summary["complete"]) == (8000, 3, True)
    assert summary["bytes"] == os.path.getsize(sound)  # noqa: PTH202  # another way than the code's
    store.require_complete()
    store.verify()


def test_fingerprint_changes_with_the_contents(tmp_path: Path) -> None:
    features = features_of(4, 2)
    other = features.copy()
    other[3, 1] += 1
    stores = [
        write_store(tmp_path / "1.h5", {"a": [1, 2], "b": [1, 2]}, features),
        write_store(tmp_path / "2.h5", {"a": [1, 2], "b": [1, 2]}, other),
        write_store(tmp_path / "3.h5", {"a": [1, 2], "b": [1, 3]}, features),
        write_store(tmp_path / "4.h5", {"a": [1, 2], "c": [1, 2]}, features),
        write_store(tmp_path / "5.h5", {"a": [1, 2], "b": [1, 2]}, features, unreadable=[3]),
        write_store(tmp_path / "6.h5", {"a": [1], "b": [0, 1, 2]}, features),
    ]
    assert len({store.fingerprint() for store in stores}) == len(stores)
    again = write_store(tmp_path / "elsewhere.h5", {"a": [1, 2], "b": [1, 2]}, features)
    assert again.fingerprint() == stores[0].fingerprint()


def test_an_incomplete_store(pending: Path) -> None:
    with StoreWriter(pending) as writer:
        writer.commit(0, np.zeros((3, 4), np.float16), np.full(3, 2, np.uint8))
    store = EmbeddingStore.open(pending)
    assert store.counts == {"pending": 7, "encoded": 0, "unreadable": 3}
    assert store.summary()["complete"] is False
    start = f"{pending} is incomplete: 7 of 10 rows are still to be encoded."
    forward = (
        " An extraction is running on it, or one was interrupted: run the same 'affcache extract' again and it "
        "continues where it stopped."
    )
    whole = " No damage was found, and 0 of 1 blocks are whole."
    for check, said in ((store.require_complete, ""), (store.verify, whole)):
        with pytest.raises(StoreError) as caught:
            check()
        assert str(caught.value) == start + said + forward


def test_no_such_file(tmp_path: Path) -> None:
    path = tmp_path / "none.h5"
    for missing in (path, tmp_path):
        with pytest.raises(StoreError) as caught:
            EmbeddingStore.open(missing)
        assert str(caught.value) == (
            f"There is no embedding store at {missing}. Make one with 'affcache extract --store {missing}', or say "
            'where it is with --store FILE or with store = "..." in affcache.toml.'
        )


@pytest.mark.parametrize("contents", [b"", b"\x89PNG\r\n", b"no HDF5 at all\n" * 1000], ids=["empty", "png", "text"])
def test_no_hdf5_file(tmp_path: Path, contents: bytes) -> None:
    (tmp_path / "s.h5").write_bytes(contents)
    with pytest.raises(
        StoreError, match=r"can't be read as an embedding store: .*Check the path.*delete it and extract again"
    ):
        EmbeddingStore.open(tmp_path / "s.h5")


def test_an_hdf5_file_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    with h5py.File(path, "w") as file:
        file["features"] = np.zeros((3, 4), np.float16)
    with pytest.raises(StoreError, match=r"no store at all .*superblock version 0: not laid out as a store is"):
        EmbeddingStore.open(path)


def test_another_format(copy: Path) -> None:
    with h5py.File(copy, "r+") as file:
        file.attrs["format"] = "faces"
    with pytest.raises(StoreError) as caught:
        EmbeddingStore.open(copy)
    assert str(caught.value) == (
        f"{copy} is an HDF5 file but no embedding store: its attribute 'format' is 'faces', expected "
        "'affcache-embeddings'. Make a store with 'affcache extract --store FILE'."
    )


@pytest.mark.parametrize("version", [0, 2])
def test_another_format_version(copy: Path, version: int) -> None:
    with h5py.File(copy, "r+") as file:
        file.attrs["format_version"] = version
    with pytest.raises(StoreError) as caught:
        EmbeddingStore.open(copy)
    assert str(caught.value) == (
        f"{copy} has store format version {version}; this affcache reads version 1. Use the affcache version that "
        "wrote it, or delete it and extract again."
    )


@pytest.mark.parametrize("dataset", ["features", "status", "frame_number", "video_start", "block_checksum"])
@pytest.mark.parametrize("fault", ["missing", "wrong type", "chunked", "other byte order"])
def test_a_dataset_that_is_not_as_the_format_says(copy: Path, dataset: str, fault: str) -> None:
    with h5py.File(copy, "r+") as file:
        values = file[dataset][:]
        del file[dataset]
        if fault == "wrong type":
            file[dataset] = values.astype(np.float64)
        elif fault == "chunked":
            file.create_dataset(dataset, data=values, chunks=True)
        elif fault == "other byte order":
            file[dataset] = values.astype(">u2" if dataset == "status" else values.dtype.newbyteorder(">"))
    with pytest.raises(StoreError, match=r"can't be read as an embedding store: it is cut short, damaged or no store"):
        EmbeddingStore.open(copy)


@pytest.mark.parametrize("attribute", ["encoder", "encoder_fingerprint"])
def test_a_missing_attribute(copy: Path, attribute: str) -> None:
    with h5py.File(copy, "r+") as file:
        del file.attrs[attribute]
    with pytest.raises(StoreError, match="can't be read as an embedding store"):
        EmbeddingStore.open(copy)


def test_an_encoder_that_is_no_json(copy: Path) -> None:
    with h5py.File(copy, "r+") as file:
        file.attrs["encoder"] = "{"
    with pytest.raises(StoreError, match="can't be read as an embedding store"):
        EmbeddingStore.open(copy)


@settings(max_examples=80, deadline=None)
@given(kept=st.integers(0, 10**9))
def test_a_store_cut_short_anywhere_is_refused(sound: Path, kept: int) -> None:
    contents = sound.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cut.h5"
        path.write_bytes(contents[: kept % len(contents)])
        with pytest.raises(StoreError, match=r"cut short"):
            EmbeddingStore.open(path)


@pytest.mark.parametrize("lost", [1, 4, 100, 4096])
def test_a_store_that_lost_its_end_is_refused(copy: Path, lost: int) -> None:
    os.truncate(copy, copy.stat().st_size - lost)
    with pytest.raises(StoreError, match=r"cut short"):
        EmbeddingStore.open(copy)


def found_by_verify(path: Path) -> str:
    with pytest.raises(StoreError) as caught:
        EmbeddingStore.open(path).verify()
    message = str(caught.value)
    assert message.startswith(str(path))
    assert message.endswith("xtract again, or restore it from a sound copy.")
    return message


@pytest.mark.parametrize(
    ("row", "block", "rows"), [(1, 0, "0 to 4095"), (4095, 0, "0 to 4095"), (4097, 1, "4096 to 8002")]
)
def test_verify_finds_a_changed_feature(copy: Path, row: int, block: int, rows: str) -> None:
    flip(copy, "features", row * WIDTH * 2 + 1)
    message = found_by_verify(copy)
    assert f"block {block} (rows {rows}) is corrupt: its features don't match their checksum." in message


@settings(max_examples=30, deadline=None)
@given(index=st.integers(0, ROWS * WIDTH * 2 - 1), difference=st.integers(1, 255))
def test_verify_finds_any_changed_byte_of_the_features(sound: Path, index: int, difference: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(shutil.copy(sound, folder))
        flip(path, "features", index, difference)
        assert f"block {index // (WIDTH * 2) // BLOCK_ROWS} " in found_by_verify(path)


@pytest.mark.parametrize("difference", [0x02, 0x80])
def test_verify_finds_an_impossible_status(copy: Path, difference: int) -> None:
    flip(copy, "status", 5000, difference)
    status = 1 ^ difference
    assert f"block 1 (rows 4096 to 8002) is corrupt: a row has status {status}, expected 0, 1 or 2." in found_by_verify(
        copy
    )


def test_verify_finds_a_row_that_was_marked_unreadable(copy: Path) -> None:
    flip(copy, "status", 5000, 0x03)
    message = found_by_verify(copy)
    assert "block 1 (rows 4096 to 8002) is corrupt: a row that is marked unreadable holds features." in message


def test_verify_finds_a_row_that_was_marked_pending(copy: Path) -> None:
    flip(copy, "status", 5000, 0x01)
    with pytest.raises(StoreError, match=r"is incomplete: 1 of 8,003 rows are still to be encoded"):
        EmbeddingStore.open(copy).verify()


@pytest.mark.parametrize("block", [0, 1])
def test_verify_finds_a_changed_checksum(copy: Path, block: int) -> None:
    flip(copy, "block_checksum", block * 4 + 2)
    assert f"block {block} (" in found_by_verify(copy)


def test_a_checksum_that_was_never_written_is_work_left(copy: Path) -> None:
    with h5py.File(copy, "r+") as file:
        file["block_checksum"][1] = 0
    with pytest.raises(StoreError, match=r"is incomplete: the checksums of 1 of .* No damage was found, and .* whole"):
        EmbeddingStore.open(copy).verify()


@pytest.mark.parametrize(("row", "byte"), [(0, 3), (100, 0), (5999, 3), (6000, 3), (8001, 3)])
def test_verify_finds_a_changed_frame_number(copy: Path, row: int, byte: int) -> None:
    flip(copy, "frame_number", row * 4 + byte, 0x80)
    assert "the index of videos and frames is corrupt" in found_by_verify(copy)


@pytest.mark.parametrize(("row", "byte", "difference"), [(0, 0, 1), (5999, 0, 8), (8002, 1, 1)])
def test_verify_finds_a_frame_number_that_changed_but_still_rises(
    copy: Path, row: int, byte: int, difference: int
) -> None:
    """Only the sum over the index can: such a row would get another frame's label."""
    flip(copy, "frame_number", row * 4 + byte, difference)
    assert "the index of videos and frames is corrupt" in found_by_verify(copy)


def test_a_store_without_a_sum_over_its_index_is_still_read(copy: Path) -> None:
    with h5py.File(copy, "r+") as file:
        del file.attrs["index_sha256"]
    assert EmbeddingStore.open(copy).index_sha256 == ""
    EmbeddingStore.open(copy).verify()


def test_verify_finds_a_negative_frame_number(tmp_path: Path) -> None:
    write_store(tmp_path / "s.h5", {"a": [4], "b": [1]}, features_of(2, 2))
    flip(tmp_path / "s.h5", "frame_number", 3, 0x80)
    assert "the index of videos and frames is corrupt" in found_by_verify(tmp_path / "s.h5")


@pytest.mark.parametrize("starts", [[1, 6000, 8000, 8003], [0, 6000, 6000, 8003], [0, 6000, 8000, 8002]])
def test_verify_finds_changed_borders_of_videos(copy: Path, starts: Sequence[int]) -> None:
    with h5py.File(copy, "r+") as file:
        file["video_start"][:] = starts
    assert "the index of videos and frames is corrupt" in found_by_verify(copy)


def test_verify_names_the_first_bad_block(copy: Path) -> None:
    flip(copy, "features", 5000 * WIDTH * 2)
    flip(copy, "features", 6)
    assert "block 0 " in found_by_verify(copy)


def test_verify_tells_how_far_it_is(sound: Path) -> None:
    seen: list[tuple[int, int]] = []
    EmbeddingStore.open(sound).verify(lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


@given(rows=st.integers(1, 20_000))
def test_blocks_cover_every_row_once(rows: int) -> None:
    bounds = [block_bounds(block, rows) for block in range(-(-rows // BLOCK_ROWS))]
    assert [row for first, last in bounds for row in range(first, last)] == list(range(rows))


def test_a_checksum_of_zero_is_kept_as_one() -> None:
    """0 stands for pending."""
    values = np.frombuffer(bytes.fromhex("9d0ad96d"), dtype="<f2")
    assert crc32(values.tobytes()) == 0
    assert block_crc(values) == 1


def golden_contents() -> tuple[dict[str, Sequence[int]], npt.NDArray[np.float16], tuple[int, ...]]:
    """What the golden file holds: made by formulas, so that it hangs on no generator of random numbers."""
    videos = {"12-30-1280x720": range(1, 4001), "12-30-1280x720_left": [3, 5, 8], "video7": range(0, 400, 4)}
    row = np.arange(4103)
    features = np.stack([row % 97 / 8, row % 13 - 6.5], axis=1).astype(np.float16)
    return videos, features, (2, 4000, 4102)


def test_the_golden_store_still_opens_with_the_same_contents() -> None:
    """Written once by the first version with ``write_store(GOLDEN, *golden_contents())``; never to be written again."""
    store = EmbeddingStore.open(GOLDEN)
    videos, features, unreadable = golden_contents()
    features[list(unreadable)] = 0
    np.testing.assert_array_equal(store.features, features)
    np.testing.assert_array_equal(np.flatnonzero(store.status == 2), unreadable)
    assert store.counts == {"pending": 0, "encoded": 4100, "unreadable": 3}
    assert store.video_names == tuple(videos)
    assert store.video_start.tolist() == [0, 4000, 4003, 4103]
    np.testing.assert_array_equal(store.frame_number, np.concatenate([np.array(v) for v in videos.values()]))
    assert store.encoder == {"model": "made-up", "pretrained": "", "weights_sha256": "0" * 64, "precision": "fp32"}
    assert store.encoder_fingerprint == "f" * 64
    store.verify()


def test_nobody_has_touched_the_golden_store() -> None:
    assert (
        hashlib.sha256(GOLDEN.read_bytes()).hexdigest()
        == "3fa7bc96aa4a48bc79b33985d1f2a173dd35f62fcdb3093298a8f89214005722"
    )
