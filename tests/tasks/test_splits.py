"""Which frames belong together, and which are held out: whole videos, persons of a video never apart."""

from pathlib import Path

import numpy as np
import pytest

from affcache.errors import InputError
from affcache.store.reading import EmbeddingStore
from affcache.tasks.annotations import JoinedLabels, join_labels
from affcache.tasks.splits import group_frames, hold_out, of_videos, stripped_name
from affcache.tasks.tasks import TASKS
from tests.conftest import write_labels, write_store

NAMES = ("10", "10_left", "11_right", "11_left", "12", "13", "left", "x_left_y")


@pytest.fixture
def joined(tmp_path: Path) -> tuple[EmbeddingStore, JoinedLabels]:
    listing = {name: range(1, 6 + index) for index, name in enumerate(NAMES)}
    count = sum(map(len, listing.values()))
    features = np.arange(count * 4).reshape(count, 4).astype(np.float16)
    store = write_store(tmp_path / "s.h5", listing, features)
    write_labels(tmp_path, "expr", "train", {name: [i % 8 for i in of] for name, of in listing.items()})
    return store, join_labels(store, tmp_path, TASKS["expr"], "train")


@pytest.mark.parametrize(
    ("video", "stripped"),
    [("10-30-1920x1080_left", "10-30-1920x1080"), ("10_right", "10"), ("left", "left"), ("a_left_b", "a_left_b")],
)
def test_the_mark_of_a_person_is_stripped_from_the_end_alone(video: str, stripped: str) -> None:
    assert stripped_name(video) == stripped


def test_persons_of_a_video_are_one_group(joined: tuple[EmbeddingStore, JoinedLabels]) -> None:
    store, labels = joined
    names, group = group_frames(store, labels)
    assert names == ["10", "11", "12", "13", "left", "x_left_y"]
    videos = np.array(store.video_names)[store.video_of_rows()[labels.rows]]
    assert [names[index] for index in group] == [stripped_name(video) for video in videos]


@pytest.mark.parametrize("share", [0.001, 0.2, 0.5, 0.999])
def test_whole_groups_are_held_out(joined: tuple[EmbeddingStore, JoinedLabels], share: float) -> None:
    store, labels = joined
    rest, names = hold_out(store, labels, share)
    held = of_videos(store, labels, names)
    assert sorted([*rest.rows, *held.rows]) == list(labels.rows)
    assert group_frames(store, held)[0] == names
    assert not set(group_frames(store, rest)[0]) & set(names)
    assert len(rest)
    assert len(held)
    assert (rest.account.used, held.account.used) == (len(rest), len(held))
    expected = dict(zip(labels.rows, labels.labels, strict=True))
    assert all(expected[row] == label for row, label in zip(held.rows, held.labels, strict=True))


def held_out_of(folder: Path, names: list[str], share: float) -> list[str]:
    """Return which videos of a store with a frame of each are held out."""
    folder.mkdir()
    store = write_store(folder / "s.h5", {name: range(1, 2) for name in names}, np.zeros((len(names), 4), np.float16))
    write_labels(folder, "expr", "train", {name: [0] for name in names})
    return hold_out(store, join_labels(store, folder, TASKS["expr"], "train"), share)[1]


def test_a_video_is_held_out_by_its_own_name_alone(tmp_path: Path) -> None:
    names = sorted(f"{number}-30-640x360" for number in range(200))
    held = held_out_of(tmp_path / "all", names, 0.2)
    assert 0.1 < len(held) / 200 < 0.3
    assert set(held) <= set(held_out_of(tmp_path / "more", names, 0.4)), "a larger share has the smaller one in it"
    for index, left_out in enumerate(("0-30-640x360", held[0])):
        fewer = held_out_of(tmp_path / str(index), [name for name in names if name != left_out], 0.2)
        assert fewer == [name for name in held if name != left_out]
    persons = held_out_of(tmp_path / "persons", [f"{name}_left" for name in names], 0.2)
    assert persons == held, "as the videos that they are of"


def test_frames_of_one_video_cannot_be_parted(joined: tuple[EmbeddingStore, JoinedLabels]) -> None:
    store, labels = joined
    _, group = group_frames(store, labels)
    one = JoinedLabels(labels.rows[group == 0], labels.labels[group == 0], labels.account)
    with pytest.raises(InputError, match="All training frames are of one video, 10: none can be held out"):
        hold_out(store, one, 0.2)
