"""The doctor: each check finds what it is for, and one that fails doesn't hide the others."""

import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from affcache import DoctorResult, DoctorSettings, ExtractSettings, doctor, extract
from affcache.cli.app import app
from affcache.encoders import loading
from affcache.extraction import doctor as doctor_module
from affcache.extraction.doctor import bare_encoder
from affcache.extraction.settings import EncodingSettings
from affcache.extraction.tuning import tune_encoder
from affcache.progress import Listener, duration_text
from tests.conftest import write_crops, write_tiny_encoder


@pytest.fixture
def settings(tmp_path: Path, tiny_encoder: str) -> DoctorSettings:
    crops = write_crops(tmp_path / "crops", {"a": range(1, 31), "b": range(1, 11)})
    return DoctorSettings(crops=(crops,), store=tmp_path / "s.h5", model=tiny_encoder, device="cpu")


def states(result: DoctorResult) -> dict[str, str]:
    return {check.name: check.state for check in result.checks}


def finding(result: DoctorResult, name: str) -> str:
    return next(check.finding for check in result.checks if check.name == name)


def test_a_healthy_machine(settings: DoctorSettings, tmp_path: Path) -> None:
    result = doctor(settings)
    assert result.healthy
    assert "problem" not in states(result).values()
    assert (result.rows, result.pending) == (40, 40)
    assert finding(result, "crops").startswith("40 in 2 videos, listed in ")
    assert finding(result, "decoding").startswith("10 crops read and decoded")
    assert finding(result, "store") == f"{tmp_path / 's.h5'} is not there yet; it will be made"
    assert "D = 24, " in finding(result, "model")
    assert finding(result, "disk").startswith("the store takes 0.00 GB, ")
    assert "for 40 crops at " in finding(result, "duration")
    assert result.projected_seconds is not None
    assert 0 < result.projected_seconds < 60
    assert list(tmp_path.glob("s.h5*")) == []  # nothing is written
    assert result.to_json()["healthy"] is True


def test_the_bare_encoder_of_a_compiled_one(tiny_encoder: str) -> None:
    settings = EncodingSettings(model=tiny_encoder, device="cpu", batch_size=4)
    encoder = tune_encoder(loading.load_weights(tiny_encoder), settings, {}, Listener())
    calls: list[tuple[int, ...]] = []
    encoder.network.register_forward_pre_hook(lambda _, inputs: calls.append(tuple(inputs[0].shape)))
    compiled = replace(encoder, compiled=torch.compile(encoder.network, backend="eager"))  # has no truth value
    bare_encoder(compiled)(3)
    assert len(calls) == 5  # two to warm up
    assert {shape[0] for shape in calls} == {4}


def test_every_check_says_what_is_wrong(settings: DoctorSettings, tmp_path: Path) -> None:
    result = doctor(settings, crops=(tmp_path / "none",), model="ViT-B-33", device="cuda:7")
    assert not result.healthy
    problems = {name for name, state in states(result).items() if state == "problem"}
    assert problems == {"crops", "model", "device"}
    assert "does not exist or is not a folder" in finding(result, "crops")
    assert "did you mean" in finding(result, "model")
    assert "--device cuda:7 is not there" in finding(result, "device")
    assert {"environment", "precision", "store"} <= states(result).keys()
    assert result.projected_seconds is None


def test_crops_that_can_not_be_read(settings: DoctorSettings, tmp_path: Path) -> None:
    (tmp_path / "crops" / "a" / "00001.jpg").write_bytes(b"")
    result = doctor(settings)
    assert states(result)["decoding"] == "warning"
    assert f"1 of 10 crops can't be read, such as {tmp_path / 'crops' / 'a' / '00001.jpg'}" in finding(
        result, "decoding"
    )
    for path in (tmp_path / "crops").rglob("*.jpg"):
        path.write_bytes(b"")
    assert states(doctor(settings))["decoding"] == "problem"


def test_a_store_that_is_half_done(settings: DoctorSettings, tmp_path: Path) -> None:
    fields = {name: value for name, value in vars(settings).items() if name not in ("store", "detector")}
    extract(ExtractSettings(**fields, store=tmp_path / "s.h5"), precision="fp16", batch_size=3)
    result = doctor(settings)
    assert result.pending == 0
    assert result.projected_seconds == 0
    assert "0 of 40 rows are still to be encoded" in finding(result, "store")
    assert "fp16, 3 crops a call" in finding(result, "model").replace(" (the store was begun in it)", "")
    assert finding(result, "agreement").startswith("fp16 agrees with fp32 to a cosine of ")
    assert "disk" not in states(result)


def test_it_says_why_a_faster_format_is_not_taken(settings: DoctorSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (doctor_module, loading):
        monkeypatch.setattr(module, "fast_precisions", lambda device: ("bf16",))
    monkeypatch.setattr(loading, "smallest_cosine", lambda *_: 0.9)
    assert "fp32 (bf16 disagrees: a cosine below 0.999 to fp32 on " in finding(doctor(settings), "model")
    fields = {name: value for name, value in vars(settings).items() if name != "detector"}
    extract(ExtractSettings(**fields), precision="fp32")
    assert "fp32 (the store was begun in it), 16 crops" in finding(doctor(settings), "model")


def test_a_disk_that_is_too_small(settings: DoctorSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 100, 100))
    result = doctor(settings)
    assert states(result)["disk"] == "problem"
    assert "Expected room for all of it" in finding(result, "disk")


def test_a_store_that_is_none(settings: DoctorSettings, tmp_path: Path) -> None:
    (tmp_path / "s.h5").write_bytes(b"no store")
    result = doctor(settings)
    assert states(result)["store"] == "problem"
    assert states(result)["crops"] == "ok"


def test_the_command_and_its_exit_code(
    settings: DoctorSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # the engine, of which the doctor knows nothing, is not its business
    (tmp_path / "affcache.toml").write_text(
        f'[extract]\nengine = "ray"\nactors = 2\ncrops = ["crops"]\nmodel = "{settings.model}"\n'
    )
    result = CliRunner().invoke(app, ["doctor", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "40 in 2 videos" in result.stdout
    assert "next: affcache extract, with the same flags" in result.stdout
    result = CliRunner().invoke(app, ["doctor", "--device", "cpu", "--crops", "none", "--json"])
    assert result.exit_code == 2
    assert json.loads(result.stdout)["healthy"] is False


def test_precisions_are_compared(settings: DoctorSettings, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    result = doctor(settings, model=write_tiny_encoder(tmp_path / "other", seed=3), precision="bf16")
    assert finding(result, "agreement").startswith("bf16 agrees with fp32 to a cosine of 0.99")
    assert "agreement" not in states(doctor(settings, precision="fp32"))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (1.24, "1.2 s"),
        (9.96, "10 s"),
        (40.4, "40 s"),
        (119, "119 s"),
        (150, "2 min"),
        (7_300, "2.0 h"),
        (200_000, "2.3 days"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_a_place_where_no_store_can_be(settings: DoctorSettings, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = doctor(settings, store=tmp_path / "file" / "s.h5")
    assert states(result)["store"] == "problem"
    assert f"{tmp_path / 'file'} takes no new files" in finding(result, "store")
