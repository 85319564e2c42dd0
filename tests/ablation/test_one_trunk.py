"""One trunk against a head for each task alone: a row of the table, paired over seeds and videos."""

import csv
from pathlib import Path
from typing import Any

import pytest

import affcache
from affcache.scoring.intervals import metric_interval
from affcache.scoring.together import beside
from affcache.tasks.multitask import MultiTask
from affcache.tasks.tasks import TASKS
from tests.training.test_multitask_training import mtl_data

MTL = TASKS["mtl"]
assert isinstance(MTL, MultiTask)
QUICK: dict[str, Any] = {
    "epochs": 3,
    "batch_size": 16,
    "hidden_width": 16,
    "hidden_layers": 1,
    "seeds": 2,
    "keep": "all",
}
TASK_NAMES = ("mtl", "va", "expr", "au")


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("folds", [None, 3])
def test_heads_alone_stand_together_beside_one_trunk(tmp_path: Path, folds: int | None) -> None:
    data, out = mtl_data(tmp_path, count=12), tmp_path / "out"
    vary = {"task": list(TASK_NAMES), "alpha": [0.5, 1.0]}
    result = affcache.ablate(task="mtl", vary=vary, out=out, folds=folds, **data, **QUICK)
    rows = {row.variant.name: row for row in result.rows}
    assert len(rows) == 10
    for alpha in ("0.5", "1"):
        trunk = rows[f"task=mtl, alpha={alpha}"]
        alone = rows[" + ".join(f"task={name}, alpha={alpha}" for name in ("va", "expr", "au"))]
        assert (alone.task, alone.metric, alone.count, alone.selected) == ("mtl", "p", 2, None)
        of_parts = [rows[f"task={name}, alpha={alpha}"].mean for name in ("va", "expr", "au")]
        assert alone.mean == pytest.approx(sum(of_parts), abs=1e-9)  # type: ignore[arg-type]
        assert alone.difference is not None
        if alpha == "0.5":
            assert trunk.is_base
            assert alone.difference.value == pytest.approx(alone.mean - trunk.mean, abs=1e-9)  # type: ignore[operator]
            assert alone.difference.bounds is not None
            assert alone.difference.bounds[0] < alone.difference.value < alone.difference.bounds[1]
    names = [line["setting"] for line in read(out / "summary.csv")]
    assert names == [row.variant.name for row in result.rows]
    assert {best["task"] for best in result.best} == set(TASK_NAMES), "what stands together is no run"
    if folds:
        assert (out / "out_of_fold" / "mtl-best-seed0.h5").is_file()


def test_the_difference_is_that_of_the_scores_of_the_kept_runs(tmp_path: Path) -> None:
    data, out = mtl_data(tmp_path, count=12), tmp_path / "out"
    result = affcache.ablate(task="mtl", vary={"task": list(TASK_NAMES)}, out=out, **data, **QUICK)
    alone = result.rows[-1]
    runs = {(line["task"], line["seed"]): out / line["run"] for line in read(out / "results.csv")}
    tables: list[list[Any]] = [[], []]
    for seed in ("0", "1"):
        together = affcache.score(run=[runs[name, seed] for name in TASK_NAMES[1:]])
        trunk = affcache.score(run=runs["mtl", seed])
        values = [together.scores.value, trunk.scores.value]
        for kept, value in zip(tables, values, strict=True):
            kept.append(value)
    assert alone.mean == pytest.approx(sum(tables[0]) / 2, abs=1e-6)
    assert alone.difference is not None
    assert alone.difference.value == pytest.approx((sum(tables[0]) - sum(tables[1])) / 2, abs=1e-6)


def test_without_each_task_alone_nothing_stands_together(tmp_path: Path) -> None:
    data = mtl_data(tmp_path)
    result = affcache.ablate(task="mtl", vary={"task": ["mtl", "va", "au"]}, out=tmp_path / "out", **data, **QUICK)
    assert [row.task for row in result.rows] == ["mtl", "va", "au"]


def test_with_one_part_labelled_the_trunk_is_that_task(tmp_path: Path) -> None:
    data = mtl_data(tmp_path, only="expr", count=12)
    result = affcache.ablate(task="mtl", vary={"task": ["mtl", "expr"]}, out=tmp_path / "out", **data, **QUICK)
    trunk, expr, together = result.rows
    assert trunk.mean == expr.mean == together.mean
    assert together.difference is not None
    assert together.difference.value == 0


def test_sums_beside_each_other_are_0_where_a_video_has_no_label() -> None:
    import numpy as np

    random = np.random.default_rng(0)
    tables = [random.random((2, part.outputs, 6 if part.name == "va" else 3)) for part in MTL.parts]
    videos, table = beside(MTL, list(zip([["a", "b"], ["b", "c"], ["c", "a"]], tables, strict=True)))
    assert videos == ["a", "b", "c"]
    assert np.array_equal(table[:2, :2], tables[0])
    assert (table[2, :2] == 0).all()
    assert np.array_equal(table[[2, 0], 10:, :3], tables[2])
    assert (table[:, 2:, 3:] == 0).all()
    assert metric_interval(MTL, [table]).value == pytest.approx(
        sum(part.metric_of(own.sum(axis=0)) for part, own in zip(MTL.parts, tables, strict=True))
    )
