"""A head of several tasks: each has its columns and its rule, it loads as one model, and it is published whole."""

import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

import affcache
from affcache.cli.app import app
from affcache.errors import ConfigError, StoreError
from affcache.faces.table import KEYS
from affcache.scoring.published import write_sealed
from affcache.store.reading import EmbeddingStore
from affcache.tasks.multitask import MultiTask
from affcache.tasks.own import task_from_json, task_to_json
from affcache.tasks.tasks import TASKS
from tests.conftest import write_crops
from tests.faces.clips import VARIABLE, moving, write_clip
from tests.prediction.test_onnx import answers
from tests.reporting.test_reporting import Elements, frames_in
from tests.tasks.challenge import write_challenge
from tests.training.test_multitask_training import mtl_data

MTL = TASKS["mtl"]
assert isinstance(MTL, MultiTask)
QUICK: dict[str, Any] = {"epochs": 12, "hidden_layers": 1, "hidden_width": 24, "batch_size": 16, "lr": 0.01,
                         "rho": 0.05, "dropout": 0.1, "held_out": 0.3, "device": "cpu"}  # fmt: skip
ROUNDING = 1e-7  # torch's sigmoid rounds an element by where it stands among the others
FITTED: dict[str, Any] = {"decide": "fitted", "calibrate": True, "device": "cpu"}
VA, EXPR, AU = ([f"{part.name}_{output}" for output in part.classes] for part in MTL.parts)
PRESENT = [f"{name}_present" for name in AU]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs mtl and other of all tasks, and expr of one; the first scored, with rules, and published in head/."""
    folder = tmp_path_factory.mktemp("several")
    data = mtl_data(folder)
    affcache.fit(task="mtl", run=folder / "mtl", **data, **QUICK)
    affcache.fit(task="mtl", run=folder / "other", seed=1, **data, **QUICK)
    affcache.fit(task="expr", run=folder / "expr", **data, **QUICK)
    affcache.score(run=folder / "mtl", device="cpu")
    affcache.score(run=folder / "mtl", **FITTED)
    affcache.publish(run=folder / "mtl", out=folder / "head", data="noise", license="mit")
    return folder


def table_of(made: Path, tmp_path: Path, *runs: str, **given: Any) -> pa.Table:
    """Return what runs say of the store."""
    inputs, run = made / "s.h5", tuple(made / name for name in runs)
    affcache.predict(inputs=inputs, run=run, out=tmp_path / "p.parquet", device="cpu", **given)
    return pq.read_table(tmp_path / "p.parquet").drop(KEYS.names)


def columns(table: pa.Table, names: list[str]) -> np.ndarray[Any, Any]:
    return np.column_stack([table[name].to_numpy(zero_copy_only=False) for name in names])


# predict


@pytest.mark.parametrize("rule", ["", "-fitted"])
def test_each_task_has_its_columns_as_score_says(made: Path, tmp_path: Path, rule: str) -> None:
    out = tmp_path / "p.parquet"
    decide = "fitted" if rule else "plain"
    result = affcache.predict(inputs=made / "s.h5", run=made / "mtl", out=out, decide=decide, device="cpu")
    assert (result.runs, result.tasks, result.rows) == ((str(made / "mtl"),), ("va", "expr", "au"), 240)
    assert {task for task, words in result.rules.items() if words} == ({"expr", "au"} if rule else set())
    table = pq.read_table(out)
    assert table.column_names == [*KEYS.names, *VA, *EXPR, "expr", *AU, *PRESENT]
    with h5py.File(made / "mtl" / f"predictions{rule}.h5") as file:
        for part, names in zip(MTL.parts, (VA, EXPR, AU), strict=True):
            group = file[part.name]
            rows = group["rows"][:]
            assert 40 < len(rows) < 80, "not each frame has each label"
            np.testing.assert_allclose(columns(table, names)[rows], group["probabilities"][:], atol=ROUNDING)
        rows, decided = file["expr/rows"][:], file["expr/decided"][:]
        assert [table["expr"][int(row)].as_py() for row in rows] == [MTL.parts[1].classes[one] for one in decided]
        assert np.array_equal(columns(table, PRESENT)[file["au/rows"][:]], file["au/decided"][:] == 1)


def test_a_fitted_rule_decides_otherwise(made: Path, tmp_path: Path) -> None:
    plain, fitted = (table_of(made, tmp_path, "mtl", decide=rule) for rule in ("plain", "fitted"))
    assert plain.select(VA).equals(fitted.select(VA))
    assert not plain["expr"].equals(fitted["expr"])
    assert not plain.select(PRESENT).equals(fitted.select(PRESENT))


def test_runs_are_averaged_task_by_task_and_weights_are_said_per_run(made: Path, tmp_path: Path) -> None:
    one, other = (table_of(made, tmp_path, name) for name in ("mtl", "other"))
    every = [*VA, *EXPR, *AU]
    assert np.abs(columns(one, every) - columns(other, every)).max() > 0.05
    for weights, share in (("", 0.5), ("0.25,0.75", 0.25), ("1,0", 1.0)):
        both = table_of(made, tmp_path, "mtl", "other", weights=weights)
        expected = share * columns(one, every).astype(np.float64) + (1 - share) * columns(other, every)
        np.testing.assert_allclose(columns(both, every), expected, atol=1e-6)
    with pytest.raises(ConfigError, match=r"Expected a number of at least 0 for each of 2 runs"):
        table_of(made, tmp_path, "mtl", "other", weights="0.2,0.2,0.2")


@pytest.mark.parametrize("runs", [("mtl", "expr"), ("expr", "mtl")])
def test_with_a_run_of_one_task_that_task_alone_is_averaged(made: Path, tmp_path: Path, runs: tuple[str, ...]) -> None:
    whole, alone = (table_of(made, tmp_path, name) for name in ("mtl", "expr"))
    both = table_of(made, tmp_path, *runs)
    mean = (columns(whole, EXPR).astype(np.float64) + columns(alone, EXPR)) / 2
    np.testing.assert_allclose(columns(both, EXPR), mean, atol=1e-6)
    assert np.abs(mean - columns(whole, EXPR)).max() > 0.05
    for names in (VA, AU, PRESENT):
        assert both.select(names).equals(whole.select(names))
    weighted = table_of(made, tmp_path, *runs, weights="1,0" if runs[0] == "mtl" else "0,1")
    np.testing.assert_allclose(columns(weighted, EXPR), columns(whole, EXPR), atol=1e-6)


def test_rules_of_an_average_are_those_that_score_fitted_for_its_tasks(made: Path, tmp_path: Path) -> None:
    for name in ("mtl", "other", "expr"):
        shutil.copytree(made / name, tmp_path / name)
    out = tmp_path / "p.csv"
    given: dict[str, Any] = {"inputs": made / "s.h5", "out": out, "decide": "fitted", "device": "cpu"}
    both = (tmp_path / "mtl", tmp_path / "other")
    with pytest.raises(ConfigError, match="have no rule that was fitted for their average"):
        affcache.predict(run=both, **given)
    scored = affcache.score(run=both, **FITTED)
    words = {part.task: part.rule.in_words(MTL.parts[i].classes) for i, part in enumerate(scored.parts)}
    assert words["expr"]
    assert words["au"]
    assert affcache.predict(run=both, **given).rules == words
    assert affcache.predict(run=both[::-1], **given).rules == words, "in any order"
    for mixed in ((tmp_path / "mtl", tmp_path / "expr"), (tmp_path / "expr", tmp_path / "mtl")):
        with pytest.raises(ConfigError, match="have no rule that was fitted for their average"):
            affcache.predict(run=mixed, **given)
        scored = affcache.score(run=mixed, **FITTED)
        rules = affcache.predict(run=mixed, **given).rules
        assert rules["expr"] == scored.parts[1].rule.in_words(MTL.parts[1].classes) != words["expr"]
        assert rules["au"] == affcache.load(tmp_path / "mtl").by_task[2].rule.in_words(MTL.parts[2].classes)
        shutil.rmtree(Path(scored.scores_file).parent)


def test_a_video_has_an_overlay_and_a_page_of_all_tasks(encoded: Path, tmp_path: Path, square_faces: None) -> None:
    clip = write_clip(tmp_path / "clip.mp4", moving(10), VARIABLE)
    out, page = tmp_path / "p.parquet", tmp_path / "p.html"
    result = affcache.predict(
        inputs=clip, run=encoded, out=out, page=page, overlay=tmp_path / "o.mp4", smooth="mean", smooth_width=3,
        device="cpu",
    )  # fmt: skip
    assert (result.faces, result.overlays) == (10, (str(tmp_path / "o.mp4"),))
    text = page.read_text()
    assert [task["name"] for task in frames_in(text)["tasks"]] == ["va", "expr", "au"]
    assert Elements(text).text.count(str(encoded)) == 1, "a run is named once"


@pytest.fixture
def encoded(tiny_encoder: str, tmp_path: Path) -> Path:
    """A run of all tasks on crops by the tiny encoder."""
    crops = write_crops(tmp_path / "crops", {"a": range(1, 17), "b": range(1, 17)})
    affcache.extract(crops=crops, store=tmp_path / "faces.h5", model=tiny_encoder, precision="fp32", device="cpu")
    for split, video in (("train", "a"), ("validation", "b")):
        lines: dict[tuple[str, int], Any] = {
            (video, i): (i / 20, -i / 30, i % 8, [(i + unit) % 3 % 2 for unit in range(12)]) for i in range(1, 17)
        }
        write_challenge(tmp_path / "labels", split, lines)
    given = {"store": tmp_path / "faces.h5", "annotations": tmp_path / "labels"}
    affcache.fit(task="mtl", run=tmp_path / "run", **given, **{**QUICK, "batch_size": 8, "held_out": 0.0})
    return tmp_path / "run"


# load


def test_a_model_says_and_decides_all_tasks_in_their_order(made: Path) -> None:
    model, store = affcache.load(made / "mtl", device="cpu"), EmbeddingStore.open(made / "s.h5")
    assert model.classes == (*MTL.parts[0].classes, *MTL.parts[1].classes, *MTL.parts[2].classes)
    assert repr(model).startswith(f"<Model mtl of {made / 'mtl'}: valence, arousal, Neutral, ")
    assert repr(model).endswith("AU25, AU26; mlp head on made-up (D = 16)>")
    probabilities, decided = (of(embeddings=store.features) for of in (model.predict_proba, model.predict))
    assert (probabilities.shape, probabilities.dtype) == ((240, 22), np.float32)
    assert (decided.shape, decided.dtype) == ((240, 15), np.float32)
    with h5py.File(made / "mtl" / "predictions.h5") as plain, h5py.File(made / "mtl" / "predictions-fitted.h5") as file:
        for part, own, of in zip(MTL.parts, MTL.outputs_of(probabilities), MTL.split(decided), strict=True):
            rows = plain[part.name]["rows"][:]
            np.testing.assert_allclose(own[rows], plain[part.name]["probabilities"][:], atol=ROUNDING)
            assert np.array_equal(of[rows], file[part.name]["decided"][:]), "by its own fitted rule"
    assert model.rule is None
    parts = model.by_task
    assert [part.task.name for part in parts] == ["va", "expr", "au"]
    for part, own, of in zip(parts, MTL.outputs_of(probabilities), MTL.split(decided), strict=True):
        np.testing.assert_allclose(part.predict_proba(embeddings=store.features), own, atol=ROUNDING)
        assert np.array_equal(part.predict(embeddings=store.features), of)
    assert parts[1].rule is not None
    assert len(parts[1].rule.offsets or ()) == 8
    assert "P **" in model.card
    without = affcache.load(made / "other", device="cpu")
    expected = MTL.decide(without.predict_proba(embeddings=store.features))
    assert np.array_equal(without.predict(embeddings=store.features), expected), "without a rule, by the tasks' own"


def test_images_are_taken_too(encoded: Path, tmp_path: Path) -> None:
    model = affcache.load(encoded, device="cpu")
    images = sorted((tmp_path / "crops").rglob("*.jpg"))[:3]
    assert model.predict_proba(images).shape == (3, 22)
    assert model.predict(images).shape == (3, 15)


# publish


def test_what_is_published_is_whole_and_names_nothing_of_this_machine(made: Path) -> None:
    config = json.loads((made / "head" / "config.json").read_text())
    scores, fitted = (json.loads((made / "mtl" / f"scores{rule}.json").read_text()) for rule in ("", "-fitted"))
    assert [part["name"] for part in config["task"]["parts"]] == ["va", "expr", "au"]
    assert config["task"]["kind"] == "multi"
    assert config["postprocessing"] == {name: of["rule"] for name, of in fitted["parts"].items()}
    assert config["metrics"]["value"] == scores["value"]
    assert config["metrics_fitted"]["parts"]["au"]["classes"] == fitted["parts"]["au"]["classes"]
    names = [str(made), str(Path.home()), made.name, *EmbeddingStore.open(made / "s.h5").video_names]
    for path in (made / "head").iterdir():
        assert not [name for name in names if name.encode() in path.read_bytes()], path


def test_the_card_shows_the_sum_and_a_table_of_each_task(made: Path) -> None:
    card = (made / "head" / "README.md").read_text()
    for rule in ("", "-fitted"):
        scores = json.loads((made / "mtl" / f"scores{rule}.json").read_text())
        assert f"P **{scores['value']:.3f}**" in card
        for part, metric in (("va", "mean CCC"), ("expr", "macro F1"), ("au", "mean F1")):
            of = scores["parts"][part]
            by = f" by a rule fitted on {of['rule']['fitted_on']}" if of["rule"]["fitted_on"] else ""
            assert (
                f"Of {part}: {metric} **{of['value']:.3f}** on the validation split{by}: {of['frames']} frames" in card
            )
    assert card.count("| Neutral | ") == card.count("| valence | ") == card.count("| AU26 | ") == 2
    assert "affcache fit --task mtl --epochs 12" in card
    assert "Outputs, in their order: valence, arousal, Neutral," in " ".join(card.split())


def test_a_published_head_loads_scores_predicts_and_is_published_again(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    head, run = (affcache.load(made / name, device="cpu") for name in ("head", "mtl"))
    features = EmbeddingStore.open(made / "s.h5").features
    for of in ("predict_proba", "predict"):
        assert np.array_equal(getattr(head, of)(embeddings=features), getattr(run, of)(embeddings=features))
    assert [part.rule for part in head.by_task] == [part.rule for part in run.by_task]
    assert head.task is MTL
    data: dict[str, Any] = {"store": made / "s.h5", "annotations": made / "labels", "device": "cpu"}
    scored = affcache.score(run=made / "head", **data)
    expected = json.loads((made / "mtl" / "scores.json").read_text())
    assert scored.scores.value == pytest.approx(expected["value"], abs=1e-9)
    assert {part.task: part.scores.value for part in scored.parts} == pytest.approx(
        {name: of["value"] for name, of in expected["parts"].items()}
    )
    assert Path(scored.scores_file) == Path("scores/head/scores.json")
    assert "mean CCC" in Path(affcache.report(run=made / "head", crops=(), **data).out).read_text()
    assert table_of(made, tmp_path, "head", decide="fitted").equals(table_of(made, tmp_path, "mtl", decide="fitted"))
    assert affcache.publish(run=made / "head", out=tmp_path / "again").rule
    before, after = (json.loads((one / "config.json").read_text()) for one in (made / "head", tmp_path / "again"))
    assert after == before


def test_a_rule_of_a_task_that_is_missing_is_damage(made: Path, tmp_path: Path) -> None:
    head = shutil.copytree(made / "head", tmp_path / "head")
    config = json.loads((head / "config.json").read_text())
    files = {name: head / name for name in ("README.md", "head.safetensors")}
    for wrong in ({"va": config["postprocessing"]["va"]}, config["postprocessing"]["expr"]):
        write_sealed(head, {**config, "postprocessing": wrong}, files)
        with pytest.raises(StoreError, match=r"config\.json has no rule that can be read"):
            affcache.load(head).predict(embeddings=np.zeros((1, 16), np.float32))
    write_sealed(head, {**config, "postprocessing": None}, files)
    assert [one.rule for one in affcache.load(head).by_task] == [None] * 3


def test_damaged_scores_of_a_task_are_refused(made: Path, tmp_path: Path) -> None:
    run = shutil.copytree(made / "mtl", tmp_path / "mtl")
    scores = json.loads((run / "scores.json").read_text())
    del scores["parts"]["au"]
    (run / "scores.json").write_text(json.dumps(scores))
    with pytest.raises(StoreError, match=r"scores\.json has no scores that can be read"):
        affcache.publish(run=run, out=tmp_path / "out")


def broken(**changes: Any) -> dict[str, Any]:
    return {**task_to_json(MTL), **changes}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (broken(parts=None), "has no parts"),
        (broken(parts=["expr"]), "has no parts"),
        (broken(parts=[]), "has no parts"),
        (broken(parts=task_to_json(MTL)["parts"][:2]), "and the parts of it differ"),
        (broken(parts=[*task_to_json(MTL)["parts"][:2], task_to_json(MTL)]), "has parts itself"),
        (broken(parts=[task_to_json(TASKS["va"])] * 2, classes=["valence", "arousal"] * 2), "parts of it differ"),
        (broken(parts=[{"name": "va", "kind": "moods", "classes": ["a"]}]), "is of kind 'moods'"),
    ],
)
def test_a_description_without_sound_parts_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        task_from_json(json.loads(json.dumps(values)))


def test_both_graphs_have_the_models_probabilities(encoded: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    result = affcache.publish(run=encoded, out=tmp_path / "head", onnx=True)
    assert sorted(result.onnx) == ["embeddings.onnx", "pixels.onnx"]
    assert max(result.onnx.values()) <= 1e-5
    model = affcache.load(encoded, device="cpu")
    embeddings = np.random.default_rng(1).normal(size=(7, 24)).astype(np.float16).astype(np.float32)
    (found,) = answers(tmp_path / "head" / "embeddings.onnx", embeddings)
    np.testing.assert_allclose(found, model.predict_proba(embeddings=embeddings), rtol=0, atol=1e-5)
    images = sorted((tmp_path / "crops").rglob("*.jpg"))[:3]
    pixels = model.encoder.prepare([np.asarray(Image.open(path)) for path in images]).contiguous().numpy()
    probabilities, _ = answers(tmp_path / "head" / "pixels.onnx", pixels)
    np.testing.assert_allclose(probabilities, model.predict_proba(images), rtol=0, atol=1e-4)


# some of the tasks


def test_a_run_of_some_tasks_works_everywhere(tmp_path: Path) -> None:
    data = mtl_data(tmp_path)
    for path in data["annotations"].iterdir():
        lines = [line.split(",") for line in path.read_text().splitlines()]
        text = [",".join(lines[0]), *(",".join([line[0], "-5", "-5", *line[3:]]) for line in lines[1:])]
        path.write_text("\n".join(text) + "\n")
    affcache.fit(task="mtl", run=tmp_path / "run", **data, **QUICK)
    plain, fitted = (affcache.score(run=tmp_path / "run", **how) for how in ({"device": "cpu"}, FITTED))
    assert [part.task for part in plain.parts] == ["expr", "au"]
    affcache.publish(run=tmp_path / "run", out=tmp_path / "head")
    features = EmbeddingStore.open(data["store"]).features
    for name in ("run", "head"):
        model = affcache.load(tmp_path / name, device="cpu")
        assert isinstance(model.task, MultiTask)
        assert [part.name for part in model.task.parts] == ["expr", "au"]
        assert model.predict_proba(embeddings=features).shape == (240, 20)
        assert model.predict(embeddings=features).shape == (240, 13)
        table = table_of(tmp_path, tmp_path, name, decide="fitted")
        assert table.column_names == [*EXPR, "expr", *AU, *PRESENT]
        card = model.card
        assert f"P **{plain.scores.value:.3f}**" in card
        assert f"P **{fitted.scores.value:.3f}**" in card
        assert "valence" not in card
    text = Path(affcache.report(run=tmp_path / "run", crops=()).out).read_text()
    assert next(one.get("id") for one in Elements(text).of("section")) == "expr-scores-section"


def test_what_is_printed(made: Path, tmp_path: Path) -> None:
    arguments = {
        "publish": ["publish", made / "mtl", "--out", tmp_path / "head", "--data", "noise", "--license", "mit"],
        "predict": ["predict", made / "s.h5", "--run", made / "mtl", "--out", tmp_path / "p.csv", "--device", "cpu"],
    }
    said = {}
    for name, words in arguments.items():
        result = CliRunner().invoke(app, list(map(str, words)))
        assert result.exit_code == 0, result.output
        said[name] = " ".join(result.output.split())
    assert "P 0." in said["publish"] or "P 1." in said["publish"] or "P 2." in said["publish"]
    assert "on validation, with a fitted rule" in said["publish"]
    assert "va, expr, au by" in said["predict"]
