"""Runs of several encoders that predict together: frames that one store lacks, weights, and whose store is whose."""

import itertools
import json
import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from affcache.errors import ConfigError, InputError, StoreError
from affcache.reporting.report import report
from affcache.scoring.ensemble import averaged, fit_weights, parse_weights, rule_of_average, shares_of
from affcache.scoring.intervals import metric_interval
from affcache.scoring.score import ScoreResult, score
from affcache.scoring.trained import TrainedHead
from affcache.store.frames import ABSENT, all_frames
from affcache.store.joined import join_stores
from affcache.store.reading import EmbeddingStore
from affcache.submission.submit import submit
from affcache.tasks.annotations import join_labels
from affcache.tasks.tasks import TASKS
from affcache.training.fit import fit
from tests.conftest import Heard, MakeData, write_labels, write_store

QUICK: dict[str, Any] = {"epochs": 3, "hidden_layers": 1, "hidden_width": 16, "batch_size": 16, "rho": 0.05}
Two = tuple[Path, Path, Path]


@pytest.fixture
def two(learnable: MakeData, tmp_path: Path) -> Two:
    """Labels, a run on a store of width 16, and one on a store of width 5 that lacks frames 11 to 20 of each video."""
    store, annotations = learnable(videos=9)
    opened = EmbeddingStore.open(store)
    kept = np.flatnonzero((opened.frame_number <= 10) | (opened.frame_number > 20))
    videos = {name: [*range(1, 11), *range(21, 41)] for name in opened.video_names}
    mixed = np.random.default_rng(1).normal(size=(16, 5))
    features = (opened.features[kept].astype(np.float32) @ mixed).astype(np.float16)
    write_store(tmp_path / "five.h5", videos, features, weights_sha256="5" * 64, model="five", width=5)
    recipe = {**QUICK, "annotations": annotations, "held_out": 0.3}
    fit(store=store, run=tmp_path / "one", **recipe)
    fit(store=tmp_path / "five.h5", run=tmp_path / "other", **recipe)
    return annotations, tmp_path / "one", tmp_path / "other"


def said(result: ScoreResult) -> dict[tuple[str, int], Any]:
    """Probabilities by video and frame."""
    with h5py.File(result.predictions_file) as file:
        names = file["video_name"].asstr()[:]
        frames = zip(names[file["video"][:]], file["frame_number"][:].tolist(), strict=True)
        return dict(zip(frames, file["probabilities"][:], strict=True))


def test_frames_that_one_store_lacks_get_the_others_word(two: Two) -> None:
    _, one, other = two
    heard = Heard()
    both = said(score(run=(one, other), listener=heard))
    first, second = said(score(run=one)), said(score(run=other))
    assert both.keys() == first.keys() > second.keys()
    for frame, probabilities in both.items():
        expected = (first[frame] + second[frame]) / 2 if frame in second else first[frame]
        np.testing.assert_allclose(probabilities, expected, atol=1e-6)
    assert any(m.startswith("90 of 360 frames have no embedding in ") and "five.h5" in m for m in heard.messages)
    assert said(score(run=(other, one))).keys() == both.keys()


def test_weights_weigh(two: Two, tmp_path: Path) -> None:
    _, one, other = two
    first, second = said(score(run=one)), said(score(run=other))
    result = score(run=(one, other), weights="0.3,0.9")
    assert Path(result.scores_file) == one / "average" / "scores-weighted.json"
    weighed = said(result)
    for frame, probabilities in weighed.items():
        expected = 0.25 * first[frame] + 0.75 * second[frame] if frame in second else first[frame]
        np.testing.assert_allclose(probabilities, expected, atol=1e-6)
    without = said(score(run=(one, other), weights="1,0"))
    for frame, probabilities in without.items():
        np.testing.assert_allclose(probabilities, first[frame], atol=1e-6)
    only_other = said(score(run=(one, other), weights="0,2"))
    for frame, probabilities in only_other.items():
        np.testing.assert_allclose(probabilities, second.get(frame, first[frame]), atol=1e-6)
    for wrong in ("1", "1,2,3", "-1,2", "a,b", "0,0", "nan,1", "inf,1"):
        with pytest.raises(ConfigError, match="--weights is"):
            score(run=(one, other), weights=wrong)
    with pytest.raises(ConfigError, match="--weights fitted weighs several runs"):
        score(run=one, weights="fitted")
    with pytest.raises(ConfigError, match="which weighs several runs; expected none: a report is of one"):
        report(run=one, weights="1,2")


