"""Archives: the same files as zipfile and tarfile find, and damage is named, never guessed at and never a hang."""

import contextlib
import gc
import io
import lzma
import os
import re
import stat
import sys
import tarfile
import tempfile
import tracemalloc
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from affcache.crops import archives as archive_module
from affcache.crops import folders, zip_archive
from affcache.crops.archives import LARGEST_FILE, MEMBER_DTYPE, Archive, Member, UnreadableCropError
from affcache.crops.folders import open_archive
from affcache.errors import InputError

CROPS = {f"{video}/{frame:05d}.jpg": os.urandom(40) * (frame + 1) for video in ("a", "b-left") for frame in range(3)}


def write_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_tar(path: Path, files: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w:", format=form, errors="surrogateescape", encoding="utf-8") as archive:
        for name, data in files.items():
            add_to_tar(archive, name, data)
    return path


def add_to_tar(archive: tarfile.TarFile, name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, "a/00001.jpg"
    archive.addfile(info, io.BytesIO(data))


def write(path: Path, files: dict[str, bytes]) -> Path:
    return (write_zip if path.suffix == ".zip" else write_tar)(path, files)


def contents(archive: Archive) -> list[tuple[str, bytes]]:
    return [(name, archive.read(member)) for name, member in archive.entries()]


def members(archive: Archive) -> dict[str, Member]:
    return dict(archive.entries())


@contextlib.contextmanager
def at_most(megabytes: float) -> Iterator[None]:
    """Fail when the block allocates more than this at any time."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()
    assert peak < megabytes, f"{peak:.1f} MiB"


both = pytest.mark.parametrize("suffix", [".zip", ".tar"])


# What is read


NAMES = st.lists(
    st.text("ab1é☺한 -_~", min_size=1, max_size=60).filter(lambda part: part.strip()), min_size=1, max_size=4
).map("/".join)
FILES = st.dictionaries(NAMES, st.binary(max_size=300) | st.binary(max_size=2).map(lambda data: data * 500), max_size=6)


@settings(max_examples=150, deadline=None)
@given(
    files=FILES,
    method=st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]),
    zip64=st.sampled_from(["as needed", "local", "everywhere"]),
    comments=st.just(b"." * 0xFFFF) | st.binary(max_size=50).filter(lambda data: b"PK" not in data),
    before=st.binary(max_size=200),
    extra=st.sampled_from([b"", b"\x55\x54\5\0\1abcd", b"\x99\x99\x00\x04" + bytes(1024)]),
    chunk=st.sampled_from([1, 100, 2**20]),
)
def test_a_zip_reads_as_zipfile_reads_it(
    files: dict[str, bytes], method: int, zip64: str, comments: bytes, before: bytes, extra: bytes, chunk: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "crops.zip"
        limit, count = (20, 2) if zip64 == "everywhere" else (zipfile.ZIP64_LIMIT, zipfile.ZIP_FILECOUNT_LIMIT)
        with (
            mock.patch.object(zipfile, "ZIP64_LIMIT", limit),
            mock.patch.object(zipfile, "ZIP_FILECOUNT_LIMIT", count),
            zipfile.ZipFile(path, "w") as archive,
        ):
            archive.comment = comments
            for name, data in files.items():
                info = zipfile.ZipInfo(name)
                info.compress_type, info.extra, info.comment = method, extra, comments[:40]
                with archive.open(info, "w", force_zip64=zip64 != "as needed") as file:
                    file.write(data)
        path.write_bytes(before + path.read_bytes())
        with zipfile.ZipFile(path) as expected, mock.patch.object(zip_archive, "_DIRECTORY_CHUNK", chunk):
            found = open_archive(path)
            assert contents(found) == [(info.filename, expected.read(info)) for info in expected.infolist()]
            sizes = [(info.compress_size, info.file_size, info.CRC, info.compress_type) for info in expected.infolist()]
            assert [tuple(member[1:]) for _, member in found.entries()] == sizes
        assert len(sizes) == len(files)
        assert found.left_out == 0


@settings(max_examples=100, deadline=None)
@given(files=FILES, form=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
def test_a_tar_reads_as_tarfile_reads_it(files: dict[str, bytes], form: int) -> None:
    files = {name: data for name, data in files.items() if form != tarfile.USTAR_FORMAT or len(name.encode()) <= 99}
    with tempfile.TemporaryDirectory() as folder:
        path = write_tar(Path(folder) / "crops.tar", files, form)
        found = open_archive(path)
        with tarfile.open(path, "r:") as expected:
            whole = [(info, expected.extractfile(info)) for info in expected]
            assert contents(found) == [(info.name, file.read()) for info, file in whole if file is not None]
        assert contents(found) == list(files.items())
        assert all(member[1:] == (len(files[name]), len(files[name]), 0, 0) for name, member in found.entries())


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file system that keeps holes")
def test_places_beyond_four_gigabytes(tmp_path: Path) -> None:
    for suffix in (".zip", ".tar"):
        path = tmp_path / f"crops{suffix}"
        whole = write(tmp_path / f"whole{suffix}", CROPS).read_bytes()
        if suffix == ".zip":
            with path.open("wb") as file:
                file.truncate(5 * 2**30)
            with zipfile.ZipFile(path, "a") as archive:  # keeps offsets from the file's beginning
                archive.writestr("a/00001.jpg", b"far")
        else:
            info = tarfile.TarInfo("a/film.bin")
            info.size = 5 * 2**30
            with path.open("wb") as file:
                file.write(info.tobuf(tarfile.GNU_FORMAT))
                file.seek(512 + info.size)
                file.write(whole)
        found = open_archive(path)
        listing = members(found)
        crop = listing["a/00001.jpg"]
        assert crop.offset >= 5 * 2**30
        assert found.read(crop) == (b"far" if suffix == ".zip" else CROPS["a/00001.jpg"])
        if suffix == ".tar":
            with at_most(1), pytest.raises(UnreadableCropError, match=r"5,368,709,120 bytes; at most 67,108,864"):
                found.read(listing["a/film.bin"])


class OldName(zipfile.ZipInfo):
    """Written in code page 437 without the flag for UTF-8, as DOS and old Windows packers do."""

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:
        return self.filename.encode("cp437"), self.flag_bits


class Nameless(zipfile.ZipInfo):
    def _encodeFilenameFlags(self) -> tuple[bytes, int]:
        return b"", self.flag_bits


def test_names_in_code_page_437(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "crops.zip", "w") as archive:
        archive.writestr(OldName("vidéo_ß/00001.jpg"), b"1")
        archive.writestr("vidéo_ß/00002.jpg", b"2")
    assert b"vid\x82o_\xe1/00001.jpg" in (tmp_path / "crops.zip").read_bytes()
    found = contents(open_archive(tmp_path / "crops.zip"))
    assert found == [("vidéo_ß/00001.jpg", b"1"), ("vidéo_ß/00002.jpg", b"2")]


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    name = b"v\xff/00001.jpg".decode("utf-8", "surrogateescape")
    assert contents(open_archive(write_tar(tmp_path / "a.tar", {name: b"1"}, tarfile.GNU_FORMAT))) == [(name, b"1")]
    data = write_zip(tmp_path / "a.zip", {"vé/00001.jpg": b"1"}).read_bytes()
    (tmp_path / "a.zip").write_bytes(data.replace("é".encode(), b"\xff\xff"))
    assert [found.encode("utf-8", "surrogateescape") for found in members(open_archive(tmp_path / "a.zip"))] == [
        b"v\xff\xff/00001.jpg"
    ]


@both
def test_names_in_their_plain_form_and_folders_left_out(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"crops{suffix}"
    names = ["./a/1.jpg", "a//2.jpg", "a/./3.jpg", r"a\4.jpg", "././5.jpg", ".a/.6.jpg", "a/..7.jpg", "a:b/8.jpg"[2:]]
    write(path, dict.fromkeys(names, b"x"))
    if suffix == ".zip":
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("c/", b"")
            archive.writestr("d\\", b"")
            unmarked = zipfile.ZipInfo("e")
            unmarked.create_system, unmarked.external_attr = 3, (stat.S_IFDIR | 0o755) << 16
            archive.writestr(unmarked, b"")
    else:
        with tarfile.open(path, "a:") as archive:
            add_to_tar(archive, "c", kind=tarfile.DIRTYPE)
    found = open_archive(path)
    expected = ["a/1.jpg", "a/2.jpg", "a/3.jpg", "a/4.jpg", "5.jpg", ".a/.6.jpg", "a/..7.jpg", "b/8.jpg"]
    assert [name for name, _ in found.entries()] == expected
    assert found.left_out == 0


@both
def test_unsafe_names_are_left_out_and_counted(tmp_path: Path, suffix: str) -> None:
    unsafe = [
        "/etc/1.jpg",
        "../1.jpg",
        "a/../../1.jpg",
        "a/..",
        "C:/1.jpg",
        "c:1.jpg",
        r"\\server\1.jpg",
        r"a\..\1.jpg",
    ]
    unsafe += ["./C:/1.jpg", "."]
    found = open_archive(write(tmp_path / f"crops{suffix}", {"a/1.jpg": b"1", **dict.fromkeys(unsafe, b"evil")}))
    for _ in range(2):  # counted afresh by every listing
        assert contents(found) == [("a/1.jpg", b"1")]
        assert found.left_out == len(unsafe)


def test_a_name_with_a_nul_and_a_name_of_nothing(tmp_path: Path) -> None:
    data = write_zip(tmp_path / "crops.zip", {"a/1.jpg": b"1", "a/2.jpg": b"2"}).read_bytes()
    (tmp_path / "crops.zip").write_bytes(data.replace(b"a/2.jpg", b"a/2\0jpg"))
    found = open_archive(tmp_path / "crops.zip")
    assert (contents(found), found.left_out) == ([("a/1.jpg", b"1")], 1)
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr(Nameless("a/1.jpg"), b"1")
    found = open_archive(tmp_path / "empty.zip")
    assert (contents(found), found.left_out) == ([], 1)


def test_a_comment_that_looks_like_an_end(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "crops.zip", "w") as archive:
        archive.writestr("a/1.jpg", b"1")
        archive.comment = b"PK\5\6" * 9
    assert contents(open_archive(tmp_path / "crops.zip")) == [("a/1.jpg", b"1")]  # zipfile itself can't


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_links_in_a_zip_are_left_out(tmp_path: Path, kind: int) -> None:
    with zipfile.ZipFile(tmp_path / "crops.zip", "w") as archive:
        for system in (3, 19, 0):  # Unix, macOS, and DOS, where these bits mean nothing
            info = zipfile.ZipInfo(f"a/{system}.jpg")
            info.create_system, info.external_attr = system, (kind | 0o777) << 16
            archive.writestr(info, b"/etc/passwd")
        for mode in (stat.S_IFREG | 0o644, 0o644):
            info = zipfile.ZipInfo(f"a/{mode}.jpg")
            info.create_system, info.external_attr = 3, mode << 16
            archive.writestr(info, b"x")
    found = open_archive(tmp_path / "crops.zip")
    assert list(members(found)) == ["a/0.jpg", f"a/{stat.S_IFREG | 0o644}.jpg", "a/420.jpg"]
    assert found.left_out == 2


def test_links_and_special_files_in_a_tar_are_left_out(tmp_path: Path) -> None:
    kinds = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE, b"V"]
    with tarfile.open(tmp_path / "crops.tar", "w:", format=tarfile.GNU_FORMAT) as archive:
        for number, kind in enumerate(kinds):
            add_to_tar(archive, f"b/{number}.jpg", kind=kind)
        add_to_tar(archive, "a/1.jpg", b"1")
        add_to_tar(archive, "a/2.jpg", b"2", kind=tarfile.CONTTYPE)
    found = open_archive(tmp_path / "crops.tar")
    assert contents(found) == [("a/1.jpg", b"1"), ("a/2.jpg", b"2")]
    assert found.left_out == len(kinds)


@both
def test_a_name_comes_as_often_as_the_archive_has_it(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"crops{suffix}", {"a/1.jpg": b"old", "a/2.jpg": b"2"})
    path.write_bytes(path.read_bytes().replace(b"a/2.jpg", b"a/1.jpg"))
    if suffix == ".tar":
        path = write(path, {"a/1.jpg": b"old"})
        with tarfile.open(path, "a:") as archive:
            add_to_tar(archive, "a/1.jpg", b"2")
    assert contents(open_archive(path)) == [("a/1.jpg", b"old"), ("a/1.jpg", b"2")]


@both
def test_an_empty_archive(tmp_path: Path, suffix: str) -> None:
    assert contents(open_archive(write(tmp_path / f"crops{suffix}", {}))) == []


@both
def test_members_fit_an_array(tmp_path: Path, suffix: str) -> None:
    found = open_archive(write(tmp_path / f"crops{suffix}", CROPS))
    table = np.array([member for _, member in found.entries()], dtype=MEMBER_DTYPE)
    assert table.dtype.names == Member._fields
    assert [found.read(Member(*row)) for row in table] == list(CROPS.values())
    table["offset"] = 2**63 - 1
    with pytest.raises(UnreadableCropError):
        found.read(Member(*table[0]))


@both
@pytest.mark.parametrize("pread", [True, False])
def test_many_threads_read(tmp_path: Path, suffix: str, pread: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not pread:
        monkeypatch.delattr(os, "pread", raising=False)
    files = {f"a/{frame:05d}.jpg": bytes([frame % 256]) * (frame * 7) for frame in range(300)}
    found = open_archive(write(tmp_path / f"crops{suffix}", files))
    listing = members(found)
    names = [*files] * 4
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda name: found.read(listing[name]), names))
    assert read == [files[name] for name in names]


@both
def test_short_reads_are_continued(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(os, "pread"):
        pytest.skip("the system has no pread")
    path = write(tmp_path / f"crops{suffix}", CROPS)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, count, offset: pread(descriptor, min(count, 7), offset))
    assert contents(open_archive(path)) == list(CROPS.items())


@both
def test_progress(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_module, "_REPORT_EVERY", 2)
    seen: list[tuple[int, int]] = []
    found = open_archive(write(tmp_path / f"crops{suffix}", dict(list(CROPS.items())[:5])))
    list(found.entries(lambda done, total: seen.append((done, total))))
    dones, totals = zip(*seen, strict=True)
    assert len(set(totals)) == 1
    assert 0 < dones[0] < dones[1] < dones[2] == totals[0]


@pytest.mark.parametrize(("suffix", "count"), [(".zip", 50_000), (".tar", 8_000)])
def test_listing_takes_no_memory(tmp_path: Path, suffix: str, count: int) -> None:
    found = open_archive(write(tmp_path / f"crops{suffix}", {f"{'a' * 80}/{number}": b"" for number in range(count)}))
    with at_most(4 if suffix == ".zip" else 0.5):  # an object a member would take 20 and 5
        assert sum(1 for _ in found.entries()) == count


@both
def test_the_file_is_closed(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"crops{suffix}", CROPS)
    found = open_archive(path)
    member = members(found)["a/00001.jpg"]
    descriptor = found._descriptor
    os.fstat(descriptor)
    found.close()
    found.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    other = open_archive(path)
    assert other._descriptor == descriptor  # which the closed one must not read through
    with pytest.raises(OSError, match="Bad file descriptor"):
        found.read(member)
    del other
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


# What can't be read


def damaged_zip(path: Path, method: int = zipfile.ZIP_DEFLATED, data: bytes = b"x" * 1000, **declared: int) -> Archive:
    """A zip of a/1.jpg whose directory declares something else, and of a sound a/2.jpg."""
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a/1.jpg", data)
        archive.writestr("a/2.jpg", b"sound", zipfile.ZIP_STORED)
        for field, value in declared.items():
            setattr(archive.filelist[0], field, value)
    return open_archive(path)


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"CRC": 1}, "damaged: its checksum (CRC-32) does not match"),
        ({"file_size": 999}, "damaged or cut short: more than the 999 bytes declared"),
        ({"file_size": 1001}, "damaged or cut short: fewer than the 1,001 bytes declared"),
        ({"file_size": 0}, "damaged or cut short: more than the 0 bytes declared"),
        ({"file_size": 10 * 2**30}, "10,737,418,240 bytes; at most 67,108,864 are read"),
        ({"file_size": 2**63}, f"{2**63 - 1:,} bytes; at most 67,108,864 are read"),
        ({"file_size": LARGEST_FILE}, "damaged or cut short: fewer than the 67,108,864 bytes declared"),
        ({"compress_size": 5}, "damaged or cut short: fewer than the 1,000 bytes declared"),
        ({"compress_size": 2**32 + 5}, "4,294,967,301 bytes; at most 67,108,864 are read"),
        ({"header_offset": 1}, "no file starts at byte 1 of the archive"),
        ({"header_offset": 10**6}, "no file starts at byte 1,000,000 of the archive"),
        ({"header_offset": 2**64 - 1}, f"no file starts at byte {2**63 - 1:,} of the archive"),
        ({"compress_type": zipfile.ZIP_LZMA}, "packed with method 14; only stored and deflated files are read"),
        ({"compress_type": 3_000}, "packed with method 255; only stored and deflated files are read"),
        ({"compress_type": zipfile.ZIP_STORED}, "damaged or cut short: fewer than the 1,000 bytes declared"),
    ],
)
def test_a_member_that_is_not_what_the_directory_declares(
    tmp_path: Path, declared: dict[str, int], message: str
) -> None:
    found = damaged_zip(tmp_path / "crops.zip", **declared)
    listing = members(found)
    with at_most(1), pytest.raises(UnreadableCropError, match=f"^{re.escape(message)}$"):
        found.read(listing["a/1.jpg"])
    assert found.read(listing["a/2.jpg"]) == b"sound"


def test_bytes_that_do_not_inflate(tmp_path: Path) -> None:
    found = damaged_zip(tmp_path / "crops.zip", zipfile.ZIP_STORED, b"\xff" * 100, compress_type=zipfile.ZIP_DEFLATED)
    with pytest.raises(UnreadableCropError, match=r"^damaged: Error -3 while decompressing data: invalid block type$"):
        found.read(members(found)["a/1.jpg"])


def test_a_bomb_is_not_inflated(tmp_path: Path) -> None:
    found = damaged_zip(tmp_path / "crops.zip", data=bytes(100 * 2**20), file_size=100)
    listing = members(found)
    assert listing["a/1.jpg"].size == 100
    with at_most(1), pytest.raises(UnreadableCropError, match=r"more than the 100 bytes declared$"):
        found.read(listing["a/1.jpg"])


def test_an_encrypted_member(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "crops.zip", {"a/1.jpg": b"1"})
    data = bytearray(path.read_bytes())
    data[6] |= 1
    data[data.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(data)
    with zipfile.ZipFile(path) as archive, pytest.raises(RuntimeError, match="encrypted"):
        archive.read("a/1.jpg")
    found = open_archive(path)
    with pytest.raises(UnreadableCropError, match=r"^encrypted$"):
        found.read(members(found)["a/1.jpg"])


@both
def test_an_archive_that_shrank_since_it_was_listed(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"crops{suffix}", CROPS)
    found = open_archive(path)
    member = members(found)["a/00001.jpg"]
    os.truncate(path, member.offset + 60)
    with pytest.raises(UnreadableCropError, match="cut short: fewer than the 80 bytes"):
        found.read(member)


def test_a_zip_cut_anywhere(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "crops.zip", {"a/1.jpg": b"1", "a/2.jpg": b"2"})
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"a comment"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError) as caught:
            open_archive(path)
        assert str(caught.value) == (
            f"The archive {path} can't be read: it has no directory at its end, so it is cut short or not a zip. "
            "Expected a whole .zip file. Copy or download it again, then run the same command."
        )
    path.write_bytes(whole + b"appended")
    assert contents(open_archive(path)) == [("a/1.jpg", b"1"), ("a/2.jpg", b"2")]
    path.write_bytes(whole[1:])
    with pytest.raises(InputError, match="its beginning is missing"):
        open_archive(path)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_cut_anywhere(tmp_path: Path, form: int) -> None:
    path = write_tar(tmp_path / "crops.tar", {"a/1.jpg": b"1" * 500, "vidé/2.jpg": b"2" * 600}, form)
    with tarfile.open(path, "r:") as archive:
        first, second = archive.getmembers()
    whole = path.read_bytes()
    for length in [*range(0, 4200, 3), 512, 1024, 1536, 2048, 2560, 3072]:
        path.write_bytes(whole[:length])
        if length >= second.offset_data + 600:
            expected = ["a/1.jpg", "vidé/2.jpg"]
        elif first.offset_data + 500 <= length <= second.offset:
            expected = ["a/1.jpg"]
        else:
            with pytest.raises(InputError, match=r"cut short|no tar header at byte 0") as caught:
                list(open_archive(path).entries())
            assert str(caught.value).endswith(
                "Expected a whole .tar file. Copy or download it again, then run the same command."
            )
            continue
        assert list(members(open_archive(path))) == expected


@pytest.mark.parametrize("damage", [bytes(512), b"\xff" * 512, bytes(100) + b"1"])
def test_a_damaged_header_in_a_tar_is_no_end(tmp_path: Path, damage: bytes) -> None:
    path = write_tar(tmp_path / "crops.tar", {f"a/{number}.jpg": b"1" for number in range(4)})
    data = bytearray(path.read_bytes())
    data[2048 : 2048 + len(damage)] = damage
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"damaged or cut short at byte 2,048, where a file's header should be"):
        list(open_archive(path).entries())


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        (tarfile.REGTYPE, -1),  # of no blocks, so that only the size itself is wrong
        *((kind, size) for kind in (tarfile.REGTYPE, b"L", b"x") for size in (-1024, -512, 2**40)),
    ],
)
@pytest.mark.parametrize("second", [False, True])
def test_an_impossible_size_in_a_tar(tmp_path: Path, kind: bytes, size: int, second: bool) -> None:
    info = tarfile.TarInfo("a/1.jpg")
    info.size, info.type = size, kind
    sound = write_tar(tmp_path / "sound.tar", {"a/2.jpg": b"2" * 512}).read_bytes()
    header = info.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "crops.tar").write_bytes(sound[:1024] + header + sound if second else header + sound)
    with at_most(1), pytest.raises(InputError, match=r"at byte (0|1,024)\b"):
        list(open_archive(tmp_path / "crops.tar").entries())


def test_a_tar_of_nothing_but_long_names(tmp_path: Path) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type = tarfile.GNUTYPE_LONGNAME
    (tmp_path / "crops.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) * 2000)  # tarfile recurses
    with pytest.raises(InputError, match="no tar header at byte 0"):
        open_archive(tmp_path / "crops.tar")


def test_a_zip_whose_directory_is_damaged(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "crops.zip", CROPS)
    whole = path.read_bytes()
    second = whole.index(b"PK\1\2", whole.index(b"PK\1\2") + 1)
    path.write_bytes(whole[:second] + b"PK\1\3" + whole[second + 4 :])
    with pytest.raises(InputError, match="the entry after the first 1 in its directory is damaged"):
        list(open_archive(path).entries())
    end = whole.rindex(b"PK\5\6")
    path.write_bytes(whole[: end + 8] + b"\7\0\7\0" + whole[end + 12 :])
    with pytest.raises(InputError, match="its directory declares 7 entries, of which 6 are whole"):
        list(open_archive(path).entries())
    longer = bytearray(whole)
    longer[whole.rindex(b"PK\1\2") + 33] = 255  # the length of the last entry's comment
    path.write_bytes(longer)
    with pytest.raises(InputError, match="its directory declares 6 entries, of which 5 are whole"):
        list(open_archive(path).entries())


def test_bytes_between_the_directory_and_the_end_of_a_zip(tmp_path: Path) -> None:
    whole = bytearray(write_zip(tmp_path / "crops.zip", CROPS).read_bytes())
    end = whole.rindex(b"PK\5\6")
    whole[end + 12] += 9  # the directory's length, here below 256 * 256
    (tmp_path / "crops.zip").write_bytes(whole[:end] + b"some more" + whole[end:])
    with pytest.raises(InputError, match="its directory declares 6 entries, of which 6 are whole, and 9 bytes more"):
        list(open_archive(tmp_path / "crops.zip").entries())


def test_a_zip_whose_64_bit_end_is_damaged(tmp_path: Path) -> None:
    with mock.patch.object(zipfile, "ZIP_FILECOUNT_LIMIT", 2):
        path = write_zip(tmp_path / "crops.zip", CROPS)
    whole = bytearray(path.read_bytes())
    end = whole.index(b"PK\6\6")
    whole[end + 26] = whole[end + 34] = 1  # 65,536 more in both counts
    path.write_bytes(whole)
    with pytest.raises(InputError, match="its directory declares 65,542 entries, of which 6 are whole"):
        list(open_archive(path).entries())
    path.write_bytes(whole.replace(b"PK\6\6", b"PK\6\5"))
    with pytest.raises(InputError, match="the 64-bit end of its directory is damaged"):
        open_archive(path)


def test_counts_modulo_65536_are_accepted_without_zip64(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "crops.zip", {f"{number}": b"" for number in range(65_540)})
    assert sum(1 for _ in open_archive(path).entries()) == 65_540
    whole = path.read_bytes()
    end64, end = whole.rindex(b"PK\6\6"), whole.rindex(b"PK\5\6")
    path.write_bytes(whole[:end64] + whole[end : end + 8] + b"\4\0\4\0" + whole[end + 12 :])
    assert sum(1 for _ in open_archive(path).entries()) == 65_540


def test_a_part_of_a_split_zip(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "crops.zip", CROPS)
    whole = path.read_bytes()
    end = whole.rindex(b"PK\5\6")
    for field in (4, 6, 8):
        path.write_bytes(whole[: end + field] + b"\2\0" + whole[end + field + 2 :])
        with pytest.raises(InputError, match=r"one part of a split zip.*Join its parts with 'zip -s 0"):
            open_archive(path)


@pytest.mark.parametrize(
    ("name", "program"),
    [
        ("crops.tar.gz", "gunzip"),
        ("crops.TGZ", "gunzip"),
        ("crops.tar.xz", "unxz"),
        ("crops.txz", "unxz"),
        ("crops.tar.bz2", "bunzip2"),
        ("crops.tar.zst", "unzstd"),
    ],
)
def test_the_name_of_a_compressed_tar(tmp_path: Path, name: str, program: str) -> None:
    with pytest.raises(InputError) as caught:
        open_archive(tmp_path / name)
    assert str(caught.value) == (
        f"{tmp_path / name} is a compressed tar, in which a crop can't be found without unpacking all before it. "
        f"Expected an uncompressed .tar, or a .zip. Unpack it once with '{program} < {tmp_path / name} > "
        f"{tmp_path / 'crops.unpacked.tar'}', then use the new file."
    )


def test_a_compressed_tar_under_another_name(tmp_path: Path) -> None:
    path = tmp_path / "my crops.tar"
    for mode, program in (("w:gz", "gunzip"), ("w:bz2", "bunzip2"), ("w:xz", "unxz")):
        with tarfile.open(path, mode) as archive:
            add_to_tar(archive, "a/1.jpg", b"1")
        with pytest.raises(InputError, match=rf"'{program} < '.*my crops.tar' > '.*my crops.unpacked.tar''"):
            open_archive(path)
    path.write_bytes(b"\x28\xb5\x2f\xfd" + bytes(600))
    with pytest.raises(InputError, match="'unzstd <"):
        open_archive(path)


@both
def test_what_is_no_archive(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"crops{suffix}"
    for make in (lambda: None, path.mkdir):
        make()
        with pytest.raises(InputError, match=r"can't be opened: it does not exist or is not a file\. Expected.*Check"):
            open_archive(path)
    path.rmdir()
    for data in (b"", b"\xff\xd8" * 5000, lzma.compress(b"x"), write(tmp_path / f"1{suffix}", CROPS).read_bytes()):
        path.write_bytes(data)
        other = path.with_suffix(".tar" if suffix == ".zip" else ".zip")
        path.replace(other)
        with pytest.raises(InputError, match=r"Expected a"):
            open_archive(other)


def test_another_suffix(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"crops.rar is not an archive that affcache reads. Expected .* Unpack it, or"):
        open_archive(tmp_path / "crops.rar")
    assert set(folders.SOURCES) == {".zip", ".tar"}
    path = write_zip(tmp_path / "CROPS.ZIP", CROPS)
    assert contents(open_archive(path)) == list(CROPS.items())


# Damage of any kind


def example_archives() -> dict[str, bytes]:
    """Small archives of CROPS, of every structure that is read."""
    made = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "crops"
        for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
            long = {} if form == tarfile.USTAR_FORMAT else {"é" * 120: b"1"}
            made[f"{form}.tar"] = write_tar(path, CROPS | long, form).read_bytes()
        for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            made[f"{method}.zip"] = write_zip(path, CROPS, method).read_bytes()
        with mock.patch.object(zipfile, "ZIP64_LIMIT", 20), mock.patch.object(zipfile, "ZIP_FILECOUNT_LIMIT", 2):
            made["64.zip"] = write_zip(path, CROPS, zipfile.ZIP_DEFLATED).read_bytes()
    return made


EXAMPLES = example_archives()
ALL_BYTES = {*CROPS.values(), b"1"}


@settings(max_examples=600, deadline=None)
@given(
    name=st.sampled_from(sorted(EXAMPLES)),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=3),
    header_flips=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 511), st.integers(1, 255)), max_size=2),
    keep=st.just(1.0) | st.floats(0, 1),
)
def test_damage_is_named_or_harmless(
    name: str, flips: list[tuple[float, int]], header_flips: list[tuple[int, int, int]], keep: float
) -> None:
    data = bytearray(EXAMPLES[name])
    starts = [match.start() for match in re.finditer(b"PK|ustar", data)]
    places = [(int(place * len(data)), bits) for place, bits in flips]
    for which, within, bits in header_flips:  # near what matters more than a crop's bytes
        start = starts[which % len(starts)]
        places.append((start + within % 60 if name.endswith(".zip") else start - 257 + within, bits))
    for place, bits in places:
        data[place % len(data)] ^= bits
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data[: int(keep * len(data))])
        with at_most(1):
            check_damaged(path, unharmed=not places and keep == 1.0)


def check_damaged(path: Path, unharmed: bool) -> None:
    try:
        found = open_archive(path)
        listing = list(found.entries())
    except InputError:
        assert not unharmed
        return
    for name, member in listing:
        try:
            data = found.read(member)
        except UnreadableCropError:
            assert not unharmed
            continue
        assert len(data) == member.size
        if path.suffix == ".zip":  # a tar has no checksum of the bytes
            assert data in ALL_BYTES
            assert not unharmed or CROPS[name] == data
    assert not unharmed or len(listing) >= len(CROPS)
