"""Folds: persons and folders never apart, frames once, alike in labels; what labels say of them; splits united."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedGroupKFold

from affcache.errors import ConfigError, InputError
from affcache.tasks.annotations import JoinAccount, JoinedLabels
from affcache.tasks.metrics import class_counts
from affcache.tasks.splits import deal_out, find_folds, stripped_name, unite
from affcache.tasks.tasks import TASKS
from tests.conftest import Heard

EXPR, VA = TASKS["expr"], TASKS["va"]


@dataclass
class Frames:
    """The videos of a store, each with as many frames."""

    videos: dict[str, int]
    path: Path = field(default=Path("s.h5"))

    @property
    def video_names(self) -> tuple[str, ...]:
        return tuple(self.videos)

    @property
    def frame_number(self) -> npt.NDArray[np.int32]:
        return np.concatenate([np.arange(1, count + 1) for count in self.videos.values()]).astype(np.int32)

    def video_of_rows(self) -> npt.NDArray[np.int64]:
        return np.repeat(np.arange(len(self.videos)), list(self.videos.values()))


def joined(store: Frames, seed: int = 0, task: str = "expr", **folds: str) -> JoinedLabels:
    """Label every frame at random."""
    random, count = np.random.default_rng(seed), sum(store.videos.values())
    if TASKS[task].parts:
        return JoinedLabels(
            np.arange(count),
            TASKS[task].joined([joined(store, seed, part.name).labels for part in TASKS[task].parts]),
            JoinAccount(used=count),
            folds,
        )
    labels: npt.NDArray[Any] = random.integers(0, 8, count) ** 2 // 8
    if task != "expr":
        labels = {"au": random.integers(0, 2, (count, 12)), "va": random.uniform(-1, 1, (count, 2))}[task]
    return JoinedLabels(np.arange(count), labels.astype(TASKS[task].label_dtype), JoinAccount(used=count), folds)


def found(store: Any, labels: JoinedLabels, count: int, by: str = "video", task: str = "expr") -> npt.NDArray[np.int64]:
    return find_folds(store, TASKS[task], labels, count, by, Heard())


PERSONS = st.sampled_from(["", "_left", "_right"])
NAMES = st.builds("{}{}{}".format, st.sampled_from(["", "p1/", "p2/", "p2/a/"]), st.integers(0, 5), PERSONS)
VIDEOS = st.dictionaries(NAMES, st.integers(1, 9), min_size=2)


@given(VIDEOS, st.integers(2, 6), st.sampled_from(["expr", "au", "va"]), st.sampled_from(["video", "folder"]))
def test_whoever_was_filmed_together_is_in_one_fold_and_none_is_empty(
    videos: dict[str, int], count: int, task: str, by: str
) -> None:
    store = Frames(dict(sorted(videos.items())))
    names = [stripped_name(store.video_names[video]) for video in store.video_of_rows()]
    kept = [name.partition("/")[0] if by == "folder" else name for name in names]
    labels = joined(store, task=task)
    if count > len(set(kept)):
        with pytest.raises(ConfigError, match=rf"--folds is {count}, but .* of {len(set(kept))} {by}.* Lower --folds"):
            found(store, labels, count, by, task)
        return
    folds = found(store, labels, count, by, task)
    assert set(folds.tolist()) == set(range(count))
    assert len(folds) == len(labels)
    together: dict[str, set[int]] = {}
    for name, fold in zip(kept, folds.tolist(), strict=True):
        together.setdefault(name, set()).add(fold)
    assert all(len(of) == 1 for of in together.values())
    assert np.array_equal(folds, found(store, labels, count, by, task)), "no chance in it"


def spread(counts: npt.NDArray[Any], folds: npt.NDArray[np.int64], count: int) -> float:
    """How much folds differ in their shares of the classes."""
    shares = np.stack([counts[folds == fold].sum(axis=0) / counts.sum(axis=0).clip(min=1) for fold in range(count)])
    return float(shares.std(axis=0).mean())


def test_folds_are_as_alike_as_those_of_scikit_learn() -> None:
    ours, theirs = [], []
    for seed in range(12):
        random = np.random.default_rng(seed)
        sizes, habit = random.integers(5, 200, 40), random.dirichlet(np.ones(8) / 2, 40)
        labels = np.concatenate([random.choice(8, n, p=p) for n, p in zip(sizes, habit, strict=True)])
        group = np.repeat(np.arange(40), sizes)
        counts = class_counts(labels, labels, group, 40, 8)
        ours.append(spread(counts[:, :, 2], deal_out(counts, sizes, 5), 5))
        of_groups = np.empty(40, np.int64)
        for fold, (_, tested) in enumerate(StratifiedGroupKFold(5).split(labels, labels, group)):
            of_groups[group[tested]] = fold
        theirs.append(spread(counts[:, :, 2], of_groups, 5))
    assert np.mean(ours) <= 1.02 * np.mean(theirs)
    assert np.mean(ours) < 0.05


def test_each_goes_where_shares_then_differ_least() -> None:
    random = np.random.default_rng(0)
    counts = random.gamma(0.1, 20, (80, 12, 1))
    sizes, shares = np.full(80, 5), counts[:, :, 0] / counts[:, :, 0].sum(axis=0)
    dealt, held = deal_out(counts, sizes, 4), np.zeros((4, 12))
    order = np.argsort(-counts[:, :, 0].std(axis=1), kind="stable")
    for place, group in enumerate(order):
        tried = np.stack([held + shares[group] * (np.arange(4) == fold)[:, None] for fold in range(4)])
        differ = tried.std(axis=1).mean(axis=1)
        if len(order) - place > (~held.any(axis=1)).sum():
            assert differ[dealt[group]] == pytest.approx(differ.min(), rel=1e-5)
        held[dealt[group]] += shares[group]


def test_no_fold_is_empty_where_two_videos_would_cancel() -> None:
    sums = np.array([[[0.5]], [[-0.5]], [[0.2]], [[-0.2]]])  # of values around their centre
    assert deal_out(sums, np.ones(4, np.int64), 2).tolist() == [0, 0, 1, 1]
    for count in (3, 4):
        assert set(deal_out(sums, np.ones(4, np.int64), count).tolist()) == set(range(count))


def test_many_folds_are_dealt_at_once() -> None:
    start, random = time.process_time(), np.random.default_rng(0)
    dealt = deal_out(random.random((400, 12, 3)), np.full(400, 10), 300)
    assert set(dealt.tolist()) == set(range(300))
    assert time.process_time() - start < 3


def test_values_are_alike_too() -> None:
    store = Frames({f"v{index:02}": 20 for index in range(20)})
    labels = joined(store, task="va")
    labels.labels[:, 0] = (store.video_of_rows() - 9.5) / 10  # a valence of its own in each video
    folds = found(store, labels, 4, task="va")
    means = [labels.labels[folds == fold, 0].mean() for fold in range(4)]
    assert np.ptp(means) < 0.2, means
    assert np.ptp(np.bincount(folds)) <= 40


def test_labels_may_say_the_folds() -> None:
    store = Frames({"a_left": 3, "a_right": 2, "b": 4, "c": 1})
    said = {"a_left": "10", "a_right": "10", "b": "2", "c": "2"}
    folds = found(store, joined(store, **said), 2)
    assert folds.tolist() == [1] * 5 + [0] * 5, "2 comes before 10"
    with pytest.raises(ConfigError, match=r"--folds is 3, but the labels say 2 folds: 2, 10\. Expected --folds 2"):
        found(store, joined(store, **said), 3)
    with pytest.raises(InputError, match="say the folds 10 and 2 for the video a"):
        found(store, joined(store, **{**said, "a_right": "2"}), 2)
    with pytest.raises(InputError, match="say no fold for the video b"):
        found(store, joined(store, a_left="1", a_right="1", c="2"), 2)


def test_a_person_in_two_folds_is_warned_of() -> None:
    store, heard = Frames({f"{person}/{visit}": 5 for person in "pqr" for visit in range(3)}), Heard()
    find_folds(store, EXPR, joined(store), 3, "video", heard)  # type: ignore[arg-type]
    assert "keep folders together with --fold-by folder" in heard.warnings[0]
    quiet = Heard()
    find_folds(store, EXPR, joined(store), 3, "folder", quiet)  # type: ignore[arg-type]
    assert quiet.warnings == []


@pytest.mark.parametrize("name", ["expr", "au", "va"])
def test_sums_of_parts_add_up_whatever_frames_they_are_of(name: str) -> None:
    task, random = TASKS[name], np.random.default_rng(1)
    labels = joined(Frames({"a": 300}), task=name).labels
    labels = labels if name != "va" else labels * 0.1 + np.linspace(-0.8, 0.8, 300)[:, None].astype(np.float32)
    decided = labels[random.permutation(300)]
    video = np.repeat(np.arange(6), 50)
    parts = [task.sums_by_video(labels[of], decided[of], video[of], 6) for of in (video < 2, video == 2, video > 2)]
    value = task.metric_of(sum(part.sum(axis=0) for part in parts))  # type: ignore[arg-type]
    assert float(value) == pytest.approx(task.score(labels, decided).value, abs=1e-12)


# Both splits


def test_both_splits_together_have_every_frame_once() -> None:
    account = JoinAccount(used=3, no_crop=1, label_files=2, videos_without_crops=("x",))
    train = JoinedLabels(np.array([0, 4, 5]), np.array([[0.1, 0.2], [np.nan, 0.4], [0.5, 0.6]]), account)
    validation = JoinedLabels(np.array([2, 4]), np.array([[0.7, 0.8], [np.nan, 0.4]]), JoinAccount(used=2, no_label=3))
    both = unite(SimpleNamespace(), train, validation)  # type: ignore[arg-type]
    assert both.rows.tolist() == [0, 2, 4, 5]
    assert both.labels[:, 1].tolist() == [0.2, 0.8, 0.4, 0.6]
    assert both.account == JoinAccount(used=4, no_crop=1, no_label=3, label_files=2, videos_without_crops=("x",))


def test_a_frame_with_two_labels_is_named() -> None:
    store = Frames({"a": 3, "b": 3})
    train, validation = (
        JoinedLabels(np.array(rows), np.array(labels), JoinAccount()) for rows, labels in (([1, 4], [2, 5]), ([4], [6]))
    )
    with pytest.raises(InputError, match="1 frame in both splits with different labels, the first is frame 2 of b"):
        unite(store, train, validation)  # type: ignore[arg-type]
