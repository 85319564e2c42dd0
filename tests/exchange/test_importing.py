"""Embeddings of the published code and of clip-retrieval: rows in order, numbers kept, everything doubtful refused."""

import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pyarrow.parquet
import pytest

import affcache
from affcache.errors import ConfigError, InputError, StoreError
from affcache.exchange import foreign_hdf5
from affcache.progress import Listener
from affcache.store.description import fingerprint
from affcache.store.reading import EmbeddingStore
from affcache.store.writing import writing_lock
from tests.conftest import MakeData, write_store
from tests.exchange.sources import IN_ORDER, SHUFFLED, matrix, unit, write_clip_retrieval, write_published


class Heard(Listener):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.warnings: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def warning(self, text: str) -> None:
        self.warnings.append(text)


def refused(tmp_path: Path, kind: type[Exception] = InputError, **values: Any) -> str:
    """Import, expect an error, and check that it says what, what was expected and what to do, and leaves nothing."""
    store = values.setdefault("store", tmp_path / "out" / "x.h5")
    before = store.read_bytes() if store.exists() else None
    with pytest.raises(kind) as caught:
        affcache.import_embeddings(model="ViT-L-14", pretrained="openai", **values)
    message = str(caught.value)
    assert "Expected" in message
    assert message.endswith(".")
    left = {path.name for path in store.parent.iterdir()} - {store.name + ".lock"} if store.parent.exists() else set()
    assert left == ({store.name} if before else set())
    assert before is None or store.read_bytes() == before
    return message


def check_frames(store: EmbeddingStore, features: npt.NDArray[Any]) -> None:
    """The store holds the rows of SHUFFLED, in a store's order, as float16."""
    assert store.video_names == ("a", "b_left")
    assert store.video_start.tolist() == [0, 2, 4]
    assert store.frame_number.tolist() == [2, 10, 1, 2]
    np.testing.assert_array_equal(store.features, features[list(IN_ORDER)].astype(np.float16))
    store.verify()


# The published code


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("options", [{}, {"chunks": (1, 3)}, {"compression": "gzip", "chunks": (3, 2)}])
def test_published_features_land_on_their_frames(tmp_path: Path, split: str, options: dict[str, Any]) -> None:
    features = matrix(4)
    source, listing = write_published(tmp_path, features, SHUFFLED, split=split, **options)
    heard = Heard()
    result = affcache.import_embeddings(
        sources=source, list=listing, store=tmp_path / "x.h5", model="ViT-L-14", pretrained="openai", listener=heard
    )
    store = EmbeddingStore.open(tmp_path / "x.h5")
    check_frames(store, features)
    assert store.encoder == {
        "model": "ViT-L-14", "pretrained": "openai", "said_to_be": ["ViT-L-14", "openai"], "weights_sha256": None,
        "imported_from": "published code", "normalised": False, "width": 3,
    }  # fmt: skip
    assert store.encoder_fingerprint == fingerprint(store.encoder) == result.encoder_fingerprint
    assert (result.rows, result.encoded, result.unreadable, result.videos, result.width) == (4, 4, 0, 2, 3)
    assert (result.labels_not_used, result.values, result.changed_values) == (4, 12, 0)
    assert (result.normalised, result.same_as_exported) == (False, None)
    assert any("4 labels in the lists are not used" in text for text in heard.messages)
    assert heard.warnings == []


def test_train_and_validation_become_one_store(tmp_path: Path) -> None:
    features = matrix(4, dtype="float32")
    train, train_list = write_published(tmp_path, features[:3], SHUFFLED[:3])
    val, val_list = write_published(tmp_path, features[3:], SHUFFLED[3:], split="val")
    affcache.import_embeddings(sources=(train, val), list=(train_list, val_list), store=tmp_path / "x.h5")
    check_frames(EmbeddingStore.open(tmp_path / "x.h5"), features)


