"""Tasks of one's own, as a whole: whatever the form of the labels the same bits, and every command without the TOML."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from typer.testing import CliRunner, Result

import affcache
from affcache.cli.app import app
from affcache.errors import ConfigError, InputError
from affcache.files import read_tensors
from affcache.store.reading import EmbeddingStore
from affcache.tasks.kinds import Classes, Units, Values
from affcache.tasks.task import Task
from tests.conftest import Heard, MakeData

QUICK: dict[str, Any] = {"epochs": 3, "hidden_layers": 1, "hidden_width": 16, "batch_size": 16, "rho": 0.05}
TASKS: dict[str, Task] = {
    "classes": Classes("mine", ("calm", "engaged", "bored")),
    "units": Units("mine", ("smile", "frown")),
    "values": Values("mine", ("pain", "effort"), low=0, high=10),
}


@pytest.fixture
def store(learnable: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of six videos of 40 frames in the working folder, which no repository is above."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return learnable()[0]


def label(store: EmbeddingStore, task: Task) -> npt.NDArray[Any]:
    """Labels (N,) or (N, C) that follow from the embeddings."""
    first = np.asarray(store.features[:, :2], dtype=np.float64)
    if task.kind == "classes":
        return (first > 0).sum(axis=1)
    return (first > 0).astype(int) if task.kind == "units" else np.round(5 + 4 * np.tanh(first), 3)


def split_of(video: int) -> str:
    return "validation" if video % 3 == 2 else "train"


def write_table(path: Path, store: EmbeddingStore, task: Task, seed: int = 0, without: int | None = None) -> Path:
    """Write the labels as a table, its rows in any order; of one video without a label."""
    order = np.random.default_rng(seed).permutation(len(store))
    videos, labels = store.video_of_rows()[order], label(store, task)[order]
    columns: dict[str, Any] = {
        "video": [store.video_names[video] for video in videos],
        "frame": store.frame_number[order].tolist(),
        "split": [split_of(video) for video in videos],
    }
    if task.exclusive:
        columns["label"] = [task.classes[one] for one in labels]
    else:
        columns |= dict(zip(task.classes, labels.T.tolist(), strict=True))
    table = pa.table(columns)
    if path.suffix == ".parquet":
        pa.parquet.write_table(table, path)
    else:
        pa.csv.write_csv(table, path)
    return path


def write_files(folder: Path, store: EmbeddingStore, task: Task) -> Path:
    """Write the labels as Aff-Wild2's: a file a video."""
    lines = [",".join(map(str, np.atleast_1d(one))) for one in label(store, task).tolist()]
    for video, name in enumerate(store.video_names):
        path = folder / {"train": "Train_Set", "validation": "Validation_Set"}[split_of(video)] / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = slice(*store.video_start[video : video + 2])
        path.write_text("\n".join([task.header, *lines[rows]]) + "\n")
    return folder


def define(path: Path, task: Task, labels: Path, table: str = "") -> Path:
    """Write the TOML that defines a task."""
    text = f"{table}kind = '{task.kind}'\nnames = {json.dumps(task.classes)}\nlabels = '{labels.name}'\n"
    text += f"level = '{task.level}'\n"
    path.write_text(text + (f"range = [{task.low}, {task.high}]\n" if isinstance(task, Values) else ""))
    return path


