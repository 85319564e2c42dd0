"""Tasks of one's own: what TOML may define, all that is wrong at once, and what a run keeps of it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from affcache.commands import SETTINGS
from affcache.config import find_config
from affcache.errors import ConfigError
from affcache.settings import build
from affcache.tasks.kinds import Classes, Units, Values
from affcache.tasks.own import ROLES, task_to_json
from affcache.tasks.task import Task
from affcache.tasks.tasks import TASKS, definition_of, find_task, is_own, task_from_json, task_of_run
from affcache.training.settings import FitSettings

CALM = 'kind = "classes"\nnames = ["calm", "engaged", "bored"]\nlabels = "labels.csv"\n'
NAMES = st.lists(st.text("abcXYZ é'", min_size=1, max_size=5).map(str.strip).filter(bool), min_size=2, unique=True)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, outside of any repository."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_a_file_defines_a_task(folder: Path) -> None:
    (folder / "my").mkdir()
    (folder / "my" / "mood.toml").write_text(CALM + 'description = "How it is"\ncolumns = {video = "clip"}\n')
    task = find_task("my/mood.toml")
    labels = folder / "my" / "labels.csv"
    assert task == Classes("mood", ("calm", "engaged", "bored"), "How it is")
    assert (task.labels, task.level, task.columns) == (labels, "frame", (("video", "clip"),))
    assert is_own(task)
    assert not is_own(find_task("expr"))

    (folder / "pain.toml").write_text(
        'name = "hurt"\nkind = "values"\nnames = ["pain"]\nrange = [0, 10]\nlabels = "/data/pain"\nlevel = "video"\n'
    )
    pain = find_task("pain.toml")
    assert isinstance(pain, Values)
    assert (pain.name, pain.valid_range, pain.level, pain.labels) == ("hurt", (0, 10), "video", Path("/data/pain"))


def test_a_table_of_affcache_toml_defines_a_task(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "annotations = 'aff-wild2'\n[fit]\nepochs = 3\n[task.smile]\nkind = 'units'\nnames = ['smile']\nlabels = 'l'\n"
    )
    (folder / "affcache.toml").write_text(text)
    (folder / "below").mkdir()
    monkeypatch.chdir(folder / "below")
    task = find_task("smile")
    assert isinstance(task, Units)
    assert (task.name, task.classes, task.labels) == ("smile", ("smile",), folder / "l")
    with pytest.raises(ConfigError, match=r"--task 'smlie' is unknown \(did you mean 'smile'\?\)"):
        find_task("smlie")

    config = find_config(folder, SETTINGS)
    assert config.of("fit") == {"annotations": folder / "aff-wild2", "epochs": 3}
    assert config.for_task("expr") == config
    assert config.for_task("smile").of("fit") == {"epochs": 3}, "its own labels count"
    assert config.for_task("x.toml").of("ablate") == {}

    (folder / "affcache.toml").write_text("[fit]\ntask = 'my/mood.toml'\n")
    assert find_config(folder, SETTINGS).of("fit") == {"task": str(folder / "my" / "mood.toml")}
    (folder / "affcache.toml").write_text("[task]\nkind = 'units'\n[tasks.a]\n")
    with pytest.raises(ConfigError, match=r"'kind' in \[task\]; unknown table \[tasks\] \(did you mean 'task'\?\)"):
        find_config(folder, SETTINGS)


def test_a_file_of_someone_else_defines_nothing(folder: Path) -> None:
    path = folder / "affcache.toml"
    path.write_text("[task.smile]\nkind = 'units'\nnames = ['smile']\nlabels = 'l'\n")
    path.chmod(0o666)
    with pytest.raises(ConfigError, match="'smile' is unknown"):
        find_task("smile")


def test_an_unknown_name_is_told_the_way(folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        find_task("calm")
    assert "expr (Facial expression" in str(caught.value)
    assert "or a task of your own: --task FILE.toml, or a table [task.calm] in affcache.toml" in str(caught.value)
    assert "docs/own-tasks.md" in str(caught.value)
    with pytest.raises(ConfigError, match=r"--task no\.toml can't be read: No such file"):
        find_task("no.toml")
    (folder / "bad.toml").write_text("kind = ")
    with pytest.raises(ConfigError, match=r"--task bad\.toml can't be read: Invalid value .* Expected a TOML file"):
        find_task("bad.toml")
    (folder / "affcache.toml").write_text("kind = ")
    with pytest.raises(ConfigError, match=r"affcache\.toml is not valid TOML"):
        find_task("calm")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["kind is missing, expected classes, units or values", "names is missing", "labels is missing"]),
        (CALM.replace("classes", "class"), ["kind is 'class' (did you mean 'classes'?), expected classes, units"]),
        (CALM + "lables = 'x'\nkinds = 1\n", ["unknown key 'lables' (did you mean 'labels'?)", "unknown key 'kinds'"]),
        (CALM.replace("bored", "calm"), ["names has 'calm' twice, expected each once"]),
        (CALM.replace("bored", "a,b"), ["names has 'a,b', expected texts without commas"]),
        (CALM.replace('"bored"', "3"), ["names has 3, expected texts"]),
        (CALM.replace("bored", " bored"), ["names has ' bored', expected no spaces around a name"]),
        (CALM.replace(', "engaged", "bored"', ""), ["names has 1, expected at least 2"]),
        (CALM + "range = [0, 1]\n", ["range is given, but classes have none"]),
        (CALM.replace("classes", "values"), ["range is missing, expected the smallest and the largest value"]),
        (CALM.replace("classes", "values") + "range = [1, 1]\n", ["range is [1, 1], expected the smallest and"]),
        (CALM.replace("classes", "values") + "range = [-9, 9]\n", ["which has -5 in it, the mark of a frame without"]),
        (CALM.replace("classes", "values") + "range = [0, inf]\n", ["range is [0, inf], expected"]),
        (CALM.replace("classes", "units") + "columns = {label = 'x'}\n", ["columns names label, which is of classes"]),
        (
            CALM.replace("classes", "values") + f"range = [0, {10**400}]\n",
            ["range is [0, 1000", "expected the smallest"],
        ),
        (CALM.replace("classes", "values") + "range = [0, 1e39]\n", ["range is [0, 1e+39], expected", "as float32"]),
        (CALM.replace("classes", "values") + "range = [0, 1e-60]\n", ["range is [0, 1e-60], expected"]),
        (CALM.replace('"bored"', '"1", "2", "1.0"'), ["names has '1' and '1.0', which are equal as numbers"]),
        (CALM.replace("bored", "mu\u0308de").replace("calm", "m\u00fcde"), ["names has 'm\u00fcde' twice"]),
        (CALM + "columns = {path = 'p', frame = 'n'}\n", ["columns names path beside video or frame; expected"]),
        (CALM + "level = 'video'\ncolumns = {frame = 'n'}\n", ["columns names frame, but level is video"]),
        (CALM + "level = 'clip'\n", ["level is 'clip', expected frame or video"]),
        (
            CALM + "columns = {vidoe = 'a', frame = 3}\n",
            ["columns names 'vidoe' (did you mean 'video'?)", "column frame"],
        ),
        (CALM.replace('"labels.csv"', "7"), ["labels is 7, expected the path of a CSV or Parquet file"]),
        (CALM.replace("labels.csv", "~nobody-at-all/x"), ["expected a path without the name of another user"]),
        ("name = 'a b'\n" + CALM, ["the name 'a b' is none for a task; expected letters, digits, - and _"]),
        ("name = 'au'\n" + CALM, ["the name 'au' is that of a task of affcache; expected another than expr, au"]),
        ("name = 3\nkind = 'units'\nfoo = 1\n", ["the name 3", "unknown key 'foo'", "names is missing"]),
    ],
)
def test_all_that_is_wrong_is_said_at_once(text: str, expected: list[str], folder: Path) -> None:
    (folder / "mood.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        find_task("mood.toml")
    message = str(caught.value)
    assert message.startswith("mood.toml: ")
    assert all(part in message for part in expected), message
    assert "of which kind, names and labels are needed" in message


def test_a_task_named_as_one_of_affcaches_is_refused_by_its_file_name_too(folder: Path) -> None:
    (folder / "expr.toml").write_text(CALM)
    with pytest.raises(ConfigError, match="the name 'expr' is that of a task of affcache"):
        find_task("expr.toml")


@given(
    kind=st.sampled_from([Classes, Units, Values]),
    classes=NAMES,
    description=st.text(max_size=8),
    labels=st.none() | st.just(Path("/data/labels.csv")),
    level=st.sampled_from(["frame", "video"]),
    columns=st.dictionaries(st.sampled_from(ROLES), st.text(max_size=4)),
)
def test_what_a_run_keeps_is_the_task(kind: Any, classes: list[str], columns: dict[str, str], **words: Any) -> None:
    limits = {"low": 0.5, "high": 7.25} if kind is Values else {}
    task: Task = kind("mine", tuple(classes), columns=tuple(sorted(columns.items())), **words, **limits)
    kept = json.loads(json.dumps(task_to_json(task)))
    back = task_from_json(kept)
    assert back == task
    assert (back.labels, back.columns, back.level) == (task.labels, task.columns, task.level)
    assert task_of_run({"task": "mine", **definition_of(task)}) == task


def test_a_run_of_a_known_task_needs_no_definition() -> None:
    for task in TASKS.values():
        assert definition_of(task) == {}
        assert task_of_run({"task": task.name}) is task
        assert task_from_json(task_to_json(task)) is task


@pytest.mark.parametrize(
    "wrong",
    [
        {"classes": []},
        {"kind": "clusters"},
        {"name": 3},
        {"labels": 3},
        {"level": "clip"},
        {"columns": ["video"]},
        {"columns": {"who": "x"}},
        {"columns": {"video": 3}},
        {"low": 3.0, "high": 2.0},
        {"low": 0, "high": 10**400},
        {"low": "0"},
    ],
)
def test_a_damaged_definition_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        task_from_json({**task_to_json(Values("mine", ("x",))), **wrong})


def test_paths_of_tasks_are_as_they_were_said(folder: Path) -> None:
    assert build(FitSettings, {"task": "my/mood.toml"}).task == os.fspath(Path("my/mood.toml"))
    assert build(FitSettings, {"task": "~/mood.TOML"}).task == str(folder / "mood.TOML")
    assert build(FitSettings, {"task": "~mood"}).task == "~mood"
