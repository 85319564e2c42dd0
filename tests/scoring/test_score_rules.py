"""What score does beyond a plain head: intervals, averages, smoothing, fitted rules, and where each was fitted."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from affcache.errors import ConfigError, InputError, StoreError
from affcache.figures import drawing
from affcache.files import read_tensors, write_tensors
from affcache.progress import Listener
from affcache.reporting.report import report
from affcache.scoring.ensemble import Ensemble
from affcache.scoring.figures import score_figures
from affcache.scoring.postprocess import fit_class_biases, fit_temperature, fit_thresholds
from affcache.scoring.predict import rows_to_predict
from affcache.scoring.rule import DecisionRule, smooth
from affcache.scoring.score import ScoreResult, score
from affcache.store.description import fingerprint
from affcache.store.reading import EmbeddingStore, block_crc, view_path
from affcache.tasks.annotations import join_labels
from affcache.tasks.metrics import ClassScores, Scores
from affcache.tasks.splits import hold_out, of_videos
from affcache.tasks.tasks import TASKS
from affcache.training.fit import fit
from tests.conftest import Heard, MakeData, write_labels, write_store

QUICK: dict[str, Any] = {"epochs": 3, "hidden_layers": 1, "hidden_width": 16, "batch_size": 16, "rho": 0.05}


def fitted(data: tuple[Path, Path], run: Path, task: str = "expr", **changes: Any) -> Path:
    fit(task=task, store=data[0], annotations=data[1], run=run, **{**QUICK, **changes})
    return run


def contents(result: ScoreResult) -> dict[str, Any]:
    with h5py.File(result.predictions_file) as file:
        return {name: file[name][:] for name in ("rows", "video", "frame_number", "probabilities", "decided", "labels")}


@pytest.mark.parametrize("task", ["expr", "au"])
def test_every_value_has_an_interval_over_videos(learnable: MakeData, tmp_path: Path, task: str) -> None:
    data = learnable(task, videos=12)
    result = score(run=fitted(data, tmp_path / "run", task, epochs=1, lr=1e-4))
    found = result.to_json()
    assert found["low"] <= found["value"] <= found["high"]
    assert found["low"] < found["high"]
    classes = [one for one in found["classes"] if 0 < one["f1"] < 1]  # nothing varies where all is right, or wrong
    assert classes
    assert all(one["low"] <= one["f1"] <= one["high"] for one in classes)
    assert json.loads((tmp_path / "run" / "scores.json").read_text()) == json.loads(json.dumps(found))
    assert score(run=tmp_path / "run").to_json() == found, "nothing is drawn"


def test_two_runs_are_compared_on_the_same_frames(learnable: MakeData, tmp_path: Path) -> None:
    data = learnable(videos=9)
    one, other = fitted(data, tmp_path / "one", epochs=6), fitted(data, tmp_path / "other", epochs=1, lr=1e-5)
    result = score(run=one, against=other)
    assert result.against is not None
    found = result.against["difference"]
    assert result.against["value"] == score(run=other).scores.value
    assert found["value"] == pytest.approx(result.scores.value - result.against["value"])
    assert found["low"] <= found["value"] <= found["high"]
    itself = score(run=one, against=one).against
    assert itself is not None
    assert itself["difference"] == {"value": 0.0, "low": None, "high": None}, "no video makes a difference"
    units = fitted(learnable("au", videos=9), tmp_path / "units", "au")
    with pytest.raises(InputError, match=r"of several tasks: .*one predicts expr, .*units predicts au"):
        score(run=one, against=units)


@pytest.mark.parametrize("task", ["expr", "au"])
def test_runs_are_averaged_by_their_probabilities(learnable: MakeData, tmp_path: Path, task: str) -> None:
    data = learnable(task)
    runs = [fitted(data, tmp_path / str(seed), task, seed=seed) for seed in (0, 1)]
    singly = [contents(score(run=run))["probabilities"] for run in runs]
    result = score(run=tuple(runs))
    np.testing.assert_allclose(contents(result)["probabilities"], (singly[0] + singly[1]) / 2, atol=1e-7)
    assert Path(result.scores_file) == runs[0] / "average" / "scores.json"
    assert (runs[0] / "scores.json").is_file(), "the run's own scores stay"
    assert result.to_json()["runs"] == [str(run) for run in runs]
    twice = score(run=(runs[0], runs[0]))
    assert twice.scores.value == score(run=runs[0]).scores.value
    assert twice.loss == pytest.approx(score(run=runs[0]).loss, rel=1e-5)


def test_runs_of_stores_that_share_no_frame_are_not_averaged(learnable: MakeData, tmp_path: Path) -> None:
    one = fitted(learnable(), tmp_path / "one")
    second = tmp_path / "second"
    second.mkdir()
    (second / "expr.h5").write_bytes((tmp_path / "expr.h5").read_bytes())
    same = fitted((second / "expr.h5", tmp_path / "labels"), tmp_path / "same")
    assert score(run=(one, same)).scores.value >= 0, "another file with the same frames is fine"
    other = write_store(tmp_path / "other.h5", {"elsewhere": range(1, 21)}, np.ones((20, 16), np.float16))
    labels = write_labels(tmp_path / "else", "expr", "train", {"elsewhere": [0, 1] * 10})
    write_labels(tmp_path / "else", "expr", "validation", {"elsewhere": [0, 1] * 10})
    elsewhere = fitted((other.path, labels), tmp_path / "elsewhere")
    with pytest.raises(InputError, match="share no frame, so that nothing can be averaged"):
        score(run=(one, elsewhere))


def mirrored(path: Path) -> EmbeddingStore:
    """Put a view of mirrored crops beside a store: its features, the sign of a column changed."""
    other = view_path(path, "flip")
    other.write_bytes(path.read_bytes())
    with h5py.File(other, "r+") as file:
        encoder = {**json.loads(file.attrs["encoder"]), "view": "flip"}
        file.attrs["encoder"], file.attrs["encoder_fingerprint"] = json.dumps(encoder), fingerprint(encoder)
    store = EmbeddingStore.open(other)
    features = np.memmap(other, "float16", "r+", store.features.offset, store.features.shape)
    features[:, 0] *= -1
    features.flush()
    checksum = store.block_checksum
    np.memmap(other, "<u4", "r+", checksum.offset, checksum.shape)[:] = block_crc(features)  # one block
    return store


def test_views_are_averaged(learnable: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = learnable()
    run = fitted(data, tmp_path / "run")
    with pytest.raises(StoreError, match="has no view 'flip'"):
        score(run=run, views="both")
    plain = contents(score(run=run))["probabilities"]
    flipped = mirrored(data[0])
    monkeypatch.setattr(EmbeddingStore, "view", lambda self, name: flipped)
    both = contents(score(run=run, views="both"))["probabilities"]
    other = 2 * both - plain
    assert np.abs(other - plain).max() > 0.01, "the other view says something else"
    np.testing.assert_allclose(other.sum(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("kind", ["mean", "median"])
def test_smoothing_is_within_videos_over_frame_numbers(learnable: MakeData, tmp_path: Path, kind: str) -> None:
    run = fitted(learnable(videos=9), tmp_path / "run")
    plain = contents(score(run=run))
    found = contents(score(run=run, smooth=kind, smooth_width=5))
    expected = smooth(plain["probabilities"], plain["video"], plain["frame_number"], 5, kind)
    expected = expected / expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found["probabilities"], expected, atol=1e-6)
    assert (found["decided"] == expected.argmax(axis=1)).all()
    assert score(run=run, smooth=kind, smooth_width=1).scores.value == score(run=run).scores.value


@pytest.mark.parametrize("task", ["expr", "au"])
def test_rules_are_fitted_on_what_training_held_out(learnable: MakeData, tmp_path: Path, task: str) -> None:
    data, heard = learnable(task, videos=9), Heard()
    run = fitted(data, tmp_path / "run", task, held_out=0.3)
    result = score(run=run, decide="fitted", calibrate=True, smooth="mean", listener=heard)
    assert (result.rule.fitted_on, result.rule.optimistic) == ("held-out training videos", False)
    assert not any("optimistic" in text for text in heard.warnings)
    assert result.rule.temperature != 1
    offsets = np.array(result.rule.offsets)
    given = contents(result)
    logs = np.log(given["probabilities"])
    decided = (logs + offsets).argmax(axis=1) if task == "expr" else given["probabilities"] >= offsets
    assert np.mean(given["decided"] == decided) > 0.99, "float32 in the file may turn a tie"
    assert json.loads(h5py.File(result.predictions_file).attrs["rule"])["offsets"] == list(result.rule.offsets or ())


def test_the_held_out_frames_are_those_that_training_left_out(learnable: MakeData, tmp_path: Path) -> None:
    data = learnable(videos=9)
    whole, part = (fit(store=data[0], annotations=data[1], run=tmp_path / str(share), held_out=share, **QUICK)
                   for share in (0.0, 0.3))  # fmt: skip
    store = EmbeddingStore.open(data[0])
    train = join_labels(store, data[1], TASKS["expr"], "train")
    rest, names = hold_out(store, train, 0.3)
    assert (part.frames, whole.frames) == (len(rest), len(train))
    assert json.loads((tmp_path / "0.3" / "config.json").read_text())["labels"]["train"]["held_out_videos"] == names


def test_a_view_of_which_other_crops_could_be_read_is_refused(learnable: MakeData, tmp_path: Path) -> None:
    data = learnable()
    run = fitted(data, tmp_path / "run")
    view = mirrored(data[0])
    status, checksum = view.status, view.block_checksum
    features = np.memmap(view.path, "float16", "r+", view.features.offset, view.features.shape)
    np.memmap(view.path, "u1", "r+", status.offset, status.shape)[100] = 2
    features[100] = 0
    np.memmap(view.path, "<u4", "r+", checksum.offset, checksum.shape)[:] = block_crc(features)
    with pytest.raises(StoreError, match=r"has embeddings of other crops than .*--retry-unreadable"):
        score(run=run, views="both")


def test_logits_that_are_no_numbers_are_refused(learnable: MakeData, tmp_path: Path) -> None:
    run = fitted(learnable(), tmp_path / "run")
    tensors, header = read_tensors(run / "head.safetensors")
    huge = {name: of * 1e30 if name.endswith("weight") else of for name, of in tensors.items()}
    write_tensors(run / "head.safetensors", huge, header)
    with pytest.raises(StoreError, match="logits that are nan or inf"):
        score(run=run)


@pytest.mark.parametrize("task", ["expr", "au"])
@pytest.mark.parametrize("smoothed", ["none", "mean"])
def test_rules_are_what_held_out_frames_say_once_they_are_smoothed(
    learnable: MakeData, tmp_path: Path, task: str, smoothed: str
) -> None:
    data = learnable(task, videos=9)
    run = fitted(data, tmp_path / "run", task, held_out=0.3, epochs=2)
    width = None if smoothed == "none" else 5
    rule = score(run=run, smooth=smoothed, smooth_width=width, calibrate=True, decide="fitted").rule
    store = EmbeddingStore.open(data[0])
    train = join_labels(store, data[1], TASKS[task], "train")
    joined = of_videos(store, train, hold_out(store, train, 0.3)[1])
    given = Ensemble.open([run], (), "cpu", Listener()).predict(joined.rows, "plain", Listener())
    given = DecisionRule(smoothed, width or 1).apply(given, TASKS[task])
    assert rule.temperature == pytest.approx(fit_temperature(given.logits.double().numpy(), joined.labels))
    given = DecisionRule(temperature=rule.temperature).apply(given, TASKS[task])
    fit_offsets = fit_class_biases if task == "expr" else fit_thresholds
    assert rule.offsets == pytest.approx(fit_offsets(given.probabilities, joined.labels).tolist())


def test_smoothing_sees_all_crops_and_the_metric_those_with_a_label(learnable: MakeData, tmp_path: Path) -> None:
    data = learnable(videos=9)
    run = fitted(data, tmp_path / "run", held_out=0.3)
    whole = contents(score(run=run, smooth="mean", smooth_width=9))
    for file in (tmp_path / "labels").rglob("*.txt"):
        lines = file.read_text().splitlines()
        file.write_text("\n".join("-1" if number % 3 == 2 else line for number, line in enumerate(lines)))
    part = contents(score(run=run, smooth="mean", smooth_width=9))
    assert len(part["rows"]) < len(whole["rows"])
    kept = np.isin(whole["rows"], part["rows"])
    np.testing.assert_allclose(part["probabilities"], whole["probabilities"][kept], atol=1e-6)


def test_smoothing_leaves_out_crops_that_could_not_be_read(tmp_path: Path) -> None:
    listing = {"a": range(1, 4), "b": range(1, 4), "c": range(1, 4)}
    store = write_store(tmp_path / "s.h5", listing, np.ones((9, 4), np.float16), unreadable=[1, 5])
    assert rows_to_predict(store, np.array([0, 8]), "mean").tolist() == [0, 2, 6, 7, 8]
    assert rows_to_predict(store, np.array([0, 8]), "none").tolist() == [0, 8]


@pytest.mark.parametrize("damage", [5, True, 1.5, "abc", [5], [None], {"a": 1}])
def test_held_out_videos_that_are_no_names(learnable: MakeData, tmp_path: Path, damage: Any) -> None:
    run = fitted(learnable(videos=9), tmp_path / "run", held_out=0.3)
    config = json.loads((run / "config.json").read_text())
    config["labels"]["train"]["held_out_videos"] = damage
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="held_out_videos is no list of names"):
        score(run=run, decide="fitted")


def test_held_out_videos_that_are_not_there_are_said(learnable: MakeData, tmp_path: Path) -> None:
    run, heard = fitted(learnable(videos=12), tmp_path / "run", held_out=0.5), Heard()
    names = json.loads((run / "config.json").read_text())["labels"]["train"]["held_out_videos"]
    assert len(names) > 1
    folder = tmp_path / "labels" / "EXPR_Recognition_Challenge" / "Train_Set"
    (folder / f"{names[0]}.txt").unlink()
    assert score(run=run, decide="fitted", listener=heard).rule.fitted_on
    assert any("without 1 held-out video" in text and names[0] in text for text in heard.warnings)
    for name in names[1:]:
        (folder / f"{name}.txt").unlink()
    with pytest.raises(ConfigError, match="No rule can be fitted"):
        score(run=run, decide="fitted")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_head_that_is_no_numbers_is_refused(learnable: MakeData, tmp_path: Path, value: float) -> None:
    run = fitted(learnable(), tmp_path / "run", epochs=1)
    tensors, header = read_tensors(run / "head.safetensors")
    tensors["output_layer.bias"][-1] = value
    write_tensors(run / "head.safetensors", tensors, header)
    with pytest.raises(StoreError, match=r"head\.safetensors holds numbers that are nan or inf"):
        score(run=run)


def test_of_equal_widths_the_smallest_is_chosen(
    learnable: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fitted(learnable(videos=9), tmp_path / "run", held_out=0.3)
    monkeypatch.setattr("affcache.scoring.rule.smooth", lambda values, *_: values.astype(float))
    assert score(run=run, smooth="mean").rule.width == 1


def test_what_was_fitted_on_training_videos_is_optimistic_of_the_training_split(
    learnable: MakeData, tmp_path: Path
) -> None:
    run = fitted(learnable(videos=9), tmp_path / "run", held_out=0.3)
    assert score(run=run, decide="fitted", split="train").rule.optimistic
    assert not score(run=run, decide="fitted").rule.optimistic


def test_runs_that_held_out_other_videos_are_not_fitted_together(learnable: MakeData, tmp_path: Path) -> None:
    data = learnable(videos=9)
    runs = [fitted(data, tmp_path / "one", held_out=0.3), fitted(data, tmp_path / "other", held_out=0.3)]
    score(run=tuple(runs), decide="fitted")
    config = json.loads((runs[1] / "config.json").read_text())
    config["labels"]["train"]["held_out_videos"].pop()
    (runs[1] / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="held out different ones"):
        score(run=tuple(runs), decide="fitted")


def test_a_run_that_held_nothing_out_has_nothing_to_fit_on(learnable: MakeData, tmp_path: Path) -> None:
    data = learnable(videos=9)
    run, other = fitted(data, tmp_path / "run"), fitted(data, tmp_path / "other", held_out=0.3)
    for wanted in ({"decide": "fitted"}, {"calibrate": True}, {"smooth": "mean"}):
        with pytest.raises(
            ConfigError, match=r"trained on all training videos\. .*--held-out 0\.2.*--fit-on validation"
        ):
            score(run=run, **wanted)
    with pytest.raises(ConfigError, match="Smoothing needs no fitting with --smooth-width N"):
        score(run=run, smooth="mean")
    with pytest.raises(ConfigError, match="held out different ones"):
        score(run=(run, other), decide="fitted")


def test_fitted_on_what_is_reported_it_says_optimistic(learnable: MakeData, tmp_path: Path) -> None:
    run, heard = fitted(learnable(videos=9), tmp_path / "run", epochs=1), Heard()
    plain = score(run=run)
    result = score(run=run, decide="fitted", fit_on="validation", listener=heard)
    assert result.rule.optimistic
    assert result.to_json()["rule"]["optimistic"] is True
    assert any("the scores are optimistic" in text for text in heard.warnings)
    assert result.scores.value > plain.scores.value, "where it was fitted it never loses"
    elsewhere = score(run=run, decide="fitted", fit_on="validation", split="train")
    assert not elsewhere.rule.optimistic


def test_scores_by_another_rule_leave_the_plain_ones_alone(learnable: MakeData, tmp_path: Path) -> None:
    store, annotations = learnable()
    run = tmp_path / "run"
    fit(store=store, annotations=annotations, run=run, epochs=1, hidden_width=8, hidden_layers=1, held_out=0.3)
    plain = score(run=run)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    words: dict[str, dict[str, Any]] = {
        "optimistic": {"decide": "fitted", "fit_on": "validation"},
        "fitted": {"calibrate": True},
        "smoothed": {"smooth": "mean", "smooth_width": 5},
        "train-optimistic": {"decide": "fitted", "split": "train"},
    }
    for name, settings in words.items():
        result = score(run=run, **settings)
        assert result.scores_file == str(run / f"scores-{name}.json")
        assert result.predictions_file == str(run / f"predictions-{name}.h5")
        assert Path(result.predictions_file).is_file()
    assert all((run / name).read_bytes() == content for name, content in before.items())
    assert plain.scores_file == str(run / "scores.json")


def test_rules_are_printed_with_the_names_of_classes() -> None:
    rule = DecisionRule("mean", 1, offsets=(0.5, -0.25), fitted_on="validation")
    assert rule.in_words(("AU1", "AU2")) == "no smoothing, which was best; offsets AU1 0.50, AU2 -0.25"
    assert DecisionRule("median", 5).in_words(()) == "median over 5 frame numbers"
    assert DecisionRule(weights=(3.0, 1.0)).in_words(()) == "weights 0.75, 0.25"


def test_the_chosen_width_is_the_best_where_it_was_chosen(learnable: MakeData, tmp_path: Path) -> None:
    run = fitted(learnable(videos=9), tmp_path / "run")
    result = score(run=run, smooth="mean", fit_on="validation")
    widths = {width: score(run=run, smooth="mean", smooth_width=width).scores.value for width in (1, 3, 5, 9, 15, 25)}
    assert result.scores.value == max(widths.values())
    assert result.rule.width == next(width for width, value in widths.items() if value == result.scores.value)


def test_values_have_no_thresholds(learnable: MakeData, tmp_path: Path) -> None:
    run = fitted(learnable("au", videos=9), tmp_path / "run", "au")
    config = json.loads((run / "config.json").read_text())
    assert config["settings"]["held_out"] == 0
    with pytest.raises(ConfigError, match="expected an odd number"):
        score(run=run, smooth="mean", smooth_width=4)
    with pytest.raises(ConfigError, match="--smooth-width is given without --smooth"):
        score(run=run, smooth_width=5)


def test_calibration_is_measured(learnable: MakeData, tmp_path: Path) -> None:
    run = fitted(learnable(videos=9), tmp_path / "run")
    plain, scaled = score(run=run), score(run=run, calibrate=True, fit_on="validation")
    assert plain.calibration_error is not None
    assert scaled.calibration_error is not None
    assert 0 <= scaled.calibration_error < plain.calibration_error
    assert scaled.scores.value == plain.scores.value, "a temperature changes no decision between classes"


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("expr", {"classes", "confusion", "learning", "precision_recall", "reliability"}),
        ("au", {"classes", "learning", "precision_recall", "reliability"}),
    ],
)
def test_pictures_are_written_where_asked(learnable: MakeData, tmp_path: Path, task: str, names: set[str]) -> None:
    run = fitted(learnable(task), tmp_path / "run", task)
    result = score(run=run, figures=tmp_path / "figures")
    assert {Path(file).name for file in result.figures} == {f"{n}.{form}" for n in names for form in ("png", "svg")}
    classes = (tmp_path / "figures" / "classes.svg").read_text()
    assert f"{result.scores.value:.3f}" in classes
    assert all(f"<!-- {name} -->" in classes for name in TASKS[task].classes)
    if task == "expr":
        labels, decided = (contents(result)[name] for name in ("labels", "decided"))
        drawn = (tmp_path / "figures" / "confusion.svg").read_text()
        assert f"<!-- {int(((labels == 2) & (decided == 2)).sum())} -->" in drawn
    assert score(run=run).figures == ()


def test_figures_are_the_same_under_any_settings_of_matplotlib(learnable: MakeData, tmp_path: Path) -> None:
    run = fitted(learnable(), tmp_path / "run")
    score(run=run, figures=tmp_path / "plain")
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.size: 30\naxes.facecolor: black\n")
    code = f"""
