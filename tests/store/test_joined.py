"""Stores side by side: which frames they share, and that their embeddings stand one after the other."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from affcache.errors import ConfigError, InputError, StoreError
from affcache.store.description import differing_fields, fingerprint
from affcache.store.frames import ABSENT, ENCODED, FrameIndex, all_frames, shared_frames
from affcache.store.joined import join_stores, open_stores
from affcache.store.prefetch import read_ahead
from affcache.store.reading import EmbeddingStore
from tests.conftest import Heard, spoil_features, write_store

CPU = torch.device("cpu")
Videos = dict[str, dict[int, bool]]  # by name: frame number -> whether it is readable
NAMES = ("a", "b_left", "é", "e\u0301x", "z/1/Q")
videos_of_stores = st.lists(
    st.dictionaries(st.sampled_from(NAMES), st.dictionaries(st.integers(0, 12), st.booleans(), min_size=1), min_size=1),
    min_size=2,
    max_size=3,
)


def index_of(videos: Videos) -> FrameIndex:
    names = sorted(videos)
    numbers = [np.array(sorted(videos[name]), np.int32) for name in names]
    status = [1 if videos[name][number] else 2 for name in names for number in sorted(videos[name])]
    starts = np.cumsum([0, *map(len, numbers)])
    return FrameIndex(Path("s.h5"), np.array(status, np.uint8), np.concatenate(numbers), tuple(names), starts)


def table_of(index: FrameIndex, rows: str) -> "pd.DataFrame":
    """A row for each frame with an embedding."""
    videos = np.array(index.video_names, dtype=object)[index.video_of_rows()]
    table = pd.DataFrame({"video": videos, "frame": index.frame_number, rows: np.arange(len(index))})
    return table[index.status == ENCODED]


@settings(max_examples=150, deadline=None)
@given(videos_of_stores)
def test_the_join_is_that_of_pandas(each: list[Videos]) -> None:
    stores = [index_of(videos) for videos in each]
    tables = [table_of(store, f"row{number}") for number, store in enumerate(stores)]
    inner, outer = tables[0], tables[0]
    for table in tables[1:]:
        inner = inner.merge(table, on=["video", "frame"], how="inner")
        outer = outer.merge(table, on=["video", "frame"], how="outer")
    frames, rows = shared_frames(stores)
    expected = inner.sort_values(["video", "frame"])
    names = [frames.video_names[video] for video in frames.video_of_rows()]
    assert list(zip(names, frames.frame_number.tolist(), strict=True)) == list(
        zip(expected["video"], expected["frame"], strict=True)
    )
    for number, own in enumerate(rows):
        assert own.tolist() == expected[f"row{number}"].tolist()
    frames, rows = all_frames(stores)
    there = frames.status == ENCODED
    expected = outer.sort_values(["video", "frame"]).fillna(ABSENT)
    names = [frames.video_names[video] for video in frames.video_of_rows()[there]]
    assert list(zip(names, frames.frame_number[there].tolist(), strict=True)) == list(
        zip(expected["video"], expected["frame"], strict=True)
    )
    for number, own in enumerate(rows):
        assert own[there].tolist() == expected[f"row{number}"].astype(int).tolist()
        assert (own[~there] == ABSENT).all()


def stores_of(folder: Path, *listings: tuple[dict[str, Sequence[int]], int, Sequence[int]]) -> list[EmbeddingStore]:
    """Write stores of videos, a width and unreadable rows each, with random embeddings."""
    found = []
    for number, (videos, width, unreadable) in enumerate(listings):
        random = np.random.default_rng(number)
        features = random.normal(size=(sum(map(len, videos.values())), width)).astype(np.float16)
        described: dict[str, Any] = {"weights_sha256": str(number) * 64, "width": width}
        found.append(write_store(folder / f"{number}.h5", videos, features, unreadable, **described))
    return found


def expected_of(stores: Sequence[EmbeddingStore], video: str, frame: int) -> npt.NDArray[np.float16]:
    parts = []
    for store in stores:
        first, last = store.video_start[store.video_names.index(video) :][:2]
        row = first + store.frame_number[first:last].tolist().index(frame)
        parts.append(store.features[row])
    return np.concatenate(parts)


def test_embeddings_stand_one_after_the_other(tmp_path: Path) -> None:
    stores = stores_of(
        tmp_path,
        ({"a": range(1, 200), "b": range(1, 100), "d": [1]}, 3, [4]),
        ({"a": range(5, 250, 2), "b": range(50, 101), "c": [1, 2]}, 5, [1]),
        ({"a": range(1, 300), "b": range(1, 120)}, 2, []),
    )
    joined = join_stores(stores)
    frames = [f for f in range(1, 200) if f >= 5 and f % 2 and f not in (5, 7)]  # row 4 of the first, 1 of the second
    assert joined.frame_number.tolist() == [*frames, *range(50, 100)]
    assert (joined.video_names, joined.width, len(joined.parts)) == (("a", "b"), 10, 3)
    every = np.arange(len(joined))
    read = joined.read(every)
    for row in every:
        video = joined.video_names[joined.video_of_rows()[row]]
        np.testing.assert_array_equal(read[row], expected_of(stores, video, int(joined.frame_number[row])))
    groups = [every[:7], every[7:90:3], every[90:]]
    for group, embeddings in zip(groups, read_ahead(joined, groups, CPU), strict=True):
        np.testing.assert_array_equal(embeddings.numpy(), read[group])


def test_videos_in_another_order_are_read_right(tmp_path: Path) -> None:
    """A composed accent sorts after z, a decomposed one before f: the rows of the second store go back and forth."""
    stores = stores_of(
        tmp_path, ({"f": range(3), "\u00e9": range(3)}, 3, []), ({"e\u0301": range(3), "f": range(3)}, 5, [])
    )
    joined = join_stores(stores)
    assert joined.rows_of_parts[1].tolist() == [3, 4, 5, 0, 1, 2]
    (embeddings,) = read_ahead(joined, [np.arange(6)], CPU)
    np.testing.assert_array_equal(embeddings.numpy(), joined.read(np.arange(6)))
    np.testing.assert_array_equal(embeddings.numpy()[4, 3:], stores[1].features[1])


def test_what_a_join_leaves_out_is_said(tmp_path: Path) -> None:
    stores = stores_of(tmp_path, ({"a": range(10)}, 3, [0]), ({"a": range(8)}, 5, []))
    heard = Heard()
    joined = open_stores([store.path for store in stores], heard)
    assert len(joined) == 7
    assert heard.messages == [
        f"2 stores side by side: 7 frames x 8; left out: 2 frames of {stores[0].path}, not in all others, "
        f"1 frame of {stores[1].path}, not in all others"
    ]
    assert "7 x (3 + 5)" in repr(joined)


def test_stores_that_cannot_stand_side_by_side_are_refused(tmp_path: Path) -> None:
    one, other, third = stores_of(tmp_path, ({"a": [1]}, 3, []), ({"a": [2], "b": [1]}, 5, []), ({"a": [1]}, 2, []))
    with pytest.raises(InputError, match=r"No frame has an embedding in all of .*0\.h5 has a, frame 1"):
        open_stores([one.path, other.path], Heard())
    with pytest.raises(ConfigError, match=r"--store names .* twice"):
        open_stores([one.path, tmp_path / "." / "0.h5"], Heard())
    with pytest.raises(StoreError, match="no embedding store at"):
        open_stores([one.path, tmp_path / "none.h5"], Heard())
    spoil_features(third.path)
    with pytest.raises(StoreError, match=r"2\.h5: block 0 .* is corrupt"):
        open_stores([one.path, third.path], Heard()).verify()


def test_who_made_them_is_in_the_fingerprint_in_their_order(tmp_path: Path) -> None:
    one, other = stores_of(tmp_path, ({"a": [1]}, 3, []), ({"a": [1]}, 5, []))
    joined, turned = join_stores([one, other]), join_stores([other, one])
    assert joined.encoder_fingerprint == fingerprint(joined.encoder) != turned.encoder_fingerprint
    assert joined.fingerprint() != turned.fingerprint()
    renamed = {"stores": [{**encoder, "model": "elsewhere", "versions": {}} for encoder in joined.encoder["stores"]]}
    assert fingerprint(renamed) == joined.encoder_fingerprint, "names and versions change no number"
    assert differing_fields(joined.encoder, renamed) == []
    assert differing_fields(joined.encoder, turned.encoder)[0].startswith("encoder 1, weights_sha256: '000")
    assert differing_fields(joined.encoder, one.encoder) == ["encoders: 2 against 1"]