def test_fitted_weights_come_from_held_out_videos_and_are_kept(two: Two) -> None:
    _, one, other = two
    result = score(run=(one, other), weights="fitted")
    assert result.scores_file.endswith("scores-fitted.json")
    weights = json.loads(Path(result.scores_file).read_text())["rule"]["weights"]
    assert result.rule.fitted_on == "held-out training videos"
    same = score(run=(one, other), weights=",".join(map(repr, weights)))
    assert said(same).keys() == said(result).keys()
    assert same.scores.value == result.scores.value
    fitted_on_validation = score(run=(one, other), weights="fitted", fit_on="validation")
    assert fitted_on_validation.scores.value >= score(run=(one, other)).scores.value
    assert fitted_on_validation.rule.optimistic


def test_views_and_weights_go_together() -> None:
    there = np.array([[True, True], [True, False]])
    shares = shares_of(there, (3.0, 1.0), 2).numpy()
    np.testing.assert_allclose(shares, [[0.375, 0.5], [0.375, 0.5], [0.125, 0], [0.125, 0]])
    np.testing.assert_allclose(shares_of(there, None).numpy(), [[0.5, 1], [0.5, 0]])
    np.testing.assert_allclose(shares_of(there, (0.0, 1.0)).numpy(), [[0, 1], [1, 0]])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["expr", "au", "va"]), st.integers(2, 4), st.integers(0, 99))
def test_logits_of_a_weighted_mean_stand_for_its_probabilities(name: str, runs: int, seed: int) -> None:
    random, task = np.random.default_rng(seed), TASKS[name]
    logits = [torch.from_numpy(random.normal(size=(6, task.outputs))) for _ in range(runs)]
    there = random.random((runs, 6)) < 0.7
    there[random.integers(runs, size=6), range(6)] = True
    weights = tuple(random.random(runs) + 0.01)
    probabilities, mean = averaged(task, logits, shares_of(there, weights))
    for frame in range(6):
        shares = np.array(weights) * there[:, frame]
        each = [task.probabilities(one[frame]).numpy() for one in logits]
        np.testing.assert_allclose(probabilities[frame], np.average(each, axis=0, weights=shares), rtol=1e-9)
    np.testing.assert_allclose(task.probabilities(mean).numpy(), probabilities, rtol=1e-9)
    alike = averaged(task, logits, shares_of(np.ones((runs, 6), dtype=bool), None))
    np.testing.assert_allclose(alike[0], averaged(task, logits)[0], rtol=1e-12)
    np.testing.assert_allclose(alike[1], averaged(task, logits)[1], rtol=1e-9, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 4), st.integers(0, 9999))
def test_fitted_weights_are_never_worse_than_equal_ones_or_the_best_run(runs: int, seed: int) -> None:
    values = np.random.default_rng(seed).random((2, runs))

    def metric(weights: tuple[float, ...]) -> float:
        return float(values[0] @ weights - ((np.array(weights) - values[1]) ** 2).sum())

    found = fit_weights(runs, metric)
    assert sum(found) == pytest.approx(1)
    assert min(found) >= 0
    alone = [metric(tuple(np.eye(runs)[run].tolist())) for run in range(runs)]
    assert metric(found) >= max(metric((1 / runs,) * runs), *alone)


