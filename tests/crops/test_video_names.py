"""Videos whose names have several levels: found at any depth, named the same wherever they lie, and never mistaken."""

import os
import shutil
import sys
import tarfile
import tempfile
import unicodedata
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from affcache import ExtractSettings, extract
from affcache.crops.crop_list import CropList, keep_listed
from affcache.crops.folders import find_crops
from affcache.crops.listing import DEEPEST
from affcache.crops.names import VideoNames, names_below
from affcache.errors import InputError, StoreError
from affcache.store.reading import EmbeddingStore
from tests.conftest import crop_list, write_crops
from tests.crops.test_folders import rows_of, touch

BAH = {  # <person>/<visit>/<question>/<name>-<n>.jpg
    "82557/Visit1/Q1": [1, 2],
    "82557/Visit1/Q3": [1, 2, 5],
    "82557/Visit2/Q3": [3],
    "90001/Visit1/Q3": [1, 2],
}
packed_or_not = pytest.mark.parametrize("kind", ["folder", ".zip", ".tar"])


def write_bah(root: Path) -> Path:
    """Empty crops, called as BAH's are."""
    for video, frames in BAH.items():
        touch(*(root / video / f"{video.replace('/', '_')}-{frame}.jpg" for frame in frames))
    return root


def packed(root: Path, kind: str, above: str = "") -> Path:
    """Pack what is in a folder, below so many folders more."""
    path = root.parent / (root.name + kind.removeprefix("folder"))
    files = sorted((file for file in root.rglob("*") if file.is_file()), reverse=True)
    if kind == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in files:
                archive.write(file, f"{above}{file.relative_to(root)}")
    elif kind == ".tar":
        with tarfile.open(path, "w") as archive:
            for file in files:
                archive.add(file, f"{above}{file.relative_to(root)}")
    else:
        return root
    return path


def keys(crops: CropList) -> list[tuple[str, int]]:
    return [(video, frame) for video, frame, _ in rows_of(crops)]


@packed_or_not
@pytest.mark.parametrize("above", ["", "cropped-aligned-faces/", "data/BAH/"])
def test_every_video_of_bah_is_there_under_its_path(tmp_path: Path, kind: str, above: str) -> None:
    crops = find_crops([packed(write_bah(tmp_path / "BAH"), kind, above)])
    assert crops.video_names == tuple(BAH)
    assert keys(crops) == [(video, frame) for video, frames in BAH.items() for frame in frames]
    assert crops.path(0).name == "82557_Visit1_Q1-1.jpg"
    assert (crops.shadowed_folders, len(crops.ignored_files), crops.lost_links) == ((), 0, ())


NAMES = st.lists(st.sampled_from(["a", "b", "Q1", "é", "e 1"]), min_size=1, max_size=4).map("/".join)
TREES = st.dictionaries(NAMES, st.sets(st.integers(0, 30), min_size=1, max_size=3), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@example(tree={"a/a": {0}, "a/a/a": {0}}, above="")
@given(tree=TREES, above=st.sampled_from(["", "crops/", "x/y/"]))
def test_a_tree_is_the_same_crops_as_folder_zip_and_tar(tree: dict[str, set[int]], above: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = write_crops(Path(folder) / "root", {video: sorted(frames) for video, frames in tree.items()}, (8, 8))
        crops = find_crops([root])
        assert keys(crops) == [(video, frame) for video in sorted(tree) for frame in sorted(tree[video])]
        some = min(tree)
        ends = [k + 1 for k, sign in enumerate(some) if sign == "/" and all(v.startswith(some[: k + 1]) for v in tree)]
        named = [video[max(ends, default=0) :] for video in crops.video_names]  # without the folders that all lie in
        for kind in (".zip", ".tar"):
            archived = find_crops([packed(root, kind, above)])
            assert archived.video_names == tuple(named)
            if archived.video_names != crops.video_names and any(
                sum(v.endswith(name) for v in tree) > 1 for name in named
            ):
                continue  # a name may be the end of several
            known = archived.as_in(crops.video_names)  # what a store of the folder goes on with
            assert keys(known) == keys(crops)
            assert [known.read(row) for row in range(len(known))] == [crops.read(row) for row in range(len(crops))]
            assert [known.path(row).name for row in range(len(known))] == [p.name for _, _, p in rows_of(crops)]


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["cropped_aligned/a", "cropped_aligned/b"], ["a", "b"]),
        (["a", "b"], ["a", "b"]),
        (["data/Aff-Wild2/cropped_aligned/a"], ["a"]),
        (["cropped_aligned/a", "cropped_aligned_new_50_vids/b"], ["a", "b"]),
        (["Aff/cropped_aligned/a", "Aff/cropped_aligned_new_50_vids/b"], ["a", "b"]),
        (
            ["cropped_aligned/a", "cropped_aligned_new_50_vids/a"],
            ["cropped_aligned/a", "cropped_aligned_new_50_vids/a"],
        ),
        (["cropped_aligned", "cropped_aligned_new/b"], ["cropped_aligned", "cropped_aligned_new/b"]),
        (["crops/v", "crops/v/more"], ["v", "v/more"]),
        (["x/1/Q3", "x/2/Q3"], ["1/Q3", "2/Q3"]),
        (["1/a", "2/b"], ["1/a", "2/b"]),
        ([], []),
    ],
)
def test_what_videos_of_an_archive_are_called(folders: list[str], names: list[str]) -> None:
    assert names_below(folders) == names