@pytest.mark.parametrize("dtype", ["float32", "float64", ">f4"])
def test_rounding_to_float16_is_said(tmp_path: Path, dtype: str) -> None:
    features = np.array([[0.5, 1.0, -0.0], [2049.0, 1.0, 3.0], [1e-9, 1.0, 2.0], [0.1, 1.0, 2.0]]).astype(dtype)
    source, listing = write_published(tmp_path, features, SHUFFLED)
    heard = Heard()
    result = affcache.import_embeddings(sources=source, list=listing, store=tmp_path / "x.h5", listener=heard)
    check_frames(EmbeddingStore.open(tmp_path / "x.h5"), features)
    assert (result.values, result.changed_values) == (12, 3)
    assert result.largest_change == 1.0, "2049 became 2048"
    assert result.largest_relative_change == 1.0, "1e-9 became 0"
    assert "3 of 12 values were rounded to float16, by at most 1, or 1 of the value" in heard.messages


def test_relative_change_is_of_the_value(tmp_path: Path) -> None:
    source, listing = write_published(tmp_path, np.array([[4098.0, 2049.0]], dtype="float32"), ["a/1.jpg"])
    result = affcache.import_embeddings(sources=source, list=listing, store=tmp_path / "x.h5")
    assert result.changed_values == 2
    assert result.largest_relative_change == pytest.approx(1 / 2049, rel=1e-6)
    assert result.largest_change == 2.0


def test_blocks_and_parts_meet_in_the_right_place(tmp_path: Path) -> None:
    rows, width = 40_001, 2
    features = np.arange(rows * width, dtype=np.float32).reshape(rows, width) % 2048
    order = np.random.default_rng(0).permutation(rows)
    paths = [f"x/{'abc'[frame % 3]}/{frame:05d}.jpg" for frame in order]
    first, first_list = write_published(tmp_path, features[order][:17_000], paths[:17_000], chunks=(1000, 2))
    second, second_list = write_published(tmp_path, features[order][17_000:], paths[17_000:], split="val")
    affcache.import_embeddings(sources=(first, second), list=(first_list, second_list), store=tmp_path / "x.h5")
    store = EmbeddingStore.open(tmp_path / "x.h5")
    assert store.video_names == ("a", "b", "c")
    np.testing.assert_array_equal(store.features, features[store.frame_number].astype(np.float16))
    assert [len(range(start, rows, 3)) for start in range(3)] == np.diff(store.video_start).tolist()
    store.verify()


@pytest.mark.parametrize(
    ("path", "video", "frame"),
    [
        ("data/cropped_aligned/14-30-1920x1080/00007.jpg", "14-30-1920x1080", 7),
        ("data/6th ABAW/a b/frame_12.PNG", "a b", 12),
        ("data/cropped_aligned\\video59_right\\00003.jpg", "video59_right", 3),
        ("C:\\data\\日本\\00003.jpeg", "日本", 3),
        ("/a=b/0.jpg", "a=b", 0),
    ],
)
def test_a_path_says_video_and_frame(tmp_path: Path, path: str, video: str, frame: int) -> None:
    source, listing = write_published(tmp_path, matrix(1), [path])
    affcache.import_embeddings(sources=source, list=listing, store=tmp_path / "x.h5")
    store = EmbeddingStore.open(tmp_path / "x.h5")
    assert (store.video_names, store.frame_number.tolist()) == ((video,), [frame])


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n  \n"])
def test_ends_of_a_list_do_not_matter(tmp_path: Path, end: str) -> None:
    source, listing = write_published(tmp_path, matrix(2), ["a/1.jpg", "a/2.jpg"])
    listing.write_bytes(b"\xef\xbb\xbfa/1.jpg\t0,1,-1\r\na/2.jpg\t-0.5,0.25" + end.encode())
    assert affcache.import_embeddings(sources=source, list=listing, store=tmp_path / "x.h5").labels_not_used == 2


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("a/1.jpg\t0\n\na/2.jpg\t0\n", 2, "is blank, with more lines after it"),
        ("a/1.jpg\t0\n\n \na/2.jpg\t0\n", 2, "is blank, with more lines after it"),
        ("a/1.jpg\t0\na/2.jpg 3\n", 2, "is 'a/2.jpg 3'"),
        ("a/1.jpg\t0\na/2.jpg\t\n", 2, "is 'a/2.jpg'"),
        ("a/1.jpg\t0\na/2.jpg\thappy\n", 2, "is 'a/2.jpg\\thappy'"),
        ("a/1.jpg\t0\na/2.jpg\t0\t1\n", 2, "doesn't end in a frame number and the suffix of an image"),
        ("1.jpg\t0\na/2.jpg\t0\n", 1, "no folder names the video"),
        ("./1.jpg\t0\na/2.jpg\t0\n", 1, "no folder names the video"),
        ("/1.jpg\t0\na/2.jpg\t0\n", 1, "no folder names the video"),
        ("a/face.jpg\t0\na/2.jpg\t0\n", 1, "doesn't end in a frame number"),
        ("a/1.jpg\t0\na/2.mp4\t0\n", 2, "doesn't end in a frame number and the suffix of an image"),
        ("a/1.jpg\t0\na/٣.jpg\t0\n", 2, "doesn't end in a frame number"),
        ("a/1.jpg\t0\na/2147483648.jpg\t0\n", 2, "has the frame number 2147483648, outside 0 to 2147483647"),
        ("a/1.jpg\t0\nb\0/2.jpg\t0\n", 2, "which a store can't keep"),
    ],
)
def test_a_line_that_would_shift_rows_is_named(tmp_path: Path, text: str, line: int, problem: str) -> None:
    source, listing = write_published(tmp_path, matrix(2), [])
    listing.write_text(text, encoding="utf-8")
    message = refused(tmp_path, sources=source, list=listing)
    assert message.startswith(f"{listing}, line {line} ")
    assert problem in message