def test_fitted_weights_find_the_optimum_of_a_simple_case() -> None:
    found = fit_weights(3, lambda weights: -float(((np.array(weights) - [0.7, 0.3, 0.0]) ** 2).sum()))
    assert found == pytest.approx((0.7, 0.3, 0.0), abs=0.051)
    assert fit_weights(3, lambda weights: 1.0) == pytest.approx((1 / 3,) * 3), "where nothing helps, all count alike"
    assert parse_weights("", 3) is None


def test_each_store_is_found_by_its_encoder(two: Two, tmp_path: Path) -> None:
    _, one, other = two
    stores = (tmp_path / "expr.h5", tmp_path / "five.h5")
    values = [
        score(run=runs, store=given).scores.value
        for runs, given in itertools.product([(one, other), (other, one)], [stores, stores[::-1], ()])
    ]
    assert len(set(values)) == 1
    with pytest.raises(StoreError, match=r"other was trained on embeddings of another encoder than .*expr\.h5 holds"):
        score(run=(one, other), store=stores[0])
    heard = Heard()
    score(run=one, store=stores, listener=heard)
    assert heard.warnings == [f"{stores[1]} isn't read: no run was trained on embeddings of its encoder"]
    encoder = EmbeddingStore.open(stores[1]).encoder
    unlike = {"weights_sha256": "7" * 64}
    third = write_store(tmp_path / "third.h5", {"a": [1]}, np.ones((1, 5), np.float16), **{**encoder, **unlike}).path
    with pytest.raises(StoreError, match=r"other needs embeddings by five, and none of the stores holds them: .*expr"):
        score(run=(one, other), store=(stores[0], third))


def test_another_run_is_compared_on_the_frames_that_both_have(two: Two) -> None:
    annotations, one, other = two
    heard = Heard()
    result = score(run=one, against=other, listener=heard)
    assert result.against is not None
    assert (result.against["frames"], result.frames) == (90, 120)
    assert result.against["value"] == score(run=other).scores.value
    frames = said(score(run=other)).keys()
    ours, labels = said(result), {}
    for video, frame in frames:
        lines = next(annotations.rglob(f"Validation_Set/{video}.txt")).read_text().splitlines()
        labels[video, frame] = int(lines[frame])
    decided = np.array([ours[frame].argmax() for frame in frames])
    value = TASKS["expr"].score(np.array([labels[frame] for frame in frames]), decided).value
    assert result.against["own"] == value
    assert result.against["difference"]["value"] == pytest.approx(value - result.against["value"])
    turned = score(run=other, against=one).against
    assert turned is not None
    assert turned["difference"]["value"] == pytest.approx(-result.against["difference"]["value"])


def test_a_submission_of_two_encoders_fills_every_line(two: Two, tmp_path: Path) -> None:
    _, one, other = two
    store, five = tmp_path / "expr.h5", tmp_path / "five.h5"
    names = EmbeddingStore.open(store).video_names[:2]
    lines = [f"{name}/{frame:05d}.jpg," for name in names for frame in range(1, 46)]
    template = tmp_path / "template.txt"
    template.write_text("\n".join(["image_location", *lines]) + "\n")
    asked: dict[str, Any] = {"run": (one, other), "template": template, "overwrite": True}
    result = submit(out=tmp_path / "out.txt", store=(five, store), **asked)
    written = (tmp_path / "out.txt").read_text().splitlines()
    assert [line.partition(",")[0] for line in written[1:]] == [line[:-1] for line in lines]
    assert all(line.partition(",")[2] in "01234567" and line[-1] != "," for line in written[1:])
    assert (result.lines, result.filled) == (90, 10), "frames 41 to 45 have no crop; those of one store do"
    weighed = submit(out=tmp_path / "weighed.txt", store=(five, store), weights="fitted", **asked)
    assert weighed.rule.weights is not None
    with pytest.raises(StoreError, match=r"one was trained on embeddings of another encoder than .*five\.h5 holds"):
        submit(out=tmp_path / "out.txt", store=five, **asked)


