"""Crop lists: s-Aff-Wild2's label files and plain lists pick rows, and never shift one."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from affcache.crops.crop_list import keep_listed
from affcache.errors import InputError
from tests.conftest import crop_list

VIDEOS = {"a": [1, 2, 3, 7], "b_left": [1, 2], "c": range(10, 20)}


def keys(crops) -> list[tuple[str, int]]:  # type: ignore[no-untyped-def]
    return [(crops.video_names[crops.video(row)], int(crops.frame_number[row])) for row in range(len(crops))]


def test_the_label_file_of_s_aff_wild2(tmp_path: Path) -> None:
    path = tmp_path / "training_set_annotations.txt"
    path.write_text(
        "image,valence,arousal,expression,aus\n"
        "a/00007.jpg,0.1,-0.2,4,0,1,0,0,0,0,0,0,0,0,0,0\n"
        "c/00010.jpg,-5,-5,-1,-1,-1,-1,-1,-1,-1,-1,-1,-1,-1,-1,-1\n"
        "c/00099.jpg,-5,-5,-1,-1,-1,-1,-1,-1,-1,-1,-1,-1,-1,-1,-1\n"
        "d/00001.jpg,-5,-5,-1,-1,-1,-1,-1,-1,-1,-1,-1,-1,-1,-1,-1\n"
    )
    kept, missing = keep_listed(crop_list(VIDEOS), path)
    assert keys(kept) == [("a", 7), ("c", 10)]
    assert missing == 2


def test_a_plain_list_with_folders_blank_lines_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbfroot/b_left/00002.jpg\r\n\r\nroot\\a\\00001.jpg\tNeutral\r\na/00001.jpg\r\n")
    kept, missing = keep_listed(crop_list(VIDEOS), path)
    assert keys(kept) == [("a", 1), ("b_left", 2)]
    assert missing == 0


@pytest.mark.parametrize("line", ["00001.jpg", "a/face.jpg", "a/", "a/1234567890123456789.jpg", "just text"])
def test_a_line_that_names_no_crop(tmp_path: Path, line: str) -> None:
    path = tmp_path / "list.txt"
    path.write_text(f"a/00001.jpg\n{line}\n")
    with pytest.raises(InputError) as caught:
        keep_listed(crop_list(VIDEOS), path)
    assert str(caught.value).startswith(f"{path}, line 2: {line!r} names no crop. Expected <video>/00001.jpg.")


def test_a_list_of_other_crops_or_none(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    with pytest.raises(InputError, match=r"^The list of crops .* can't be read: No such file"):
        keep_listed(crop_list(VIDEOS), path)
    path.write_text("z/00001.jpg\n")
    with pytest.raises(InputError, match=r"^None of the 1 crops that .* lists is among the 16 found"):
        keep_listed(crop_list(VIDEOS), path)


FRAMES = st.dictionaries(st.sampled_from("abcdef"), st.sets(st.integers(0, 12), min_size=1), min_size=1)


@given(found=FRAMES, listed=FRAMES)
def test_exactly_what_is_found_and_listed(
    tmp_path_factory: pytest.TempPathFactory, found: dict[str, set[int]], listed: dict[str, set[int]]
) -> None:
    path = tmp_path_factory.mktemp("list") / "list.txt"
    path.write_text("".join(f"{video}/{frame:05d}.jpg\n" for video, frames in listed.items() for frame in frames))
    expected = sorted((v, f) for v in found for f in found[v] if f in listed.get(v, set()))
    crops = crop_list({video: sorted(frames) for video, frames in found.items()})
    if not expected:
        with pytest.raises(InputError, match="None of the"):
            keep_listed(crops, path)
        return
    kept, missing = keep_listed(crops, path)
    assert keys(kept) == expected
    assert missing == sum(map(len, listed.values())) - len(expected)
    assert [kept.path(row) for row in range(len(kept))] == [Path("crops") / v / f"{f:05d}.jpg" for v, f in expected]
