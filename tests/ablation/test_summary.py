"""What trials say of their settings: means, spreads, and differences paired over seeds and videos."""

import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from affcache.ablation.grid import Variant
from affcache.ablation.summary import FEW_SEEDS, Outcome, Summary, paired_difference, summarise
from affcache.ablation.tables import columns_of, headings, latex, markdown, write_results, write_summary
from affcache.tasks.metrics import Interval
from affcache.tasks.tasks import TASKS

EXPR = TASKS["expr"]
VIDEOS = [f"video {index}" for index in range(12)]


def outcome(accuracy: float, seed: int, videos: list[str] = VIDEOS, noise: int = 0) -> Outcome:
    """Draw what a head decides that is right so often; ``noise`` 0 has every seed's luck the same for all heads."""
    random = np.random.default_rng([seed, noise])
    labels, video = random.integers(0, 8, 600), random.integers(0, len(videos), 600)
    decided = np.where(random.random(600) < accuracy, labels, random.integers(0, 8, 600))
    value = EXPR.score(labels, decided).value
    statistics = EXPR.sums_by_video(labels, decided, video, len(videos))
    return Outcome(value, value - 0.1, 3, None, [], statistics, videos)


BROKEN = Outcome(None, None, 0, 2, [], None, [])


def variant(name: str, **values: Any) -> Variant:
    return Variant(name, values, (Path("store.h5"),))


def rows_of(outcomes: list[dict[int, Outcome]]) -> list[Summary]:
    variants = [variant(f"alpha={index}", alpha=index) for index in range(len(outcomes))]
    return summarise(variants, outcomes, 0, [TASKS["expr"]] * len(variants))


def test_means_and_spreads_are_over_finished_seeds() -> None:
    found = {seed: outcome(0.5, seed) for seed in range(4)}
    base, other, broken, none = rows_of([found, {0: outcome(0.6, 0), 7: BROKEN}, {0: BROKEN}, {}])
    values = [one.value for one in found.values()]
    assert base.mean == pytest.approx(statistics.fmean(values))  # type: ignore[type-var]
    assert base.deviation == pytest.approx(statistics.stdev(values))  # type: ignore[type-var]
    assert base.selected == pytest.approx(base.mean - 0.1)
    assert (base.count, base.is_base, base.difference) == (4, True, None)
    assert (other.count, other.diverged, other.finished, other.deviation) == (1, 1, 2, None)
    assert (broken.mean, broken.difference, broken.diverged) == (None, None, 1)
    assert (none.finished, none.mean, none.difference) == (0, None, None)


def test_the_difference_is_of_shared_seeds() -> None:
    base = {seed: outcome(0.4, seed) for seed in range(3)}
    other = {seed: outcome(0.7, seed) for seed in range(1, 5)}
    found = paired_difference(other, base, EXPR)
    assert found is not None
    expected = statistics.fmean(other[seed].value - base[seed].value for seed in (1, 2))  # type: ignore[operator]
    assert found.value == pytest.approx(expected, abs=1e-12)
    assert found.bounds is not None
    assert 0 < found.bounds[0] < found.value < found.bounds[1], "0.7 and 0.4 are clearly apart"
    assert paired_difference({9: outcome(0.7, 9)}, base, EXPR) is None
    assert paired_difference({0: outcome(0.7, 0)}, {0: BROKEN}, EXPR) is None


def test_a_difference_is_one_from_three_seeds_on() -> None:
    for seeds in (2, FEW_SEEDS):
        base, other = ({seed: outcome(accuracy, seed) for seed in range(seeds)} for accuracy in (0.4, 0.7))
        _, row = rows_of([base, other])
        assert row.difference is not None
        assert row.difference.bounds is not None
        assert row.difference.bounds[0] > 0
        assert row.differs == (seeds == FEW_SEEDS)
    _, alike = rows_of([base, base])
    assert not alike.differs


def test_pairing_takes_off_what_seeds_and_videos_share() -> None:
    base = {seed: outcome(0.5, seed) for seed in range(3)}
    alike = {seed: outcome(0.52, seed) for seed in range(3)}
    apart = {seed: outcome(0.52, seed, noise=1) for seed in range(3)}
    widths = []
    for other in (alike, apart):
        found = paired_difference(other, base, EXPR)
        assert found is not None
        assert found.bounds is not None
        widths.append(found.bounds[1] - found.bounds[0])
    assert widths[0] < 0.5 * widths[1]