def test_an_archive_of_one_video_and_crops_at_the_top(tmp_path: Path) -> None:
    for name, member, video in (("a.zip", "00001.jpg", "a"), ("b.zip", "x/y/v/00001.jpg", "v")):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr(member, b"1")
        assert find_crops([tmp_path / name]).video_names == (video,)
    with zipfile.ZipFile(tmp_path / "b.zip", "a") as archive:
        archive.writestr("preview1.jpg", b"1")  # at the top, and no reason to name others otherwise
    assert find_crops([tmp_path / "b.zip"]).video_names == ("b", "v")


# What lies in folders


def test_a_folder_with_crops_and_folders_is_a_video_and_above_videos(tmp_path: Path) -> None:
    touch(tmp_path / "v" / "1.jpg", tmp_path / "v" / "more" / "2.jpg", tmp_path / "v" / "notes.txt")
    crops = find_crops([tmp_path])
    assert keys(crops) == [("v", 1), ("v/more", 2)]
    assert str(crops.ignored_files) == "1 with the suffix .txt (notes.txt)"


def test_the_first_root_has_a_video_by_its_full_name(tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    touch(first / "p" / "Q1" / "1.jpg", second / "p" / "Q1" / "2.jpg", second / "q" / "Q1" / "3.jpg")
    touch(second / "p" / "4.jpg")  # in the first root, p is no video but a folder above one
    crops = find_crops([first, second])
    assert keys(crops) == [("p", 4), ("p/Q1", 1), ("q/Q1", 3)]
    assert crops.shadowed_folders == (second / "p" / "Q1",)


def test_links_that_lead_back_end_there(tmp_path: Path) -> None:
    touch(tmp_path / "p" / "v" / "1.jpg", tmp_path / "q" / "2.jpg")
    for link, target in (
        ("p/v/up", ".."),
        ("p/v/top", "../.."),
        ("p/self", "self"),
        ("q/over", "../p"),
        ("p/q", "../q"),
    ):
        (tmp_path / link).symlink_to(target)
    (tmp_path / "p" / "v" / "gone").symlink_to("/nowhere")
    crops = find_crops([tmp_path])
    assert keys(crops) == [("p/q", 2), ("p/v", 1), ("q", 2), ("q/over/v", 1)]  # a link that leads elsewhere is followed
    assert "lead back to a folder above" in str(crops.ignored_files)
    assert set(crops.lost_links) >= {tmp_path / "p" / "self", tmp_path / "p" / "v" / "gone"}


def test_a_disk_without_numbers_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "p" / "v" / "1.jpg")
    stat = Path.stat

    def unnumbered(self: Path, **options: bool) -> os.stat_result:
        found = list(stat(self, **options))
        found[1] = found[2] = 0
        return os.stat_result(found)

    monkeypatch.setattr(Path, "stat", unnumbered)
    assert keys(find_crops([tmp_path])) == [("p/v", 1)]


def test_hidden_folders_pipes_and_what_macos_adds(tmp_path: Path) -> None:
    touch(tmp_path / "p" / "v" / "1.jpg", tmp_path / "p" / ".hidden" / "v" / "1.jpg")
    touch(tmp_path / "__MACOSX" / "p" / "v" / "1.jpg", tmp_path / "p" / "__MACOSX" / "1.jpg")
    os.mkfifo(tmp_path / "p" / "pipe")
    os.mkfifo(tmp_path / "p" / "v" / "log")
    crops = find_crops([tmp_path])
    assert (keys(crops), str(crops.ignored_files)) == ([("p/v", 1)], "2 without a suffix (pipe)")