def test_stores_that_share_nothing_are_refused(two: Two, tmp_path: Path) -> None:
    annotations, one, other = two
    encoder = EmbeddingStore.open(tmp_path / "five.h5").encoder
    away = write_store(tmp_path / "away.h5", {"x": [1, 2]}, np.ones((2, 5), np.float16), **encoder).path
    with pytest.raises(InputError, match="share no frame, so that nothing can be averaged"):
        score(run=(one, other), store=(tmp_path / "expr.h5", away))
    videos = {name: range(11, 21) for name in EmbeddingStore.open(tmp_path / "expr.h5").video_names}
    features = np.random.default_rng(3).normal(size=(90, 4)).astype(np.float16)
    rest = write_store(tmp_path / "rest.h5", videos, features, weights_sha256="4" * 64, width=4).path
    fit(store=rest, annotations=annotations, run=tmp_path / "rest", **QUICK)
    with pytest.raises(InputError, match="No labelled frame is both in"):
        score(run=other, against=tmp_path / "rest")


def test_the_interval_of_a_difference_is_over_videos_that_both_have(two: Two, tmp_path: Path) -> None:
    annotations, one, _ = two
    five = EmbeddingStore.open(tmp_path / "five.h5")
    names = [name for v, name in enumerate(five.video_names) if v % 3 != 2 or v < 6]  # not the last of validation
    rows = np.flatnonzero(np.isin(np.array(five.video_names)[five.video_of_rows()], names))
    listing = {name: five.frame_number[rows][five.video_of_rows()[rows] == five.video_names.index(name)].tolist()
               for name in names}  # fmt: skip
    write_store(tmp_path / "part.h5", listing, five.read(rows), **five.encoder)
    fit(store=tmp_path / "part.h5", annotations=annotations, run=tmp_path / "part", **QUICK)
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("affcache.scoring.together.metric_interval",
                      lambda task, ours, theirs=(), **more: seen.append(len(ours[0]) if theirs else 0)
                      or metric_interval(task, ours, theirs, **more))  # fmt: skip
        score(run=one, against=tmp_path / "part")
    assert max(seen) == 2, "of three validation videos"


def test_the_rule_of_an_average_is_of_these_very_heads_and_the_newest(two: Two, tmp_path: Path) -> None:
    annotations, one, other = two
    heads = [TrainedHead.open(run, "cpu") for run in (one, other)]
    assert rule_of_average(heads) is None
    score(run=(one, other), weights="fitted")
    path = one / "average" / "scores-fitted.json"
    found = json.loads(path.read_text())
    found["rule"]["weights"] = [0.75, 0.25]
    path.write_text(json.dumps(found))
    first, second = rule_of_average(heads), rule_of_average(heads[::-1])
    assert first is not None
    assert second is not None
    assert (first.weights, second.weights) == ((0.75, 0.25), (0.25, 0.75))
    score(run=(other, one), decide="fitted")
    newer = other / "average" / "scores-fitted.json"
    os.utime(path, (1, 1))
    for order in (heads, heads[::-1]):
        rule = rule_of_average(order)
        assert rule is not None
        assert rule.offsets is not None, "the newer one, whichever run is named first"
    newer.unlink()
    twice = {
        **found,
        "heads": [*found["heads"], found["heads"][0]],
        "rule": {**found["rule"], "weights": [0.2, 0.3, 0.5]},
    }
    path.write_text(json.dumps(twice))
    both = rule_of_average([heads[1], heads[0], heads[0]])
    assert both is not None
    assert both.weights == (0.3, 0.2, 0.5)
    for weights in ([-1, 2, 1], [0, 0, 0], [1e308, 1e308, 1e308], ["a"], 3):
        path.write_text(json.dumps({**twice, "rule": {**found["rule"], "weights": weights}}))
        with pytest.raises(StoreError, match="no rule that can be read"):
            rule_of_average([heads[1], heads[0], heads[0]])
    path.write_text(json.dumps(found))
    fit(store=tmp_path / "five.h5", annotations=annotations, run=tmp_path / "anew", **{**QUICK, "seed": 5})
    assert rule_of_average([heads[0], TrainedHead.open(tmp_path / "anew", "cpu")]) is None


