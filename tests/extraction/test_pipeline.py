"""The pipeline: which rows go together, how much a stop may cost, and that threads leave no trace."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from affcache.crops.folders import find_crops
from affcache.crops.images import decode_crop
from affcache.encoders.encoder import Encoder
from affcache.encoders.loading import load_encoder
from affcache.errors import InputError
from affcache.extraction import extract as extract_module
from affcache.extraction.extract import write_embeddings
from affcache.extraction.pipeline import Pipeline, consecutive_batches
from affcache.progress import Listener
from affcache.store.description import fingerprint
from affcache.store.reading import EmbeddingStore
from affcache.store.writing import StoreWriter, create_store
from tests.conftest import write_crops

VIDEOS = {"a": range(1, 31), "b": range(0, 30, 3)}  # 40 rows


class Stopped(Exception):
    """Stands for anything that ends a run without a word."""


class StopAfter(Listener):
    def __init__(self, rows: int, error: type[BaseException]) -> None:
        self.rows, self.error = rows, error

    def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
        if done >= self.rows:
            raise self.error


@pytest.fixture(scope="module")
def encoder(tiny_encoder: str) -> Encoder:
    return load_encoder(tiny_encoder, precision="fp32")


@pytest.fixture
def crops(tmp_path: Path) -> Path:
    return write_crops(tmp_path / "crops", VIDEOS)


def run(
    store: Path, root: Path, encoder: Encoder, listener: Listener | None = None, batch_size: int = 4, workers: int = 2
) -> Pipeline:
    crops = find_crops([root])
    if not store.exists():
        create_store(store, crops, encoder.width, encoder.description, fingerprint(encoder.description))
    with StoreWriter(store) as writer:
        pipeline = Pipeline(crops, encoder, listener or Listener(), batch_size, workers)
        write_embeddings(writer, pipeline, writer.pending_rows(), listener or Listener())
    return pipeline


@given(rows=st.sets(st.integers(0, 200)), size=st.integers(1, 40))
def test_batches_are_runs_of_rows_within_multiples_of_their_size(rows: set[int], size: int) -> None:
    pending = np.array(sorted(rows), dtype=np.int64)
    batches = list(consecutive_batches(pending, size))
    assert [row for batch in batches for row in batch] == sorted(rows)
    for batch in batches:
        assert (np.diff(batch) == 1).all()
        assert batch[0] // size == batch[-1] // size


@given(total=st.integers(1, 200), size=st.integers(1, 40), done=st.integers(0, 20))
def test_a_continued_run_has_the_same_batches(total: int, size: int, done: int) -> None:
    whole = [batch.tolist() for batch in consecutive_batches(np.arange(total), size)]
    rest = [batch.tolist() for batch in consecutive_batches(np.arange(min(done * size, total), total), size)]
    assert rest == whole[done:]


def test_workers_and_read_ahead_change_nothing(tmp_path: Path, crops: Path, encoder: Encoder) -> None:
    run(tmp_path / "one.h5", crops, encoder, workers=1)
    run(tmp_path / "many.h5", crops, encoder, workers=8)
    assert (tmp_path / "one.h5").read_bytes() == (tmp_path / "many.h5").read_bytes()
    store = EmbeddingStore.open(tmp_path / "one.h5")
    store.verify()
    listing = find_crops([crops])
    for row in (0, 7, 39):  # each row holds its own crop
        alone = encoder.encode([decode_crop(listing.path(row).read_bytes()).pixels]).numpy()[0]
        np.testing.assert_allclose(store.features[row].astype(np.float32), alone, rtol=2e-3, atol=2e-3)


def test_an_interrupt_keeps_every_encoded_row(tmp_path: Path, crops: Path, encoder: Encoder) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "s.h5", crops, encoder, StopAfter(24, KeyboardInterrupt))
    assert EmbeddingStore.open(tmp_path / "s.h5").counts == {"pending": 16, "encoded": 24, "unreadable": 0}


def test_rows_are_committed_on_the_way(
    tmp_path: Path, crops: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kill may cost is bounded by rows, and by time."""
    monkeypatch.setattr(extract_module, "COMMIT_ROWS", 8)
    with pytest.raises(Stopped):
        run(tmp_path / "rows.h5", crops, encoder, StopAfter(24, Stopped))
    assert EmbeddingStore.open(tmp_path / "rows.h5").counts["encoded"] == 16
    monkeypatch.undo()
    monkeypatch.setattr(extract_module, "COMMIT_SECONDS", 0.0)
    with pytest.raises(Stopped):
        run(tmp_path / "time.h5", crops, encoder, StopAfter(24, Stopped))
    assert EmbeddingStore.open(tmp_path / "time.h5").counts["encoded"] == 20
    monkeypatch.undo()
    for name in ("rows.h5", "time.h5"):
        run(tmp_path / name, crops, encoder)
    run(tmp_path / "whole.h5", crops, encoder)
    assert (tmp_path / "rows.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()
    assert (tmp_path / "time.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_pending_rows_in_pieces_are_put_where_they_belong(tmp_path: Path, crops: Path, encoder: Encoder) -> None:
    run(tmp_path / "whole.h5", crops, encoder)
    whole = EmbeddingStore.open(tmp_path / "whole.h5")
    listing = find_crops([crops])
    create_store(tmp_path / "s.h5", listing, encoder.width, encoder.description, fingerprint(encoder.description))
    done = np.flatnonzero(np.arange(40) // 4 % 3 == 1)  # every third batch
    with StoreWriter(tmp_path / "s.h5") as writer:
        for row in done:
            writer.commit(int(row), whole.features[row : row + 1], np.ones(1, np.uint8))
    pipeline = run(tmp_path / "s.h5", crops, encoder)
    assert pipeline.stats.modes == {"RGB": 40 - len(done)}
    assert (tmp_path / "s.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_account_of_modes_reasons_and_time(tmp_path: Path, crops: Path, encoder: Encoder) -> None:
    (crops / "a" / "00002.jpg").write_bytes(b"")
    (crops / "a" / "00003.jpg").unlink()
    (crops / "a" / "00003.jpg").mkdir()
    pipeline = run(tmp_path / "s.h5", crops, encoder)
    assert pipeline.stats.unreadable == {1: "the file is empty (0 bytes)", 2: "Is a directory"}
    assert pipeline.stats.modes == {"RGB": 38}
    shares = pipeline.stats.shares()
    assert set(shares) == {"decode", "copy", "encode", "write"}
    assert sum(shares.values()) == pytest.approx(1)
    assert all(share > 0 for share in shares.values())
    store = EmbeddingStore.open(tmp_path / "s.h5")
    assert np.flatnonzero(store.status == 2).tolist() == [1, 2]
    assert not store.features[1:3].any()


def test_a_crop_that_goes_is_unreadable_but_a_folder_that_goes_stops_the_run(
    tmp_path: Path, crops: Path, encoder: Encoder
) -> None:
    listing = find_crops([crops])
    create_store(tmp_path / "s.h5", listing, encoder.width, encoder.description, fingerprint(encoder.description))
    (crops / "a" / "00001.jpg").unlink()
    (crops / "b").rename(crops / "gone")
    with StoreWriter(tmp_path / "s.h5") as writer:
        pipeline = Pipeline(listing, encoder, Listener(), batch_size=5, workers=2)
        with pytest.raises(InputError) as caught:
            write_embeddings(writer, pipeline, writer.pending_rows(), Listener())
        assert str(caught.value) == (
            f"The crops folder {crops / 'b'} can't be read any more (No such file or directory). Expected it to stay "
            "while crops are encoded. Reconnect it and run the same command again: it continues at the last committed "
            "row."
        )
        assert pipeline.stats.unreadable == {0: "No such file or directory"}
        assert not (writer.store.status[30:] != 0).any()


def test_threads_leave_the_filters_of_warnings_alone(tmp_path: Path, crops: Path, encoder: Encoder) -> None:
    """Threads that each set and restored them would leave one another's behind."""
    before = list(warnings.filters)
    run(tmp_path / "s.h5", crops, encoder, batch_size=16, workers=16)
    assert list(warnings.filters) == before


def test_remarks_of_pillow_are_no_fault_of_a_crop(tmp_path: Path, encoder: Encoder) -> None:
    """It warns of a palette whose transparency stands in bytes; the pixels are right."""
    root = tmp_path / "crops"
    (root / "v").mkdir(parents=True)
    image = Image.fromarray(np.zeros((40, 40, 3), np.uint8)).quantize(4)
    image.save(root / "v" / "00001.png", transparency=b"\x00\x80")
    pipeline = run(tmp_path / "s.h5", root, encoder)
    assert pipeline.stats.unreadable == {}
    assert pipeline.stats.modes == {"P": 1}