def test_archives_are_read_where_they_lie_in_the_root_alone(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a/1.jpg", b"")
    touch(tmp_path / "p" / "v" / "1.jpg")
    (tmp_path / "p" / "b.zip").write_bytes((tmp_path / "a.zip").read_bytes())
    crops = find_crops([tmp_path])
    assert (keys(crops), str(crops.ignored_files)) == ([("a", 1), ("p/v", 1)], "1 with the suffix .zip (b.zip)")


@packed_or_not
def test_no_deeper_than_sixteen_folders(tmp_path: Path, kind: str) -> None:
    deep = "/".join("abcdefghijklmnop")
    touch(
        tmp_path / "root" / deep / "1.jpg", tmp_path / "root" / deep / "q" / "1.jpg", tmp_path / "root" / "v" / "1.jpg"
    )
    crops = find_crops([packed(tmp_path / "root", kind)])
    assert deep.count("/") + 1 == DEEPEST
    assert keys(crops) == [(deep, 1), ("v", 1)]
    assert "1 that lie more than 16 folders deep" in str(crops.ignored_files)


def test_a_deep_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "p" / "v" / "1.jpg")
    scandir = os.scandir

    def refusing(path: Path) -> object:
        if Path(path).name == "p":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(InputError, match=r"The folder .*p can't be listed: Permission denied"):
        find_crops([tmp_path])


def test_no_file_with_a_crop_s_name_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(*(tmp_path / "v" / f"{frame}.jpg" for frame in range(9)), tmp_path / "p" / "w" / "1.jpg")
    looked: list[Path] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: looked.append(Path(path)) or scandir(path))
    find_crops([tmp_path])
    assert sorted(looked) == [tmp_path, tmp_path / "p"], "folders of nothing but crops are listed once"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has file names of any bytes")
def test_a_folder_above_videos_whose_name_is_no_text(tmp_path: Path) -> None:
    touch(tmp_path / os.fsdecode(b"p\xff") / "v" / "00001.jpg")
    with pytest.raises(InputError, match=r"The name of the folder b'p\\xff/v' in .* is not valid UTF-8"):
        find_crops([tmp_path])


def test_progress_counts_folders_of_all_levels(tmp_path: Path) -> None:
    touch(tmp_path / "p" / "v" / "1.jpg", tmp_path / "q" / "1.jpg")
    seen: list[tuple[int, int, str]] = []
    find_crops([tmp_path], lambda *step: seen.append(step))
    assert seen == [(1, 2, "video"), (2, 2, "video"), (3, 3, "video")]


# Which video a name means


def meant(known: Sequence[str], *asked: str) -> dict[str, str]:
    return {name: known[index] for name, index in VideoNames(known).match(asked, Path("list.txt")).items()}


def test_full_names_short_ones_and_folders_before_them() -> None:
    known = [*BAH, "v", "a/v2"]
    for video in known:
        for path in (video, f"/data/crops/{video}", f"./{video}", f"x//{video}"):
            assert meant(known, path) == {path: video}
    assert meant(known, "Q1", "Visit2/Q3", "v2") == {
        "Q1": "82557/Visit1/Q1",
        "Visit2/Q3": "82557/Visit2/Q3",
        "v2": "a/v2",
    }
    assert meant(known, "Q2", "b/v2", "90001/Visit2/Q3", "Visit1", "82557") == {}
    composed, decomposed = (unicodedata.normalize(form, "é/Q1") for form in ("NFC", "NFD"))
    assert meant([composed], decomposed, f"x/{decomposed}") == {decomposed: composed, f"x/{decomposed}": composed}


@pytest.mark.parametrize(
    ("known", "asked", "said"),
    [
        (
            tuple(BAH),
            ["Q3"],
            "list.txt: Q3 may be any of 3 videos, 82557/Visit1/Q3, 82557/Visit2/Q3, 90001/Visit1/Q3. ",
        ),
        (tuple(BAH), ["Visit1/Q3"], "list.txt: Visit1/Q3 may be any of 2 videos, 82557/Visit1/Q3, 90001/Visit1/Q3. "),
        (("Q3", "1/V/Q3"), ["2/V/Q3"], "list.txt: 2/V/Q3 may be any of 2 videos, Q3, 1/V/Q3. "),
        (("Q3",), ["1/V/Q3", "2/V/Q3"], "list.txt: 1/V/Q3 and 2/V/Q3 may both be the video Q3. "),
        (tuple(f"{p}/Q" for p in range(9)), ["Q"], "list.txt: Q may be any of 9 videos, 0/Q, 1/Q, 2/Q, .... "),
    ],
)
def test_a_name_that_may_be_several_videos_is_refused(known: Sequence[str], asked: list[str], said: str) -> None:
    with pytest.raises(InputError) as caught:
        meant(known, *asked)
    assert str(caught.value).startswith(said + "Expected ")


