"""Wrong labels, runs and settings through the command line: each ends with exit code 2 and says what to do."""

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from affcache.cli.app import app
from affcache.store.reading import EmbeddingStore
from affcache.tasks.tasks import TASKS
from tests.conftest import MakeData, write_labels, write_store

SHORT = ("--epochs", "1", "--hidden-width", "8", "--hidden-layers", "1")


@pytest.fixture
def data(learnable: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A store and labels that fit, in a working folder without an affcache.toml."""
    monkeypatch.chdir(tmp_path)
    return learnable(videos=3, frames=12)


def succeed(*arguments: object) -> None:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output


def refusal(*arguments: object) -> str:
    """Call the command line, which must refuse; return its error message, the last thing that it says."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    _, error, message = f"\n{result.stderr}".partition("\nError: ")
    assert error
    return message


def fit_arguments(data: tuple[Path, Path], run: str = "run", task: str = "expr") -> tuple[object, ...]:
    return ("fit", "--task", task, "--store", data[0], "--annotations", data[1], "--run", run, *SHORT)


def test_labels_of_other_videos_only(data: tuple[Path, Path], tmp_path: Path) -> None:
    for split in ("train", "validation"):
        write_labels(tmp_path / "others", "expr", split, {f"other-{split}": [1, 2, 3]})
    message = refusal(*fit_arguments((data[0], tmp_path / "others")))
    assert f"No train label of task expr belongs to a crop of {data[0]}" in message
    assert "1 label file of videos not in the store (other-train)" in message
    assert "videos like 'other-train', the crops of videos like '0-30-640x360': expected the same names" in message
    assert "Point --store and --annotations at the same data." in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("task", "lines", "problem"),
    [
        ("expr", [TASKS["au"].header, "1"], "line 1: the header is 'AU1,AU2,AU4,"),
        ("expr", [TASKS["expr"].header, "1", "2,3"], "line 3: 2 values in '2,3'. Expected 1 whole numbers from 0 to 7"),
        ("expr", [TASKS["expr"].header, "1", "", "2"], "line 3: no values in ''"),
        ("expr", [TASKS["expr"].header, "x"], "line 2: not a number in 'x'"),
        ("expr", [TASKS["expr"].header, "0", "9"], "line 3: a value out of range in '9'"),
        ("au", [TASKS["au"].header, "0,1"], "line 2: 2 values in '0,1'. Expected 12 whole numbers from 0 to 1"),
    ],
    ids=["header", "count", "blank line", "a letter", "out of range", "count of action units"],
)
def test_a_broken_label_file_is_named_with_its_line(
    learnable: MakeData, data: tuple[Path, Path], task: str, lines: list[str], problem: str
) -> None:
    store, annotations = learnable(task, videos=3, frames=12)
    broken = annotations / TASKS[task].folders[0] / "Train_Set" / "1-30-640x360.txt"
    broken.write_text("\n".join(lines) + "\n")
    message = refusal(*fit_arguments((store, annotations), task=task))
    assert f"{broken}, {problem}" in message
    assert not Path("run").exists()


def test_a_run_whose_store_has_changed(data: tuple[Path, Path]) -> None:
    succeed(*fit_arguments(data))
    store = EmbeddingStore.open(data[0])
    features = (store.features.astype(np.float32) + 1).astype(np.float16)
    listing = {name: range(1, 13) for name in store.video_names}
    data[0].unlink()
    write_store(data[0], listing, features)
    message = refusal("score", "run")
    assert f"The store {data[0]} has changed since run run was trained on it" in message
    assert f"Score on it as it is now with --store {data[0]}, or train again with 'affcache fit'." in message
    resumed = refusal(*fit_arguments(data), "--resume")
    assert "The store of run run has changed" in resumed
    succeed("score", "run", "--store", data[0])


def test_an_unknown_key_in_the_file(data: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "affcache.toml").write_text("[fit]\nepoch = 3\n\n[scor]\nsplit = 'train'\n")
    message = refusal(*fit_arguments(data))
    assert f"{tmp_path / 'affcache.toml'}: unknown key 'epoch' in [fit] (did you mean 'epochs'?)" in message
    assert "unknown table [scor] (did you mean 'score'?)" in message


def test_an_unknown_task(data: tuple[Path, Path]) -> None:
    message = refusal(*fit_arguments(data, task="exprs"))
    assert "--task 'exprs' is unknown (did you mean 'expr'?). Expected one of: expr (Facial expression" in message


def test_several_settings_out_of_range(data: tuple[Path, Path]) -> None:
    message = refusal(*fit_arguments(data), "--alpha", "0", "--rho", "-1", "--normalize", "l1")
    for problem in (
        "--normalize is 'l1'; expected one of none, l2, standard.",
        "--rho is -1.0; expected at least 0 and less than inf.",
        "--alpha is 0.0; expected more than 0 and at most 1.",
    ):
        assert problem in message


def test_a_taken_run_folder(data: tuple[Path, Path]) -> None:
    succeed(*fit_arguments(data))
    before = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    message = refusal(*fit_arguments(data))
    assert "run already holds something. Expected an empty or new folder." in message
    assert "--run run --resume, choose another --run DIR, or delete that folder" in message
    assert {path.name: path.read_bytes() for path in Path("run").iterdir()} == before


def test_a_folder_that_is_no_run(data: tuple[Path, Path]) -> None:
    message = refusal("score", data[1])
    assert f"{data[1]} is no run folder that can be read" in message
    assert "Expected a folder that 'affcache fit' wrote" in message


def test_a_file_that_is_no_store(data: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "text.h5").write_text("not HDF5")
    assert "can't be read as an embedding store" in refusal(*fit_arguments((tmp_path / "text.h5", data[1])))
