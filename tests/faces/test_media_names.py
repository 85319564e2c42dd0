"""Which files are meant, and what the folders of their crops are called."""

from pathlib import Path

import pytest

from affcache.errors import InputError
from affcache.faces.media import Media, find_media


def touch(root: Path, *names: str) -> Path:
    """Make empty files."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def names_of(*inputs: Path, out: Path | None = None) -> dict[str, str]:
    """Return the name of each input that is found, by that of its file."""
    return {one.path.name: one.name for one in find_media(inputs, out)[0]}


def test_files_are_taken_in_the_order_given_whatever_they_are_called(tmp_path: Path) -> None:
    touch(tmp_path, "b.mp4", "a.jpg", "odd.xyz", "bare")
    given = [tmp_path / name for name in ("odd.xyz", "b.mp4", "bare", "a.jpg")]
    media, others = find_media(given)
    assert media == [Media(path, name) for path, name in zip(given, ("odd", "b", "bare", "a"), strict=True)]
    assert not others
    assert [one.is_photo for one in media] == [False, False, False, True]


def test_folders_are_searched_at_any_depth_and_by_name(tmp_path: Path) -> None:
    touch(
        tmp_path, "z.MP4", "a/b/c.jpeg", "a/x.webm", "a.b/x.mov", "ünï/日本 1.mkv", "notes.txt", "a/list.csv", "README"
    )
    media, others = find_media([tmp_path])
    assert [one.name for one in media] == ["a-b-c", "a-x", "a.b-x", "z", "ünï-日本 1"]
    assert others == {".txt": 1, ".csv": 1, "README": 1}


def test_hidden_files_and_folders_are_left_out_unless_they_are_named(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", ".b.mp4", ".hidden/c.mp4", "d/.e/f.jpg")
    assert names_of(tmp_path) == {"a.mp4": "a"}
    assert names_of(tmp_path / ".b.mp4") == {".b.mp4": "b"}, "crops in a hidden folder would never be found"


@pytest.mark.parametrize("name", ["...mp4", "....mp4", ".mp4", "..."])
def test_no_name_leads_out_of_the_folder_or_hides_in_it(name: str, tmp_path: Path) -> None:
    (named,) = names_of(touch(tmp_path, name) / name).values() if name != "..." else ["x"]
    assert named.strip(".")
    assert not named.startswith(".")


def test_two_files_of_one_stem_keep_their_endings(tmp_path: Path) -> None:
    touch(tmp_path, "clip.mp4", "clip.mov", "other.mp4", "CLIP.jpg")
    assert names_of(tmp_path) == {
        "clip.mp4": "clip-mp4", "clip.mov": "clip-mov", "CLIP.jpg": "CLIP-jpg", "other.mp4": "other"
    }  # fmt: skip


@pytest.mark.parametrize("names", [("one/a.mp4", "two/a.mp4"), ("one/A.mp4", "two/a.mp4")])
def test_files_that_would_be_called_alike_are_refused(names: tuple[str, str], tmp_path: Path) -> None:
    touch(tmp_path, *names)
    paths = [tmp_path / name for name in names]
    with pytest.raises(
        InputError, match=r"would both be called [aA]-mp4\. Expected inputs of different names"
    ) as caught:
        find_media(paths)
    assert all(str(path) in str(caught.value) for path in paths)
    assert "name the folder above both" in str(caught.value)
    assert sorted(one.name.lower() for one in find_media([tmp_path])[0]) == ["one-a", "two-a"], "as it advises"


def test_a_folder_and_a_file_whose_names_meet_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a/b.mp4", "a-b.mp4")
    with pytest.raises(InputError, match="would both be called a-b-mp4"):
        find_media([tmp_path])


def test_what_is_given_twice_counts_once(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    assert len(find_media([tmp_path, tmp_path, tmp_path / "a.mp4", tmp_path / "a.mp4"])[0]) == 1


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.mp4 does not exist\. Expected a photo, a video, or a folder of them"):
        find_media([touch(tmp_path, "a.mp4"), tmp_path / "gone.mp4"])


def test_a_folder_of_neither_says_what_it_holds_and_what_was_expected(tmp_path: Path) -> None:
    touch(tmp_path, "a.txt", "b/c.pdf", "b/d.pdf", "e.wav", "f.zip")
    with pytest.raises(
        InputError, match=r"no photo or video in .*It holds 5 other files: \.pdf, \.txt, \.wav\. "
    ) as caught:
        find_media([tmp_path])
    assert ".jpeg, .jpg" in str(caught.value)
    assert ".mov, .mp4" in str(caught.value)


def test_an_empty_folder_is_said_to_hold_neither(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no photo or video in .*\. Expected files that end in "):
        find_media([tmp_path])


def test_crops_that_lie_among_the_inputs_are_no_photos(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "faces/a/00001.jpg", "faces.jpg", "b/faces/c.jpg")
    assert names_of(tmp_path, out=tmp_path / "faces") == {"a.mp4": "a", "faces.jpg": "faces", "c.jpg": "b-faces-c"}
    assert names_of(tmp_path / "b", out=tmp_path) == {"c.jpg": "faces-c"}, "here inputs lie among the crops"


def test_a_folder_that_is_called_as_a_video_is_a_folder(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4/b.jpg")
    assert names_of(tmp_path) == {"b.jpg": "a.mp4-b"}