def test_a_frame_that_occurs_twice_is_named_with_both_places(tmp_path: Path) -> None:
    train, train_list = write_published(tmp_path, matrix(4), SHUFFLED)
    val, val_list = write_published(tmp_path, matrix(2), ["other/b_left/2.png", "b/3.jpg"], split="val")
    message = refused(tmp_path, sources=(train, val), list=(train_list, val_list))
    assert message.startswith(
        f"Frame 2 of the video b_left occurs twice: {train_list}, line 1 and {val_list}, line 1. Expected"
    )


@pytest.mark.parametrize("named", [3, 5])
def test_a_list_of_another_length_is_refused(tmp_path: Path, named: int) -> None:
    source, listing = write_published(tmp_path, matrix(4), [f"a/{frame}.jpg" for frame in range(named)])
    message = refused(tmp_path, sources=source, list=listing)
    assert f"{source} holds 4 embeddings, {listing} names {named} frames" in message


@pytest.mark.parametrize(
    ("value", "dtype", "problem"),
    [
        (np.nan, "float32", "is nan and is not finite"),
        (-np.inf, "float16", "is -inf and is not finite"),
        (65520.0, "float32", "is 65520.0 and is too large for float16"),
        (-1e300, "float64", "is -1e+300 and is too large for float16"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"chunks": True}])
def test_numbers_that_float16_cannot_hold_are_named(
    tmp_path: Path, value: float, dtype: str, problem: str, options: dict[str, Any]
) -> None:
    features = matrix(4, dtype=dtype)
    features[2, 1] = value
    source, listing = write_published(tmp_path, features, SHUFFLED, **options)
    message = refused(tmp_path, sources=source, list=listing)
    assert message.startswith(f"{listing}, line 3: value 1 (counted from 0) {problem}")


def test_a_block_after_the_first_is_checked_as_the_first(tmp_path: Path) -> None:
    features = np.ones((20_000, 1), dtype="float32")
    features[:2], features[-1] = [[2049.0], [4098.0]], 0.1
    paths = [f"a/{frame}.jpg" for frame in range(20_000)]
    source, listing = write_published(tmp_path, features, paths)
    result = affcache.import_embeddings(sources=source, list=listing, store=tmp_path / "x.h5")
    assert (result.values, result.changed_values, result.largest_change) == (20_000, 3, 2.0)
    assert result.largest_relative_change == pytest.approx(1 / 2049, rel=1e-6)
    features[-1] = np.nan
    source, listing = write_published(tmp_path, features, paths)
    assert refused(tmp_path, sources=source, list=listing).startswith(f"{listing}, line 20000: value 0 ")


def test_features_in_another_file_are_not_followed(tmp_path: Path) -> None:
    """They could be any file that its maker chose."""
    features = matrix(4)
    features.tofile(tmp_path / "raw.bin")
    source, listing = write_published(tmp_path, features, SHUFFLED, external=[(tmp_path / "raw.bin", 0, 24)])
    assert "train_features lies in other files" in refused(tmp_path, sources=source, list=listing)


