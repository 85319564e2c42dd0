"""The benchmarks give what docs promise; how fast anything is, is no matter of tests."""

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from affcache.crops.folders import find_crops
from affcache.errors import ConfigError
from affcache.settings import flag
from affcache.training.settings import FitSettings
from benchmarks.__main__ import BENCHMARKS, NAME, app
from benchmarks.ablate import bench_ablate
from benchmarks.extract import bench_extract, repeated
from benchmarks.fit import bare_products, bench_fit, products_needed
from benchmarks.predict import bench_predict
from benchmarks.settings import BenchExtractSettings, BenchFitSettings, BenchStoreSettings
from benchmarks.store import bench_store
from tests.conftest import write_crops
from tests.faces.clips import moving, write_clip
from tests.faces.conftest import square_faces  # noqa: F401  # a fixture


def test_predict(
    tiny_encoder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    square_faces: None,  # noqa: F811
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    clip = write_clip(tmp_path / "clip.mp4", moving(20))
    result = bench_predict(video=clip, model=tiny_encoder, pretrained="", rounds=3, times=2, workers=2, device="cpu")
    assert (result.frames, result.faces) == (40, 40)
    assert len(result.rates) == len(result.detectings) == len(result.encodings) == 3
    halves = list(zip(result.rates, result.detectings, result.encodings, strict=True))
    assert result.rate == sorted(result.rates)[1]
    assert result.ratio == sorted(rate / min(d, e) for rate, d, e in halves)[1]
    assert result.bare == min(result.detecting, result.encoding)
    with pytest.raises(ConfigError, match="--video FILE"):
        bench_predict(model=tiny_encoder, pretrained="")


def test_extract(tiny_encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    result = bench_extract(model=tiny_encoder, pretrained="", seconds=0.05, rounds=3, batch_size=8, device="cpu")
    assert len(result.rates) == len(result.bares) == 3
    assert result.rate == sorted(result.rates)[1]
    assert result.bare == sorted(result.bares)[1]
    assert result.ratio == sorted(a / b for a, b in zip(result.rates, result.bares, strict=True))[1]
    assert result.crops % 8 == 0
    assert result.crops >= 16
    assert sum(result.shares.values()) == pytest.approx(1)
    assert result.bottleneck
    assert (result.unit, result.batch_size, result.device, result.compiled) == ("crops/s", 8, "cpu", False)
    assert {"processor", "cores", "torch", "date"} <= result.machine.keys()
    assert list(tmp_path.iterdir()) == []  # the stores are gone


def test_extract_with_a_network_of_timm() -> None:
    words = {"model": "timm:test_vit", "image_size": 32, "seconds": 0.05, "rounds": 1, "batch_size": 8, "device": "cpu"}
    result = bench_extract(**words)
    assert (result.model, result.batch_size) == ("timm:test_vit", 8)
    assert result.ratio == result.rate / result.bare


def test_a_list_can_be_made_longer(tmp_path: Path) -> None:
    root = write_crops(tmp_path / "crops", {"a": [1, 2], "b": [5]})
    (root / "b" / "00005.jpg").rename(root / "b" / "face_5.jpg")
    found = find_crops([root])
    longer = repeated(found, 7)
    assert len(longer) == 7
    assert longer.video_start.tolist() == [0, 2, 3, 5, 6, 7]
    assert len(set(longer.video_names)) == 5
    assert [longer.path(row) for row in range(7)] == [found.path(row % 3) for row in range(7)]
    np.testing.assert_array_equal(repeated(found, 2).frame_number, [1, 2])


def test_store(tmp_path: Path) -> None:
    result = bench_store(rows=9_000, width=16, reads=3, folder=tmp_path)
    layouts = {"HDF5, chunks of 4,096 rows", "HDF5, chunks of 16 rows"}
    assert set(result.random) == set(result.sequential) == {"store", "numpy.memmap", *layouts}
    assert set(result.write) == {"store", "plain file", *layouts}
    for measured in (result.random, result.sequential, result.write):
        assert all(value > 0 for value in measured.values())
    assert result.rate == pytest.approx(4096 / result.random["store"] * 1e3)
    assert list(tmp_path.iterdir()) == []


def test_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    result = bench_fit(rows=100, width=24, batch_size=8, steps=10, rounds=3, device="cpu")
    assert len(result.rates) == len(result.bares) == 3
    assert result.rate == sorted(result.rates)[1]
    assert result.ratio == sorted(a / b for a, b in zip(result.rates, result.bares, strict=True))[1]
    assert result.published is not None
    assert result.speedup is not None
    evaluations = 32 * 280_532 * result.evaluation / 1e6
    assert result.paper_fit == pytest.approx(32 * 73_165 * result.rate / 1e3 + evaluations)
    assert list(tmp_path.iterdir()) == []
    once = bench_fit(rows=100, width=24, batch_size=8, steps=2, rounds=1, device="cpu")
    assert once.published is not None
    assert once.speedup == pytest.approx(once.published / once.rate)
    without = bench_fit(rows=100, width=24, batch_size=8, steps=2, rounds=1, device="cpu", published="off")
    assert without.published is without.speedup is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_bare_products_are_those_that_a_step_needs(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = FitSettings(hidden_layers=3, hidden_width=16, batch_size=4, precision=precision)
    take, made, multiply = bare_products(recipe, 24, torch.device("cpu")), [], torch.mm

    def counted(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        made.append((*left.shape, right.shape[1], left.dtype))
        return multiply(left, right, out=out)

    monkeypatch.setattr(torch, "mm", counted)
    take(2)
    of_weights = torch.bfloat16 if precision == "bf16" else torch.float32
    expected = {
        (4, 24, 16, of_weights): 1,  # the first layer's, once for both passes
        (4, 16, 16, of_weights): 2 * 2 + 2 * 2,  # the other two layers', there and back, in both passes
        (16, 4, 24, torch.float32): 1,  # gradients of weights, in the second pass
        (16, 4, 16, torch.float32): 2,
    }
    assert Counter(made) == {product: 2 * count for product, count in expected.items()}
    assert sum(expected.values()) == products_needed(3)


def test_ablate() -> None:
    result = bench_ablate(rows=100, width=24, batch_size=8, heads=(3, 2), steps=6, rounds=3, device="cpu")
    assert [group.heads for group in result.groups] == [1, 2, 3]
    one, _, most = result.groups
    assert (one.ratio, result.bare) == (1, one.epoch)
    assert result.rate == most.epoch / 3
    assert result.ratio == most.ratio / 3
    assert one.epoch == pytest.approx(73_165 * one.step / 1e3 + 280_532 * one.evaluation / 1e6)
    assert most.step == sorted(most.steps)[1]
    assert len(most.steps) == 3
    with pytest.raises(ConfigError, match="expected numbers of at least 2"):
        bench_ablate(heads=(1,))


def test_the_commands(tmp_path: Path, tiny_encoder: str) -> None:
    words = ["store", "--rows", "5000", "--width", "8", "--reads", "1", "--folder", str(tmp_path)]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.output
    assert "of a plain numpy.memmap's rate" in shown.stdout
    words = ["fit", "--rows", "64", "--width", "8", "--steps", "2", "--rounds", "1"]
    assert "times as long" in CliRunner().invoke(app, words).stdout
    assert "times as long" not in CliRunner().invoke(app, [*words, "--published", "off"]).stdout
    words = ["ablate", "--rows", "64", "--width", "8", "--steps", "2", "--rounds", "1", "--heads", "2"]
    assert "each, of one's" in CliRunner().invoke(app, words).stdout
    assert json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)["groups"][1]["heads"] == 2
    words = ["extract", "--model", tiny_encoder, "--pretrained", "", "--seconds", "0.05", "--rounds", "1"]
    found = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert {"rate", "bare", "ratio", "unit"} <= found.keys()
    assert "bottleneck" in CliRunner().invoke(app, words).stdout


@pytest.mark.parametrize("name", BENCHMARKS)
def test_help_names_every_setting_and_two_examples_that_parse(name: str) -> None:
    shown = CliRunner().invoke(app, [name, "--help"]).stdout
    assert all(flag(declared.name) in shown for declared in dataclasses.fields(BENCHMARKS[name].settings))
    command = typer.main.get_command(app).commands[name]
    for line in shown.rstrip().splitlines()[-2:]:
        start, _, flags = line.strip().partition(f"{NAME} {name}")
        assert start == ""
        command.make_context(name, flags.split())  # raises on a flag that isn't there


def test_the_page_names_every_setting() -> None:
    page = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
    for name, benchmark in BENCHMARKS.items():
        section = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        fields = [flag(declared.name) for declared in dataclasses.fields(benchmark.settings)]
        assert [field for field in fields if f"`{field}" not in section] == []


def test_what_is_out_of_range() -> None:
    with pytest.raises(
        ConfigError, match=r"--rounds is 0; expected at least 1\.\n--seconds is 0; expected more than 0"
    ):
        BenchExtractSettings(rounds=0, seconds=0)
    with pytest.raises(ConfigError, match=r"--rows is 9; expected at least 32"):
        BenchFitSettings(rows=9)
    with pytest.raises(ConfigError, match=r"--rows is 0"):
        BenchStoreSettings(rows=0)


@pytest.mark.cluster
def test_the_driver_of_a_cluster_writes_what_stand_ins_make_up() -> None:
    command = [sys.executable, "-m", "benchmarks.ray_driver", "--rows", "8192", "--actors", "1", "--rounds", "1"]
    done = subprocess.run([*command, "--width", "8"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "store from Ray: " in done.stdout
