"""Several tasks scored at once: one trunk, or three runs together; each part by its own rule, P and its interval."""

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from sklearn.metrics import f1_score

import affcache
from affcache.errors import ConfigError, InputError
from affcache.scoring.postprocess import fit_temperature, fit_thresholds, reliability
from affcache.tasks.tasks import TASKS
from tests.conftest import write_labels
from tests.tasks.test_multitask import ccc
from tests.training.test_multitask_training import QUICK, mtl_data

PARTS = ("va", "expr", "au")
METRICS = ("mean_ccc", "macro_f1", "mean_f1")
RECIPE: dict[str, Any] = {**QUICK, "epochs": 8, "lr": 0.01, "rho": 0.05, "dropout": 0.1, "held_out": 0.3}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of all tasks at once, a second one, and one of each task, on the same labels."""
    folder = tmp_path_factory.mktemp("together")
    data = mtl_data(folder, count=12)
    for name, task, seed in (("mtl", "mtl", 0), ("mtl2", "mtl", 1), *((part, part, 0) for part in PARTS)):
        affcache.fit(task=task, run=folder / name, seed=seed, **data, **RECIPE)
    return {name: folder / name for name in ("mtl", "mtl2", *PARTS)}


def by_hand(predictions: Path) -> dict[str, float]:
    """Return the metric of each part from a file of predictions, by scikit-learn and a textbook."""
    found = {}
    with h5py.File(predictions) as file:
        for part in PARTS:
            labels, decided = (file[part][name][:] for name in ("labels", "decided"))
            if part == "expr":
                found[part] = f1_score(labels, decided, labels=range(8), average="macro", zero_division=0)
                continue
            columns = []
            for column in range(labels.shape[1]):
                has = ~np.isnan(labels[:, column]) if part == "va" else labels[:, column] >= 0
                own = labels[has, column], decided[has, column]
                columns.append(
                    ccc(*(of.astype(float) for of in own)) if part == "va" else f1_score(*own, zero_division=0)
                )
            found[part] = float(np.mean(columns))
    return found


def test_p_is_the_sum_of_what_the_predictions_say(runs: dict[str, Path]) -> None:
    scored = affcache.score(run=runs["mtl"])
    found = by_hand(Path(scored.predictions_file))
    assert scored.scores.value == pytest.approx(sum(found.values()), abs=1e-6)
    assert scored.scores.further == pytest.approx(dict(zip(METRICS, found.values(), strict=True)), abs=1e-6)
    assert scored.scores.interval is not None
    assert scored.scores.interval[0] < scored.scores.value < scored.scores.interval[1]
    written = json.loads(Path(scored.scores_file).read_text())
    assert (written["task"], written["metric"], written["value"]) == ("mtl", "p", scored.scores.value)
    assert [part["value"] for part in written["parts"].values()] == pytest.approx(list(found.values()), abs=1e-6)
    assert [one["name"] for one in written["classes"]] == list(TASKS["mtl"].classes)
    assert scored.frames > max(part.frames for part in scored.parts), "frames have some label"
    history = [json.loads(line) for line in (runs["mtl"] / "history.jsonl").read_text().splitlines()]
    assert scored.scores.value == pytest.approx(max(entry["p"] for entry in history), abs=1e-6)


def test_three_runs_together_are_each_alone_and_in_any_order(runs: dict[str, Path]) -> None:
    alone = {part: affcache.score(run=runs[part]) for part in PARTS}
    together = affcache.score(run=[runs[part] for part in ("au", "va", "expr")])
    assert together.task == "mtl"
    assert together.scores.value == pytest.approx(sum(one.scores.value for one in alone.values()), abs=1e-12)
    for part in together.parts:
        assert part.scores == alone[part.task].scores, "intervals too"
    assert Path(together.scores_file).parent == runs["au"] / "average"
    assert by_hand(Path(together.predictions_file)) == pytest.approx(
        {p: alone[p].scores.value for p in PARTS}, abs=1e-6
    )


def test_two_trunks_are_averaged_part_by_part_and_a_run_of_one_task_joins_its_part(runs: dict[str, Path]) -> None:
    each = [affcache.score(run=runs[name]) for name in ("mtl", "mtl2")]
    both = affcache.score(run=[runs["mtl"], runs["mtl2"]])
    for part in PARTS:
        said = []
        for scored in (*each, both):
            with h5py.File(scored.predictions_file) as file:
                said.append(file[part]["probabilities"][:])
        np.testing.assert_allclose(said[2], (said[0] + said[1]) / 2, atol=1e-6)
    with_one = affcache.score(run=[runs["mtl"], runs["expr"]])
    assert [part.scores.value for part in with_one.parts][::2] == [part.scores.value for part in each[0].parts][::2]
    assert len(with_one.parts[1].runs) == 2
    assert len(with_one.parts[0].runs) == 1


def test_weights_are_of_runs_and_count_where_several_are_averaged(runs: dict[str, Path]) -> None:
    both = [runs["mtl"], runs["expr"]]
    weighed = affcache.score(run=both, weights="3,1")
    assert [part.rule.weights for part in weighed.parts] == [None, (3, 1), None]
    fitted = affcache.score(run=[runs["mtl"], runs["mtl2"]], weights="fitted")
    assert all(part.rule.weights is not None for part in fitted.parts)
    with pytest.raises(ConfigError, match="no two of the runs are of one task, so that nothing is averaged"):
        affcache.score(run=[runs[part] for part in PARTS], weights="1,2,3")
    with pytest.raises(ConfigError, match="for each of 2 runs"):
        affcache.score(run=both, weights="1,2,3")


@pytest.mark.parametrize("fit_on", ["heldout", "validation"])
def test_each_part_has_its_own_rule(runs: dict[str, Path], fit_on: str) -> None:
    scored = affcache.score(run=runs["mtl"], decide="fitted", calibrate=True, smooth="mean", fit_on=fit_on)
    affect, expression, units = (part.rule for part in scored.parts)
    assert affect.offsets is None
    assert affect.temperature == 1
    assert (len(expression.offsets or ()), len(units.offsets or ())) == (8, 12)
    assert {rule.smooth for rule in (affect, expression, units)} == {"mean"}
    assert scored.scores.value == pytest.approx(sum(by_hand(Path(scored.predictions_file)).values()), abs=1e-6)
    assert Path(scored.scores_file).name == ("scores-fitted.json" if fit_on == "heldout" else "scores-optimistic.json")
    if fit_on == "heldout":
        for head in affcache.load(runs["mtl"]).trained.by_task:
            assert head.rule == next(part.rule for part in scored.parts if part.task == head.task.name)


def test_another_run_is_compared_on_what_both_predict(runs: dict[str, Path]) -> None:
    found = affcache.score(run=runs["mtl"], against=runs["mtl2"]).against
    assert found is not None
    values = [affcache.score(run=runs[name]).scores.value for name in ("mtl", "mtl2")]
    assert (found["own"], found["value"]) == pytest.approx(values, abs=1e-9)
    assert found["difference"]["value"] == pytest.approx(values[0] - values[1], abs=1e-9)
    assert found["difference"]["low"] < found["difference"]["value"] < found["difference"]["high"]
    one = affcache.score(run=runs["expr"], against=runs["mtl"]).against
    assert one is not None
    assert one["value"] == pytest.approx(affcache.score(run=runs["mtl"]).parts[1].scores.value, abs=1e-9)
    with pytest.raises(InputError, match="The runs are of several tasks"):
        affcache.score(run=runs["mtl"], against=runs["expr"])


def test_runs_of_some_of_the_tasks_are_refused(runs: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="or of all that the multi-task challenge has: va, expr, au"):
        affcache.score(run=[runs["expr"], runs["au"]])


def test_a_run_with_one_part_labelled_scores_what_that_task_does(tmp_path: Path) -> None:
    data = mtl_data(tmp_path, only="au")
    results = [
        affcache.score(run=affcache.fit(task=task, run=tmp_path / task, **data, **RECIPE).run, decide="fitted")
        for task in ("mtl", "au")
    ]
    assert results[0].task == "mtl"
    assert [part.task for part in results[0].parts] == ["au"]
    assert results[0].scores.value == results[1].scores.value
    assert results[0].parts[0].scores == results[1].scores
    assert results[0].parts[0].rule == results[1].rule


def test_rules_are_fitted_and_calibration_is_measured_on_labels_that_are_there() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(size=(200, 3))
    probabilities = 1 / (1 + np.exp(-logits))
    labels = (random.random((200, 3)) < probabilities).astype(int)
    gaps = random.random((200, 3)) < 0.4
    partial = np.where(gaps, -1, labels)
    for unit in range(3):
        has = ~gaps[:, unit]
        alone = fit_thresholds(probabilities[has][:, [unit]], labels[has][:, [unit]])
        assert fit_thresholds(probabilities, partial)[unit] == alone[0]
    shown, kept = np.where(gaps, 9.0, logits), ~gaps
    assert fit_temperature(shown, partial) == fit_temperature(logits, partial)
    assert fit_temperature(logits[kept][:, None], labels[kept][:, None]) == pytest.approx(
        fit_temperature(logits, partial)
    )
    alone = reliability(probabilities[kept][:, None], labels[kept][:, None])
    assert reliability(probabilities, partial).error == pytest.approx(alone.error)


def test_the_command_line_shows_each_part_and_their_sum(runs: dict[str, Path], capsys: Any) -> None:
    from affcache.cli.app import app

    with pytest.raises(SystemExit) as done:
        app(["score", str(runs["mtl"])])
    assert done.value.code == 0
    out = capsys.readouterr().out
    value = affcache.score(run=runs["mtl"]).scores.value
    assert f"P {value:.3f}" in out
    assert "mean CCC + macro F1 + mean F1" in out
    assert "valence" in out
    assert "AU26" in out


def test_a_trunk_is_scored_on_the_labels_it_was_fitted_on(tmp_path: Path) -> None:
    data = mtl_data(tmp_path)
    for split in ("train", "validation"):  # of another release, beside the challenge's file
        write_labels(data["annotations"], "expr", split, {f"{i}-30-640x360": [7] * 40 for i in range(6)})
    run = affcache.fit(task="mtl", run=tmp_path / "run", **data, **RECIPE)
    scored = affcache.score(run=run.run)
    assert scored.scores.value == pytest.approx(run.value, abs=1e-6)
    with h5py.File(scored.predictions_file) as file:
        assert set(file["expr"]["labels"][:].tolist()) > {7}
    last = affcache.fit(as_=tmp_path / "run", train_on="all", run=tmp_path / "last", held_out=0.3)
    with_rule = affcache.score(run=last.run, split="train", decide="fitted")
    folder = data["annotations"] / TASKS["expr"].folders[0]
    folder.rename(tmp_path / "away")
    assert affcache.score(run=last.run, split="train", decide="fitted").parts[1].rule == with_rule.parts[1].rule
    (tmp_path / "away").rename(folder)
    vary = {"task": ["mtl", "va", "expr", "au"]}
    result = affcache.ablate(task="mtl", vary=vary, out=tmp_path / "out", **data, **QUICK, seeds=1)
    assert result.rows[-1].task == "au", "labels of expr alone are others: nothing stands together"
