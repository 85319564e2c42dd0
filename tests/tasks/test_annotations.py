"""Label files and the join: every oddity of Aff-Wild2's files, and the join against a dictionary."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import affcache
from affcache.errors import InputError, StoreError
from affcache.store.description import fingerprint
from affcache.store.frames import ENCODED, UNREADABLE
from affcache.store.reading import EmbeddingStore
from affcache.store.writing import create_store
from affcache.tasks.annotations import JoinedLabels, join_labels
from affcache.tasks.label_files import find_label_files, read_label_file
from affcache.tasks.label_sources import find_labels
from affcache.tasks.task import Task
from affcache.tasks.tasks import TASKS
from tests.conftest import crop_list, write_labels, write_store

EXPR, AU, VA = TASKS["expr"], TASKS["au"], TASKS["va"]
PRESENT, ABSENT = ",".join("1" * 12), ",".join("0" * 12)


def store_in_memory(videos: dict[str, Sequence[int]], unreadable: Sequence[int] = ()) -> EmbeddingStore:
    """A store with these videos and frames whose file was never written; the join reads the index alone."""
    crops = crop_list(videos)
    status = np.full(len(crops.frame_number), ENCODED, dtype=np.uint8)
    status[list(unreadable)] = UNREADABLE
    return EmbeddingStore(
        path=Path("made-up.h5"),
        features=np.zeros((len(status), 2), dtype=np.float16),
        status=status,
        frame_number=crops.frame_number,
        video_names=crops.video_names,
        video_start=crops.video_start,
        block_checksum=np.ones(1, dtype=np.uint32),
        encoder={},
        encoder_fingerprint="",
    )


def write_file(folder: Path, text: str | bytes, name: str = "a.txt") -> Path:
    """Write a label file byte for byte, so that no platform changes its line ends."""
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def lines_of(task: Task, *lines: object) -> str:
    return "\n".join([task.header, *map(str, lines)]) + "\n"


# Reading one file


def test_header_is_line_0_and_line_i_belongs_to_frame_i(tmp_path: Path) -> None:
    labels, valid = read_label_file(write_file(tmp_path, lines_of(EXPR, 3, 0, -1, 7)), EXPR)
    assert labels.tolist() == [3, 0, -1, 7]  # entry 0 is frame 1
    assert valid.tolist() == [True, True, False, True]
    store = store_in_memory({"a": [1, 2, 3, 4]})
    joined = join_labels(store, write_labels(tmp_path, "expr", "train", {"a": [3, 0, -1, 7]}), EXPR, "train")
    assert joined.rows.tolist() == [0, 1, 3]
    assert joined.labels.tolist() == [3, 0, 7]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda text: text.replace("\n", "\r\n"), id="CRLF"),
        pytest.param(lambda text: text + "\n\n \n\r\n", id="blank trailing lines"),
        pytest.param(lambda text: "\ufeff" + text, id="BOM"),
        pytest.param(lambda text: text.rstrip("\n"), id="no newline at the end"),
        pytest.param(lambda text: text.replace(",", ", "), id="blanks after commas"),
        pytest.param(lambda text: text.upper(), id="header in capitals"),
    ],
)
@pytest.mark.parametrize(
    ("task", "lines"), [(EXPR, [3, 0, 7]), (AU, [PRESENT, ABSENT]), (VA, ["0.5,-1", "-5,-5", "1,0.25"])]
)
def test_harmless_variations_read_the_same(tmp_path: Path, change, task: Task, lines: list[object]) -> None:
    text = lines_of(task, *lines)
    labels, valid = read_label_file(write_file(tmp_path, text), task)
    changed_labels, changed_valid = read_label_file(write_file(tmp_path, change(text), "changed.txt"), task)
    assert np.array_equal(changed_labels, labels, equal_nan=True)
    assert np.array_equal(changed_valid, valid)
    assert len(labels) == len(lines)
    assert labels.dtype == np.dtype(task.label_dtype)


def test_an_action_unit_row_with_some_marks_counts_where_it_is_labelled(tmp_path: Path) -> None:
    one_mark = "0,1,0,1,0,-1,0,0,0,0,0,0"
    text = lines_of(AU, PRESENT, one_mark, ",".join(["-1"] * 12), ABSENT)
    labels, valid = read_label_file(write_file(tmp_path, text), AU)
    assert labels[1].tolist() == [0, 1, 0, 1, 0, -1, 0, 0, 0, 0, 0, 0]
    assert valid.tolist() == [True, True, False, True]
    annotations, store = (
        write_labels(tmp_path, "au", "train", {"a": text.splitlines()[1:]}),
        store_in_memory({"a": [1, 2, 3, 4]}),
    )
    kept, dropped = (join_labels(store, annotations, AU, "train", partial) for partial in ("keep", "drop"))
    assert (kept.rows.tolist(), dropped.rows.tolist()) == ([0, 1, 3], [0, 3])
    assert (kept.account.partial, dropped.account.partial) == (1, 0)
    assert (kept.account.invalid_label, dropped.account.invalid_label, dropped.account.dropped) == (1, 1, 1)
    assert "1 crop labelled in part" in dropped.account.sentence("train")
    assert "3 frames of 1 video, 1 of them labelled in part" in kept.account.sentence("train")


def test_minus_5_marks_valence_arousal_without_a_label(tmp_path: Path) -> None:
    path = write_file(tmp_path, lines_of(VA, "0.123,-0.456", "-5,-5", "-5,0.5", "-5.0,-5.00", "-1,1"))
    labels, valid = read_label_file(path, VA)
    assert labels.dtype == np.float32
    assert valid.tolist() == [True, False, True, False, True]
    assert np.array_equal(labels[valid], np.float32([[0.123, -0.456], [np.nan, 0.5], [-1.0, 1.0]]), equal_nan=True)


@pytest.mark.parametrize("task", [EXPR, AU, VA], ids=lambda task: task.name)
def test_a_header_alone_is_a_file_without_labels(tmp_path: Path, task: Task) -> None:
    labels, valid = read_label_file(write_file(tmp_path, task.header), task)
    assert len(labels) == len(valid) == 0


@pytest.mark.parametrize(
    ("task", "text", "line", "problem"),
    [
        pytest.param(EXPR, lines_of(EXPR, 1, "", 2), 3, "no values in ''", id="blank line, EXPR"),
        pytest.param(EXPR, lines_of(EXPR, 1, " ", 2), 3, "no values in ' '", id="line of a blank, EXPR"),
        pytest.param(AU, lines_of(AU, PRESENT, "", ABSENT), 3, "no values in ''", id="blank line, AU"),
        pytest.param(EXPR, lines_of(EXPR, 1, 2, "0,0"), 4, "2 values in '0,0'", id="two values, EXPR"),
        pytest.param(EXPR, lines_of(EXPR, "4,"), 2, "2 values in '4,'", id="comma at the end"),
        pytest.param(AU, lines_of(AU, PRESENT, PRESENT[:-2]), 3, "11 values in", id="11 values, AU"),
        pytest.param(AU, lines_of(AU, PRESENT + ",0"), 2, "13 values in", id="13 values, AU"),
        pytest.param(EXPR, lines_of(EXPR, 1, 1, 1, "x"), 5, "not a number in 'x'", id="a letter, EXPR"),
        pytest.param(AU, lines_of(AU, "0,1,a" + ",0" * 9), 2, "not a number in '0,1,a", id="a letter, AU"),
        pytest.param(EXPR, lines_of(EXPR, 1, "2\u20283", 4), 3, "not a number in '2", id="U+2028, EXPR"),
        pytest.param(EXPR, lines_of(EXPR, 1, "2\x0c", 4), 3, "not a number in '2", id="form feed, EXPR"),
        pytest.param(AU, lines_of(AU, PRESENT + "\x85" + ABSENT), 2, "23 values in", id="U+0085, AU"),
        pytest.param(VA, lines_of(VA, "0.1,0.2\x1c"), 2, "not a number in '0.1", id="file separator, VA"),
        pytest.param(EXPR, lines_of(EXPR, 1, "2."), 3, "not a number in '2.'", id="a point, EXPR"),
        pytest.param(EXPR, lines_of(EXPR, 1, "1e0"), 3, "not a number in '1e0'", id="an exponent, EXPR"),
        pytest.param(EXPR, lines_of(EXPR, 1, "2.5"), 3, "not a number in '2.5'", id="a fraction, EXPR"),
        pytest.param(EXPR, lines_of(EXPR, 1, 8), 3, "a value out of range in '8'", id="too large, EXPR"),
        pytest.param(EXPR, lines_of(EXPR, -2, 7), 2, "a value out of range in '-2'", id="too small, EXPR"),
        pytest.param(AU, lines_of(AU, ABSENT, "2" + ",0" * 11), 3, "a value out of range in '2", id="2 in AU"),
        pytest.param(VA, lines_of(VA, "0,0", "0.5,1.01"), 3, "a value out of range", id="too large, VA"),
        pytest.param(VA, lines_of(VA, "0,nan"), 2, "not a number", id="nan, VA"),
        pytest.param(VA, lines_of(VA, "0,0", "1.00000001,0"), 3, "a value out of range", id="1 in float32 alone, VA"),
        pytest.param(VA, lines_of(VA, "0,-5.0000001", "0,0"), 2, "a value out of range", id="-5 in float32 alone, VA"),
        pytest.param(VA, lines_of(VA, "0.5 -0.5"), 2, "1 values in '0.5 -0.5'", id="a blank for a comma, VA"),
        pytest.param(VA, lines_of(VA, "0,0", "", "0,0"), 3, "no values in ''", id="blank line, VA"),
        pytest.param(VA, lines_of(VA, "0_1,0", "0,0"), 2, "not a number in '0_1,0'", id="a number to Python alone"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, task: Task, text: str, line: int, problem: str) -> None:
    path = write_file(tmp_path, text)
    with pytest.raises(InputError) as caught:
        read_label_file(path, task)
    message = str(caught.value)
    assert message.startswith(f"{path}, line {line}: {problem}")
    low, high = task.valid_range
    kind = "numbers" if task is VA else "whole numbers"
    assert f"Expected {task.values_per_line} {kind} from {low:g} to {high:g} (or {task.invalid_value}" in message
    assert "don't drop it, since line i belongs to frame i" in message


@pytest.mark.parametrize("text", [lines_of(AU, PRESENT), "", "3\n4\n", EXPR.header.replace("Fear,", "") + "\n1\n"])
def test_a_wrong_header_is_refused(tmp_path: Path, text: str) -> None:
    path = write_file(tmp_path, text)
    with pytest.raises(InputError, match="the header is") as caught:
        read_label_file(path, EXPR)
    assert str(caught.value).startswith(f"{path}, line 1: the header is ")
    assert f"expected {EXPR.header!r}" in str(caught.value)
    assert "point --annotations at the right folder" in str(caught.value)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = write_file(tmp_path, lines_of(EXPR, 1).encode("utf-16"))
    with pytest.raises(InputError, match="can't be read as a label file"):
        read_label_file(path, EXPR)


# Finding the files


@pytest.mark.parametrize("folder", EXPR.folders)
@pytest.mark.parametrize("root", ["6th ABAW Annotations", "x", "download/ABAW annotations (new)"])
def test_any_root_and_both_expression_folders_are_found(tmp_path: Path, folder: str, root: str) -> None:
    annotations = tmp_path / root
    split = annotations / folder / "Train_Set"
    split.mkdir(parents=True)
    expected = {"v1": write_file(split, lines_of(EXPR, 1), "v1.txt"), "v2": write_file(split, "x", "v2.txt")}
    write_file(split, "", ".v3.txt")
    write_file(split, "", "notes.md")
    assert find_label_files(annotations, EXPR, "train") == expected
    assert find_label_files(annotations.parent, EXPR, "train") == expected, "one level above"
    assert find_label_files(annotations / folder, EXPR, "train") == expected, "the challenge folder itself"


def test_the_newer_expression_folder_wins(tmp_path: Path) -> None:
    for folder in EXPR.folders:
        split = tmp_path / folder / "Validation_Set"
        split.mkdir(parents=True)
        write_file(split, lines_of(EXPR, 1))
    found = find_label_files(tmp_path, EXPR, "validation")
    assert found == {"a": tmp_path / "EXPR_Recognition_Challenge" / "Validation_Set" / "a.txt"}


def test_the_challenge_folder_may_be_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_labels(tmp_path, "expr", "train", {"a": [1]})
    monkeypatch.chdir(tmp_path / "EXPR_Recognition_Challenge")
    assert list(find_label_files(Path(), EXPR, "train")) == ["a"]


def test_no_labels_says_where_it_looked_and_what_to_do(tmp_path: Path) -> None:
    write_labels(tmp_path, "expr", "train", {"a": [1]})
    with pytest.raises(InputError) as caught:
        find_labels(tmp_path, EXPR, "validation")
    message = str(caught.value)
    for folder in EXPR.folders:
        assert str(tmp_path / folder / "Validation_Set") in message
    assert "--annotations DIR" in message
    assert 'annotations = "..." in affcache.toml' in message
    with pytest.raises(InputError, match="No train labels of task au"):
        find_labels(tmp_path / "nowhere", AU, "train")


# The join


def join(tmp_path: Path, store: EmbeddingStore, lines: dict[str, Sequence[object]], task: str = "expr") -> JoinedLabels:
    return join_labels(store, write_labels(tmp_path, task, "train", lines), TASKS[task], "train")


def test_a_task_may_be_named_and_a_split_must_be_there(tmp_path: Path) -> None:
    store = store_in_memory({"a": [1, 2]})
    expected = join(tmp_path, store, {"a": [3, 4]})
    assert join_labels(store, tmp_path, "expr", "train").labels.tolist() == expected.labels.tolist() == [3, 4]
    with pytest.raises(InputError, match=r"^There is no split 'test'. Expected train or validation; "):
        join_labels(store, tmp_path, "expr", "test")
    with pytest.raises(InputError, match=r"^task 'exp' is unknown \(did you mean 'expr'\?\). Expected one of: expr \("):
        join_labels(store, tmp_path, "exp", "train")
    with pytest.raises(InputError, match=r"^task '3' is unknown. Expected one of: expr "):
        join_labels(store, tmp_path, 3, "train")  # type: ignore[arg-type]


def test_a_store_may_be_a_path_and_must_be_whole(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s.h5", {"a": [1, 2]}, np.ones((2, 4), np.float16))
    expected = join(tmp_path, store, {"a": [3, 4]})
    for named in (store.path, str(store.path)):
        joined = affcache.join_labels(named, tmp_path, "expr", "train")
        assert joined.rows.tolist() == expected.rows.tolist() == [0, 1]
        assert store.read(joined.rows).shape == (2, 4)
    with pytest.raises(StoreError, match=r"There is no embedding store at .*other\.h5"):
        join_labels(tmp_path / "other.h5", tmp_path, "expr", "train")
    with pytest.raises(InputError, match=r"^The store is a memmap. Expected an EmbeddingStore, or the path of one"):
        join_labels(store.features, tmp_path, "expr", "train")  # type: ignore[arg-type]
    encoder = {"model": "made-up"}
    create_store(tmp_path / "begun.h5", crop_list({"a": [1]}), 4, encoder, fingerprint(encoder))
    with pytest.raises(StoreError, match=r"begun\.h5 is incomplete"):
        join_labels(tmp_path / "begun.h5", tmp_path, "expr", "train")


def test_the_join_goes_by_frame_number_and_never_by_position(tmp_path: Path) -> None:
    store = store_in_memory({"a": [2, 5, 6]})
    joined = join(tmp_path, store, {"a": [0, 1, 2, 3, 4, 5]})
    assert joined.labels.tolist() == [1, 4, 5]
    assert joined.account.no_crop == 3


def test_a_row_more_than_frames_and_a_crop_past_the_rows(tmp_path: Path) -> None:
    store = store_in_memory({"long": [1, 2, 3], "short": [1, 2, 3, 4]})
    joined = join(tmp_path, store, {"long": [5, 5, 5, 6], "short": [1, 2, 3]})
    assert joined.labels.tolist() == [5, 5, 5, 1, 2, 3]
    assert joined.rows.tolist() == [0, 1, 2, 3, 4, 5]
    assert (joined.account.no_crop, joined.account.no_label) == (1, 1)


def test_labels_without_a_crop_and_invalid_and_unreadable_frames_are_counted(tmp_path: Path) -> None:
    store = store_in_memory({"a": [1, 2, 4, 5]}, unreadable=[1, 3])
    # frame 1 used, 2 unreadable, 3 no crop, 4 invalid, 5 unreadable and invalid: the label decides first
    joined = join(tmp_path, store, {"a": [0, 1, 2, -1, -1]})
    account = joined.account
    assert joined.rows.tolist() == [0]
    assert (account.used, account.unreadable_crop, account.no_crop, account.invalid_label) == (1, 1, 1, 2)
    assert account.sentence("train") == (
        "train: 1 frame of 1 video; left out: 1 label without a crop, 2 invalid labels, 1 unreadable crop"
    )


def test_label_files_of_other_videos_are_named(tmp_path: Path) -> None:
    store = store_in_memory({"here": [1]})
    account = join(tmp_path, store, {"here": [0], "away": [1, -1], "far": [2]}).account
    assert account.videos_without_crops == ("away", "far")
    assert account.no_crop == 2
    assert "2 label files of videos not in the store (away, far)" in account.sentence("train")
    assert account.to_json()["label_files"] == 3


def test_a_frame_number_0_has_no_label(tmp_path: Path) -> None:
    joined = join(tmp_path, store_in_memory({"a": [0, 1]}), {"a": [3, 4]})
    assert joined.labels.tolist() == [3]
    assert (joined.account.no_label, joined.account.no_crop) == (1, 1)


def test_no_label_that_belongs_to_a_crop_is_an_error(tmp_path: Path) -> None:
    store = store_in_memory({"b": [1]})
    with pytest.raises(InputError) as caught:
        join(tmp_path, store, {"a": [3]})
    message = str(caught.value)
    assert "No train label of task expr belongs to a crop of made-up.h5" in message
    assert "videos like 'a', the crops of videos like 'b'" in message
    assert "Point --store and --annotations at the same data" in message
    with pytest.raises(InputError, match="1 invalid label"):
        join(tmp_path / "invalid", store, {"b": [-1]})


@dataclass(frozen=True)
class Video:
    """One random video: frame numbers with a crop, unreadable ones among them, label lines or no label file."""

    frames: tuple[int, ...]
    unreadable: frozenset[int]
    labels: tuple[int, ...] | None


@st.composite
def random_videos(draw: st.DrawFn) -> dict[str, Video]:
    names = draw(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=5, unique=True))
    videos = {}
    for name in names:
        frames = sorted(draw(st.sets(st.integers(1, 14), max_size=12)))
        unreadable = draw(st.frozensets(st.sampled_from(frames))) if frames else frozenset()
        labels = draw(st.none() | st.lists(st.integers(-1, 7), max_size=15).map(tuple))
        videos[name] = Video(tuple(frames), unreadable, labels)
    return videos


@settings(deadline=None, max_examples=150)
@given(random_videos(), st.sampled_from(["expr", "au"]), st.sampled_from(["keep", "drop"]))
@example({"a": Video((2,), frozenset(), (-1, 4)), "b": Video((), frozenset(), (1,))}, "au", "drop")
def test_the_join_equals_a_dictionary_join(videos: dict[str, Video], name: str, partial: str) -> None:
    task = TASKS[name]

    def line(label: int) -> list[int]:  # an AU row made from one number; -1 stands for one mark in the row
        return [label] if name == "expr" else [-1 if label < 0 and i == 5 else (label + i) % 2 for i in range(12)]

    crops = {video: v.frames for video, v in videos.items() if v.frames}
    labels = {video: v.labels for video, v in videos.items() if v.labels is not None}
    if not crops or not labels:
        return
    row_of = {key: row for row, key in enumerate((video, frame) for video in sorted(crops) for frame in crops[video])}
    unreadable = {(video, frame) for video in crops for frame in videos[video].unreadable}
    label_of = {(video, i): label for video, rows in labels.items() for i, label in enumerate(rows, start=1)}
    valid = {key for key, label in label_of.items() if label >= 0 or (name == "au" and partial == "keep")}
    expected = sorted((row_of[key], line(label_of[key])) for key in valid & row_of.keys() - unreadable)
    labelled_crops = [key for key in row_of if key[0] in labels]

    store = store_in_memory(crops, [row_of[key] for key in unreadable])
    with tempfile.TemporaryDirectory() as folder:
        text = {video: [",".join(map(str, line(label))) for label in rows] for video, rows in labels.items()}
        annotations = write_labels(Path(folder), name, "train", text)
        if not expected:
            with pytest.raises(InputError, match="belongs to a crop"):
                join_labels(store, annotations, task, "train", partial)
            return
        joined = join_labels(store, annotations, task, "train", partial)

    assert joined.rows.tolist() == [row for row, _ in expected]
    assert joined.labels.reshape(len(expected), -1).tolist() == [values for _, values in expected]
    account = joined.account
    assert account.used == len(joined) == len(expected)
    assert account.no_crop == len(valid - row_of.keys())
    assert account.no_label == sum(key not in label_of for key in labelled_crops)
    left = sum(key in label_of and key not in valid for key in labelled_crops)
    assert (account.dropped if name == "au" else account.invalid_label) == left
    assert account.unreadable_crop == len(valid & unreadable)
    assert account.videos_without_crops == tuple(sorted(labels.keys() - crops.keys()))
    # it adds up: every valid label, and every crop of a labelled video, is used or left out for one reason
    assert account.used + account.unreadable_crop + account.no_crop == len(valid)
    without = account.invalid_label + account.dropped + account.no_label
    assert account.used + account.unreadable_crop + without == len(labelled_crops)


def test_rows_rise_even_where_files_sort_otherwise_than_the_store(tmp_path: Path) -> None:
    # as file names "a-b.txt" sorts before "a.txt"; as video names "a" sorts before "a-b"
    joined = join(tmp_path, store_in_memory({"a": [1], "a-b": [1]}), {"a": [1], "a-b": [2]})
    assert joined.rows.tolist() == [0, 1]
    assert joined.labels.tolist() == [1, 2]


def test_two_releases_below_one_folder_are_refused(tmp_path: Path) -> None:
    for release in ("5th ABAW Annotations", "6th ABAW Annotations"):
        write_labels(tmp_path / release, "expr", "train", {"1": [0]})
    with pytest.raises(InputError, match=r"holds 2 releases of the train labels.*5th ABAW.*6th ABAW.*--annotations"):
        find_label_files(tmp_path, TASKS["expr"], "train")
    assert set(find_label_files(tmp_path / "6th ABAW Annotations", TASKS["expr"], "train")) == {"1"}


def test_a_link_to_itself_is_no_annotations(tmp_path: Path) -> None:
    (tmp_path / "ann").symlink_to("ann")
    with pytest.raises(InputError, match="ann"):
        find_labels(tmp_path / "ann", TASKS["expr"], "train")


def test_labels_from_frame_0_on_are_asked_about(tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    rows = [f"a,{frame},train,{frame % 8}" for frame in range(4)]
    table.write_text("\n".join(["video,frame,split,label", *rows]))
    shifted = join_labels(store_in_memory({"a": [1, 2, 3, 4]}), table, EXPR, "train").account
    assert shifted.from_zero == 1
    assert "Labels of 1 video begin at frame 0, crops later: are they shifted?" in shifted.sentence("train")
    sound = join_labels(store_in_memory({"a": [0, 1, 2]}), table, EXPR, "train").account
    assert "shifted" not in sound.sentence("train")


def test_labels_are_where_fit_looks_unless_it_is_said_and_partial_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_labels(tmp_path / "data" / "Aff-Wild2" / "annotations", "expr", "train", {"a": [3]})
    assert join_labels(store_in_memory({"a": [1]}), None, "expr", "train").labels.tolist() == [3]
    with pytest.raises(InputError, match=r"There is no partial 'dropped'\. Expected keep or drop"):
        join_labels(store_in_memory({"a": [1]}), None, "expr", "train", "dropped")