def test_two_stores_by_one_encoder_are_taken_as_they_were_trained_on(two: Two, tmp_path: Path) -> None:
    annotations, _, _ = two
    store = EmbeddingStore.open(tmp_path / "expr.h5")
    videos, features = {name: range(1, 41) for name in store.video_names}, store.read(np.arange(len(store)))

    def kinds(name: str, more: float) -> tuple[Path, Path]:
        signs = {"tight": 1, "loose": -1}
        return tuple(
            write_store(tmp_path / f"{name}-{kind}.h5", videos, sign * features + np.float16(more), width=16).path
            for kind, sign in signs.items()
        )  # type: ignore[return-value]

    trained_on, others, run = kinds("old", 0), kinds("new", 1), tmp_path / "kinds"
    fit(store=trained_on, annotations=annotations, run=run, **QUICK)
    values = [score(run=run, store=given).scores.value for given in ((), trained_on, trained_on[::-1])]
    assert len(set(values)) == 1
    heard = Heard()
    score(run=run, store=others, listener=heard)
    assert f"takes them as {others[0]} + {others[1]}" in " ".join(heard.messages), "which is which can't be known"


def test_a_label_that_one_store_alone_could_not_place_isnt_placed_by_a_join(tmp_path: Path) -> None:
    one = write_store(tmp_path / "a.h5", {"1/Q4": [1, 2], "2/Q4": [1, 2]}, np.ones((4, 3), np.float16), width=3)
    fewer = write_store(
        tmp_path / "b.h5", {"1/Q4": [1, 2]}, np.ones((2, 2), np.float16), weights_sha256="2" * 64, width=2
    )
    joined = join_stores([one, fewer])
    assert joined.known_names == ("1/Q4", "2/Q4")
    labels = write_labels(tmp_path, "expr", "train", {"Q4": [0, 1]})
    third = write_store(tmp_path / "c.h5", {"1/Q4": [2, 3]}, np.ones((2, 4), np.float16), weights_sha256="3" * 64)
    every, rows = all_frames([joined, third])
    assert (every.video_names, every.video_start.tolist()) == (("1/Q4", "2/Q4"), [0, 3, 3])
    assert [own.tolist() for own in rows] == [[0, 1, ABSENT], [ABSENT, 0, 1]]
    for frames in (joined, every):
        with pytest.raises(InputError, match="Q4 may be any of 2 videos"):
            join_labels(frames, labels, "expr", "train")


def test_a_video_that_one_run_held_out_and_another_lacks_serves_for_rules(two: Two, tmp_path: Path) -> None:
    annotations, one = two[0], tmp_path / "half"
    store = EmbeddingStore.open(tmp_path / "expr.h5")
    fit(store=store.path, annotations=annotations, run=one, **{**QUICK, "held_out": 0.85})
    held = json.loads((one / "config.json").read_text())["labels"]["train"]["held_out_videos"]
    assert len(held) > 1
    for name, left in {"fewer": held[:1], "none": held}.items():
        videos = {video: range(1, 41) for video in store.video_names if video not in left}
        rows = np.flatnonzero(np.isin(np.array(store.video_names)[store.video_of_rows()], list(videos)))
        path = write_store(tmp_path / f"{name}.h5", videos, store.read(rows)[:, :7], weights_sha256=name, width=7).path
        recipe = {**QUICK, "annotations": annotations, **({"held_out": 0.85} if name == "fewer" else {})}
        fit(store=path, run=tmp_path / name, **recipe)
    assert score(run=(one, tmp_path / "fewer"), weights="fitted").rule.weights is not None
    with pytest.raises(ConfigError, match="A rule can't be fitted on held-out training videos"):
        score(run=(one, tmp_path / "none"), weights="fitted")