def call(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("recipe", [{"head": "ridge"}, QUICK], ids=["ridge", "mlp"])
def test_tables_and_label_files_give_the_same_bits(kind: str, recipe: dict[str, Any], store: Path) -> None:
    task, opened = TASKS[kind], EmbeddingStore.open(store)
    labels = [
        write_table(Path("l.csv"), opened, task),
        write_table(Path("l.parquet"), opened, task, seed=1),
        write_files(Path("l"), opened, task),
    ]
    found = []
    for number, where in enumerate(labels):
        toml = define(Path(f"mine{number}.toml"), task, where)
        toml.write_text("name = 'mine'\n" + toml.read_text())
        run = Path(f"run{number}")
        fitted = affcache.fit(task=str(toml), store=store, run=run, device="cpu", **recipe)
        config = json.loads((run / "config.json").read_text())
        scored = affcache.score(run=run)
        assert scored.scores.value == pytest.approx(fitted.value, abs=1e-7)
        found.append((read_tensors(run / "head.safetensors")[0], config["labels"], scored.scores, scored.cvar))
    (tensors, *first), *others = found
    for other, *same in others:
        assert same == first
        assert other.keys() == tensors.keys()
        assert all(other[name].equal(tensors[name]) for name in tensors)


@pytest.mark.parametrize("kind", TASKS)
def test_a_run_knows_its_task_once_the_toml_is_gone(kind: str, store: Path, tmp_path: Path) -> None:
    task, opened = TASKS[kind], EmbeddingStore.open(store)
    table = write_table(tmp_path / "mine.csv", opened, task)
    toml = define(tmp_path / "mine.toml", task, table)
    fitted = affcache.fit(task="mine.toml", store=store, run=Path("run"), held_out=0.3, **QUICK)
    assert (fitted.task, fitted.kind) == ("mine", kind)
    toml.unlink()

    config = json.loads(Path("run/config.json").read_text())
    assert (config["task"], config["settings"]["task"]) == ("mine", "mine")
    assert config["definition"]["labels"] == config["settings"]["annotations"] == str(table)
    scored = json.loads(call("score", "run", "--json").stdout)
    assert (scored["task"], scored["value"]) == ("mine", pytest.approx(fitted.value, abs=1e-6))
    assert [one["name"] for one in scored["classes"]] == list(task.classes)
    shown = call("score", "run", *([] if kind == "values" else ["--decide", "fitted"])).stdout
    assert all(name in shown for name in task.classes)
    assert "mine on validation: run" in shown
    call("report", "run", "--out", "report.html")
    call("predict", store, "--run", "run", "--out", "said.csv")
    assert any(name in Path("said.csv").read_text().splitlines()[0] for name in task.classes)

    call("publish", "run", "--out", "head", "--data", "mine", "--license", "mit")
    assert str(tmp_path) not in Path("head/config.json").read_text(), "nothing of this machine"
    model = affcache.load("head")
    assert (model.task, model.classes) == (task, task.classes)
    with pytest.raises(ConfigError, match="it brings neither a store nor labels"):
        affcache.score(run=Path("head"))
    again = affcache.score(run=Path("head"), store=store, annotations=table)
    assert again.scores.value == pytest.approx(fitted.value, abs=1e-6)

    (tmp_path / "elsewhere").mkdir()
    table.rename(tmp_path / "elsewhere" / "mine.csv")
    with pytest.raises(InputError, match=r"mine\.csv can't be read"):
        affcache.score(run=Path("run"))
    moved = affcache.score(run=Path("run"), annotations=Path("elsewhere/mine.csv"))
    assert moved.scores.value == again.scores.value


def test_affcache_toml_names_tasks_for_every_command(store: Path, tmp_path: Path) -> None:
    task, opened = TASKS["units"], EmbeddingStore.open(store)
    write_table(tmp_path / "mine.csv", opened, task)
    define(tmp_path / "affcache.toml", task, Path("mine.csv"), "annotations = 'labels'\n[task.mine]\n")
    quick = [word for name, value in QUICK.items() for word in (f"--{name.replace('_', '-')}", value)]
    fitted = json.loads(call("fit", "--task", "mine", "--store", store, "--run", "a", *quick, "--json").stdout)
    assert fitted["task"] == "mine"
    other = affcache.fit(task="mine", store=store, run=Path("b"), **QUICK)
    assert other.value == fitted["value"], "in Python the same"
    shown = call("fit", "--task", "mine", "--store", store, "--head", "ridge")
    assert "runs/mine-" in shown.stdout

    grid = ("ablate", "--task", "mine", "--preset", "paper", "--seeds", 1, "--store", store, *quick)
    found = json.loads(call(*grid, "--json").stdout)
    assert found["out"] == "ablations/mine-paper"
    assert [row["name"] for row in found["settings"]][-1] == "cvar+auc+sam", "units have an AUC term"
    assert json.loads(call(*grid, "--json").stdout)["trained"] == 0
    call("score", found["best"][0]["run"])
    cells = {path.name for path in Path("ablations/mine-paper/cells").iterdir()}
    affcache.ablate(task="mine", preset="paper", seeds=1, store=store, out=Path("again"), **QUICK)
    assert {path.name for path in Path("again/cells").iterdir()} == cells
    both = ("ablate", "--vary", "task=expr,mine", "--annotations", "labels", "--seeds", 1, "--store", store, *quick)
    assert "looked for <video>.txt in labels/Train_Set" in call(*both, code=2).stderr, "what is said counts"
    Path("data/Aff-Wild2").mkdir(parents=True)
    Path("labels").rename("data/Aff-Wild2/annotations")
    define(tmp_path / "affcache.toml", task, Path("mine.csv"), "[task.mine]\n")
    both = ("ablate", "--vary", "task=expr,mine", "--seeds", 1, "--store", store, *quick, "--json")
    found = json.loads(call(*both).stdout)
    assert [row["task"] for row in found["settings"]] == ["expr", "mine"]


def test_an_interrupted_run_continues_without_its_toml(store: Path, tmp_path: Path) -> None:
    class Interrupts(Heard):
        def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
            if (done, unit) == (2, "epoch"):
                raise KeyboardInterrupt

    task = TASKS["classes"]
    table = write_table(tmp_path / "mine.csv", EmbeddingStore.open(store), task)
    toml = define(tmp_path / "mine.toml", task, table)
    whole = affcache.fit(task="mine.toml", store=store, run=Path("whole"), **QUICK)
    with pytest.raises(KeyboardInterrupt):
        affcache.fit(task="mine.toml", store=store, run=Path("run"), listener=Interrupts(), **QUICK)
    with pytest.raises(ConfigError, match="--task 'mine' then, 'au' now"):
        affcache.fit(task="au", run=Path("run"), resume=True)
    for other in (
        Classes("mine", ("engaged", "calm", "bored")),
        Units("mine", task.classes),
        replace(task, level="video"),
    ):
        define(tmp_path / "other.toml", other, table, 'name = "mine"\n')
        with pytest.raises(
            ConfigError, match=r"can't be continued: task mine is defined otherwise: .* then, .* now\. Exp"
        ):
            affcache.fit(task="other.toml", run=Path("run"), resume=True)
        with pytest.raises(ConfigError, match=r"What whole chose is of no use .*: task mine is defined otherwise"):
            affcache.fit(task="other.toml", as_=Path("whole"), run=Path("as"))
    affcache.fit(task="mine.toml", run=Path("run"), resume=True)
    affcache.fit(task="mine", run=Path("run"), resume=True)
    toml.unlink()
    assert affcache.fit(run=Path("run"), resume=True).value == whole.value
    (tensors, header), (expected, _) = (read_tensors(Path(run) / "head.safetensors") for run in ("run", "whole"))
    assert header["task"] == "mine"
    assert all(tensors[name].equal(expected[name]) for name in expected)


def test_a_damaged_definition_of_a_run_is_refused(store: Path, tmp_path: Path) -> None:
    table = write_table(tmp_path / "mine.csv", EmbeddingStore.open(store), TASKS["classes"])
    define(tmp_path / "mine.toml", TASKS["classes"], table)
    affcache.fit(task="mine.toml", store=store, run=Path("run"), head="ridge")
    config = json.loads(Path("run/config.json").read_text())
    for wrong in (3, {}, {**config["definition"], "kind": "x"}, {**config["definition"], "name": "other"}):
        Path("run/config.json").write_text(json.dumps({**config, "definition": wrong}))
        with pytest.raises(InputError, match="is no run folder that can be read"):
            affcache.score(run=Path("run"))


def test_runs_of_one_name_and_other_classes_are_not_averaged(store: Path, tmp_path: Path) -> None:
    opened, calm = EmbeddingStore.open(store), TASKS["classes"]
    for run, task in (("a", calm), ("b", Classes("mine", ("x", "y", "z")))):
        define(tmp_path / "mine.toml", task, write_table(tmp_path / f"{run}.csv", opened, task))
        affcache.fit(task="mine.toml", store=store, run=Path(run), head="ridge")
    with pytest.raises(InputError, match=r"a predicts mine \(calm, engaged, bored\), b predicts mine \(x, y, z\)"):
        affcache.score(run=(Path("a"), Path("b")))


@pytest.mark.parametrize("kind", ["classes", "units"])
def test_what_train_never_shows_is_refused(kind: str, store: Path, tmp_path: Path) -> None:
    task = TASKS[kind]
    path = write_table(tmp_path / "mine.csv", EmbeddingStore.open(store), task)
    lines = path.read_text().splitlines()
    never = task.classes[-1]
    kept = [
        one
        for one in lines
        if "validation" in one or not (one.endswith(f'"{never}"') if kind == "classes" else one.endswith(",1"))
    ]
    path.write_text("\n".join(kept) + "\n")
    define(tmp_path / "mine.toml", task, path)
    with pytest.raises(InputError, match=f"Validation frames are labelled {never}, and no training frame is"):
        affcache.fit(task="mine.toml", store=store, run=Path("run"), **QUICK)


def test_submissions_need_a_template_that_names_the_outputs(store: Path, tmp_path: Path) -> None:
    opened, task = EmbeddingStore.open(store), TASKS["classes"]
    define(tmp_path / "mine.toml", task, write_table(tmp_path / "mine.csv", opened, task))
    affcache.fit(task="mine.toml", store=store, run=Path("run"), head="ridge")
    asked = [f"{opened.video_names[0]}/{frame:05d}.jpg" for frame in (1, 2, 3)]
    Path("template.txt").write_text("\n".join(["image_location", *asked]) + "\n")
    flags = ("submit", "run", "--store", store, "--template", "template.txt")
    message = " ".join(call(*flags, code=2).stderr.split())
    assert "The run is of mine, a task of one's own, of which no challenge has a template" in message
    assert "image_location,calm,engaged,bored" in message
    Path("template.txt").write_text("\n".join([f"image_location,{task.header}", *asked]) + "\n")
    call(*flags, "--out", "said.txt")
    assert [one.partition(",")[0] for one in Path("said.txt").read_text().splitlines()[1:]] == asked