@settings(max_examples=200)
@given(known=st.lists(NAMES, min_size=1, max_size=6, unique=True), asked=st.lists(NAMES, max_size=4))
def test_a_name_means_a_video_only_where_one_is_the_end_of_the_other(known: list[str], asked: list[str]) -> None:
    try:
        found = meant(known, *asked)
    except InputError:
        return
    for name, video in found.items():
        assert f"/{name}".endswith(f"/{video}") or f"/{video}".endswith(f"/{name}")
        assert name == video or name not in known
        if name != video and not name.endswith(f"/{video}"):
            assert [one for one in known if one.endswith(f"/{name}")] == [video]
    assert all(name in found for name in asked if name in known)


def test_a_crop_list_goes_by_full_names_and_by_last_ones_where_it_can(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("D:\\crops\\82557\\Visit1\\Q3\\x-5.jpg\nQ1/2.jpg\n82557/Visit1/Q1/2.jpg\n5/Visit9/Q3/1.jpg\n")
    kept, missing = keep_listed(crop_list(BAH), path)
    assert (keys(kept), missing) == ([("82557/Visit1/Q1", 2), ("82557/Visit1/Q3", 5)], 1)
    path.write_text("Q3/1.jpg\n")
    with pytest.raises(InputError, match=r"list.txt: Q3 may be any of 3 videos"):
        keep_listed(crop_list(BAH), path)


# Stores


def test_a_store_goes_on_under_the_names_that_it_was_begun_with(tmp_path: Path, tiny_encoder: str) -> None:
    write_crops(tmp_path / "flat", {"b": [1, 2], "a": [1]})
    made = ExtractSettings(crops=(tmp_path / "flat",), store=tmp_path / "s.h5", model=tiny_encoder, batch_size=2)
    extract(made)
    before = (tmp_path / "s.h5").read_bytes()
    for video, release in (("a", "2"), ("b", "1")):  # in another order now: 1/b, 2/a
        (tmp_path / "deep" / release).mkdir(parents=True)
        (tmp_path / "flat" / video).rename(tmp_path / "deep" / release / video)
    for root in (tmp_path / "deep", packed(tmp_path / "deep", ".zip", "x/")):
        assert find_crops([root]).video_names == ("1/b", "2/a")
        again = extract(made, crops=(root,), view="flip")
        assert (again.rows, again.unreadable) == (3, 0)
        assert (tmp_path / "s.h5").read_bytes() == before
    assert EmbeddingStore.open(tmp_path / "s.h5").view("flip").video_names == ("a", "b")
    write_crops(tmp_path / "deep", {"3/a": [1]})
    with pytest.raises(StoreError, match=r"made of other crops"):
        extract(made, crops=(tmp_path / "deep",))


@pytest.mark.parametrize("names", [("a", "c"), ("a",), ("a", "b", "c"), ("b", "a")])
def test_other_videos_keep_their_names(names: Sequence[str]) -> None:
    crops = crop_list({"1/a": [1], "2/b": [1, 2]})
    known = crops.as_in(names)
    assert (known.video_names == names) == (set(names) == {"a", "b"})
    assert (known is crops) == (set(names) != {"a", "b"})
    if known is not crops:
        assert np.diff(known.video_start).tolist() == [2, 1]


def test_archives_of_two_people_with_equal_names_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "zips"
    root.mkdir()
    for person in ("82557", "82570"):
        crops = write_crops(tmp_path / person, {f"Visit1/Q{question}": [1, 2] for question in (1, 2)})
        shutil.make_archive(str(root / person), "zip", crops)
    with pytest.raises(InputError, match=r"82557\.zip and 82570\.zip beside it both have a video Q1"):
        find_crops([root])
    found = find_crops([root / "82557.zip", root / "82570.zip"])  # roots of their own: the first one's count
    assert len(found.shadowed_folders) == 2