def test_a_file_over_which_hdf5_loops_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, listing = write_published(tmp_path, matrix(4), SHUFFLED)
    loop = tmp_path / "loop.py"
    loop.write_text("while True: pass")
    monkeypatch.setattr(foreign_hdf5, "__file__", str(loop))
    monkeypatch.setattr(foreign_hdf5, "SECONDS", 0.3)
    assert "HDF5 comes to no end with it" in refused(tmp_path, sources=source, list=listing)


def test_what_is_no_matrix_of_features_is_refused(tmp_path: Path) -> None:
    listing = tmp_path / "x.txt"
    listing.write_text("a/1.jpg\t0\n")
    for name, array in {
        "whole": np.ones((1, 3), int),
        "flat": np.ones(3),
        "none": np.ones((0, 3)),
        "no": np.ones((1, 0)),
    }.items():
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["train_features"] = array
        message = refused(tmp_path, sources=tmp_path / f"{name}.h5", list=listing)
        assert f"of {tmp_path / name}.h5 is {array.dtype} of shape {array.shape}" in message


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["features"], "neither train_features nor val_features (it has features)"),
        ([], "neither train_features nor val_features (it has nothing)"),
        (["train_features", "val_features"], "train_features and val_features (it has"),
    ],
)
def test_a_file_without_the_one_dataset_is_refused(tmp_path: Path, names: list[str], said: str) -> None:
    with h5py.File(tmp_path / "in.h5", "w") as file:
        for name in names:
            file[name] = matrix(1)
    (tmp_path / "in.txt").write_text("a/1.jpg\t0\n")
    assert said in refused(tmp_path, sources=tmp_path / "in.h5", list=tmp_path / "in.txt")


def test_a_store_is_not_imported(tmp_path: Path) -> None:
    write_store(tmp_path / "s.h5", {"a": [1]}, matrix(1))
    (tmp_path / "in.txt").write_text("a/1.jpg\t0\n")
    message = refused(tmp_path, sources=tmp_path / "s.h5", list=tmp_path / "in.txt")
    assert "is an embedding store of affcache already" in message


@pytest.mark.parametrize("lists", [0, 1, 3])
def test_every_features_file_needs_its_list(tmp_path: Path, lists: int) -> None:
    pairs = [write_published(tmp_path, matrix(1), [f"{split}/1.jpg"], split=split) for split in ("train", "val")]
    message = refused(tmp_path, ConfigError, sources=[pair[0] for pair in pairs], list=[pairs[0][1]] * lists)
    assert f"2 HDF5 files and {lists} lists are given" in message


@pytest.mark.parametrize("missing", ["train.h5", "train.txt"])
def test_missing_and_damaged_files_are_named(tmp_path: Path, missing: str) -> None:
    source, listing = write_published(tmp_path, matrix(4), SHUFFLED)
    (tmp_path / missing).rename(tmp_path / "away")
    assert refused(tmp_path, sources=source, list=listing).startswith(
        f"{tmp_path / missing} can't be read: No such file"
    )
    (tmp_path / missing).write_bytes(b"\x89HDF\r\n\x1a\n" + b"\xff" * 20)
    assert refused(tmp_path, sources=source, list=listing).startswith(f"{tmp_path / missing} can't be read: ")


# clip-retrieval


def test_parts_of_clip_retrieval_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    features = unit(matrix(12))
    paths = [f"/data/crops/v{row % 2}/{row:05d}.jpg" for row in range(12)]
    parts = {f"{part:02d}": (features[part : part + 1], paths[part : part + 1]) for part in (10, 9, 2)}
    write_clip_retrieval(tmp_path / "padded", parts)
    (tmp_path / "padded/img_emb/notes.txt").write_text("not a part")
    result = affcache.import_embeddings(sources=tmp_path / "padded", store=tmp_path / "x.h5", model="ViT-B-32")
    store = EmbeddingStore.open(tmp_path / "x.h5")
    assert (store.video_names, store.frame_number.tolist()) == (("v0", "v1"), [2, 10, 9])
    np.testing.assert_array_equal(store.features, features[[2, 10, 9]])
    assert store.encoder["imported_from"] == result.imported_from == "clip-retrieval"
    assert store.encoder["normalised"] is result.normalised is True
    store.verify()


