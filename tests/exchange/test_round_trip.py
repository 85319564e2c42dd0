"""Exports read back: the store is the same file, to the byte, whatever its names, frames and statuses."""

import json
import tempfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import affcache
from affcache.errors import ConfigError, InputError, StoreError
from affcache.store.description import fingerprint
from affcache.store.reading import EmbeddingStore
from affcache.store.writing import create_store
from tests.conftest import NAMED_ONLY, crop_list, write_store
from tests.exchange.sources import matrix

FORMATS = ("npy", "parquet", "safetensors")
NAMES = st.sampled_from(
    ["a=b", "日本", "14-30-1920x1080", "video59_right", "ünï cødé", "%41", "__0__", "-1", ".", "x.5"]
)
ANY_NAME = st.text(
    st.characters(codec="utf-8", exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=6
)
FRAMES = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4, unique=True).map(sorted)


@st.composite
def stores(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of write_store."""
    videos = draw(st.dictionaries(NAMES | ANY_NAME, FRAMES, min_size=1, max_size=4))
    rows = sum(map(len, videos.values()))
    width = draw(st.integers(1, 5))
    finite = st.integers(0, 2**16 - 1).filter(lambda bits: bits & 0x7C00 != 0x7C00)  # subnormals and -0.0 too
    bits = draw(st.lists(finite, min_size=rows * width, max_size=rows * width))
    features = np.array(bits, dtype=np.uint16).view(np.float16).reshape(rows, width)
    unreadable = draw(st.sets(st.integers(0, rows - 1), max_size=rows))
    return {"videos": videos, "features": features, "unreadable": sorted(unreadable)}


@pytest.mark.parametrize("form", FORMATS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(stores())
def test_a_store_comes_back_byte_for_byte(form: str, made: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        original = write_store(folder / "store.h5", **made)
        exported = affcache.export_embeddings(store=original.path, format=form, out=folder / "out")
        imported = affcache.import_embeddings(sources=_with_suffix(folder / "out", form), store=folder / "back.h5")
        assert (folder / "back.h5").read_bytes() == original.path.read_bytes()
        assert imported.same_as_exported is True
        assert imported.encoder_fingerprint == original.encoder_fingerprint
        assert (imported.encoded, imported.unreadable) == (exported.encoded, exported.unreadable)
        assert exported.unreadable == len(made["unreadable"])
        assert (imported.changed_values, imported.largest_change) == (0, 0.0)


def _with_suffix(path: Path, form: str) -> Path:
    """A safetensors file is known by its suffix alone."""
    return path.rename(path.with_suffix(".safetensors")) if form == "safetensors" else path


@pytest.mark.parametrize("form", FORMATS)
def test_many_blocks_come_back(tmp_path: Path, form: str) -> None:
    features = matrix(40_000, width=4)
    write_store(
        tmp_path / "s.h5", {"b": range(30_000), "a": range(5, 10_005)}, features, unreadable=[0, 20_000, 39_999]
    )
    out = affcache.export_embeddings(store=tmp_path / "s.h5", format=form).out
    affcache.import_embeddings(sources=out, store=tmp_path / "back.h5")
    assert (tmp_path / "back.h5").read_bytes() == (tmp_path / "s.h5").read_bytes()
    EmbeddingStore.open(tmp_path / "back.h5").verify()


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    return write_store(tmp_path / "s.h5", {"a": [1, 7], "b_left": [3]}, matrix(3), unreadable=[1])


def test_npy_is_what_clip_retrieval_reads(store: EmbeddingStore, tmp_path: Path) -> None:
    affcache.export_embeddings(store=store.path, out=tmp_path / "out")
    files = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*"))
    assert files == ["img_emb/img_emb_0.npy", "metadata/metadata_0.parquet", "provenance.json"]
    array = np.load(tmp_path / "out/img_emb/img_emb_0.npy")
    assert array.dtype == np.float16
    np.testing.assert_array_equal(array, store.features)
    table = pyarrow.parquet.read_table(tmp_path / "out/metadata/metadata_0.parquet").to_pylist()
    assert table == [
        {"image_path": "a/00001.jpg", "video": "a", "frame_number": 1, "status": 1},
        {"image_path": "a/00007.jpg", "video": "a", "frame_number": 7, "status": 2},
        {"image_path": "b_left/00003.jpg", "video": "b_left", "frame_number": 3, "status": 1},
    ]
    _check_provenance(json.loads((tmp_path / "out/provenance.json").read_text()), store)


def test_parquet_holds_lists_of_float32(store: EmbeddingStore, tmp_path: Path) -> None:
    affcache.export_embeddings(store=store.path, format="parquet", out=tmp_path / "x.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "x.parquet")
    assert table.column_names == ["video", "frame_number", "status", "embedding"]
    assert table.column("video").to_pylist() == ["a", "a", "b_left"]
    np.testing.assert_array_equal(np.array(table.column("embedding").to_pylist()), store.features)
    chunk = pyarrow.parquet.ParquetFile(tmp_path / "x.parquet").metadata.row_group(0).column(3)
    assert chunk.physical_type == "FLOAT"
    assert "BYTE_STREAM_SPLIT" in chunk.encodings
    assert chunk.compression == "ZSTD"
    _check_provenance(json.loads(table.schema.metadata[b"affcache"]), store)


def test_safetensors_is_read_by_its_own_library(store: EmbeddingStore, tmp_path: Path) -> None:
    affcache.export_embeddings(store=store.path, format="safetensors", out=tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dictionary
        described = file.metadata()
    assert {name: array.dtype.name for name, array in tensors.items()} == {
        "features": "float16", "status": "uint8", "frame_number": "int32", "video_start": "int64",
    }  # fmt: skip
    for name, array in tensors.items():
        np.testing.assert_array_equal(array, getattr(store, name))
    assert json.loads(described["video_name"]) == ["a", "b_left"]
    _check_provenance(json.loads(described["affcache"]), store)


def _check_provenance(found: dict[str, Any], store: EmbeddingStore) -> None:
    assert found == {
        "format": "affcache-export",
        "format_version": 1,
        "affcache": affcache.__version__,
        "encoder": store.encoder,
        "encoder_fingerprint": fingerprint(store.encoder),
        "store_fingerprint": store.fingerprint(),
        "rows": {"encoded": 2, "unreadable": 1},
        "videos": 2,
        "width": 3,
    }


@pytest.mark.parametrize(
    ("form", "name"), [("npy", "s-npy"), ("parquet", "s.parquet"), ("safetensors", "s.safetensors")]
)
def test_the_output_lies_beside_the_store_and_is_never_overwritten(store: EmbeddingStore, form: str, name: str) -> None:
    result = affcache.export_embeddings(store=store.path, format=form)
    out = store.path.parent / name
    assert result.out == str(out)
    assert result.bytes == sum(path.stat().st_size for path in (out, *out.rglob("*")) if path.is_file())
    before = sorted(store.path.parent.rglob("*"))
    with pytest.raises(InputError, match=r"exists already.*another --out, or delete"):
        affcache.export_embeddings(store=store.path, format=form)
    assert sorted(store.path.parent.rglob("*")) == before, "nothing else is left behind"


def test_incomplete_and_damaged_stores_are_not_exported(store: EmbeddingStore, tmp_path: Path) -> None:
    create_store(tmp_path / "pending.h5", crop_list({"a": [1, 2]}), 4, {"model": "made-up"}, NAMED_ONLY)
    with pytest.raises(StoreError, match="2 of 2 rows are still to be encoded"):
        affcache.export_embeddings(store=tmp_path / "pending.h5")
    with h5py.File(store.path) as file:
        offset = file["features"].id.get_offset()
    with store.path.open("r+b") as raw:
        raw.seek(offset)
        raw.write(b"\x01")
    with pytest.raises(StoreError, match="block 0"):
        affcache.export_embeddings(store=store.path)
    assert {path.name for path in tmp_path.iterdir()} == {"pending.h5", "s.h5"}


def test_an_export_that_fails_leaves_nothing(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numpy.lib.format.write_array_header_1_0", full)
    with pytest.raises(InputError, match=r"No space left on device.*another place"):
        affcache.export_embeddings(store=store.path, out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["s.h5"]


@pytest.mark.parametrize("form", ["npy", "parquet"])
def test_without_pyarrow_one_sentence_says_what_to_install(
    store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    out = affcache.export_embeddings(store=store.path, format=form).out
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match=r"pip install pyarrow$"):
        affcache.export_embeddings(store=store.path, format=form, out=store.path.parent / "other")
    with pytest.raises(ConfigError, match=r"pip install pyarrow$"):
        affcache.import_embeddings(sources=out, store=store.path.parent / "back.h5")
    affcache.export_embeddings(store=store.path, format="safetensors")


def test_two_exports_of_one_encoder_become_one_store(tmp_path: Path) -> None:
    both = matrix(4)
    write_store(tmp_path / "b.h5", {"b": [1, 2]}, both[2:], unreadable=[0])
    write_store(tmp_path / "a.h5", {"a": [1, 2]}, both[:2])
    write_store(tmp_path / "all.h5", {"a": [1, 2], "b": [1, 2]}, both, unreadable=[2])
    outs = [affcache.export_embeddings(store=tmp_path / f"{name}.h5", format="parquet").out for name in ("b", "a")]
    result = affcache.import_embeddings(sources=outs, store=tmp_path / "back.h5")
    assert (tmp_path / "back.h5").read_bytes() == (tmp_path / "all.h5").read_bytes()
    assert result.same_as_exported is None


def test_exports_of_two_encoders_are_refused_and_what_differs_is_said(store: EmbeddingStore, tmp_path: Path) -> None:
    first = Path(affcache.export_embeddings(store=store.path).out)
    second = Path(affcache.export_embeddings(store=store.path, out=tmp_path / "other").out)
    said = json.loads((second / "provenance.json").read_text())
    said["encoder"]["precision"] = "bf16"
    (second / "provenance.json").write_text(json.dumps({**said, "encoder_fingerprint": fingerprint(said["encoder"])}))
    with pytest.raises(StoreError, match=r"two encoders.*\n  precision: 'fp32' against 'bf16'\nImport each"):
        affcache.import_embeddings(sources=(first, second), store=tmp_path / "back.h5")


def test_an_export_that_was_changed_is_told_from_one_that_was_not(
    store: EmbeddingStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = Path(affcache.export_embeddings(store=store.path).out)
    array = np.load(out / "img_emb/img_emb_0.npy")
    array[0, 0] += 1
    np.save(out / "img_emb/img_emb_0.npy", array)
    result = affcache.import_embeddings(sources=out, store=tmp_path / "back.h5")
    assert result.same_as_exported is False
    assert "was changed after its export, or was damaged" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.replace_schema_metadata(None), "doesn't say how its embeddings were made"),
        (lambda table: table.drop_columns(["status"]), "has no column status; it has video, frame_number, embedding"),
        (lambda table: table.set_column(2, "status", [[1, 0, 1]]), r"row 1 .* has the status 0, not 1 \(encoded\)"),
        (lambda table: table.set_column(2, "status", [[1, 1, 2]]), r"row 2 .* is marked unreadable and holds"),
        (lambda table: table.set_column(1, "frame_number", [[1, None, 3]]), r"row 1 .* the frame number None"),
        (lambda table: table.set_column(1, "frame_number", [[1, 2**31, 3]]), r"row 1 .* frame number 2147483648, out"),
        (lambda table: table.set_column(0, "video", [["a", "", "b"]]), "row 1 .* has the video name ''"),
        (lambda table: table.set_column(3, "embedding", [[1.0, 2.0, 3.0]]), "embedding is a single value, not a list"),
        (lambda table: table.set_column(3, "embedding", _floats([[1], [2], [3]])), "are not 3 values each"),
        (
            lambda table: table.set_column(3, "embedding", _floats([[1, 2, 3], [0] * 3, [0.1, 1, 1]])),
            "row 2 .* holds 0.1",
        ),
        (lambda table: table.slice(0, 0), "no rows"),
    ],
)
def test_a_parquet_file_that_no_export_wrote_is_refused(
    store: EmbeddingStore, tmp_path: Path, change: Any, message: str
) -> None:
    path = Path(affcache.export_embeddings(store=store.path, format="parquet").out)
    pyarrow.parquet.write_table(change(pyarrow.parquet.read_table(path)), tmp_path / "changed.parquet")
    with pytest.raises(InputError, match=f"(?s){message}"):
        affcache.import_embeddings(sources=tmp_path / "changed.parquet", store=tmp_path / "back.h5")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("back") and path.suffix != ".lock"]


def _floats(rows: list[list[float]]) -> pyarrow.Array:
    return pyarrow.array(rows, pyarrow.list_(pyarrow.float32()))


def test_a_parquet_file_in_another_order_is_the_same_store(store: EmbeddingStore, tmp_path: Path) -> None:
    path = Path(affcache.export_embeddings(store=store.path, format="parquet").out)
    table = pyarrow.parquet.read_table(path).take([2, 0, 1])
    pyarrow.parquet.write_table(table, tmp_path / "shuffled.parquet", row_group_size=2)
    result = affcache.import_embeddings(sources=tmp_path / "shuffled.parquet", store=tmp_path / "back.h5")
    assert result.same_as_exported is True
    assert (tmp_path / "back.h5").read_bytes() == store.path.read_bytes()


def test_an_exported_folder_of_other_numbers_than_float16_is_refused(store: EmbeddingStore, tmp_path: Path) -> None:
    out = Path(affcache.export_embeddings(store=store.path).out)
    np.save(out / "img_emb/img_emb_0.npy", np.array(store.features, dtype=np.float32))
    with pytest.raises(InputError, match="an export holds float16, this is float32"):
        affcache.import_embeddings(sources=out, store=tmp_path / "back.h5")


@pytest.mark.parametrize("cut", [4, 60, -1])
def test_a_safetensors_file_that_is_cut_short_is_refused(store: EmbeddingStore, tmp_path: Path, cut: int) -> None:
    path = Path(affcache.export_embeddings(store=store.path, format="safetensors").out)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InputError, match=r"s.safetensors can't be read"):
        affcache.import_embeddings(sources=path, store=tmp_path / "back.h5")


def test_safetensors_of_something_else_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"features": matrix(2)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="doesn't say how its embeddings were made"):
        affcache.import_embeddings(sources=tmp_path / "x.safetensors", store=tmp_path / "back.h5")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "affcache-export", "format_version": 2}'])
def test_damaged_provenance_is_refused(store: EmbeddingStore, tmp_path: Path, text: str) -> None:
    out = Path(affcache.export_embeddings(store=store.path).out)
    (out / "provenance.json").write_text(text)
    with pytest.raises(InputError, match=r"provenance.json doesn't say how its embeddings were made"):
        affcache.import_embeddings(sources=out, store=tmp_path / "back.h5")
