"""affcache faces run again: it continues, looks at nothing twice, mixes nothing, and removes only what is its own."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import affcache
from affcache.errors import ConfigError, InputError
from affcache.faces import find as find_module
from affcache.faces.media import Media
from affcache.faces.scan import Scanner
from affcache.faces.table import FinishedInputs, read_kept, write_kept
from tests.conftest import Heard
from tests.faces.clips import moving, picture, squares, write_clip, write_photo
from tests.faces.test_find import crops_in, find, numbered, rows_of
from tests.test_cli import call

pytestmark = pytest.mark.usefixtures("square_faces")


def content(folder: Path) -> dict[str, bytes]:
    """Return the visible files of a folder with their bytes."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if ".faces" not in p.parts}


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """A folder of three clips, a to c; b has two persons."""
    folder = tmp_path / "in"
    write_clip(folder / "a.mp4", moving(4))
    write_clip(folder / "b.mp4", [picture((8, 8), (70, 50))] * 3)
    write_clip(folder / "c.mp4", moving(5))
    return folder


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list of the inputs that are looked at from now on."""
    names: list[str] = []
    scan = Scanner.scan

    def heard(self: Scanner, media: Media, *rest: Any) -> Any:
        names.append(media.name)
        return scan(self, media, *rest)

    monkeypatch.setattr(Scanner, "scan", heard)
    return names


def stop_at(monkeypatch: pytest.MonkeyPatch, of: object, name: str, call_number: int, error: BaseException) -> None:
    """Make a function raise at its so many-th call."""
    calls, function = 0, getattr(of, name)

    def stopping(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call_number:
            raise error
        return function(*arguments, **named)

    monkeypatch.setattr(of, name, stopping)


def test_a_second_run_looks_at_nothing_and_gives_the_same(clips: Path, tmp_path: Path, looked_at: list[str]) -> None:
    first = find(clips, out=tmp_path / "out")
    before = content(tmp_path / "out")
    assert looked_at == ["a", "b", "c"]
    looked_at.clear()
    second = find(clips, out=tmp_path / "out")
    assert looked_at == []
    assert content(tmp_path / "out") == before
    assert {**vars(second), "seconds": 0, "rate": 0} == {**vars(first), "seconds": 0, "rate": 0}


@pytest.mark.parametrize(
    ("of", "name", "number"),
    [
        (find_module._Finding, "_keep", 1),
        (find_module._Finding, "_keep", 6),  # in the second input, of which some crops are written
        (find_module._Finding, "_finish", 2),
        (FinishedInputs, "write", 2),
        (Path, "mkdir", 8),
        (Path, "replace", 3),
        (Path, "replace", 6),
        (Path, "replace", 9),
        (Path, "replace", 11),
        (Path, "replace", 16),
        (find_module, "write_table", 1),
    ],
)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_what_was_stopped_goes_on_to_the_same_bytes(
    of: object, name: str, number: int, error: BaseException, clips: Path, tmp_path: Path
) -> None:
    find(clips, out=tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patched:
        stop_at(patched, of, name, number, error)
        with pytest.raises((KeyboardInterrupt, InputError, OSError)):
            find(clips, out=tmp_path / "out")
    heard = Heard()
    find(clips, out=tmp_path / "out", listener=heard)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    kept = sorted(path.name for path in (tmp_path / "out" / ".faces").iterdir())
    assert kept == ["a.arrow", "b.arrow", "c.arrow"], "nothing else is left"


def test_what_is_finished_is_not_looked_at_again(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looked_at: list[str]
) -> None:
    with monkeypatch.context() as patched:
        stop_at(patched, find_module._Finding, "_keep", 6, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            find(clips, out=tmp_path / "out")
    assert looked_at == ["a", "b"]
    heard = Heard()
    find(clips, out=tmp_path / "out", listener=heard)
    assert looked_at == ["a", "b", "b", "c"]
    assert "continuing: 1 of 3 are finished" in heard.messages


def test_more_inputs_may_come_later(clips: Path, tmp_path: Path, looked_at: list[str]) -> None:
    find(clips / "a.mp4", out=tmp_path / "out")
    result = find(clips / "c.mp4", out=tmp_path / "out")
    assert looked_at == ["a", "c"]
    assert (result.inputs, result.frames) == (2, 9)
    assert [row["crops"] for row in rows_of(tmp_path / "out")] == ["a"] * 4 + ["c"] * 5


@pytest.mark.parametrize("given", ["a.mp4", "c.mp4"])
def test_other_settings_are_refused_whichever_input_they_are_for(given: str, clips: Path, tmp_path: Path) -> None:
    find(clips / "a.mp4", out=tmp_path / "out")
    before = content(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"a\.mp4 that were made with other settings: confidence, every\. ") as caught:
        find(clips / given, out=tmp_path / "out", every=2, confidence=0.5)
    assert "choose another --out" in str(caught.value)
    assert content(tmp_path / "out") == before
    find(clips / "a.mp4", out=tmp_path / "out")


def test_settings_that_change_no_result_may_change(clips: Path, tmp_path: Path, looked_at: list[str]) -> None:
    find(clips / "a.mp4", out=tmp_path / "out")
    affcache.find_faces(inputs=clips / "a.mp4", out=tmp_path / "out", workers=5, device="cpu", listener=Heard())
    assert looked_at == ["a"]


def test_another_detector_is_another_setting(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find(clips / "a.mp4", out=tmp_path / "out")
    for module in ("detector", "find"):
        monkeypatch.setattr(f"affcache.faces.{module}.DETECTORS", {"yunet": squares, "mine": squares})
    with pytest.raises(ConfigError, match="made with other settings: detector"):
        find(clips / "a.mp4", out=tmp_path / "out", detector="mine")


def replaced(path: Path, frames: list[Any]) -> None:
    """Write another clip in the place of one, later."""
    modified = path.stat().st_mtime_ns
    write_clip(path, frames)
    os.utime(path, ns=(modified + 10**9, modified + 10**9))


def test_an_input_that_has_changed_is_looked_at_anew(clips: Path, tmp_path: Path, looked_at: list[str]) -> None:
    out = tmp_path / "out"
    find(clips, out=out)
    looked_at.clear()
    replaced(clips / "b.mp4", moving(2))
    find(clips, out=out)
    assert looked_at == ["b"]
    assert crops_in(out) == {"a": numbered(1, 2, 3, 4), "b": numbered(1, 2), "c": numbered(1, 2, 3, 4, 5)}
    assert [row["frame"] for row in rows_of(out) if row["crops"] == "b"] == [1, 2]
    replaced(clips / "b.mp4", [picture()] * 2)
    assert find(clips, out=out).inputs == 3
    assert crops_in(out).keys() == {"a", "c"}, "nobody is left in it"


def test_an_input_that_is_damaged_now_loses_its_crops(clips: Path, tmp_path: Path) -> None:
    find(clips, out=tmp_path / "out")
    (clips / "b.mp4").write_bytes(b"")
    result = find(clips, out=tmp_path / "out")
    assert result.unreadable == (str(clips / "b.mp4"),)
    assert crops_in(tmp_path / "out").keys() == {"a", "c"}
    assert {row["crops"] for row in rows_of(tmp_path / "out")} == {"a", "c"}


def test_a_table_whose_faces_are_all_gone_goes_too(clips: Path, tmp_path: Path) -> None:
    find(clips / "a.mp4", out=tmp_path / "out")
    replaced(clips / "a.mp4", [picture()] * 3)
    with pytest.raises(InputError, match="No face was found in 3 frames of 1 input"):
        find(clips / "a.mp4", out=tmp_path / "out")
    assert content(tmp_path / "out") == {}


def test_another_file_of_the_same_name_does_not_replace_it(clips: Path, tmp_path: Path, looked_at: list[str]) -> None:
    find(clips / "a.mp4", out=tmp_path / "out")
    before = content(tmp_path / "out")
    other = write_clip(tmp_path / "day2" / "a.mp4", moving(2))
    with pytest.raises(InputError, match=r"in/a\.mp4, which is called a there as .*day2/a\.mp4 would be\. ") as caught:
        find(other, out=tmp_path / "out")
    assert "choose another --out" in str(caught.value)
    assert content(tmp_path / "out") == before
    looked_at.clear()
    clips.rename(tmp_path / "moved")  # the same file elsewhere is looked at again
    find(tmp_path / "moved" / "a.mp4", out=tmp_path / "out")
    assert looked_at == ["a"]
    assert crops_in(tmp_path / "out").keys() == {"a"}


def foreign_folder(out: Path, name: str) -> Path:
    (out / name).mkdir(parents=True)
    (out / name / "00001.jpg").write_bytes(b"mine")
    return out / name / "00001.jpg"


@pytest.mark.parametrize("name", ["a", "b_1", "b_2", "c"])
def test_a_folder_of_somebody_else_is_refused_and_kept(name: str, clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    mine = foreign_folder(out, name)
    message = call("faces", clips, "--out", out, code=2).stderr
    assert f"{name} is there already, and is none of what 'affcache faces' keeps of " in message
    assert "Choose another --out, or move it away." in message
    assert mine.read_bytes() == b"mine"
    assert find_module.CLAIM not in {path.name for path in out.rglob("*")}
    shutil.move(out / name, tmp_path / "elsewhere")
    find(clips, out=out)
    find(clips, out=tmp_path / "whole")
    assert content(out) == content(tmp_path / "whole")


def test_a_folder_that_merely_has_the_name_is_no_crop_of_an_earlier_run(clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    find(clips / "a.mp4", out=out)
    mine = [foreign_folder(out, name) for name in ("a_1", "a_2", "a-other")]
    replaced(clips / "a.mp4", moving(2))
    find(clips / "a.mp4", out=out)
    assert all(path.read_bytes() == b"mine" for path in mine)
    assert (out / "a" / "00002.jpg").exists()


def test_a_kept_table_that_says_nothing_of_itself_is_made_anew(clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    find(clips / "a.mp4", out=out)
    kept = out / ".faces" / "a.arrow"
    unknown = {b"affcache": json.dumps({"made": 3}).encode()}
    table = read_kept(kept)
    write_kept(kept, table.replace_schema_metadata(unknown))
    find(clips / "a.mp4", out=out)
    assert crops_in(out) == {"a": numbered(1, 2, 3, 4)}


def test_where_a_kept_table_is_damaged_its_crops_are_not_taken_for_ones_own(clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    find(clips / "a.mp4", out=out)
    (out / ".faces" / "a.arrow").write_bytes(b"no table")
    with pytest.raises(InputError, match="a is there already, and is none of what"):
        find(clips / "a.mp4", out=out)
    assert crops_in(out) == {"a": numbered(1, 2, 3, 4)}
    shutil.rmtree(out / "a")
    assert find(clips / "a.mp4", out=out).faces == 4, "as it advises"


def test_crops_that_lie_among_the_inputs_are_no_inputs_of_the_next_run(clips: Path, looked_at: list[str]) -> None:
    find(clips, out=clips / "faces")
    before = content(clips / "faces")
    find(clips, out=clips / "faces")
    assert looked_at == ["a", "b", "c"]
    assert content(clips / "faces") == before


def test_a_name_that_is_no_text_is_listed_by_its_bytes(clips: Path, tmp_path: Path) -> None:
    path = clips / os.fsdecode(b"caf\xe9.png")
    write_photo(tmp_path / "x.png", picture((8, 8))).rename(path)
    result = find(clips, out=tmp_path / "out")
    assert result.unreadable == (str(path),)
    assert b"caf\xe9.png\tThe name of b'" in (tmp_path / "out" / "unreadable.txt").read_bytes()
    assert "caf\\udce9.png" in call("faces", clips, "--out", tmp_path / "out", "--json").stdout
