"""``fit --head ridge`` and ``--head linear``: against scikit-learn's ridge, and as any run is scored and continued."""

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import Ridge as PeerRidge
from sklearn.preprocessing import StandardScaler

from affcache.errors import ConfigError
from affcache.files import read_tensors
from affcache.scoring.score import score
from affcache.store.reading import EmbeddingStore
from affcache.tasks.annotations import join_labels
from affcache.tasks.tasks import TASKS
from affcache.training.fit import fit
from affcache.training.ridge import STRENGTHS
from affcache.training.run_folder import RunFolder
from tests.conftest import MakeData, write_store


def macro_f1s(run: Path) -> list[float]:
    return [json.loads(line)["macro_f1"] for line in (run / "history.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("task", ["expr", "au"])
def test_the_best_strength_is_kept_and_is_scikit_learns_ridge(learnable: MakeData, tmp_path: Path, task: str) -> None:
    store_path, annotations = learnable(task)
    result = fit(task=task, head="ridge", store=store_path, annotations=annotations, run=tmp_path / "run", device="cpu")
    folder = RunFolder(tmp_path / "run")
    history = [json.loads(line) for line in folder.history.read_text().splitlines()]
    metric = TASKS[task].metric
    assert [entry["strength"] for entry in history] == list(STRENGTHS)
    assert result.value == max(entry[metric] for entry in history)
    assert history[result.best_epoch - 1][metric] == result.value
    assert result.value > 0.3, "labels are to be learnt from these embeddings"

    store = EmbeddingStore.open(store_path)
    train = join_labels(store, annotations, TASKS[task], "train")
    targets = 2 * (np.eye(8)[train.labels] if task == "expr" else train.labels) - 1
    embeddings = np.asarray(store.features[train.rows], dtype=np.float64)
    scaler = StandardScaler().fit(embeddings)
    strength = STRENGTHS[result.best_epoch - 1]
    expected = PeerRidge(alpha=strength * len(train)).fit(scaler.transform(embeddings), targets)
    tensors, header = read_tensors(folder.head)
    assert header["strength"] == strength
    outputs = embeddings @ tensors["output_layer.weight"].double().numpy().T + tensors["output_layer.bias"].numpy()
    np.testing.assert_allclose(outputs, expected.predict(scaler.transform(embeddings)), atol=1e-3)

    scored = score(run=tmp_path / "run", device="cpu")
    assert (scored.scores.value, scored.epoch) == (result.value, result.best_epoch)


def test_of_strengths_that_are_alike_the_first_is_kept(learnable: MakeData, tmp_path: Path) -> None:
    store, annotations = learnable()
    result = fit(head="ridge", store=store, annotations=annotations, run=tmp_path / "run", device="cpu")
    values = macro_f1s(tmp_path / "run")
    assert values.count(result.value) > 1, "some are alike"
    assert result.best_epoch == 1 + values.index(result.value)


def test_l2_forgets_lengths_in_training_and_validation(learnable: MakeData, tmp_path: Path) -> None:
    path, annotations = learnable()
    store = EmbeddingStore.open(path)
    lengths = 2.0 ** np.random.default_rng(0).integers(-3, 4, (len(store), 1))  # exact in float16
    listing = {name: range(1, 41) for name in store.video_names}
    write_store(tmp_path / "other.h5", listing, (store.features * lengths).astype(np.float16))
    for name, embeddings in (("a", path), ("b", tmp_path / "other.h5")):
        words = {"head": "ridge", "normalize": "l2", "annotations": annotations, "device": "cpu"}
        fit(store=embeddings, run=tmp_path / name, **words)
    assert macro_f1s(tmp_path / "a") == macro_f1s(tmp_path / "b")


def test_continuing_begins_anew(learnable: MakeData, tmp_path: Path) -> None:
    store, annotations = learnable()
    words = {"head": "ridge", "store": store, "annotations": annotations, "run": tmp_path / "run", "device": "cpu"}
    first = fit(**words)
    again = fit(**words, resume=True)
    assert (again.value, again.best_epoch) == (first.value, first.best_epoch)
    assert len((tmp_path / "run" / "history.jsonl").read_text().splitlines()) == len(STRENGTHS)


def test_balanced_weights_count_for_expressions(learnable: MakeData, tmp_path: Path) -> None:
    store, annotations = learnable()
    words = {"head": "ridge", "store": store, "annotations": annotations, "device": "cpu"}
    fit(**words, run=tmp_path / "plain")
    fit(**words, run=tmp_path / "balanced", class_weights="balanced")
    heads = [read_tensors(RunFolder(tmp_path / name).head)[0] for name in ("plain", "balanced")]
    assert not heads[0]["output_layer.bias"].equal(heads[1]["output_layer.bias"])


def test_a_linear_head_is_one_layer_trained(learnable: MakeData, tmp_path: Path) -> None:
    store, annotations = learnable()
    words = {"store": store, "annotations": annotations, "epochs": 2, "device": "cpu"}
    fit(**words, run=tmp_path / "linear", head="linear")
    fit(**words, run=tmp_path / "no-layers", hidden_layers=0)
    linear, no_layers = (read_tensors(RunFolder(tmp_path / name).head)[0] for name in ("linear", "no-layers"))
    assert set(linear) == {"output_layer.weight", "output_layer.bias"}
    assert all(no_layers[name].equal(tensor) for name, tensor in linear.items())
    assert score(run=tmp_path / "linear", device="cpu").frames > 0


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"task": "va", "label_smoothing": 0.1}, "--label-smoothing is 0.1, but the loss of task va doesn't take it"),
        ({"task": "va", "focal_gamma": 2.0}, "--focal-gamma is 2.0, but the loss of task va doesn't take it; expected"),
        ({"task": "va", "logit_adjustment": 0.5}, "--logit-adjustment is 0.5, but va has no classes; expected 0.0"),
        ({"task": "va", "class_weights": "balanced"}, "--class-weights is balanced, but va has no classes"),
        ({"task": "va", "cvar_within": "class"}, "--cvar-within is class, but va has no classes"),
        ({"task": "expr", "auc_weight": 0.2}, "--auc-weight is 0.2, but expr has no AUC term, only units have"),
        ({"task": "au", "head": "ridge", "class_weights": "balanced"}, "one ridge solves for all 12 units"),
        ({"head": "tree"}, "--head 'tree' is unknown. Expected mlp or linear or ridge"),
    ],
)
def test_settings_that_task_or_head_have_no_use_for(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):  # before anything is read: there are no such files
        fit(**wrong, store=Path("no-store.h5"), annotations=Path("no-labels"), device="cpu")
