"""Finding crops: every row is one file of one video, in order, whatever else lies in the folders."""

import os
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from affcache.crops.crop_list import LARGEST_FRAME_NUMBER, CropList
from affcache.crops.folders import find_crops
from affcache.errors import InputError


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def rows_of(crops: CropList) -> list[tuple[str, int, Path]]:
    """(video, frame number, file) of every row, through the public fields alone."""
    return [
        (video, int(crops.frame_number[row]), crops.path(row))
        for index, video in enumerate(crops.video_names)
        for row in range(crops.video_start[index], crops.video_start[index + 1])
    ]


def test_gaps_are_kept(tmp_path: Path) -> None:
    touch(*(tmp_path / "v" / f"{frame:05d}.jpg" for frame in (1, 2, 7, 12345)))
    crops = find_crops([tmp_path])
    assert crops.frame_number.tolist() == [1, 2, 7, 12345]
    assert crops.frame_number.dtype == np.int32
    assert len(crops) == 4
    assert len(crops.ignored_files) == 0
    assert not crops.namings


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("frame_12.png", 12),
        ("7.jpg", 7),
        ("0.jpg", 0),
        ("00003.JPG", 3),
        ("000000004.jpeg", 4),
        ("video2-30fps-0099.webp", 99),
        (f"{LARGEST_FRAME_NUMBER}.jpg", LARGEST_FRAME_NUMBER),
        ("123456.jpg", 123456),
    ],
)
def test_other_names_of_crops(tmp_path: Path, name: str, number: int) -> None:
    touch(tmp_path / "v" / name)
    crops = find_crops([tmp_path])
    assert rows_of(crops) == [("v", number, tmp_path / "v" / name)]


def test_frames_are_in_number_order_not_name_order(tmp_path: Path) -> None:
    touch(*(tmp_path / "v" / f"{frame}.jpg" for frame in (10, 9, 100)))
    assert find_crops([tmp_path]).frame_number.tolist() == [9, 10, 100]


def test_what_is_no_crop_is_counted_and_what_is_hidden_is_not(tmp_path: Path) -> None:
    touch(tmp_path / "v" / "00001.jpg")
    touch(
        *(tmp_path / "v" / name for name in ("notes.txt", "00001.txt", "cover.jpg", f"{LARGEST_FRAME_NUMBER + 1}.jpg"))
    )
    touch(*(tmp_path / "v" / name for name in (".DS_Store", "._00001.jpg", ".00002.jpg")))
    touch(tmp_path / ".hidden" / "00001.jpg", tmp_path / ".DS_Store", tmp_path / "readme.txt")
    crops = find_crops([tmp_path])
    assert crops.video_names == ("v",)
    assert crops.frame_number.tolist() == [1]
    assert len(crops.ignored_files) == 4


def test_digits_of_other_scripts_are_no_frame_number(tmp_path: Path) -> None:
    touch(tmp_path / "v" / "00001.jpg", tmp_path / "v" / "\u0661\u0662.jpg")
    crops = find_crops([tmp_path])
    assert (crops.frame_number.tolist(), len(crops.ignored_files)) == ([1], 1)


def test_videos_without_crops_have_no_rows(tmp_path: Path) -> None:
    touch(tmp_path / "b" / "00001.jpg", tmp_path / "c" / "list.txt")
    (tmp_path / "a").mkdir()
    crops = find_crops([tmp_path])
    assert crops.video_names == ("b",)
    assert crops.video_start.tolist() == [0, 1]
    assert len(crops.ignored_files) == 1