def test_videos_that_only_one_store_has_are_left_out() -> None:
    base, other = outcome(0.5, 0), outcome(0.8, 0, videos=[*VIDEOS[3:], "another"])
    found = paired_difference({0: other}, {0: base}, EXPR)
    assert found is not None
    assert base.statistics is not None
    assert other.statistics is not None
    shared = EXPR.metric_of(other.statistics[:9].sum(0)) - EXPR.metric_of(base.statistics[3:].sum(0))
    assert found.value == pytest.approx(float(shared))
    nothing = outcome(0.8, 0, videos=["elsewhere"])
    assert paired_difference({0: nothing}, {0: base}, EXPR) is None


def test_no_difference_is_found_about_as_often_as_the_level_says() -> None:
    held = 0
    for trial in range(60):
        pair = [{seed: outcome(0.5, 100 * trial + seed, noise=noise) for seed in range(3)} for noise in (1, 2)]
        found = paired_difference(*pair, EXPR)
        assert found is not None
        assert found.bounds is not None
        held += found.bounds[0] <= 0 <= found.bounds[1]
    assert held >= 54


def test_a_task_is_compared_with_its_own_base() -> None:
    variants = [variant(f"{task} {alpha}", task=task, alpha=alpha) for task in ("expr", "au") for alpha in (1, 2)]
    found = [{0: outcome(0.5, 0)} for _ in variants[:2]]
    units = np.ones((len(VIDEOS), 12, 3))
    found += [{0: replace(outcome(0.5, 0), statistics=units)} for _ in variants[2:]]
    rows = summarise(variants, found, 1, [TASKS[str(one.values["task"])] for one in variants])
    assert [row.is_base for row in rows] == [False, True, False, True]
    assert [row.difference is not None for row in rows] == [True, False, True, False]
    assert [row.metric for row in rows] == ["macro_f1", "macro_f1", "mean_f1", "mean_f1"]


def row(name: str, **values: Any) -> Summary:
    default: dict[str, Any] = {
        "variant": variant(name), "task": "expr", "metric": "macro_f1", "finished": 3, "diverged": 0, "mean": 0.5,
        "deviation": 0.01, "selected": 0.6, "difference": None, "is_base": False,
    }  # fmt: skip
    return Summary(**{**default, **values})


ROWS = [
    row("alpha=1", is_base=True),
    row("a_b & 50 %", mean=0.4567, difference=Interval(-0.0433, (-0.06, 0.001))),
    row("wild", diverged=1, difference=Interval(0.01, (0.0, 0.02))),
    row("gone | lost", finished=2, diverged=2, mean=None, deviation=None, selected=None),
]


def test_tables_for_papers_say_what_the_summary_says() -> None:
    assert markdown(ROWS, heldout=True).splitlines() == [
        "| setting | n | held out | macro F1 | s.d. | difference | 95 % interval |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| alpha=1 | 3 | 0.600 | 0.500 | 0.010 | base |  |",
        "| a_b & 50 % | 3 | 0.600 | 0.457 | 0.010 | -0.043 | -0.060 to +0.001 |",
        "| wild | 2 (1 diverged) | 0.600 | 0.500 | 0.010 | +0.010 | +0.000 to +0.020 |",
        "| gone \\| lost | 0 (2 diverged) |  |  |  |  |  |",
    ]
    assert latex(ROWS, heldout=False).splitlines() == [
        r"\begin{tabular}{lrrrrr}",
        r"\toprule",
        r"setting & n & macro F1 & s.d. & difference & 95\,\% interval \\",
        r"\midrule",
        r"alpha=1 & 3 & 0.500 & 0.010 & base &  \\",
        r"a\_b \& 50 \% & 3 & 0.457 & 0.010 & $-0.043$ & $-0.060$ to $+0.001$ \\",
        r"wild & 2 (1 diverged) & 0.500 & 0.010 & $+0.010$ & $+0.000$ to $+0.020$ \\",
        r"gone | lost & 0 (2 diverged) &  &  &  &  \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
    assert all(len(columns_of(one, held)) == len(headings(ROWS, held)) for one in ROWS for held in (True, False))


def test_csv_files_hold_full_precision(tmp_path: Path) -> None:
    write_summary(tmp_path / "summary.csv", ROWS[:2], [])
    lines = (tmp_path / "summary.csv").read_text().splitlines()
    assert lines[1] == "alpha=1,store,macro_f1,3,0,0.5,0.01,,,,0.6"
    assert lines[2] == "a_b & 50 %,store,macro_f1,3,0,0.4567,0.01,-0.0433,-0.06,0.001,0.6"
    write_results(tmp_path / "results.csv", [], ["alpha"])
    assert (tmp_path / "results.csv").read_text() == (
        "setting,store,alpha,seed,metric,value,chosen_by,best_epoch,diverged_in_epoch,run\n"
    )
    assert math.isfinite(float(lines[1].split(",")[5]))
