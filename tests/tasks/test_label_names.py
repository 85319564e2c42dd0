"""Label files of videos whose names have several levels: nested or flat, and never joined to another video."""

from pathlib import Path

import numpy as np
import pytest

from affcache.errors import InputError
from affcache.tasks.annotations import join_labels
from affcache.tasks.label_files import find_label_files
from affcache.tasks.splits import group_frames, hold_out
from affcache.tasks.tasks import TASKS
from affcache.training.splits import JoinedSplits
from tests.conftest import Heard, write_labels, write_store
from tests.tasks.test_annotations import join, store_in_memory

BAH = {"1/V1/Q1": [1, 2], "1/V1/Q3": [1, 2], "1/V2/Q3": [1], "2/V1/Q3": [1, 2], "2/V1/Q4": [1, 2]}


def write_nested(annotations: Path, labels: dict[str, list[int]], split: str = "train") -> Path:
    """Write label files, in folders where a name has several levels."""
    below = annotations / "EXPR_Recognition_Challenge" / {"train": "Train_Set", "validation": "Validation_Set"}[split]
    for name in labels:
        (below / name).parent.mkdir(parents=True, exist_ok=True)
    return write_labels(annotations, "expr", split, dict(labels))


def test_label_files_are_found_at_any_depth(tmp_path: Path) -> None:
    annotations = write_nested(tmp_path, {"1/V1/Q3": [1], "flat": [2], "e\u0301/Q1.b": [3], ".hidden/Q1": [4]})
    folder = annotations / "EXPR_Recognition_Challenge" / "Train_Set"
    assert find_label_files(annotations, TASKS["expr"], "train") == {
        "1/V1/Q3": folder / "1" / "V1" / "Q3.txt",
        "flat": folder / "flat.txt",
        "é/Q1.b": folder / "e\u0301" / "Q1.b.txt",
    }
    write_nested(tmp_path, {"é/Q1.b": [3]})
    with pytest.raises(InputError, match=r"two label files of the video .*/Q1\.b, whose names differ in the form"):
        find_label_files(annotations, TASKS["expr"], "train")


def test_full_names_join_and_last_ones_where_they_are_unambiguous(tmp_path: Path) -> None:
    store = store_in_memory(BAH)
    nested = write_nested(tmp_path / "nested", {name: [int(name[0])] * 2 for name in BAH})
    joined = join_labels(store, nested, TASKS["expr"], "train")
    assert joined.labels.tolist() == [1, 1, 1, 1, 1, 2, 2, 2, 2]
    assert joined.account.videos_without_crops == ()
    assert group_frames(store, joined)[0] == list(BAH)
    flat = join(tmp_path / "flat", store, {"Q1": [5], "Q4": [6, 7], "Q9": [0]})
    assert (flat.rows.tolist(), flat.labels.tolist()) == ([0, 7, 8], [5, 6, 7])
    assert flat.account.videos_without_crops == ("Q9",)
    deeper = write_nested(tmp_path / "deeper", {"x/a": [1], "x/b": [2], "y/c": [3]})
    assert join_labels(store_in_memory({"a": [1], "b": [1]}), deeper, TASKS["expr"], "train").labels.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("videos", "labels", "said"),
    [
        (list(BAH), ["Q1", "Q3"], "Q3 may be any of 3 videos, 1/V1/Q3, 1/V2/Q3, 2/V1/Q3. "),
        (["Q3"], ["1/Q3", "2/Q3"], "1/Q3 and 2/Q3 may both be the video Q3. "),
        (["Q3"], ["1/Q3", "0/1/Q3"], "0/1/Q3 and 1/Q3 are both labels of the video Q3. "),
    ],
)
def test_a_label_file_that_may_be_of_several_videos_is_refused(
    tmp_path: Path, videos: list[str], labels: list[str], said: str
) -> None:
    annotations = write_nested(tmp_path, {name: [0] for name in labels})
    with pytest.raises(InputError) as caught:
        join_labels(store_in_memory({name: [1] for name in videos}), annotations, TASKS["expr"], "train")
    folder = annotations / "EXPR_Recognition_Challenge" / "Train_Set"
    assert str(caught.value).startswith(f"{folder}: {said}Expected one" if "both" in said else f"{folder}: {said}")


def test_labels_of_other_people_are_not_taken(tmp_path: Path) -> None:
    """The last folder is the same, and there is but one on either side: the persons differ all the same."""
    annotations = write_nested(tmp_path, {"9/V1/Q4": [0], "1/V1/Q1": [1]})
    joined = join_labels(store_in_memory(BAH), annotations, TASKS["expr"], "train")
    assert (joined.rows.tolist(), joined.account.videos_without_crops) == ([0], ("9/V1/Q4",))


def test_the_full_name_wins_over_a_short_one(tmp_path: Path) -> None:
    annotations = write_nested(tmp_path, {"1/V1/Q1": [1], "Q1": [2]})
    joined = join_labels(store_in_memory({"1/V1/Q1": [1]}), annotations, TASKS["expr"], "train")
    assert (joined.labels.tolist(), joined.account.videos_without_crops) == ([1], ("Q1",))


def test_a_video_in_both_splits_is_warned_of_under_whatever_name(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s.h5", BAH, np.ones((9, 3), np.float16))
    annotations = write_nested(tmp_path, {"1/V1/Q1": [1, 1], "2/V1/Q3": [1, 1]})
    write_nested(tmp_path, {"Q1": [1, 1], "Q4": [0, 0]}, "validation")
    heard = Heard()
    joined = JoinedSplits.open((store.path,), TASKS["expr"], annotations, heard)
    assert heard.warnings == ["1 video in both splits, so validation flatters: 1/V1/Q1"]
    rest, held = hold_out(store, joined.train, 0.5)
    assert {*held, *group_frames(store, rest)[0]} == {"1/V1/Q1", "2/V1/Q3"}