def test_clip_retrieval_in_any_order_with_float32(tmp_path: Path) -> None:
    features = matrix(4, dtype="float32")
    write_clip_retrieval(
        tmp_path / "in", {"0": (features[:3], SHUFFLED[:3]), "1": (features[3:].astype("float16"), SHUFFLED[3:])}
    )
    result = affcache.import_embeddings(sources=tmp_path / "in", store=tmp_path / "x.h5")
    check_frames(EmbeddingStore.open(tmp_path / "x.h5"), features)
    assert result.normalised is False, "measured, not assumed"
    assert 0 < result.changed_values <= 9


def test_keys_of_a_web_dataset_have_no_suffix(tmp_path: Path) -> None:
    write_clip_retrieval(tmp_path / "in", {"0": (matrix(2), ["v.1/00001", "v.1/00002"])})
    affcache.import_embeddings(sources=tmp_path / "in", store=tmp_path / "x.h5")
    store = EmbeddingStore.open(tmp_path / "x.h5")
    assert (store.video_names, store.frame_number.tolist()) == (("v.1",), [1, 2])


@pytest.mark.parametrize("path", [None, "00001.jpg", "a/b.jpg"])
def test_a_row_without_a_frame_is_named(tmp_path: Path, path: str | None) -> None:
    write_clip_retrieval(tmp_path / "in", {"0": (matrix(1), ["a/1.jpg"]), "1": (matrix(2), ["a/2.jpg", path])})
    message = refused(tmp_path, sources=tmp_path / "in")
    assert message.startswith(f"{tmp_path / 'in/metadata/metadata_1.parquet'}, row 1 (counted from 0) has the path")


def test_twice_in_clip_retrieval_names_file_and_row(tmp_path: Path) -> None:
    write_clip_retrieval(tmp_path / "in", {"0": (matrix(1), ["a/1.jpg"]), "1": (matrix(2), ["a/2.jpg", "b/a/1.png"])})
    message = refused(tmp_path, sources=tmp_path / "in")
    folder = tmp_path / "in/img_emb"
    assert f"occurs twice: {folder}/img_emb_0.npy, row 0 (counted from 0) and {folder}/img_emb_1.npy, row 1" in message


def test_damaged_folders_of_clip_retrieval_are_refused(tmp_path: Path) -> None:
    folder = write_clip_retrieval(
        tmp_path / "in", {"0": (matrix(2), ["a/1.jpg", "a/2.jpg"]), "1": (matrix(1), ["a/3.jpg"])}
    )
    embeddings, metadata = folder / "img_emb/img_emb_1.npy", folder / "metadata/metadata_1.parquet"
    sound, sound_metadata = embeddings.read_bytes(), metadata.read_bytes()

    for damage, said in (
        (b"", "can't be read"),
        (sound[:-1], "can't be read"),
        (b"PK\x03\x04" + sound, "can't be read"),
    ):
        embeddings.write_bytes(damage)
        assert said in refused(tmp_path, sources=folder)
    np.save(embeddings, matrix(2))
    assert f"{embeddings} holds 2 embeddings, {metadata} names 1 frames" in refused(tmp_path, sources=folder)
    np.save(embeddings, matrix(1, width=4))
    assert "has embeddings of 3 values" in refused(tmp_path, sources=folder)
    np.savez(folder / "x.npz", matrix(1))
    (folder / "x.npz").replace(embeddings)
    assert "can't be read" in refused(tmp_path, sources=folder)
    embeddings.write_bytes(sound)

    metadata.write_bytes(sound_metadata[:-3])
    assert refused(tmp_path, sources=folder).startswith(f"{metadata} can't be read")
    metadata.rename(metadata.with_name("metadata_01.parquet"))
    (folder / "metadata/metadata_1.parquet").write_bytes(sound_metadata)
    assert "have the same number" in refused(tmp_path, sources=folder)
    for path in folder.glob("metadata/metadata_*1.parquet"):
        path.unlink()
    assert "part 1 of one has no counterpart" in refused(tmp_path, sources=folder)
    (tmp_path / "empty").mkdir()
    assert "there are none" in refused(tmp_path, sources=tmp_path / "empty")


