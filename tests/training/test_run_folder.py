"""Run folders: files that survive a kill, and folders that are not what they should be."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from affcache.errors import ConfigError, InputError, StoreError
from affcache.files import read_tensors, write_tensors
from affcache.progress import Listener
from affcache.store.reading import EmbeddingStore
from affcache.training.run_folder import (
    RunFolder,
    claim_run,
    describe_store,
    locked_run,
    newest_run,
    settings_from_json,
    settings_to_json,
)
from affcache.training.settings import FitSettings
from tests.conftest import MakeData


def test_tensors_come_back_to_the_bit_with_their_header(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).T,  # not contiguous
        "b": torch.tensor(7),
        "c": torch.arange(5, dtype=torch.uint8),
        "d": torch.nn.Parameter(torch.ones(2, dtype=torch.float16)),
    }
    header = {"task": "expr", "value": 0.1 + 0.2, "list": [1, None], "text": "Größe"}
    write_tensors(tmp_path / "x.safetensors", tensors, header)
    found, found_header = read_tensors(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].equal(tensor)
    assert found_header == header
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:20], lambda b: b"", lambda b: b"\xff" * len(b)])
def test_damaged_tensors_are_a_named_error(tmp_path: Path, damage) -> None:
    path = tmp_path / "head.safetensors"
    write_tensors(path, {"a": torch.ones(100)}, {})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        StoreError, match=r"head\.safetensors can't be read .*Expected a file that 'affcache fit' wrote"
    ):
        read_tensors(path)


def test_tensors_of_another_program_or_none_are_a_named_error(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(StoreError, match="can't be read"):
        read_tensors(tmp_path / "foreign.safetensors")
    with pytest.raises(StoreError, match="FileNotFoundError"):
        read_tensors(tmp_path / "none.safetensors")


def test_a_history_comes_back_without_what_a_kill_left_half(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_history([{"epoch": 1}, {"epoch": 2}])
    assert folder.history.read_text() == '{"epoch": 1}\n{"epoch": 2}\n'
    folder.history.write_text(folder.history.read_text() + '{"epo')
    assert folder.read_history() == [{"epoch": 1}, {"epoch": 2}]


def test_the_newest_run_is_the_one_whose_head_was_saved_last(tmp_path: Path) -> None:
    for index, name in enumerate(["b", "a", "c"]):
        (tmp_path / name).mkdir()
        head = tmp_path / name / "head.safetensors"
        head.touch()
        os.utime(head, (1000 + index, 1000 + index))
    (tmp_path / "z").mkdir()  # interrupted before its first epoch
    (tmp_path / "z" / "config.json").touch()
    assert newest_run(tmp_path).path.name == "c"
    os.utime(tmp_path / "a" / "head.safetensors", (5000, 5000))
    assert newest_run(tmp_path).path.name == "a"


def test_no_run_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        newest_run(tmp_path / "runs")
    assert f"no finished run in {tmp_path / 'runs'}" in str(caught.value)
    assert "'affcache fit --task expr'" in str(caught.value)
    assert "or name a run folder" in str(caught.value)


@pytest.mark.parametrize(
    "content", [None, "", "{", "[1]", "3", '{"model_type": "clip"}'],
    ids=["none", "empty", "half", "a list", "a number", "another program's"],
)  # fmt: skip
def test_a_folder_without_a_runs_config_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"is no run folder that can be read .*config\.json") as caught:
        RunFolder(tmp_path).read_config()
    assert "Expected a folder that 'affcache fit' wrote" in str(caught.value)


def test_settings_come_back_from_json() -> None:
    settings = FitSettings(
        task="au", annotations=Path("my labels").absolute(), alpha=0.3, rho=0.0, epochs=5, normalize="l2"
    )
    kept = json.loads(json.dumps(settings_to_json(settings)))
    assert settings_from_json(kept) == settings
    assert kept.keys() & {"run", "resume", "store"} == set()
    with pytest.raises(ConfigError, match="Unknown setting 'momentum'"):
        settings_from_json({**kept, "momentum": 1})


def test_a_claimed_folder_holds_the_config_and_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "a"
    with locked_run(path, "expr", Listener(), resume=False) as (folder, begun):
        assert not begun
        store = {"path": "s.h5", "fingerprint": "0", "encoder": {}, "encoder_fingerprint": "1"}
        labels = {"train": {}, "validation": {}}
        config = {"task": "expr", "settings": {"annotations": "labels"}, "store": store, "labels": labels}
        claim_run(folder, config, resume=False)
    assert folder.read_config()["task"] == "expr"
    with (
        pytest.raises(ConfigError, match="already holds something"),
        locked_run(path, "expr", Listener(), resume=False),
    ):
        pass
    with locked_run(path, "expr", Listener(), resume=True) as (_, begun):
        assert begun


def test_a_store_is_recognised_by_its_contents(learnable: MakeData) -> None:
    path, _ = learnable(videos=3, frames=4)
    first = describe_store(EmbeddingStore.open(path))
    moved = path.rename(path.with_name("moved.h5"))
    second = describe_store(EmbeddingStore.open(moved))
    assert (first["rows"], first["width"]) == (12, 16)
    assert first.pop("path") != second.pop("path")
    assert first == second
    assert json.loads(json.dumps(first)) == first


@pytest.mark.parametrize(
    "text", ["{\n", "[]\n", "\xff\n", '{"epoch": "x"}\n', '{"a": ' + "9" * 5000 + "}\n", "[" * 99999 + "\n"]
)
def test_a_damaged_history_is_a_named_error(tmp_path: Path, text: str) -> None:
    folder = RunFolder(tmp_path)
    folder.history.write_text('{"epoch": 1}\n' + text, encoding="latin-1")
    with pytest.raises(StoreError, match=r"history\.jsonl can't be read"):
        folder.read_history()


def test_half_a_line_at_the_end_of_a_history_is_what_a_kill_leaves(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.history.write_text('{"epoch": 1}\n{"epoch": 2, "tr')
    assert folder.read_history() == [{"epoch": 1}]


@pytest.mark.parametrize(
    "part", ["task", "settings", "labels", "store", "annotations", "path", "fingerprint", "encoder"]
)
@pytest.mark.parametrize("value", [None, 7, [], "missing"])
def test_a_damaged_config_is_a_named_error(tmp_path: Path, part: str, value: object) -> None:
    store = {"path": "s.h5", "fingerprint": "0", "encoder": {}, "encoder_fingerprint": "1"}
    config = {"task": "expr", "settings": {"annotations": "labels"}, "store": store, "labels": {}}
    table = next(table for table in (config, store, config["settings"]) if part in table)
    if value == "missing":
        del table[part]
    else:
        table[part] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="is no run folder that can be read"):
        RunFolder(tmp_path).read_config()
