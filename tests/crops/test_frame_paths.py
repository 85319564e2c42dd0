"""Frame paths: one reading of a crop's name, whoever asks, and a format that gives the name back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from affcache.crops.crop_list import LARGEST_FRAME_NUMBER, format_of, parse_path, split_name


@pytest.mark.parametrize(
    ("path", "folder", "video", "number"),
    [
        ("v/00001.jpg", "v", "v", 1),
        ("crops/v_left/frame_12.PNG", "crops/v_left", "v_left", 12),
        ("C:\\crops\\v\\7.tiff", "C:/crops/v", "v", 7),
        ("82557/Visit1/Q3/00010.jpeg", "82557/Visit1/Q3", "Q3", 10),
        ("v.mp4/00001", "v.mp4", "v.mp4", 1),  # a web dataset's key
        (f"v/{LARGEST_FRAME_NUMBER}.jpg", "v", "v", LARGEST_FRAME_NUMBER),
    ],
)
def test_paths_of_frames(path: str, folder: str, video: str, number: int) -> None:
    assert parse_path(path) == (folder, video, number)


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("00001.jpg", "no folder names the video"),
        ("/00001.jpg", "no folder names the video"),
        ("../00001.jpg", "no folder names the video"),
        ("v/", "doesn't end in a frame number"),
        ("v/face.jpg", "doesn't end in a frame number"),
        ("v/00001.txt", "doesn't end in a frame number"),
        ("v/.00001", "doesn't end in a frame number"),
        ("v/\u0661.jpg", "doesn't end in a frame number"),
        (f"v/{'1' * 5000}.jpg", "doesn't end in a frame number"),  # more digits than Python turns into a number
    ],
)
def test_what_names_no_frame(path: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_path(path)


BEFORE = st.text(st.characters(exclude_characters="/\\.0123456789", codec="utf-8"), max_size=6)


@given(BEFORE, st.integers(0, LARGEST_FRAME_NUMBER), st.integers(1, 12), st.sampled_from([".jpg", ".PNG", ""]))
def test_the_format_of_a_name_gives_it_back(before: str, number: int, width: int, suffix: str) -> None:
    name = f"{before}{number:0{width}d}{suffix}"
    parts = split_name(name)
    assert parts == (before, f"{number:0{width}d}", suffix)
    assert format_of(*parts).format(number) == name
    assert parse_path(f"v/{name}") == ("v", "v", number)
