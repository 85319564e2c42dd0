"""The command line: its help, bare commands with the data at the default places, tables, JSON, and exit codes."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

import affcache
from affcache.cli.app import app
from affcache.cli.console import ConsoleListener, interrupted, out, rate_text, run
from affcache.cli.show import fact_table
from affcache.commands import SETTINGS
from affcache.settings import flag
from affcache.store.writing import create_store
from affcache.tasks.tasks import TASKS
from tests.conftest import NAMED_ONLY, MakeData, crop_list, write_labels, write_store


def leaves() -> dict[str, Any]:
    """Every command by its whole name, groups opened."""
    found: dict[str, Any] = {}
    for name, command in typer.main.get_command(app).commands.items():
        inner = getattr(command, "commands", None)
        found |= {f"{name} {sub}": leaf for sub, leaf in inner.items()} if inner else {name: command}
    return found


NAMES = sorted(leaves())


def call(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def json_of(result: Result) -> dict[str, Any]:
    """Standard output as one JSON object and nothing else."""
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    assert len(result.stdout.splitlines()) == 1
    return found


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with data where the bare commands look for it, and an affcache.toml for short runs."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    random = np.random.default_rng(0)
    videos = {f"video{index}": range(1, 31) for index in range(4)}
    classes = random.integers(0, 7, 120)  # never Other
    patterns = random.normal(size=(8, 16))
    features = patterns[classes] + random.normal(scale=0.3, size=(120, 16))
    store = folder / "data/features/ViT-L-14-openai.h5"
    store.parent.mkdir(parents=True)
    write_store(store, videos, features.astype(np.float16))
    for index, video in enumerate(videos):
        split = "validation" if index == 3 else "train"
        labels = {video: classes[index * 30 : (index + 1) * 30]}
        write_labels(folder / "data/Aff-Wild2/annotations", "expr", split, labels)
    (folder / "affcache.toml").write_text("[fit]\nepochs = 2\nhidden_width = 16\nhidden_layers = 1\n")
    return folder


# Help


def test_all_commands_are_there_and_the_bare_command_shows_them() -> None:
    assert {"extract", "fit", "score", "info", "verify", "demo"} <= set(NAMES)
    assert set(SETTINGS) <= set(NAMES)
    shown = CliRunner().invoke(app, []).output
    assert all(name.split()[0] in shown for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_help_ends_with_two_examples_that_parse(name: str) -> None:
    lines = call(*name.split(), "--help").stdout.rstrip().splitlines()
    assert lines[-3:-2] == [""]
    assert lines[-4].strip() == "Examples:"
    command, depth = leaves()[name], len(name.split())
    for line in lines[-2:]:
        words = line.split()
        assert words[: depth + 1] == ["affcache", *name.split()]
        command.make_context(name, words[depth + 1 :])  # raises on a flag that isn't there


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_help_names_every_setting_with_its_sentence_and_default(name: str) -> None:
    def squeezed(text: str) -> str:  # lines are broken at spaces and after hyphens
        return "".join(text.split())

    shown = squeezed(call(*name.split(), "--help").stdout)
    for declared in dataclasses.fields(SETTINGS[name]):
        positional = (name, declared.name) in {
            ("score", "run"), ("report", "run"), ("submit", "run"), ("import", "sources"), ("export", "store"),
            ("publish", "run"), ("faces", "inputs"), ("predict", "inputs"), ("encoders", "word"),
        }  # fmt: skip
        assert (f"[{declared.name.upper()}]" if positional else flag(declared.name)) in shown
        assert squeezed(declared.metadata["help"]) in shown
        if declared.metadata["default_text"]:
            assert squeezed(f"[default: {declared.metadata['default_text']}]") in shown
    assert "--json" in shown


def test_version() -> None:
    assert call("--version").stdout == f"affcache {affcache.__version__}\n"


@pytest.mark.parametrize(
    "arguments", [["fits"], ["fit", "--epoch", "3"], ["fit", "--epochs", "many"], ["info", "a", "b"]]
)
def test_what_cannot_be_parsed_exits_2(arguments: list[str]) -> None:
    result = call(*arguments, code=2)
    assert "Usage: affcache" in result.stderr


# Bare commands


def test_bare_fit_and_score_work_with_the_data_at_the_default_places(workplace: Path) -> None:
    fitted = call("fit")
    (run,) = (workplace / "runs").iterdir()
    assert re.fullmatch(r"expr-\d{8}-\d{6}", run.name)
    assert f"next: affcache score runs/{run.name}" in fitted.stdout
    assert "best" in fitted.stdout
    assert "of 2" in fitted.stdout, "the epochs of affcache.toml"
    assert "train: 90 frames of 3 videos" in fitted.stderr
    scored = call("score")
    assert (run / "scores.json").is_file()
    assert (run / "predictions.h5").is_file()
    for name in TASKS["expr"].classes:
        assert name in scored.stdout
    assert "macro F1" in scored.stdout
    assert "No validation frame is labelled Other" in scored.stderr
    value = json.loads((run / "scores.json").read_text())["value"]
    assert f"{value:.3f}" in scored.stdout


def test_a_bare_fit_in_a_folder_below_finds_the_file_above(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (workplace / "affcache.toml").write_text(
        "annotations = 'data/Aff-Wild2/annotations'\nstore = 'data/features/ViT-L-14-openai.h5'\n"
        "[fit]\nepochs = 1\nhidden_width = 16\nrun = 'runs/above'\n"
    )
    below = workplace / "notes"
    below.mkdir()
    monkeypatch.chdir(below)
    call("fit")
    assert (workplace / "runs" / "above" / "head.safetensors").is_file()


def test_fit_reads_the_store_that_extract_would_write(workplace: Path) -> None:
    (workplace / "data/features/ViT-L-14-openai.h5").rename(workplace / "data/features/ViT-B-32-openai.h5")
    words = "model = 'ViT-B-32'\n[fit]\nepochs = 1\nhidden_width = 8\nrun = 'runs/b'\n"
    (workplace / "affcache.toml").write_text(words)
    assert "the only one there" not in call("fit").stderr
    config = json.loads((workplace / "runs/b/config.json").read_text())
    assert Path(config["store"]["path"]).name == "ViT-B-32-openai.h5"


def test_the_only_store_there_is_taken_and_said_and_of_several_none(workplace: Path) -> None:
    features = workplace / "data/features"
    (features / "ViT-L-14-openai.h5").rename(features / "ViT-B-32-openai.h5")
    (features / "another.flip.h5").touch()
    said = "store: data/features/ViT-B-32-openai.h5, the only one there; ViT-L-14-openai.h5 isn't"
    commands = (
        ["fit"],
        ["info"],
        ["verify"],
        ["export"],
        ["ablate", "--vary", "rho=0,0.1", "--seeds", "1", "--epochs", "1"],
    )
    for words in commands:
        assert said in call(*words).stderr, words
    assert affcache.fit(run="runs/python", epochs=1, hidden_width=8).frames == 90
    (features / "more.h5").touch()
    for words in commands:
        message = call(*words, code=2).stderr
        assert "There is no data/features/ViT-L-14-openai.h5, but data/features/ViT-B-32-openai.h5, " in message
        assert "data/features/more.h5. Expected one. Say which: --store FILE, or for info, " in message
    assert "no embedding store at none.h5" in call("fit", "--store", "none.h5", code=2).stderr


def test_a_flag_wins_over_the_file(workplace: Path) -> None:
    found = json_of(call("fit", "--json", "--epochs", "1", "--run", "runs/x"))
    assert found["epochs"] == 1
    config = json.loads(Path("runs/x/config.json").read_text())
    assert config["settings"]["hidden_width"] == 16


@pytest.mark.parametrize("command", ["fit", "score", "extract"])
def test_with_nothing_there_it_says_where_it_looked_and_two_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call(command, code=2)
    where, ways = {
        "fit": ("data/features/ViT-L-14-openai.h5", ("--store", "store = ")),
        "score": (str(tmp_path / "runs"), ("affcache fit --task expr", "name a run folder")),
        "extract": ("data/Aff-Wild2/cropped_aligned", ("--crops", "crops = ")),
    }[command]
    assert result.stderr.startswith("Error: ")
    assert where in result.stderr
    assert all(way in result.stderr for way in ways)
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_without_labels_it_says_where_it_looked_and_two_ways(workplace: Path) -> None:
    (workplace / "data/Aff-Wild2/annotations").rename(workplace / "elsewhere")
    message = call("fit", code=2).stderr
    assert "data/Aff-Wild2/annotations/EXPR_Recognition_Challenge/Train_Set" in message
    assert "--annotations DIR" in message
    assert 'annotations = "..." in affcache.toml' in message
    call("fit", "--annotations", "elsewhere", "--epochs", "1")


# JSON and tables


def test_json_is_one_object_with_the_designed_keys(workplace: Path) -> None:
    fitted = json_of(call("fit", "--json", "--run", "runs/a"))
    assert fitted.keys() >= {"run", "task", "metric", "value", "best_epoch", "epochs", "seconds", "device"}
    scored = json_of(call("score", "runs/a", "--json"))
    assert scored.keys() >= {"task", "split", "metric", "value", "classes"}
    assert (scored["task"], scored["split"], scored["metric"]) == ("expr", "validation", "macro_f1")
    assert scored["value"] == fitted["value"]
    assert [c["name"] for c in scored["classes"]] == list(TASKS["expr"].classes)
    assert scored == json.loads(Path("runs/a/scores.json").read_text())
    train = json_of(call("score", "runs/a", "--split", "train", "--json"))
    assert (train["split"], train["frames"]) == ("train", 90)


def test_an_error_with_json_is_one_object_too(workplace: Path) -> None:
    result = call("fit", "--task", "exp", "--json", code=2)
    found = json_of(result)
    assert found["error"] == "ConfigError"
    assert "did you mean 'expr'" in found["message"]
    assert found["message"] in result.stderr


def test_every_action_unit_stands_in_the_table(learnable: MakeData, tmp_path: Path) -> None:
    store, annotations = learnable("au", videos=10)
    flags = ("--store", store, "--annotations", annotations, "--epochs", 1, "--hidden-width", 8)
    call("fit", "--task", "au", "--run", tmp_path / "run", *flags)
    rows = [line.split() for line in call("score", tmp_path / "run").stdout.splitlines()]
    names = [row[0] for row in rows if row and re.fullmatch(r"AU\d+", row[0])]
    assert names == list(TASKS["au"].classes)
    assert max(len(row) for row in rows if row and row[0] in names) == 8, "three scores, the range of F1, support"


def test_info_and_verify(workplace: Path) -> None:
    store = "data/features/ViT-L-14-openai.h5"
    found = json_of(call("info", store, "--json"))
    assert (found["rows"], found["videos"], found["width"], found["complete"]) == (120, 4, 16, True)
    assert "made-up" in call("info", store).stdout
    assert json_of(call("verify", store, "--json"))["sound"] is True
    assert "is sound: 120 rows" in call("verify", store).stdout
    assert "no embedding store at none.h5" in call("verify", "none.h5", code=2).stderr


def test_verify_refuses_a_store_in_the_making(tmp_path: Path) -> None:
    create_store(tmp_path / "x.h5", crop_list({"a": [1, 2]}), 4, {"model": "made-up"}, NAMED_ONLY)
    assert "2 of 2 rows are still to be encoded" in call("verify", tmp_path / "x.h5", code=2).stderr


def test_names_with_brackets_and_colons_are_shown_as_they_are(workplace: Path) -> None:
    run = "runs/[bold]a [/x] :smile:"
    fitted = call("fit", "--run", run)
    assert f"next: affcache score {run}" in fitted.stdout
    assert run in call("score", run).stdout
    assert f"{run} already holds something" in call("fit", "--run", run, code=2).stderr


def test_facts_keep_their_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    out(fact_table({"a": "[red]x", "b": 3}), "[/z]")
    assert capsys.readouterr().out.split() == ["a", "[red]x", "b", "3", "[/z]"]


# Exit codes and what is said on the way


def test_interrupted_exits_130_and_resume_finishes(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    show = ConsoleListener.progress

    def interrupt(self: ConsoleListener, done: int, total: int, unit: str, note: str = "") -> None:
        show(self, done, total, unit, note)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ConsoleListener, "progress", interrupt)
        result = call("fit", "--run", "runs/a", code=130)
    kept = "1 epoch of 2 kept in runs/a; this continues: affcache fit --run runs/a --resume"
    assert f"Interrupted: {kept}" in result.stderr
    (workplace / "affcache.toml").write_text("[fit]\nepochs = 9\nstore = 'elsewhere.h5'\n")  # the folder knows the rest
    assert json_of(call("fit", "--run", "runs/a", "--resume", "--json"))["epochs"] == 2
    assert "--epochs 2 then, 3 now" in call("fit", "--run", "runs/a", "--resume", "--epochs", "3", code=2).stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [("extract", "this continues: affcache extract --store 'a b.h5'"), ("score", "the same command begins anew")],
)
def test_what_continues_an_interrupted_command_is_said(
    monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["affcache", name, "--store", "a b.h5"])
    assert interrupted(name, "").endswith(message)


def test_a_bug_shows_its_traceback(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: ConsoleListener, text: str) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(ConsoleListener, "message", broken)
    result = CliRunner().invoke(app, ["fit"])
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


def test_progress_without_a_terminal_is_the_last_line_of_each_work(workplace: Path) -> None:
    assert "2 of 2 epochs  macro_f1 0." in call("fit").stderr


def test_lines_of_a_log_have_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = iter([100.0, 110.0, 140.0, 150.0])
    monkeypatch.setattr("affcache.cli.console.time.monotonic", lambda: next(now))
    listener = ConsoleListener()
    for done in (50, 60, 90, 130):  # 50 were there when it began
        listener.progress(done, 130, "crop", "note")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "50 of 130 crops  note",
        "90 of 130 crops, 1.0 crops/s, 40 s left  note",
        "130 of 130 crops  note",
    ]


def test_the_bar_moves_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    with ConsoleListener() as listener:
        for done in (1, 2, 3):
            listener.progress(done, 3, "epoch", "macro_f1 [0.5]")
        listener.warning("[few] frames")
    shown = capsys.readouterr().err
    assert "3/3" in shown
    assert "macro_f1 [0.5]" in shown
    assert "[few] frames" in shown


@pytest.mark.parametrize(
    ("speed", "text"),
    [
        (None, ""),
        (0, ""),
        (57.34, "57.3 crops/s"),
        (1, "1.0 crops/s"),
        (0.25, "4.0 s/crop"),
        (12345.6, "12,345.6 crops/s"),
    ],
)
def test_rates_read_well(speed: float | None, text: str) -> None:
    assert rate_text(speed, "crop") == text


@pytest.mark.parametrize("words", [["extract", "--bogus"], ["fit", "--epochs", "abc"], ["nothing"]])
def test_words_that_cannot_be_parsed_give_json_when_asked(words: list[str]) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "affcache.cli", *words, "--json"], capture_output=True, text=True, check=False
    )
    assert process.returncode == 2
    found = json.loads(process.stdout)
    assert (found["error"], process.stdout.count("\n")) == ("UsageError", 1)
    assert "Usage: affcache" in process.stderr
    assert found["message"] in process.stderr


def test_json_of_a_command_that_succeeds_is_alone(tmp_path: Path) -> None:
    write_store(tmp_path / "s.h5", {"a": [1, 2]}, np.ones((2, 3), np.float16))
    for command, code in (("verify", 0), ("info", 0), ("fit", 2)):
        words = [command, *(["--store"] if command == "fit" else []), str(tmp_path / "s.h5"), "--json"]
        process = subprocess.run(
            [sys.executable, "-m", "affcache.cli", *words], capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert process.returncode == code
        assert len(process.stdout.splitlines()) == 1
        json.loads(process.stdout)


def test_what_a_library_prints_does_not_reach_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    """Ray prints what it has to say of lost workers."""

    def work(listener: Any) -> dict[str, int]:
        print("a worker died")
        return {"rows": 1}

    run("fit", True, work, lambda result: None)
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"rows": 1}
    assert "a worker died" in printed.err


def test_ablate_shows_a_table_and_what_is_next(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    (workplace / "affcache.toml").write_text("[ablate]\nepochs = 2\nhidden_width = 16\nhidden_layers = 1\nseeds = 2\n")
    shown = call("ablate", "--vary", "alpha=0.3,1", "--vary", "lr=0.001,1e30")
    lines = shown.stdout.splitlines()
    assert any(re.search(r"alpha=0.3, lr=0.001 +2 +0\.\d{3} +0\.\d{3} +base", line) for line in lines), shown.stdout
    assert any(re.search(r"alpha=1, lr=0.001 +2 .*[+-]0\.\d{3} +$", line) for line in lines), "of one video no interval"
    assert any(re.search(r"alpha=1, lr=1e\+30 +0 \(2 diverged\)", line) for line in lines)
    assert "validation itself, which flatters" in shown.stdout
    assert lines[-1].startswith("next: affcache score ablations/expr-alpha-lr/cells/")
    call("score", lines[-1].split()[-1])
    assert "8 heads" in shown.stderr
    found = json_of(call("ablate", "--vary", "alpha=0.3,1", "--select", "heldout", "--keep", "none", "--json"))
    assert (found["trained"], found["select"]) == (4, "heldout")
    assert "--alpha" in found["best"][0]["fit"]
    again = call("ablate", "--vary", "alpha=0.3,1", "--select", "heldout", "--keep", "none")
    assert "held-out training videos" in again.stdout
    best = found["best"][0]
    assert f"{best['value']:.3f} on validation ({best['selected']:.3f} where it was chosen)" in again.stdout
    assert again.stdout.splitlines()[-1] == f"next: {found['best'][0]['fit']}"


def test_ablate_names_what_is_wrong(workplace: Path) -> None:
    assert "did you mean 'alpha'" in call("ablate", "--vary", "alpa=1", code=2).stderr
    found = json_of(call("ablate", "--json", code=2))
    assert found["error"] == "ConfigError"
    assert "Nothing is varied" in found["message"]
    (workplace / "affcache.toml").write_text('[ablate]\nvary = ["alpha=0.5,1"]\nalpa = 1\n')
    assert "unknown key 'alpa' in [ablate] (did you mean 'alpha'?)" in call("ablate", code=2).stderr


def test_a_file_of_settings_above_the_working_folder_is_said(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (workplace / "inner").mkdir()
    monkeypatch.chdir(workplace / "inner")
    store = workplace / "data/features/ViT-L-14-openai.h5"
    said = f"settings from {workplace / 'affcache.toml'}\n"
    assert CliRunner().invoke(app, ["info", str(store)]).stderr == said
    monkeypatch.chdir(workplace)
    assert CliRunner().invoke(app, ["info", str(store)]).stderr == ""


def test_a_working_folder_that_was_deleted_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    result = CliRunner().invoke(app, ["fit"])
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: The working folder doesn't exist any more.")