def test_two_files_of_one_frame(tmp_path: Path) -> None:
    touch(tmp_path / "v" / "00007.jpg", tmp_path / "v" / "frame_7.png")
    message = (
        f"Two crops of frame 7 in {tmp_path / 'v'}: 00007.jpg and frame_7.png. Expected one file per frame. "
        "Remove or rename one of them, then run the same command again."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        find_crops([tmp_path])


def test_a_video_under_two_roots_is_taken_from_the_first(tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    touch(first / "b" / "00001.jpg", second / "b" / "00002.jpg", second / "a" / "00003.jpg")
    crops = find_crops([first, second])
    assert rows_of(crops) == [("a", 3, second / "a" / "00003.jpg"), ("b", 1, first / "b" / "00001.jpg")]
    assert crops.shadowed_folders == (second / "b",)
    assert find_crops([second, first]).shadowed_folders == (first / "b",)


def test_progress_counts_every_video_folder(tmp_path: Path) -> None:
    touch(tmp_path / "a" / "00001.jpg", tmp_path / "b" / "00001.jpg")
    (tmp_path / "c").mkdir()
    seen: list[tuple[int, int, str]] = []
    find_crops([tmp_path], lambda done, total, unit: seen.append((done, total, unit)))
    assert seen == [(1, 3, "video"), (2, 3, "video"), (3, 3, "video")]


@pytest.mark.parametrize("kind", ["missing", "a file"])
def test_a_root_that_is_no_folder(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "crops"
    if kind == "a file":
        root.touch()
    touch(tmp_path / "sound" / "v" / "00001.jpg")
    with pytest.raises(InputError) as caught:
        find_crops([tmp_path / "sound", root])
    assert str(caught.value) == (
        f"The crops folder {root} {'is a file' if kind == 'a file' else 'does not exist or is not a folder'}. Expected "
        "a folder that holds one folder of crops per video, or a .zip or .tar archive of one. Say where it is with "
        "--crops DIR, or with crops = [...] in affcache.toml."
    )


def test_nothing_found(tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    with pytest.raises(InputError) as caught:
        find_crops([tmp_path])
    assert str(caught.value) == (
        f"No crops found in {tmp_path}. Expected files like <folder>/<video>/00001.jpg. "
        "Say where the crops are with --crops DIR, or with crops = [...] in affcache.toml."
    )


IGNORED = [
    ("DSC.jpg", "1 without digits at the end of the name (DSC.jpg)"),
    ("0-f1-su-ph.jpg", "1 without digits at the end of the name (0-f1-su-ph.jpg)"),
    ("00001.HEIC", "1 with the suffix .heic (00001.HEIC)"),
    ("00001.jfif", "1 with the suffix .jfif (00001.jfif)"),
    ("1700000000123.jpg", "1 with a number above 2,147,483,647 (1700000000123.jpg)"),
    ("1" * 30 + ".jpg", f"1 with a number above 2,147,483,647 ({'1' * 30}.jpg)"),
]


@pytest.mark.parametrize(("name", "said"), IGNORED)
def test_what_was_ignored_and_why_is_said_where_nothing_is_found(tmp_path: Path, name: str, said: str) -> None:
    touch(tmp_path / "v" / name)
    with pytest.raises(InputError) as caught:
        find_crops([tmp_path])
    assert f"No crops found in {tmp_path}. Ignored: {said}. Expected files like" in str(caught.value)


def test_kinds_of_ignored_files_are_counted_the_most_frequent_first(tmp_path: Path) -> None:
    for suffix, count in zip("abcdefg", range(9, 2, -1), strict=True):
        touch(*(tmp_path / "v" / f"{number}.{suffix}" for number in range(count)))
    touch(tmp_path / "v" / "1.jpg")
    said = str(find_crops([tmp_path]).ignored_files)
    assert re.fullmatch(r"9 with the suffix \.a \(\d\.a\); 8 .*; 5 with the suffix \.e \(\d\.e\); \.\.\.", said)


def test_images_directly_in_the_root(tmp_path: Path) -> None:
    touch(tmp_path / "v" / "00001.jpg")
    with pytest.raises(InputError) as caught:
        find_crops([tmp_path / "v"])
    assert str(caught.value).startswith(f"No crops found in {tmp_path / 'v'}. Expected files like")
    assert str(caught.value).endswith("itself holds images: pass its parent folder, which holds one folder per video.")


def test_the_folder_above_cropped_aligned(tmp_path: Path) -> None:
    touch(tmp_path / "cropped_aligned" / "v" / "00001.jpg")
    with pytest.raises(InputError, match=re.escape(f"Did you mean --crops {tmp_path / 'cropped_aligned'}?")):
        find_crops([tmp_path])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has file names of any bytes")
def test_a_video_whose_name_is_no_text(tmp_path: Path) -> None:
    touch(tmp_path / os.fsdecode(b"v\xff") / "00001.jpg")
    with pytest.raises(
        InputError, match=r"The name of the folder b'v\\xff' in .* is not valid UTF-8.*Rename the folder"
    ):
        find_crops([tmp_path])


FILE_NAMES = ("{:05d}.jpg", "{}.jpg", "frame_{}.png", "{:07d}.JPEG", "x-{:03d}.bmp")
VIDEO_NAMES = st.text("ab01_- .", min_size=1, max_size=6).filter(lambda name: not name.startswith(".") and name.strip())
FRAMES = st.dictionaries(
    st.integers(0, 2000) | st.integers(0, LARGEST_FRAME_NUMBER), st.sampled_from(FILE_NAMES), max_size=9
)


@settings(max_examples=60, deadline=None)
@given(roots=st.lists(st.dictionaries(VIDEO_NAMES, FRAMES, max_size=5), min_size=1, max_size=2))
def test_rows_are_exactly_the_files_in_order(roots: list[dict[str, dict[int, str]]]) -> None:
    expected: dict[tuple[str, int], Path] = {}
    with tempfile.TemporaryDirectory() as folder:
        videos: set[str] = set()
        for index, listing in enumerate(roots):
            root = Path(folder) / str(index)
            root.mkdir()
            for video, frames in listing.items():
                (root / video).mkdir()
                touch(*(root / video / pattern.format(frame) for frame, pattern in frames.items()))
                if video not in videos:  # the first root wins
                    paths = {(video, frame): root / video / pattern.format(frame) for frame, pattern in frames.items()}
                    expected.update(paths)
            videos |= listing.keys()
        folders = [Path(folder) / str(index) for index in range(len(roots))]
        if not expected:
            with pytest.raises(InputError, match="No crops found"):
                find_crops(folders)
            return
        crops = find_crops(folders)
        assert rows_of(crops) == [(*key, path) for key, path in sorted(expected.items())]
        assert all(crops.path(row).is_file() for row in range(len(crops)))
        assert crops.video_start[-1] == len(crops) == len(expected)
        assert (np.diff(crops.video_start) > 0).all()
        assert len(crops.ignored_files) == 0


def test_a_link_to_itself_and_one_that_leads_nowhere_are_named(tmp_path: Path) -> None:
    touch(tmp_path / "v" / "00001.jpg")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "video2").symlink_to("/nowhere/video2")
    crops = find_crops([tmp_path])
    assert crops.video_names == ("v",)
    assert crops.lost_links == (tmp_path / "loop", tmp_path / "video2")


def test_where_all_links_lead_nowhere_that_is_the_reason(tmp_path: Path) -> None:
    (tmp_path / "video2").symlink_to("/nowhere/video2")
    with pytest.raises(InputError, match="video2 is a link that leads nowhere"):
        find_crops([tmp_path])


def test_a_pipe_among_the_crops_is_an_unreadable_crop(tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    os.mkfifo(tmp_path / "v" / "00002.jpg")
    with pytest.raises(OSError, match="not a regular file"):
        find_crops([tmp_path]).read(0)
