"""Crops in archives: the same rows and the same store as from folders, and nothing outside is touched."""

import io
import os
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest

from affcache import ExtractSettings, extract
from affcache.crops import archives
from affcache.crops.crop_list import CropList
from affcache.crops.folders import find_crops, open_archive, require_source
from affcache.errors import InputError
from tests.conftest import write_crops

VIDEOS = {"10-25-640x360": [1, 2, 4], "b_left": [7, 100], "c": range(1, 21)}


@pytest.fixture
def crops(tmp_path: Path) -> Path:
    root = write_crops(tmp_path / "cropped_aligned", VIDEOS)
    (root / "c" / "notes.txt").write_text("x")
    (root / "c" / ".DS_Store").write_text("x")
    (root / "c" / "00020.jpg").rename(root / "c" / "frame_20.png")
    return root


def packed(root: Path, kind: str, compression: int = zipfile.ZIP_STORED) -> Path:
    """Pack a folder, its own name included, as people do."""
    path = root.with_suffix(kind)
    files = sorted(root.rglob("*"), reverse=True)  # not in the order of rows
    if kind == ".zip":
        with zipfile.ZipFile(path, "w", compression) as archive:
            for file in files:
                archive.write(file, file.relative_to(root.parent))
    else:
        with tarfile.open(path, "w") as archive:
            for file in files:
                archive.add(file, file.relative_to(root.parent), recursive=False)
    return path


def contents(crops: CropList) -> list[tuple[str, int, str, bytes]]:
    return [
        (crops.video_names[crops.video(row)], int(crops.frame_number[row]), crops.path(row).name, crops.read(row))
        for row in range(len(crops))
    ]


@pytest.mark.parametrize("kind", [".zip", ".tar"])
def test_an_archive_is_its_folder(crops: Path, kind: str) -> None:
    archive = packed(crops, kind, zipfile.ZIP_DEFLATED)
    from_folder, from_archive = find_crops([crops]), find_crops([archive])
    assert contents(from_archive) == contents(from_folder)
    assert str(from_archive.ignored_files) == str(from_folder.ignored_files) == "1 with the suffix .txt (notes.txt)"
    assert from_archive.path(0) == archive / "cropped_aligned" / "10-25-640x360" / "00001.jpg"
    kept = np.arange(len(from_folder)) % 3 == 1
    assert contents(from_archive.only(kept)) == contents(from_folder.only(kept))


@pytest.mark.parametrize("kind", [".zip", ".tar"])
def test_the_store_of_an_archive_is_the_store_of_its_folder(crops: Path, kind: str, tiny_encoder: str) -> None:
    settings = ExtractSettings(crops=(crops,), store=crops.parent / "folder.h5", model=tiny_encoder, batch_size=4)
    extract(settings)
    archive = packed(crops, kind)
    extract(settings, crops=(archive,), store=crops.parent / "archive.h5")
    assert (crops.parent / "archive.h5").read_bytes() == (crops.parent / "folder.h5").read_bytes()
    assert extract(settings, crops=(archive,)).encoded_now == 0  # one may go on where the other stopped


def test_archives_in_a_folder_and_crops_at_the_top_of_one(tmp_path: Path, crops: Path) -> None:
    folder = tmp_path / "packed"
    folder.mkdir()
    with zipfile.ZipFile(folder / "12-30-1280x720.zip", "w") as archive:
        archive.write(crops / "c" / "00003.jpg", "00003.jpg")
    (crops / "b_left").rename(folder / "b_left")
    found = find_crops([folder])
    assert found.video_names == ("12-30-1280x720", "b_left")
    assert found.frame_number.tolist() == [3, 7, 100]
    assert found.read(0) == (crops / "c" / "00003.jpg").read_bytes()


def test_a_video_in_folder_and_archive_is_taken_once(crops: Path) -> None:
    archive = packed(crops, ".zip")
    found = find_crops([crops, archive])
    assert len(found) == len(find_crops([crops]))
    assert found.shadowed_folders == tuple(archive / "cropped_aligned" / video for video in sorted(VIDEOS))


def test_names_that_lead_out_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    path = tmp_path / "crops.tar"
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("v/00002.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret.jpg")
        archive.addfile(link)
        for name in ("v/00001.jpg", "../v/00003.jpg", "/v/00004.jpg", "v/../../00005.jpg"):
            archive.add(tmp_path / "secret.jpg", name)
            if name.startswith("/"):
                archive.members[-1].name = name
    found = find_crops([path])
    assert found.video_names[0] == "v"
    assert 1 in found.frame_number
    assert not {2, 3, 5} & set(found.frame_number.tolist())
    assert found.unsafe_members >= 3
    assert found.only(found.frame_number == 1).unsafe_members == found.unsafe_members