import sys, affcache
affcache.score(run={str(run)!r}, figures={str(tmp_path / "own")!r})
assert sys.modules["matplotlib"].rcParams["font.size"] == 30
assert "matplotlib.pyplot" not in sys.modules
"""
    env = os.environ | {"MPLBACKEND": "module://of.a.notebook", "MATPLOTLIBRC": str(tmp_path / "matplotlibrc")}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
    for path in (tmp_path / "plain").iterdir():
        assert path.read_bytes() == (tmp_path / "own" / path.name).read_bytes(), path.name


def test_figures_of_one_unit() -> None:
    labels = np.array([[0], [1], [1], [0]])
    scores = Scores("mean_f1", 0.8, (ClassScores("smile", {"f1": 0.8}, 2, (0.5, 0.9)),))
    task = replace(TASKS["au"], classes=("smile",))
    with drawing():
        figures = score_figures(task, scores, labels, labels, np.array([[0.1], [0.8], [0.9], [0.4]]), [])
    assert set(figures) == {"classes", "precision_recall", "reliability"}
    assert figures["precision_recall"].legends[0].get_texts()[0].get_text() == "smile 1.00"


def test_the_mean_over_the_classes_present_stands_beside_that_over_all(learnable: MakeData, tmp_path: Path) -> None:
    data, heard = learnable(videos=12), Heard()
    for file in (tmp_path / "labels").rglob("*.txt"):
        file.write_text(file.read_text().replace("7\n", "-1\n"))
    run = fitted(data, tmp_path / "run", epochs=1)
    result = score(run=run, listener=heard)
    found = result.to_json()
    values = [one["f1"] for one in found["classes"]]
    assert values[7] == 0
    assert found["value"] == pytest.approx(np.mean(values))
    present = found["over_classes_present"]
    assert present["value"] == pytest.approx(np.mean(values[:7]))
    assert present["low"] < present["value"] < present["high"]
    assert "low" not in found
    assert "macro F1 has no interval: Other in none of the videos, expected each in at least 3" in heard.messages
    page = tmp_path / "report.html"
    report(run=run, crops=(), out=page)
    assert "no interval" in page.read_text()
    assert f"Over the classes that some frame has: {present['value']:.3f}" in page.read_text()
