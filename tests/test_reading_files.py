"""Reading a user's files: what is no file, or larger than its kind, is refused before anything is read."""

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from affcache.crops.crop_list import keep_listed
from affcache.errors import AffcacheError
from affcache.exchange.exporting import open_npy_export, open_safetensors_export
from affcache.exchange.layouts import _read_listing
from affcache.exchange.parquet import parquet_file
from affcache.files import LARGEST_LINE, read_bytes, read_json, read_lines, read_tensors, written_by_others
from affcache.settings import read_toml
from affcache.store.reading import EmbeddingStore
from affcache.submission.template import read_frame_counts, read_template
from affcache.tasks.label_files import read_label_file
from affcache.tasks.tasks import TASKS
from affcache.training.run_folder import RunFolder
from tests.conftest import crop_list


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(os.path.relpath(path))


KINDS: dict[str, Callable[[Path], Any]] = {
    "pipe": make_pipe,
    "folder": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "socket": make_socket,
    "too large": lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 2**36),
}


def open_parquet(path: Path) -> None:
    with parquet_file(path):
        pass


READERS: dict[str, Callable[[Path], object]] = {
    "label file": lambda path: read_label_file(path, TASKS["expr"]),
    "crop list": lambda path: keep_listed(crop_list({"a": [1]}), path),
    "template": read_template,
    "frame counts": read_frame_counts,
    "store": EmbeddingStore.open,
    "parquet": open_parquet,
    "safetensors": open_safetensors_export,
    "listing": _read_listing,
    "tensors": read_tensors,
    "config.json": lambda path: RunFolder(path.rename(path.with_name("config.json")).parent).read_config(),
    "history.jsonl": lambda path: RunFolder(path.rename(path.with_name("history.jsonl")).parent).read_history(),
    "provenance.json": lambda path: open_npy_export(path.rename(path.with_name("provenance.json")).parent),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_of_its_kind_is_a_named_error_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, reader: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x"
    KINDS[kind](path)
    failed: list[BaseException] = []

    def read() -> None:
        try:
            READERS[reader](path)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=read, daemon=True)  # one that waits would never end
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it waits"
    assert [type(error) for error in failed if not isinstance(error, AffcacheError)] == []
    assert failed


def test_the_reason_is_said(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        read_bytes(tmp_path / "pipe", 10)
    (tmp_path / "file").write_bytes(b"12345678901")
    with pytest.raises(OSError, match="it has 11 bytes, of which at most 10 are read"):
        read_bytes(tmp_path / "file", 10)
    assert read_bytes(tmp_path / "file", 11) == b"12345678901"
    with pytest.raises(OSError, match="no file has such a name"):
        read_bytes(tmp_path / "a\0b", 10)


def test_lines_end_at_newlines_alone(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes("\ufeffa\u2028b\r\nc\x85d\x0ce\n\n\rf\x1cg".encode())
    assert list(read_lines(path, 100)) == ["a\u2028b", "c\x85d\x0ce", "", "\rf\x1cg"]
    path.write_bytes(b"1\n" + b"2" * (LARGEST_LINE + 1))
    with pytest.raises(OSError, match="a line of it has more than"):
        list(read_lines(path, 2**20))


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", '{"a":' + "1" * 5000 + "}", "{", "\ud800"])
def test_json_that_is_no_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(ValueError, match=r"."):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize("text", ["a = " + "[" * 100_000, "a = " + "9" * 5000])
def test_toml_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(ValueError, match=r"."):
        read_toml(tmp_path / "x.toml")


def test_who_may_have_written_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    path.write_text("")
    path.chmod(0o664)
    assert not written_by_others(path)
    path.chmod(0o666)
    assert written_by_others(path)
    path.chmod(0o644)
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    assert written_by_others(path) == (path.stat().st_uid != 0)
