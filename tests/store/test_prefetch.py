"""Rows read ahead by a thread: the right ones, into two buffers, with no thread left behind."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from io import RawIOBase
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from affcache.errors import StoreError
from affcache.store import prefetch as module
from affcache.store.prefetch import SPAN_ROWS, read_ahead
from affcache.store.reading import EmbeddingStore
from tests.conftest import write_store

CPU = torch.device("cpu")
ROWS = 1000


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    return make_store(tmp_path_factory.mktemp("store") / "store.h5")


def make_store(path: Path) -> EmbeddingStore:
    """Write a store of ROWS rows of width 3; a row's values say which it is."""
    features = np.arange(ROWS)[:, None] + np.array([0.0, 0.25, 0.5])
    return write_store(path, {"video": range(1, ROWS + 1)}, features.astype(np.float16))


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def wait_until(happened: Callable[[], bool]) -> bool:
    end = time.monotonic() + 10
    while not happened() and time.monotonic() < end:
        time.sleep(0.001)
    return happened()


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert wait_until(lambda: not threads())


def groups_of(*sizes: int) -> list[np.ndarray]:
    starts = np.cumsum([0, *sizes])
    return [np.arange(first, last) for first, last in pairwise(starts)]


SETS = st.lists(st.sets(st.integers(0, ROWS - 1), min_size=1, max_size=200).map(sorted).map(np.array), max_size=6)


@given(SETS)
def test_every_group_is_its_rows(store: EmbeddingStore, groups: list[np.ndarray]) -> None:
    found = [embeddings.numpy().tobytes() for embeddings in read_ahead(store, groups, CPU)]
    assert found == [store.features[group].tobytes() for group in groups]


@given(SETS)
def test_the_way_by_pinned_memory_gives_the_same(store: EmbeddingStore, groups: list[np.ndarray]) -> None:
    waits: list[torch.device] = []
    with pytest.MonkeyPatch.context() as patch:  # stands in for a GPU
        patch.setattr(module, "STAGING_ROWS", 7)
        patch.setattr(module, "_staging", lambda width, device: torch.empty(7, width, dtype=torch.float16))
        patch.setattr(module, "_synchronize", waits.append)
        found = [embeddings.numpy().tobytes() for embeddings in read_ahead(store, groups, CPU)]
    assert found == [store.features[group].tobytes() for group in groups]
    assert len(waits) == sum(-(-len(group) // 7) for group in groups), "before the memory is filled again"


def test_there_are_two_buffers_of_the_largest_group(store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    make = module._empty

    def recorded(rows: int, *rest: Any) -> torch.Tensor:
        made.append(rows)
        return make(rows, *rest)

    monkeypatch.setattr(module, "_empty", recorded)
    places = [embeddings.data_ptr() for embeddings in read_ahead(store, groups_of(30, 40, 10, 40, 20), CPU)]
    assert made == [40, 40]
    assert places[0] != places[1]
    assert places == [places[0], places[1]] * 2 + [places[0]]


def test_the_next_group_is_read_meanwhile_and_no_further(
    store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    plain = module.read_rows

    def recorded(file: RawIOBase, features: Any, first: int, last: int) -> Any:
        read.append(first)
        return plain(file, features, first, last)

    monkeypatch.setattr(module, "read_rows", recorded)
    generator = read_ahead(store, groups_of(*[SPAN_ROWS] * 5), CPU)
    kept = next(generator)
    assert wait_until(lambda: len(read) == 2)
    time.sleep(0.05)
    assert read == [0, SPAN_ROWS], "the second while the first is in use, and not the third, into its buffer"
    assert kept.numpy().tobytes() == store.features[:SPAN_ROWS].tobytes()
    next(generator)
    assert wait_until(lambda: len(read) == 3)
    generator.close()


def test_reading_is_by_short_spans(store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch) -> None:
    spans: list[tuple[int, int]] = []
    plain = module.read_rows

    def recorded(file: RawIOBase, features: Any, first: int, last: int) -> Any:
        spans.append((first, last))
        return plain(file, features, first, last)

    monkeypatch.setattr(module, "read_rows", recorded)
    rows = np.array([3, 5, 63, 64, 130, 900])
    (embeddings,) = read_ahead(store, [rows], CPU)
    assert spans == [(3, 64), (64, 65), (130, 131), (900, 901)]
    assert embeddings.numpy().tobytes() == store.features[rows].tobytes()


def slow_reads(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    plain = module.read_rows

    def slow(*arguments: Any) -> Any:
        time.sleep(seconds)
        return plain(*arguments)

    monkeypatch.setattr(module, "read_rows", slow)


def test_closing_early_ends_the_thread_soon(store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = read_ahead(store, [np.arange(5), np.arange(ROWS)], CPU)
    slow_reads(monkeypatch, 0.2)
    next(generator)
    assert len(threads()) == 1
    start = time.monotonic()
    generator.close()
    assert wait_until(lambda: not threads())
    assert time.monotonic() - start < 1, "16 spans would take three seconds"


def test_closing_waits_for_the_read_under_way(store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = module.read_rows
    began: list[bool] = []
    open_files: list[bool] = []

    def slow(file: RawIOBase, *arguments: Any) -> Any:
        began.append(True)
        time.sleep(0.2)
        open_files.append(not file.closed)
        return plain(file, *arguments)

    monkeypatch.setattr(module, "read_rows", slow)
    generator = read_ahead(store, [np.arange(5), np.arange(ROWS)], CPU)
    next(generator)
    assert wait_until(lambda: len(began) == 2)
    generator.close()
    assert open_files == [True, True]


def test_an_error_of_the_caller_ends_the_thread(store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_reads(monkeypatch, 0.01)
    generator = read_ahead(store, groups_of(200, 200, 200), CPU)

    def use(embeddings: Iterator[torch.Tensor]) -> None:
        for _ in embeddings:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use(generator)
    assert wait_until(lambda: not threads()), "also if the generator is never closed, as while a debugger has it"


def test_a_file_cut_short_is_an_error_of_the_caller(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store.h5")
    assert isinstance(store.features, np.memmap)
    os.truncate(store.path, store.features.offset + 150 * store.features.strides[0])
    generator = read_ahead(store, groups_of(100, 100, 100), CPU)
    assert len(next(generator)) == 100
    with pytest.raises(StoreError, match=r"store\.h5 is cut short"):
        next(generator)


@pytest.mark.parametrize("group", [0, 1, 4])
def test_a_broken_disk_is_an_error_of_the_caller(
    group: int, store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = module.read_rows

    def broken(file: RawIOBase, features: Any, first: int, last: int) -> Any:
        if first >= group * 100:
            raise OSError(5, "Input/output error")
        return plain(file, features, first, last)

    monkeypatch.setattr(module, "read_rows", broken)
    generator = read_ahead(store, groups_of(*[100] * 5), CPU)
    for _ in range(group):
        next(generator)
    with pytest.raises(StoreError, match=r"can't be read any more: Input/output error\. Expected .* run the command"):
        next(generator)


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store.h5")
    store.path.unlink()
    with pytest.raises(StoreError, match=r"store\.h5 can't be opened any more: No such file .* Put it back"):
        next(read_ahead(store, groups_of(10), CPU))
