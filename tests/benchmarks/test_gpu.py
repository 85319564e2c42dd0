"""The measurements of a GPU, rehearsed at toy sizes on a CPU: none is lost, whatever becomes of the others."""

import json
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from affcache.errors import AffcacheError, ConfigError
from affcache.progress import Listener
from benchmarks import gpu, gpu_parts
from benchmarks.__main__ import app
from benchmarks.gpu import PARTS, OverBudget, Part, at_most, attempt, bench_gpu
from benchmarks.gpu_parts import FULL, ROOT, TESTS, TOY, Bench, Found, SkippedPartError
from benchmarks.settings import BenchGpuSettings
from tests.conftest import Heard

THREE_TESTS = """
import pytest, warnings

def test_that_passes(): warnings.warn("another version of torch")
def test_that_fails(): assert False
@pytest.mark.skip
def test_that_is_skipped(): pass
"""


@pytest.fixture
def three_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the tests of recorded steps, whose start takes a while."""
    (tmp_path / "test_three.py").write_text(THREE_TESTS)
    monkeypatch.setattr(gpu_parts, "TESTS", str(tmp_path / "test_three.py"))


def with_parts(monkeypatch: pytest.MonkeyPatch, **parts: Callable[[Bench, Listener], Found]) -> None:
    """Put other parts in place of the real ones."""
    monkeypatch.setattr(gpu, "PARTS", {name: Part(measure, 0) for name, measure in parts.items()})


def works(bench: Bench, listener: Listener) -> Found:
    return Found({"rate": 1.0, "bare": 2.0, "ratio": 0.5, "unit": "crops/s"}, "well")


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread", "three_tests")
def test_every_part_runs_at_toy_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda network, dynamic: network)  # it takes a minute on a CPU
    out = tmp_path / "gpu.json"
    shown = CliRunner().invoke(app, ["gpu", "--device", "cpu", "--out", str(out)])
    assert shown.exit_code == 0, shown.output
    found = json.loads(out.read_text())
    parts = found["parts"]
    assert {name: part["reason"] for name, part in parts.items() if part["state"] != "measured"} == {
        "recording": "steps are recorded on a GPU alone"
    }
    assert list(parts) == list(PARTS)
    assert parts["tests"]["result"] == {"passed": 1, "failed": 1, "skipped": 1, "names": ["test_that_fails"]}
    for name in parts.keys() - {"tests", "recording"}:
        assert {"rate", "bare", "ratio", "unit"} <= parts[name]["result"].keys(), name
        assert parts[name]["note"]
    assert [found[key] for key in ("rate", "bare", "ratio", "unit")] == [
        parts["extract"]["result"][key] for key in ("rate", "bare", "ratio", "unit")
    ]
    assert (found["device"], found["toy"], found["gpu"], found["torch"]) == ("cpu", True, None, torch.__version__)
    assert found["date"]
    assert found["seconds"] >= sum(part["seconds"] for part in parts.values())
    assert parts["extract-one-worker"]["result"]["workers"] == 1
    assert parts["extract-fp32"]["result"]["precision"] == "fp32"
    assert parts["extract-fp32"]["result"]["bf16_cosine"] > 0.99
    assert parts["extract-compiled"]["result"]["compiled"]
    assert parts["extract"]["result"]["compiled"] is False
    assert parts["epoch"]["result"]["frames"] == TOY.frames
    assert parts["step-bf16"]["result"]["precision"] == parts["heads-bf16"]["result"]["precision"] == "bf16"
    assert all(name in shown.stdout for name in PARTS)
    assert "toy sizes" in shown.stdout
    assert "1 passed, 1 failed, 1 skipped; test_that_fails" in shown.stdout


def test_the_sizes_are_the_paper_s_on_a_gpu_and_fit_the_time() -> None:
    assert (FULL.frames, FULL.validation_frames, FULL.width, FULL.heads[-1]) == (585_317, 280_532, 768, 64)
    budget = BenchGpuSettings().budget
    assert sum(part.seconds for part in PARTS.values()) <= budget <= 7 * 60 - 30  # torch takes a while to start
    assert (ROOT / TESTS).is_file()


def test_what_is_measured_is_written_after_each_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, seen = tmp_path / "gpu.json", []

    def looks(bench: Bench, listener: Listener) -> Found:
        seen.append(json.loads(out.read_text())["parts"])
        raise KeyboardInterrupt

    with_parts(monkeypatch, first=works, second=looks)
    with pytest.raises(KeyboardInterrupt):
        bench_gpu(device="cpu", out=out)
    assert {name: part["state"] for name, part in seen[0].items()} == {"first": "measured"}
    assert json.loads(out.read_text())["parts"] == seen[0]


def test_a_part_that_fails_is_noted_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(bench: Bench, listener: Listener) -> Found:
        listener.warning("it looks bad")
        raise RuntimeError("no compiler\nat all")

    def endless(bench: Bench, listener: Listener) -> Found:
        bench.deadline = time.perf_counter()
        try:
            signal.raise_signal(signal.SIGALRM)  # as the timer does
        except Exception:  # torch.compile's caller takes any of these for a failure to compile
            pytest.fail("went on")
        return works(bench, listener)

    with_parts(monkeypatch, bad=fails, extract=works, endless=endless, late=works)
    heard = Heard()
    result = bench_gpu(device="cpu", out=tmp_path / "gpu.json", listener=heard)
    bad, extract, stopped, late = result.parts.values()
    assert (bad.state, bad.reason, bad.warnings) == ("failed", "RuntimeError: no compiler\nat all", ["it looks bad"])
    assert (extract.state, extract.note, result.ratio) == ("measured", "well", 0.5)
    assert (stopped.state, stopped.reason) == ("stopped", "it went on when the budget was used up")
    assert (late.state, late.reason) == ("skipped", "takes about 0 s, 0 s of the budget are left")
    assert heard.warnings == ["it looks bad"]
    assert re.fullmatch(r"bad: failed, [\d.]+ s; RuntimeError: no compiler", heard.messages[0])
    assert json.loads((tmp_path / "gpu.json").read_text()) == json.loads(json.dumps(result.to_json()))


def test_a_part_is_not_begun_without_the_time_it_takes() -> None:
    bench = Bench(torch.device("cpu"), TOY, deadline=time.perf_counter() + 100)
    assert attempt(Part(works, 0), bench, Heard(), expected=90).state == "measured"
    outcome = attempt(Part(works, 0), bench, Heard(), expected=200)
    assert outcome.state == "skipped"
    assert outcome.reason.startswith("takes about 200 s, ")


def test_an_epoch_is_not_begun_where_its_steps_say_that_it_takes_too_long() -> None:
    with pytest.raises(SkippedPartError, match=r"an epoch takes \d+ s, -\d+ s of the budget are left"):
        gpu_parts.epoch(Bench(torch.device("cpu"), TOY, deadline=time.perf_counter() - 10), Heard())


def test_nothing_measured_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "gpu.json"
    with pytest.raises(AffcacheError, match=r"Nothing could be measured\. Of the first part, tests: skipped, 0\.0 s"):
        bench_gpu(device="cpu", out=out, budget=1e-9)
    assert {part["state"] for part in json.loads(out.read_text())["parts"].values()} == {"skipped"}


def test_parts_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_parts(monkeypatch, one=works, two=works, three=works)
    assert list(bench_gpu(device="cpu", out=tmp_path / "gpu.json", parts=("three", "one")).parts) == ["one", "three"]
    with pytest.raises(ConfigError, match=r"Unknown part 'tow' \(did you mean 'two'\?\)\. Expected --parts to be of"):
        bench_gpu(device="cpu", out=tmp_path / "gpu.json", parts=("tow",))
    with pytest.raises(ConfigError, match=r"--budget is 0; expected more than 0\.\n--out is .*, in a folder that"):
        BenchGpuSettings(budget=0, out=tmp_path / "nowhere" / "gpu.json")


def test_an_encoder_that_cannot_be_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda network, dynamic: lambda pixels: pixels[0, 0, 0, :0].item())
    with pytest.raises(AffcacheError, match="the encoder could not be compiled; see the warnings"):
        bench_gpu(device="cpu", out=tmp_path / "gpu.json", parts=("extract-compiled",))
    (part,) = json.loads((tmp_path / "gpu.json").read_text())["parts"].values()
    assert part["warnings"][0].startswith("torch.compile failed (RuntimeError: ")


def test_tests_that_cannot_be_run_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.CompletedProcess([], 4, stdout="", stderr="ERROR: file or directory not found")
    monkeypatch.setattr(subprocess, "run", lambda *words, **how: ended)
    with pytest.raises(RuntimeError, match=r"test_cuda_graph\.py ended with 4: ERROR: file or directory not found"):
        gpu_parts.recorded_step_tests(Bench(torch.device("cpu"), TOY), Heard())


def test_a_timer_that_runs_out_stops_the_work() -> None:
    with pytest.raises(OverBudget), at_most(0.01):
        threading.Event().wait()  # for nothing


def test_the_timer_leaves_things_as_they_were() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with at_most(100):
        assert signal.getsignal(signal.SIGALRM) is not before
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    states = []

    def elsewhere() -> None:  # a thread can't have a timer, and does without
        with at_most(100):
            states.append(signal.getsignal(signal.SIGALRM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert states == [before]


def test_ratios_are_taken_round_by_round() -> None:
    found = gpu_parts.against([1.0, 4.0, 9.0], [2.0, 2.0, 3.0], "ms a step")
    assert (found["rate"], found["bare"], found["ratio"], found["unit"]) == (4.0, 2.0, 2.0, "ms a step")
