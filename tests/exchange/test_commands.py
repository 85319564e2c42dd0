"""affcache import and affcache export on the command line: exit codes, tables, --json, affcache.toml."""

import json
from pathlib import Path

import pytest

from affcache.store.reading import EmbeddingStore
from tests.conftest import write_store
from tests.exchange.sources import SHUFFLED, matrix, write_published
from tests.test_cli import call, json_of


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_published(tmp_path, matrix(4, dtype="float32"), SHUFFLED)
    return tmp_path


def test_import_says_what_it_did(folder: Path) -> None:
    result = call("import", "train.h5", "--list", "train.txt", "--store", "x.h5", "--model", "ViT-L-14")
    assert "4: 4 encoded, 0 unreadable" in result.stdout
    assert "not normalised" in result.stdout
    assert "next: affcache fit --task expr --store x.h5" in result.stdout
    assert "values were rounded to float16" in result.stderr
    assert len(EmbeddingStore.open("x.h5")) == 4


def test_import_and_export_in_json(folder: Path) -> None:
    found = json_of(call("import", "train.h5", "--list", "train.txt", "--store", "x.h5", "--json"))
    assert (found["rows"], found["labels_not_used"], found["imported_from"]) == (4, 4, "published code")
    for form in ("npy", "parquet", "safetensors"):
        exported = json_of(call("export", "x.h5", "--format", form, "--json"))
        back = json_of(call("import", exported["out"], "--store", f"{form}.h5", "--json"))
        assert back["same_as_exported"] is True
        assert Path(f"{form}.h5").read_bytes() == Path("x.h5").read_bytes()


def test_export_says_what_it_did_and_the_way_back(folder: Path) -> None:
    write_store(folder / "s.h5", {"a": [1, 2]}, matrix(2), unreadable=[0])
    shown = call("export", "s.h5", "--out", "embeddings").stdout
    assert "2: 1 encoded, 1 unreadable" in shown
    assert "back: affcache import embeddings --store FILE" in shown
    assert "to the bit" in call("import", "embeddings", "--store", "back.h5").stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["import"], "No source is given"),
        (["import", "train.h5", "--store", "x.h5"], "1 HDF5 files and 0 lists are given"),
        (["import", "none.h5", "--store", "x.h5"], "none.h5 can't be read: No such file"),
        (["export", "none.h5"], "no embedding store at none.h5"),
        (["export", "s.h5", "--format", "csv"], "--format is 'csv'; expected one of npy, parquet, safetensors"),
        (["export", "s.h5", "--out", "train.h5"], "train.h5 exists already"),
    ],
)
def test_errors_exit_2(folder: Path, arguments: list[str], said: str) -> None:
    write_store(folder / "s.h5", {"a": [1, 2]}, matrix(2))
    before = sorted(folder.iterdir())
    result = call(*arguments, "--json", code=2)
    assert said in json.loads(result.stdout)["message"]
    assert said in result.stderr
    assert sorted(folder.iterdir()) == before


def test_the_file_says_store_and_encoder(folder: Path) -> None:
    (folder / "affcache.toml").write_text("store = 'mine.h5'\nmodel = 'ViT-B-32'\npretrained = 'openai'\n")
    call("import", "train.h5", "--list", "train.txt")
    assert EmbeddingStore.open("mine.h5").encoder["said_to_be"] == ["ViT-B-32", "openai"]
    call("export", "--format", "safetensors")
    assert (folder / "mine.safetensors").is_file()