def test_metadata_without_paths_is_refused(tmp_path: Path) -> None:
    write_clip_retrieval(tmp_path / "in", {"0": (matrix(1), ["a/1.jpg"])}, column="url")
    message = refused(tmp_path, sources=tmp_path / "in")
    assert "has no column image_path; it has url, caption" in message


# Any source


def test_sources_of_two_kinds_or_widths_are_refused(tmp_path: Path) -> None:
    published, listing = write_published(tmp_path, matrix(1), ["a/1.jpg"])
    wide, wide_list = write_published(tmp_path, matrix(1, width=4), ["b/1.jpg"], split="val")
    folder = write_clip_retrieval(tmp_path / "in", {"0": (matrix(1), ["b/1.jpg"])})
    message = refused(tmp_path, StoreError, sources=(published, folder), list=listing)
    assert f"{published} is from published code, {folder} from clip-retrieval" in message
    message = refused(tmp_path, sources=(published, wide), list=(listing, wide_list))
    assert f"{published} has embeddings of 3 values, {wide} of 4" in message


def test_an_existing_store_and_one_in_use_are_left_alone(tmp_path: Path) -> None:
    source, listing = write_published(tmp_path, matrix(4), SHUFFLED)
    store = tmp_path / "out" / "x.h5"
    store.parent.mkdir()
    with writing_lock(store, Listener()), pytest.raises(StoreError, match="is being written by another process"):
        affcache.import_embeddings(sources=source, list=listing, store=store)
    store.write_bytes(b"something")
    assert f"{store} exists already" in refused(tmp_path, StoreError, sources=source, list=listing, store=store)


