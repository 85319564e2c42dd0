"""Files are written whole or not at all, under names that nobody can foresee; locks hold, or say that they can't."""

import errno
import os
import secrets
import stat
from pathlib import Path

import pytest

from affcache.errors import ConfigError, InputError
from affcache.files import beside, discard_partials, locked, remove, whole_file, write_bytes, write_text
from tests.conftest import Heard


def test_a_file_is_written_with_its_folder_and_the_usual_rights(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a" / "b" / "x.txt", "Größe \udcff")
    finally:
        os.umask(before)
    path = tmp_path / "a" / "b" / "x.txt"
    assert path.read_bytes() == "Größe ".encode() + b"\xff"
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list(path.parent.iterdir()) == [path]


def test_names_of_unfinished_files_differ_and_links_planted_there_are_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with beside(tmp_path / "x") as one, beside(tmp_path / "x") as other:
        assert one != other
        one.touch()
        other.touch()
    monkeypatch.setattr(secrets, "token_hex", lambda count: "foreseen")
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "y.foreseen.partial").symlink_to("precious")
    with pytest.raises(InputError, match="y can't be written: File exists"):
        write_bytes(tmp_path / "y", b"new")
    assert (tmp_path / "precious").read_text() == "kept"


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (
            errno.ENOSPC,
            "No space left on device. Expected a folder that can be written, with room. Free some ",
        ),
        (errno.EDQUOT, "Disk quota exceeded"),
        (errno.EIO, "Input/output error. Expected a folder that can be written, with room. Put that right or choose "),
    ],
)
def test_a_write_that_is_refused_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    def refuse(file: int) -> None:
        raise OSError(number, os.strerror(number))

    path = tmp_path / "x.json"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(InputError) as caught:
        write_text(path, "new")
    assert f"{path} can't be written: {said}" in str(caught.value)
    assert str(caught.value).endswith("run the same command again ('affcache fit' with --run DIR --resume).")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_came_out_too_short_is_no_file(tmp_path: Path) -> None:
    def write() -> None:
        with whole_file(tmp_path / "x") as file:
            file.write(b"all of this")
            file.truncate(3)

    with pytest.raises(OSError, match="shorter than what was written"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_goes_when_it_was_not_finished(tmp_path: Path) -> None:
    def write() -> None:
        with beside(tmp_path / "out") as folder:
            write_bytes(folder / "deep" / "x", b"1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert list(tmp_path.iterdir()) == []


def test_what_killed_processes_left_of_a_file_is_discarded(tmp_path: Path) -> None:
    for name in ("[x].h5.0a1b2c3d.partial", "[x].h5", "x.h5.0a1b2c3d.partial"):
        (tmp_path / name).touch()
    discard_partials(tmp_path / "[x].h5")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["[x].h5", "x.h5.0a1b2c3d.partial"]


def test_a_file_that_can_not_be_removed_is_named(tmp_path: Path) -> None:
    remove(tmp_path / "none")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"folder can't be written: "):
        remove(tmp_path / "folder")


def test_a_lock_is_held_by_one_and_leaves_nothing(tmp_path: Path) -> None:
    lock, heard = tmp_path / "new" / ".lock", Heard()
    with locked(lock, ConfigError("first"), heard):
        with pytest.raises(ConfigError, match="taken"), locked(lock, ConfigError("taken"), heard):
            pass
        assert lock.exists()
    assert list(tmp_path.iterdir()) == []
    lock.parent.mkdir()
    with locked(lock, ConfigError(""), heard):
        pass
    assert list(lock.parent.iterdir()) == []
    assert not heard.warnings


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, 524])
def test_a_disk_without_locks_is_worked_on_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def refuse(file: int, operation: int) -> None:
        raise OSError(number, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    heard = Heard()
    with locked(tmp_path / ".lock", ConfigError(""), heard):
        pass
    assert heard.warnings == [f"The disk of {tmp_path} has no locks. See to it that nobody else writes there now."]


def test_a_lock_below_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    lock = locked(tmp_path / "file" / "x", ConfigError(""), Heard())
    with pytest.raises(InputError, match="file can't be written"), lock:
        pass
