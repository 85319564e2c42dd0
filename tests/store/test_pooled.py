"""Videos in place of frames: which there are, and that they are pooled as by hand, from encoded frames alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from affcache.errors import InputError
from affcache.store.description import fingerprint
from affcache.store.frames import ENCODED, UNREADABLE
from affcache.store.joined import join_stores
from affcache.store.pooled import COLUMNS, QUANTILES, PooledStore, pool_frames, pooled_width
from affcache.store.prefetch import read_ahead
from affcache.store.reading import view_path
from tests.conftest import write_store

POOLS = ("mean", "mean+std", "mean+std+quantiles")
VIDEOS = {"a": range(1, 8), "b_left": [4], "b_right": range(2, 30, 3), "c": [1, 2]}  # of c none can be read
ROWS = sum(map(len, VIDEOS.values()))
LOST = [0, 3, 10, ROWS - 2, ROWS - 1]


def features_of(width: int, seed: int = 0) -> npt.NDArray[np.float16]:
    return np.random.default_rng(seed).normal(3, 2, (ROWS, width)).astype(np.float16)


def by_hand(frames: npt.NDArray[np.float16], pool: str) -> npt.NDArray[np.float64]:
    """What is pooled of frames (n, D), by plain sums and sorted values."""
    values = frames.astype(np.float64)
    count = len(values)
    mean = values.sum(0) / count
    found = [mean, np.sqrt(((values - mean) ** 2).sum(0) / count)]
    for quantile in QUANTILES:
        place = quantile * (count - 1)
        low, share = int(place), place - int(place)
        each = np.sort(values, axis=0)
        found.append(each[low] * (1 - share) + each[min(low + 1, count - 1)] * share)
    return np.concatenate(found[: {"mean": 1, "mean+std": 2}.get(pool, len(found))])


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("width", [1, 5, COLUMNS + 1])
def test_a_video_is_the_statistics_of_its_encoded_frames(tmp_path: Path, pool: str, width: int) -> None:
    features = features_of(width)
    source = write_store(tmp_path / "s.h5", VIDEOS, features, unreadable=LOST)
    store = PooledStore.of(source, pool)
    assert (store.video_names, store.status.tolist()) == (tuple(VIDEOS), [ENCODED] * 3 + [UNREADABLE])
    assert store.width == pooled_width(pool, width) == len(by_hand(features, pool))
    found = store.read(np.array([0, 1, 2]))
    assert found.dtype == np.float32
    for video, name in enumerate(list(VIDEOS)[:3]):
        rows = [row for row in range(*source.video_start[video : video + 2]) if row not in LOST]
        assert found[video] == pytest.approx(by_hand(features[rows], pool), rel=1e-6, abs=1e-6), name
        assert store.frames_of(np.array([video]))[0].tolist() == rows
    again = torch.cat(list(read_ahead(store, [np.array([2]), np.array([0])], torch.device("cpu"))))
    assert np.array_equal(again.numpy(), found[[2, 0]])


@given(st.integers(1, 40), st.sampled_from(POOLS), st.integers(0, 100), st.floats(-3e4, 3e4))
def test_values_far_from_zero_lose_nothing(frames: int, pool: str, seed: int, offset: float) -> None:
    values = np.random.default_rng(seed).normal(offset, 1, (frames, 3)).astype(np.float16)
    expected = by_hand(values, pool)
    assert pool_frames(values, pool) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_stores_side_by_side_are_pooled_as_their_concatenation(tmp_path: Path) -> None:
    features = features_of(7)
    whole = write_store(tmp_path / "whole.h5", VIDEOS, features, unreadable=LOST)
    parts = [
        write_store(tmp_path / f"{n}.h5", VIDEOS, features[:, cut], unreadable=LOST, weights_sha256=str(n) * 64)
        for n, cut in enumerate((slice(0, 3), slice(3, 7)))
    ]
    joined, alone = (PooledStore.of(one, "mean+std") for one in (join_stores(parts), whole))
    assert np.array_equal(joined.read(np.arange(3)), alone.read(np.arange(3)))
    assert joined.video_names == ("a", "b_left", "b_right"), "what no store has is left out"
    assert joined.known_names == ("a", "b_left", "b_right", "c")
    assert joined.fingerprint() == join_stores(parts).fingerprint()


def test_a_view_is_pooled_by_its_own_frames(tmp_path: Path) -> None:
    plain, mirrored = features_of(4), features_of(4, seed=1)
    source = write_store(tmp_path / "s.h5", VIDEOS, plain, unreadable=LOST)
    write_store(view_path(source.path, "flip"), VIDEOS, mirrored, unreadable=LOST, view="flip")
    assert fingerprint(source.encoder) == source.encoder_fingerprint
    found = PooledStore.of(source, "mean").view("flip").read(np.array([1]))
    assert found[0] == pytest.approx(mirrored[7].astype(np.float64))


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_an_embedding_that_is_no_number_is_named_by_its_video(tmp_path: Path, wrong: float) -> None:
    features = features_of(4)
    source = write_store(tmp_path / "s.h5", VIDEOS, features)
    features[12, 2] = wrong  # no writer takes it
    store = PooledStore.of(replace(source, features=features), "mean+std+quantiles")
    store.read(np.array([0, 3]))
    with pytest.raises(InputError, match=r"video b_right of .*s\.h5 has an embedding with nan or inf"):
        store.read(np.array([2]))