def test_what_cannot_be_imported_is_said(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("a,1\n")
    assert "in.csv is nothing that can be imported" in refused(tmp_path, sources=tmp_path / "in.csv")
    assert "No source is given" in refused(tmp_path, ConfigError, sources=())
    with pytest.raises(ConfigError, match=r"Unknown setting 'lists' \(did you mean 'list'\?\)"):
        affcache.import_embeddings(sources="x.h5", lists="x.txt")


def test_the_store_is_named_after_the_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source, listing = write_published(tmp_path, matrix(4), SHUFFLED)
    result = affcache.import_embeddings(sources=source, list=listing, model="ViT-L-14", pretrained="openai")
    assert result.store == "data/features/ViT-L-14-openai.h5"
    assert Path(result.store).is_file()
    with pytest.raises(ConfigError, match="Nothing says where the store goes"):
        affcache.import_embeddings(sources=source, list=listing)


def test_encoders_are_told_apart_by_what_is_said(tmp_path: Path) -> None:
    source, listing = write_published(tmp_path, matrix(4), SHUFFLED)
    heard = Heard()
    said = ({"model": "ViT-L-14", "pretrained": "openai"}, {"model": "ViT-L-14", "pretrained": "laion2b_s32b_b82k"}, {})
    found = [
        affcache.import_embeddings(sources=source, list=listing, store=tmp_path / f"{i}.h5", listener=heard, **names)
        for i, names in enumerate(said)
    ]
    assert len({result.encoder_fingerprint for result in found}) == 3
    (warning,) = heard.warnings
    assert warning.startswith("--model isn't said")


def test_a_full_disk_leaves_nothing_and_names_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    source, listing = write_published(tmp_path, matrix(4), SHUFFLED)
    monkeypatch.setattr("os.posix_fallocate", full)
    store = tmp_path / "out" / "x.h5"
    with pytest.raises(StoreError, match=f"^No space for the store {re.escape(str(store))}: 4 rows"):
        affcache.import_embeddings(sources=source, list=listing, store=store)
    assert not store.parent.exists()


def test_fit_and_score_work_on_an_imported_store(learnable: MakeData, tmp_path: Path) -> None:
    path, annotations = learnable("expr", videos=3)
    original = EmbeddingStore.open(path)
    names = [
        f"crops/{original.video_names[v]}/{f:05d}.jpg"
        for v, f in zip(original.video_of_rows(), original.frame_number, strict=True)
    ]
    order = np.random.default_rng(0).permutation(len(original))
    source, listing = write_published(tmp_path / "in", np.array(original.features)[order], [names[i] for i in order])
    affcache.import_embeddings(sources=source, list=listing, store=tmp_path / "x.h5", model="made-up")
    recipe = {"epochs": 2, "hidden_width": 8, "hidden_layers": 1, "device": "cpu", "annotations": annotations}
    values = [
        affcache.fit(store=store, run=tmp_path / f"run{i}", **recipe).value
        for i, store in enumerate((path, tmp_path / "x.h5"))
    ]
    assert values[0] == values[1], "the same rows, so the same head"
    assert affcache.score(run=tmp_path / "run1").frames == 40
    with pytest.raises(StoreError, match="encoder"):
        affcache.score(run=tmp_path / "run1", store=path)


def test_a_store_needs_no_import(tmp_path: Path) -> None:
    write_store(tmp_path / "s.h5", {"a": [1, 2]}, np.ones((2, 3), np.float16))
    with pytest.raises(InputError, match=r"s\.h5 is an embedding store of affcache already\..* with --store "):
        affcache.import_embeddings(sources=(tmp_path / "s.h5",), store=tmp_path / "new.h5")


def test_paths_that_are_no_texts(tmp_path: Path) -> None:
    folder = write_clip_retrieval(tmp_path / "clip", {"0": (matrix(1), ["a/1.jpg"])})
    table = pyarrow.table({"image_path": [b"a/1.jpg"]})
    pyarrow.parquet.write_table(table, folder / "metadata" / "metadata_0.parquet")
    assert "row 0 (counted from 0) has the path b'a/1.jpg', which is no text" in refused(tmp_path, sources=folder)


DEEP = ("d/1/V1/Q3/00001.jpg", "d/1/V2/Q3/00001.jpg", "d/2/V1/Q3/00001.jpg")


def test_videos_of_one_name_in_different_folders_stay_apart(tmp_path: Path) -> None:
    train, val = (
        write_published(tmp_path, matrix(len(paths)), paths, name=name)
        for name, paths in (("train", DEEP), ("val", ["d/3/V1/Q4/00001.jpg"]))
    )
    sources, lists = zip(train, val, strict=True)
    affcache.import_embeddings(sources=sources, list=lists, store=tmp_path / "s.h5", model="m")
    assert EmbeddingStore.open(tmp_path / "s.h5").video_names == ("1/V1/Q3", "1/V2/Q3", "2/V1/Q3", "3/V1/Q4")
    write_clip_retrieval(tmp_path / "in", {str(n): (matrix(1), [path]) for n, path in enumerate(DEEP)})
    affcache.import_embeddings(sources=tmp_path / "in", store=tmp_path / "c.h5", model="m")
    assert EmbeddingStore.open(tmp_path / "c.h5").video_names == ("1/V1/Q3", "1/V2/Q3", "2/V1/Q3")
    for out in ("s.parquet", "s.safetensors", "s-npy"):
        kind = out[2:].replace("npy", "npy")
        affcache.export_embeddings(store=tmp_path / "s.h5", format=kind, out=tmp_path / out)
        affcache.import_embeddings(sources=tmp_path / out, store=tmp_path / f"{kind}.h5")
        assert (tmp_path / f"{kind}.h5").read_bytes() == (tmp_path / "s.h5").read_bytes()


def test_the_last_folder_names_a_video_where_that_is_enough(tmp_path: Path) -> None:
    train, val = (
        write_published(tmp_path, matrix(2), paths, name=name)
        for name, paths in (
            ("train", ["cropped_aligned/a/1.jpg", "cropped_aligned_new_50_vids/b/1.jpg"]),
            ("val", ["/elsewhere/a/2.jpg", "c/3.jpg"]),
        )
    )
    sources, lists = zip(train, val, strict=True)
    affcache.import_embeddings(sources=sources, list=lists, store=tmp_path / "s.h5", model="m")
    store = EmbeddingStore.open(tmp_path / "s.h5")
    assert (store.video_names, store.frame_number.tolist()) == (("a", "b", "c"), [1, 2, 1, 3])
