"""Folders of real photographs as videos with one label each: pooled and inherited, against scikit-learn and numpy."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy.special import softmax
from sklearn.linear_model import Ridge as PeerRidge
from sklearn.metrics import f1_score
from sklearn.preprocessing import StandardScaler

from affcache.files import read_tensors
from affcache.scoring.score import score
from affcache.store.pooled import PooledStore
from affcache.store.reading import EmbeddingStore
from affcache.tasks.kinds import Classes
from affcache.training.fit import fit
from affcache.training.run_folder import RunFolder
from tests.conftest import REAL
from tests.whole_videos import Labels, label

MOOD = Classes("mood", ("Neutral", "Happiness", "Other"), "What most faces of a folder show", level="video")
OF_EXPRESSIONS = {0: 0, 4: 1}  # all others are Other

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not REAL.is_dir(), reason="shared/real is not beside the checkout"),
]


def labels_of(split: str) -> Labels:
    """Return what most of the labels of each folder say."""
    found = {}
    for path in sorted((REAL / "annotations" / "EXPR_Recognition_Challenge" / split).glob("*.txt")):
        lines = [int(line) for line in path.read_text().splitlines()[1:]]
        of = Counter(OF_EXPRESSIONS.get(one, 2) for one in lines if one >= 0)
        found[path.stem] = of.most_common(1)[0][0]
    return found


@pytest.fixture
def splits(monkeypatch: pytest.MonkeyPatch) -> dict[str, Labels]:
    splits = {"train": labels_of("Train_Set"), "validation": labels_of("Validation_Set")}
    label(monkeypatch, MOOD, splits)
    return splits


def frames_of(store: EmbeddingStore, names: Labels) -> list[npt.NDArray[np.float64]]:
    starts = store.video_start
    return [
        np.asarray(store.features[starts[v] : starts[v + 1]], float)
        for v, n in enumerate(store.video_names)
        if n in names
    ]


@pytest.mark.parametrize("pool", ["mean", "mean+std", "mean+std+quantiles"])
def test_ridge_on_pooled_folders_is_scikit_learns(
    real_store: Path, splits: dict[str, Labels], tmp_path: Path, pool: str
) -> None:
    store = EmbeddingStore.open(real_store)
    x, y = (np.stack([pooled(one, pool) for one in frames_of(store, splits[split])]) for split in splits)
    videos = [number for number, name in enumerate(store.video_names) if name in splits["train"]]
    assert PooledStore.of(store, pool).read(np.array(videos)) == pytest.approx(x, rel=1e-6, abs=1e-6)

    result = fit(task="mood", store=real_store, head="ridge", pool=pool, run=tmp_path / "run", device="cpu")
    train, validation = ([of[name] for name in store.video_names if name in of] for of in splits.values())
    strength = RunFolder(tmp_path / "run").read_history()[result.best_epoch - 1]["strength"]
    scaler = StandardScaler().fit(x)
    peer = PeerRidge(alpha=strength * len(x)).fit(scaler.transform(x), 2.0 * np.eye(3)[train] - 1)
    head, _ = read_tensors(tmp_path / "run" / "head.safetensors")
    ours = y @ head["output_layer.weight"].numpy().T.astype(float) + head["output_layer.bias"].numpy()
    theirs = peer.predict(scaler.transform(y))
    assert ours == pytest.approx(theirs, abs=1e-4)
    expected = f1_score(validation, theirs.argmax(axis=1), average="macro", zero_division=0)
    assert result.value == pytest.approx(expected)
    assert score(run=tmp_path / "run", device="cpu").scores.value == pytest.approx(expected)


def pooled(frames: npt.NDArray[np.float64], pool: str) -> npt.NDArray[np.float64]:
    parts = [frames.mean(0), frames.std(0), *np.quantile(frames, (0.1, 0.5, 0.9), axis=0)]
    return np.concatenate(parts[: {"mean": 1, "mean+std": 2}.get(pool, 5)])


def test_inherited_labels_are_decided_by_the_mean_of_a_folder(
    real_store: Path, splits: dict[str, Labels], tmp_path: Path
) -> None:
    recipe: dict[str, Any] = {"epochs": 2, "stride": 4, "device": "cpu"}
    result = fit(task="mood", store=real_store, head="linear", pool="none", run=tmp_path / "run", **recipe)
    scored = score(run=tmp_path / "run", device="cpu")
    assert (scored.scores.value, scored.frames) == (result.value, len(splits["validation"]))
    store, (head, _) = EmbeddingStore.open(real_store), read_tensors(tmp_path / "run" / "head.safetensors")
    weight, bias = (head[f"output_layer.{name}"].numpy().astype(float) for name in ("weight", "bias"))
    means = [softmax(of @ weight.T + bias, axis=1).mean(axis=0) for of in frames_of(store, splits["validation"])]
    labels = [splits["validation"][name] for name in store.video_names if name in splits["validation"]]
    expected = f1_score(labels, np.argmax(means, axis=1), average="macro", zero_division=0)
    assert scored.scores.value == pytest.approx(expected)
