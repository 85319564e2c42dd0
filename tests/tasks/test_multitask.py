"""Several tasks at once: P is the sum of what scikit-learn says of each, over the frames that have its label."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from affcache.errors import ConfigError, InputError
from affcache.store.frames import ENCODED
from affcache.tasks.annotations import join_labels, labelled_parts
from affcache.tasks.challenge_file import HEADER
from affcache.tasks.label_sources import find_labels
from affcache.tasks.multitask import MultiTask
from affcache.tasks.tasks import TASKS
from affcache.training.settings import FitSettings
from tests.tasks.challenge import challenge_lines, write_challenge
from tests.tasks.test_annotations import store_in_memory

MTL = TASKS["mtl"]
assert isinstance(MTL, MultiTask)


def ccc(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> float:
    """Return the concordance of two series as a textbook has it; 0 where one is constant."""
    if len(x) == 0 or x.std() < 1e-9 or y.std() < 1e-9:
        return 0.0
    covariance = ((x - x.mean()) * (y - y.mean())).mean()
    return float(2 * covariance / (x.var() + y.var() + (x.mean() - y.mean()) ** 2))


def drawn(seed: int, count: int, missing: tuple[float, float, float]) -> tuple[npt.NDArray[np.float32], ...]:
    """Draw labels and decisions (n, 15) in the challenge's columns, a share of each part's labels missing."""
    random = np.random.default_rng(seed)
    pairs = []
    for which in range(2):
        affect = random.uniform(-1, 1, (count, 2))
        expression = random.integers(0, 8, (count, 1)).astype(float)
        units = random.integers(0, 2, (count, 12)).astype(float)
        if which == 0:
            affect[random.random(count) < missing[0]] = np.nan
            expression[random.random(count) < missing[1]] = np.nan
            units[random.random((count, 12)) < missing[2]] = np.nan
        pairs.append(np.hstack([affect, expression, units]).astype(np.float32))
    return tuple(pairs)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 60), st.tuples(*[st.sampled_from([0.0, 0.3, 1.0])] * 3))
def test_p_is_the_sum_that_scikit_learn_and_a_textbook_ccc_say(
    seed: int, count: int, missing: tuple[float, float, float]
) -> None:
    labels, decided = drawn(seed, count, missing)
    there = ~np.isnan(labels)
    affect = np.mean([ccc(*(of[there[:, i], i].astype(float) for of in (labels, decided))) for i in (0, 1)])
    has = there[:, 2]
    expression = (
        f1_score(labels[has, 2], decided[has, 2], labels=range(8), average="macro", zero_division=0) if has.any() else 0
    )
    units = np.mean(
        [
            f1_score(labels[there[:, i], i], decided[there[:, i], i], zero_division=0) if there[:, i].any() else 0
            for i in range(3, 15)
        ]
    )
    scores = MTL.score(labels, decided)
    assert scores.value == pytest.approx(affect + expression + units, abs=1e-6)
    parts = {"mean_ccc": affect, "macro_f1": expression, "mean_f1": units}
    assert scores.further == pytest.approx(parts, abs=1e-6)
    assert [one.name for one in scores.classes] == list(MTL.classes)
    sums = MTL.sums_by_video(labels, decided, np.arange(count) % 3, 3)
    assert float(MTL.metric_of(sums.sum(axis=0))) == pytest.approx(scores.value, abs=1e-6)


def test_labels_are_split_into_each_tasks_own_form_and_joined_again() -> None:
    labels, _ = drawn(0, 40, (0.3, 0.3, 0.3))
    affect, expression, units = MTL.split(labels)
    assert (affect.dtype, expression.dtype, units.dtype) == (np.float32, np.int64, np.int64)
    assert (affect.shape, expression.shape, units.shape) == ((40, 2), (40,), (40, 12))
    assert set(np.unique(units)) == {-1, 0, 1}
    assert np.array_equal(MTL.joined([affect, expression, units]), labels, equal_nan=True)
    for own, of in zip(MTL.split(torch.from_numpy(labels)), (affect, expression, units), strict=True):
        assert np.array_equal(own.numpy(), of, equal_nan=True)


def test_outputs_stand_in_the_order_of_the_challenges_file() -> None:
    assert MTL.outputs == 22
    assert MTL.classes[:3] == ("valence", "arousal", "Neutral")
    assert MTL.metric_limits == (-1, 3)
    logits = torch.randn(5, 22, generator=torch.Generator().manual_seed(0))
    found = MTL.probabilities(logits)
    assert torch.equal(found[:, :2], logits[:, :2].clamp(-1, 1))
    assert torch.equal(found[:, 2:10], logits[:, 2:10].softmax(-1))
    assert torch.equal(found[:, 10:], logits[:, 10:].sigmoid())
    assert torch.allclose(MTL.probabilities(MTL.logits(found.double())), found.double())
    decided = MTL.decide(found.numpy())
    assert decided.shape == (5, 15)
    assert np.array_equal(decided[:, 2], found[:, 2:10].argmax(1))


# The file


def test_a_line_is_joined_by_its_frame_number_and_each_task_has_its_labels(tmp_path: Path) -> None:
    write_challenge(
        tmp_path,
        "train",
        {("b", 7): (0.5, -0.25, 3, [1] * 12), ("a", 2): (None, 0.1, None, None), ("a", 9): (0, 0, 1, None)},
    )
    store = store_in_memory({"a": [1, 2, 3], "b": [6, 7, 8]})
    joined = join_labels(store, tmp_path, "mtl", "train")
    assert joined.rows.tolist() == [1, 4]
    nan = np.nan
    expected = np.float32([[nan, 0.1, nan, *[nan] * 12], [0.5, -0.25, 3, *[1] * 12]])
    assert np.array_equal(joined.labels, expected, equal_nan=True)
    assert joined.account.partial == 1
    assert joined.account.no_crop == 1
    assert join_labels(store, tmp_path, "mtl", "train", "drop").rows.tolist() == [4]
    assert join_labels(store, tmp_path, "expr", "train").labels.tolist() == [3]
    assert join_labels(store, tmp_path, "au", "train").labels.tolist() == [[1] * 12]
    assert join_labels(store, tmp_path, "va", "train").rows.tolist() == [1, 4]


@pytest.mark.parametrize("where", ["", "MTL", "file"])
def test_the_file_may_lie_in_the_folder_or_below_or_be_named(tmp_path: Path, where: str) -> None:
    folder = tmp_path / ("MTL" if where == "MTL" else "")
    folder.mkdir(exist_ok=True)
    write_challenge(folder, "validation", {("a", 1): (0, 0, 0, [0] * 12)})
    named = folder / "training_set_annotations.txt" if where == "file" else tmp_path
    assert list(find_labels(named, MTL, "validation").videos) == ["a"]


def test_a_second_line_of_a_frame_is_counted_and_the_first_one_counts(tmp_path: Path) -> None:
    path = write_challenge(tmp_path, "train", {("a", 1): (0.5, 0.5, 3, None)})
    path.write_text(
        path.read_text() + "\n".join(challenge_lines({("a", 1): (0.1, 0.1, 5, None), ("a", 2): (0, 0, 2, None)}))
    )
    joined = join_labels(store_in_memory({"a": [1, 2]}), tmp_path, "expr", "train")
    assert joined.labels.tolist() == [3, 2]
    assert joined.account.repeated == 1
    assert "1 further label of a frame that has one" in joined.account.sentence("train")


@pytest.mark.parametrize(
    ("line", "number"),
    [
        ("a/00002.jpg,0.5,0.5,3" + ",0" * 11, 3),
        ("a/00002.jpg,0.5,0.5,3" + ",0" * 13, 3),
        ("a/00002.jpg,1.5,0.5,3" + ",0" * 12, 3),
        ("a/00002.jpg,0.5,0.5,8" + ",0" * 12, 3),
        ("a/00002.jpg,0.5,0.5,2.5" + ",0" * 12, 3),
        ("a/00002.jpg,0.5,0.5,3" + ",2" * 12, 3),
        ("a/00002.jpg,0.5,nan,3" + ",0" * 12, 3),
        ("a/00002.jpg,0.5,x,3" + ",0" * 12, 3),
        ("a/00002.jpg", 3),
        ("00002.jpg,0.5,0.5,3" + ",0" * 12, 3),
        ("", 3),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, number: int) -> None:
    path = write_challenge(tmp_path, "train", {("a", 1): (0, 0, 0, [0] * 12), ("a", 3): (0, 0, 0, [0] * 12)})
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
    with pytest.raises(InputError, match=rf"training_set_annotations\.txt, line {number}: .*Expected <video>/<frame"):
        join_labels(store_in_memory({"a": [1, 2, 3]}), tmp_path, "mtl", "train")


@pytest.mark.parametrize(
    "change", [lambda t: t.replace("\n", "\r\n"), lambda t: "\ufeff" + t, lambda t: t + "\n\n", str.rstrip]
)
def test_harmless_variations_read_the_same(tmp_path: Path, change) -> None:
    path = write_challenge(tmp_path, "train", {("a", i): (0.25, None, i, None) for i in range(1, 5)})
    store = store_in_memory({"a": [1, 2, 3, 4]})
    before = join_labels(store, tmp_path, "mtl", "train")
    path.write_bytes(change(path.read_text()).encode())
    assert join_labels(store, tmp_path, "mtl", "train").to_json() == before.to_json()


def test_another_header_is_refused_and_nothing_found_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "training_set_annotations.txt").write_text("image,valence\n")
    with pytest.raises(InputError, match=f"line 1: the header is 'image,valence', expected '{HEADER}'"):
        join_labels(store_in_memory({"a": [1]}), tmp_path, "mtl", "train")
    with pytest.raises(InputError, match=r"looked for validation_set_annotations\.txt in") as caught:
        find_labels(tmp_path, MTL, "validation")
    assert "--annotations DIR" in str(caught.value)


# What is labelled


def test_parts_that_a_split_lacks_are_left_out_and_said(tmp_path: Path) -> None:
    lines = {("a", 1): (0.5, 0.5, 3, None), ("a", 2): (None, None, 2, None), ("a", 3): (0.1, 0.1, None, None)}
    write_challenge(tmp_path, "train", lines)
    write_challenge(tmp_path, "validation", {("b", 1): (None, None, 3, [1] * 12)})
    store = store_in_memory({"a": [1, 2, 3], "b": [1]})
    assert (store.status == ENCODED).all()
    splits = [join_labels(store, tmp_path, MTL, split) for split in ("train", "validation")]
    said: list[str] = []

    class Heard:
        def warning(self, text: str) -> None:
            said.append(text)

    task, (train, validation) = labelled_parts(MTL, splits, Heard())
    assert [part.name for part in task.parts] == ["expr"]
    assert train.rows.tolist() == [0, 1]
    assert train.labels.tolist() == [[3], [2]]
    assert validation.labels.tolist() == [[3]]
    assert "Not labelled in both splits, and so neither trained nor scored: va, au. mtl is expr here" in said[0]


@pytest.mark.parametrize("text", ["expr", "expr=x", "other=1", "expr=-1", "expr=inf", "expr=nan"])
def test_task_weights_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a number of at least 0 for some of va, expr, au"):
        FitSettings(task="mtl", task_weights=text).require_fitting(MTL)


def test_settings_count_for_the_parts_that_have_a_use_for_them() -> None:
    assert FitSettings(task_weights="expr=2, au=0.5").weights_of(MTL) == [1, 2, 0.5]
    for fitting in ({"auc_weight": 0.2}, {"class_weights": "balanced"}, {"cvar_within": "class"}, {"focal_gamma": 1.0}):
        FitSettings(task="mtl", **fitting).require_fitting(MTL)
    with pytest.raises(ConfigError, match="--task-weights is expr=1, but expr is one task"):
        FitSettings(task="expr", task_weights="expr=1").require_fitting(TASKS["expr"])
    with pytest.raises(ConfigError, match="--loss 'hinge' is no loss of"):
        FitSettings(task="mtl", loss="hinge").require_fitting(MTL)


@pytest.mark.parametrize("end", ["", "\n\n"])
def test_a_header_alone_has_no_labels(tmp_path: Path, end: str) -> None:
    (tmp_path / "training_set_annotations.txt").write_text(HEADER + "\n" + end)
    with pytest.raises(InputError, match="a header and no line below it"):
        join_labels(store_in_memory({"a": [1]}), tmp_path, "mtl", "train")