@pytest.mark.parametrize("name", ["crops.zip", "crops.tar", "crops.tar.gz", "crops.7z"])
def test_what_is_no_archive(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no archive" * 100)
    with pytest.raises(InputError) as caught:
        find_crops([tmp_path / name])
    assert str(tmp_path / name) in str(caught.value)
    assert "xpected" in str(caught.value)


def test_an_archive_without_crops(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("v/readme.txt", "nothing")
    with pytest.raises(InputError, match=r"^No crops found in .*empty\.zip"):
        find_crops([tmp_path / "empty.zip"])


def test_two_files_of_one_frame_in_an_archive(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "crops.zip", "w") as archive:
        archive.writestr("v/00001.jpg", "a")
        archive.writestr("v/1.png", "b")
    with pytest.raises(InputError, match=r"^Two crops of frame 1 in .*v: 00001\.jpg and 1\.png"):
        find_crops([tmp_path / "crops.zip"])


def test_progress_of_a_listing(crops: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    find_crops([crops, packed(crops, ".zip")], lambda *step: seen.append(step))
    assert seen[:3] == [(1, 3, "video"), (2, 3, "video"), (3, 3, "video")]
    assert all(unit == "archived MB" and done <= total for done, total, unit in seen[3:])


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_crops(tmp_path / "crops", {"a": [1], "b": [1]})
    listdir = os.listdir

    def refusing(path: Path) -> list[str]:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refusing)
    with pytest.raises(InputError, match=r"The folder .*b can't be listed: Permission denied"):
        find_crops([tmp_path / "crops"])


def test_a_file_of_no_crop_s_size_is_not_loaded(tmp_path: Path) -> None:
    write_crops(tmp_path / "crops", {"a": [1]})
    with (tmp_path / "crops" / "a" / "00001.jpg").open("r+b") as file:
        file.truncate(65 << 20)
    with pytest.raises(OSError, match="of which at most 67,108,864 are read"):
        find_crops([tmp_path / "crops"]).read(0)


@pytest.mark.parametrize("number", [24, 107, 116])  # too many open files, not connected, stale handle
def test_errors_that_are_never_one_crops_own(tmp_path: Path, number: int) -> None:
    with pytest.raises(InputError, match="can't be read any more"):
        require_source(tmp_path, OSError(number, os.strerror(number)))


def test_errors_that_may_be_one_crops_own(tmp_path: Path) -> None:
    (tmp_path / "crops.zip").write_bytes(b"PK")
    for container in (tmp_path, tmp_path / "crops.zip"):
        require_source(container, OSError(5, "Input/output error"))
    with pytest.raises(InputError, match=r"^The crops archive .*gone.zip can't be read any more \(No such file"):
        require_source(tmp_path / "gone.zip", OSError(5, "Input/output error"))


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_more_archives_than_files_may_be_open(tmp_path: Path, suffix: str) -> None:
    script = """
import pickle, resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from affcache.crops.folders import find_crops
crops = find_crops([Path(sys.argv[1])])
for one in (crops, pickle.loads(pickle.dumps(crops))):
    assert [one.read(row) for row in range(len(one))] == [b"%d" % row for row in range(300)]
"""
    for video in range(300):
        name, data = f"{video:03d}/00001.jpg", b"%d" % video
        path = tmp_path / f"{video:03d}{suffix}"
        if suffix == ".zip":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr(name, data)
        else:
            with tarfile.open(path, "w") as archive:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    subprocess.run([sys.executable, "-c", script, tmp_path], check=True)


def test_an_archive_that_was_replaced_is_not_read_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "_KEPT_OPEN", threading.Semaphore(0))  # as where many are open
    for name, data in (("a.zip", b"1"), ("b.zip", b"2")):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("v/1.jpg", data)
    opened = open_archive(tmp_path / "a.zip")
    ((_, member),) = opened.entries()
    opened.rest()
    assert opened.read(member) == b"1"
    (tmp_path / "b.zip").replace(tmp_path / "a.zip")
    with pytest.raises(OSError, match="another file has its name now"):
        opened.read(member)
