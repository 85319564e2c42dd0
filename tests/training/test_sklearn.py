"""The scikit-learn estimators: scikit-learn's own checks, its tools around them, and the core underneath."""

import inspect
import pickle
import re
import runpy
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.sparse import csr_matrix
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import TransformedTargetRegressor
from sklearn.ensemble import BaggingClassifier
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LinearRegression, RidgeClassifier
from sklearn.metrics import accuracy_score, f1_score, get_scorer, log_loss, r2_score, roc_auc_score
from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import affcache
from affcache.files import read_tensors
from affcache.store.reading import EmbeddingStore
from affcache.tasks.tasks import TASKS
from affcache.training.data import Frames
from affcache.training.learner import Learner, learning_rate
from affcache.training.objective import ClassCounts
from affcache.training.risk import cvar
from affcache.training.run_folder import RunFolder
from affcache.training.settings import FitSettings
from affcache.training.sklearn import CVaRMLPClassifier, CVaRMLPMultiLabelClassifier, CVaRMLPRegressor
from tests.conftest import MakeData

PAGE = Path(__file__).parents[2] / "docs" / "estimators.md"
SMALL: dict[str, Any] = {"epochs": 12, "hidden_layers": 1, "hidden_width": 16, "dropout": 0.1, "lr": 1e-2}
QUICK = {**SMALL, "epochs": 4, "rho": 0.05, "random_state": 0}
LONGER = {**QUICK, "epochs": 20, "lr_half_period": 1.0}
LINEAR = {**QUICK, "epochs": 12, "batch_size": 16, "lr": 3e-2, "hidden_layers": 0, "clip_norm": 1.0}
BOTH = (CVaRMLPClassifier, CVaRMLPMultiLabelClassifier)
ALL = (*BOTH, CVaRMLPRegressor)
KINDS = {"expr": CVaRMLPClassifier, "au": CVaRMLPMultiLabelClassifier, "va": CVaRMLPRegressor}

Data = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]
Change = Callable[[npt.NDArray[Any]], Any]


def not_passed(_: Any) -> dict[str, str]:
    """Which of scikit-learn's checks can't be passed, and why."""
    repeated = "a row that is repeated comes up in several batches, one of a larger weight in one"
    return {"check_sample_weight_equivalence_on_dense_data": repeated}


@parametrize_with_checks(
    [
        CVaRMLPClassifier(**SMALL),
        CVaRMLPMultiLabelClassifier(**SMALL),
        CVaRMLPClassifier(**LINEAR),
        CVaRMLPMultiLabelClassifier(
            **SMALL, cvar_level="set", class_weights="balanced", auc_weight=0.2, precision="bf16"
        ),
        CVaRMLPRegressor(**SMALL),
        CVaRMLPRegressor(**LONGER, ccc_weight=0.0),
    ],
    expected_failed_checks=not_passed,
)
def test_scikit_learns_own_checks(estimator: Any, check: Callable[[Any], None]) -> None:
    check(estimator)


def blobs(n: int = 300, classes: int = 3, scale: float = 2.0, seed: int = 0, share: Any = None) -> Data:
    """Gaussian clouds around random centres: float32 (n, 8) and class numbers (n,). Centres depend on classes alone."""
    centres = np.random.default_rng(classes).normal(scale=scale, size=(classes, 8))
    random = np.random.default_rng(seed)
    y = random.choice(classes, size=n, p=share)
    return (centres[y] + random.normal(size=(n, 8))).astype(np.float32), y


def units(n: int = 300, labels: int = 3, seed: int = 0) -> Data:
    """Embeddings (n, 8) and an indicator matrix (n, labels) that directions in them decide, up to noise."""
    directions = np.random.default_rng(labels).normal(size=(8, labels))
    random = np.random.default_rng(seed)
    X = random.normal(size=(n, 8)).astype(np.float32)
    return X, (X @ directions + random.normal(scale=0.5, size=(n, labels)) > 0.5).astype(np.int64)


def values(n: int = 300, columns: int = 2, seed: int = 0) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    """Embeddings (n, 8) and values (n, columns) in [-1, 1] that bent directions in them give, up to noise."""
    directions = np.random.default_rng(columns).normal(scale=0.4, size=(8, columns))
    random = np.random.default_rng(seed)
    X = random.normal(size=(n, 8)).astype(np.float32)
    return X, np.tanh(X @ directions + random.normal(scale=0.1, size=(n, columns)))


def data_of(kind: Any) -> tuple[npt.NDArray[np.float32], npt.NDArray[Any]]:
    """Embeddings and labels that an estimator takes."""
    return {CVaRMLPClassifier: blobs, CVaRMLPMultiLabelClassifier: units, CVaRMLPRegressor: values}[kind]()


def outputs(head: Any, X: Any) -> npt.NDArray[np.float64]:
    """What the head gives: logits, or values."""
    return getattr(head, "decision_function", head.predict)(X)


@pytest.mark.parametrize("kind", ALL)
def test_parameters_are_the_settings_with_their_defaults(kind: Any) -> None:
    defaults = {name: parameter.default for name, parameter in inspect.signature(kind).parameters.items()}
    of_settings = {field.name: field.default for field in fields(FitSettings)}
    assert defaults.pop("random_state") is None
    assert defaults.pop("device") == "cpu"
    assert {name: of_settings[name] for name in defaults} == defaults
    assert f"`{kind.__name__}`" in PAGE.read_text()
    assert [name for name in defaults if f"`{name}`" not in PAGE.read_text()] == []


@pytest.mark.parametrize(
    ("settings", "classes"),
    [({}, 3), ({"alpha": 0.3, "class_weights": "balanced", "normalize": "l2"}, 2), ({"logit_adjustment": 1.0}, 11)],
)
def test_a_classifier_is_the_learner_driven_directly(settings: dict[str, Any], classes: int) -> None:
    X, y = blobs(classes=classes)
    head = CVaRMLPClassifier(**{**QUICK, **settings}).fit(X, y)
    recipe = FitSettings(**{k: v for k, v in QUICK.items() if k != "random_state"}, **settings, seed=0)  # type: ignore[arg-type]
    task = head._task(classes)
    labels = torch.from_numpy(y)
    frames = Frames(torch.from_numpy(X), labels, torch.arange(len(y)))
    learner = Learner([recipe], task, 8, torch.device("cpu"), ClassCounts.of(task, labels))
    losses = [float(learner.epoch(frames, learning_rate(recipe, epoch))[0]) for epoch in range(recipe.epochs)]
    assert head.loss_curve_ == losses
    assert head.n_iter_ == recipe.epochs
    expected = learner.heads.state_dict(0)
    assert head.head_.keys() == expected.keys()
    assert all(np.array_equal(head.head_[name], tensor.numpy()) for name, tensor in expected.items())
    (logits,) = learner.predict(frames)
    probabilities = torch.softmax(logits, dim=1).numpy()
    np.testing.assert_allclose(head.predict_proba(X), probabilities, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("task", KINDS)
def test_the_head_is_what_fit_has_after_its_last_epoch(learnable: MakeData, tmp_path: Path, task: str) -> None:
    path, annotations = learnable(task)
    settings = {k: v for k, v in QUICK.items() if k != "random_state"}
    affcache.fit(task=task, store=path, annotations=annotations, run=tmp_path / "run", device="cpu", seed=5, **settings)
    tensors, _ = read_tensors(RunFolder(tmp_path / "run").last)
    store = EmbeddingStore.open(path)
    joined = affcache.join_labels(path, annotations, task, "train")
    head = KINDS[task](**{**QUICK, "random_state": 5}).fit(store.features[joined.rows], joined.labels)
    assert all(np.array_equal(array, tensors[f"head.{name}"].numpy()) for name, array in head.head_.items())
    module = affcache.MLPHead(16, TASKS[task].outputs, hidden_layers=1, hidden_width=16)
    module.load_state_dict({name: torch.from_numpy(array) for name, array in head.head_.items()})
    with torch.no_grad():
        logits = module.eval()(torch.from_numpy(np.asarray(store.features[joined.rows])).float())
    np.testing.assert_allclose(outputs(head, store.features[joined.rows]), logits.numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "change", [lambda X: X.astype(np.float16), lambda X: X.astype(np.float64), lambda X: X[::-1], np.asfortranarray]
)
@pytest.mark.parametrize("kind", ALL)
def test_two_fits_are_equal_and_leave_data_and_random_numbers_alone(kind: Any, change: Change) -> None:
    X, y = data_of(kind)
    X = change(X)
    X.flags.writeable = False
    state = torch.random.get_rng_state()
    first, second = (kind(**QUICK).fit(X, y) for _ in range(2))
    assert np.array_equal(outputs(first, X), outputs(second, X))
    assert first.loss_curve_ == second.loss_curve_
    assert torch.equal(state, torch.random.get_rng_state())
    other = kind(**{**QUICK, "random_state": np.random.RandomState(1)}).fit(X, y)
    assert not np.array_equal(outputs(first, X), outputs(other, X))


@pytest.mark.parametrize("labels", [["calm", "happy", "sad"], [-5, 70, 7**20], [0.0, 2.0, 1.0], [False, True, True]])
def test_labels_of_any_kind(labels: list[Any]) -> None:
    X, numbers = blobs()
    y = np.array(labels)[numbers]
    head = CVaRMLPClassifier(**QUICK).fit(X, y)
    assert list(head.classes_) == sorted(set(labels))
    assert head.predict(X).dtype == y.dtype
    assert head.score(X, y) == accuracy_score(y, head.predict(X)) > 0.9
    probabilities = head.predict_proba(X)
    assert np.array_equal(head.classes_[probabilities.argmax(axis=1)], head.predict(X))
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)


@pytest.mark.parametrize("kind", ALL)
def test_a_pickle_predicts_the_same_and_holds_the_head_alone(kind: Any) -> None:
    X, y = data_of(kind)
    head = kind(**{**QUICK, "hidden_width": 300}).fit(X, y)
    text = pickle.dumps(head)
    assert len(text) < sum(array.nbytes for array in head.head_.values()) + 10_000
    assert np.array_equal(outputs(pickle.loads(text), X), outputs(head, X))
    fresh = clone(head)
    assert fresh.get_params() == head.get_params()
    with pytest.raises(NotFittedError):
        fresh.predict(X)
    head.set_params(hidden_width=7, hidden_layers=2, normalize="l2")  # for the next fit
    assert np.array_equal(pickle.loads(text).predict(X), head.predict(X))


def test_pipelines_cross_validation_and_grid_search() -> None:
    X, numbers = blobs()
    X, y = X * 1000 + 500, np.array(["a", "b", "c"])[numbers]
    pipeline = make_pipeline(StandardScaler(), CVaRMLPClassifier(**LONGER))
    scores = cross_val_score(pipeline, X, y, cv=3, scoring="f1_macro")
    assert scores.min() > 0.8
    grid = {
        "cvarmlpclassifier__alpha": np.array([0.3, 1.0]),
        "cvarmlpclassifier__rho": [0.0, 0.05],
        "cvarmlpclassifier__epochs": np.arange(19, 20),
    }
    search = GridSearchCV(pipeline, grid, cv=2, scoring="neg_log_loss", error_score="raise").fit(X, y)
    assert len(search.cv_results_["params"]) == 4
    assert len(set(search.cv_results_["mean_test_score"])) == 4
    assert -search.score(X, y) == log_loss(y, search.predict_proba(X)) < 0.5
    calibrated = CalibratedClassifierCV(CVaRMLPClassifier(**QUICK), cv=2).fit(X, y)
    assert calibrated.predict_proba(X).shape == (len(y), 3)


@pytest.mark.parametrize(
    ("labels", "change"), [(2, csr_matrix), (2, lambda y: y.astype(bool)), (3, lambda y: y.tolist()), (12, np.asarray)]
)
def test_labels_of_which_several_hold(labels: int, change: Change) -> None:
    X, y = units(labels=labels)
    head = CVaRMLPMultiLabelClassifier(**LONGER).fit(X, change(y))
    probabilities, predicted = head.predict_proba(X), head.predict(X)
    assert probabilities.shape == predicted.shape == (300, labels)
    assert np.array_equal(predicted, head.decision_function(X) > 0)
    assert np.array_equal(predicted, probabilities > 0.5)
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-head.decision_function(X))))
    assert f1_score(y, predicted, average="macro") > 0.8
    assert head.score(X, y) == accuracy_score(y, predicted)
    assert get_scorer("roc_auc")(head, X, y) == roc_auc_score(y, probabilities) > 0.9
    assert get_scorer("average_precision")(head, X, y) > 0.8
    assert len(head.classes_) == labels


def test_labels_of_which_several_hold_in_cross_validation() -> None:
    X, y = units()
    pipeline = make_pipeline(StandardScaler(), CVaRMLPMultiLabelClassifier(**LONGER, auc_weight=0.2))
    probabilities = cross_val_predict(pipeline, X, y, cv=3, method="predict_proba")
    assert roc_auc_score(y, probabilities) > 0.9
    search = GridSearchCV(
        CVaRMLPMultiLabelClassifier(**LONGER), {"alpha": [0.3, 1.0], "auc_weight": [0.0, 0.5]}, cv=2, scoring="f1_macro"
    )
    assert len(set(search.fit(X, y).cv_results_["mean_test_score"])) > 1
    assert search.best_score_ > 0.7


def test_a_single_label_counts_as_two_classes() -> None:
    X, y = units()
    words = np.array(["absent", "present"])[y[:, 0]]
    head = CVaRMLPMultiLabelClassifier(**LONGER).fit(X, words)
    assert list(head.classes_) == ["absent", "present"]
    assert head.decision_function(X).shape == (300,)
    np.testing.assert_allclose(head.predict_proba(X)[:, 1], 1 / (1 + np.exp(-head.decision_function(X))))
    assert head.score(X, words) > 0.85
    assert get_scorer("roc_auc")(head, X, words) > 0.9


def test_a_rare_or_absent_label_is_no_obstacle() -> None:
    X, y = units()
    y[:, 1] = 0
    for settings in ({"class_weights": "balanced"}, {"logit_adjustment": 1.0}, {"auc_weight": 0.5}):
        head = CVaRMLPMultiLabelClassifier(**LONGER, **settings).fit(X, y)  # type: ignore[arg-type]
        assert f1_score(y[:, 0], head.predict(X)[:, 0]) > 0.8


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"alpha": 0}, "alpha is 0.0; expected more than 0 and at most 1"),
        ({"alpha": 2.0}, "alpha is 2.0; expected"),
        ({"alpha": "half"}, "alpha is 'half', expected a number"),
        ({"rho": -0.1, "lr_minimum": -1.0}, "lr_minimum is -1.0; .*\nrho is -0.1; expected at least 0"),
        ({"epochs": 0}, "epochs is 0; expected at least 1"),
        ({"epochs": 2.5}, "epochs is 2.5, expected a whole number"),
        ({"batch_size": 1}, "batch_size is 1; expected at least 2"),
        ({"dropout": 1.0}, "dropout is 1.0; expected at least 0 and less than 1"),
        ({"cvar_level": "video"}, "cvar_level is 'video'; expected one of batch, set"),
        ({"precision": "fp8"}, "precision is 'fp8'; expected one of fp32, bf16"),
        ({"random_state": -1}, "Seed must be between 0 and"),
        ({"device": "abacus"}, "device abacus is none that affcache computes on. Expected auto, cpu"),
        ({"lr": 1e38, "rho": 0.0}, "The training diverged in epoch 1: .* Lower lr or rho"),
    ],
)
@pytest.mark.parametrize("kind", ALL)
def test_what_is_wrong_with_a_parameter_is_said_in_fit(kind: Any, wrong: dict[str, Any], message: str) -> None:
    X, y = units()
    head = kind(**{**QUICK, **wrong})  # says nothing yet
    with pytest.raises(ValueError, match=message) as caught:
        head.fit(X, y[:, 0])
    assert "--" not in str(caught.value)
    with pytest.raises(NotFittedError):
        head.predict(X)


@pytest.mark.parametrize(
    ("kind", "y", "message"),
    [
        (CVaRMLPClassifier, np.full(300, "calm"), "y has only one class, .*'calm'.*expected at least two"),
        (CVaRMLPMultiLabelClassifier, np.zeros(300), "y has only one class"),
        (CVaRMLPClassifier, units()[1], "y should be a 1d array"),
        (CVaRMLPClassifier, np.linspace(0, 1, 300), "Unknown label type: continuous"),
        (CVaRMLPMultiLabelClassifier, units()[1] + 1, "expected a matrix .* of 0 and 1"),
        (CVaRMLPMultiLabelClassifier, np.arange(300) % 3, "Only binary .* use CVaRMLPClassifier"),
        (CVaRMLPMultiLabelClassifier, np.arange(600).reshape(300, 2) % 3, "is multiclass-multioutput; expected"),
        (CVaRMLPRegressor, np.full(300, "calm"), "could not convert string to float"),
        (CVaRMLPRegressor, np.full(300, np.nan), "Input y contains NaN"),
        (CVaRMLPRegressor, np.full((300, 2), 1e300), "Input y contains infinity or a value too large"),
        (CVaRMLPRegressor, np.zeros((300, 2, 2)), "Found array with dim 3"),
    ],
)
def test_labels_that_do_not_fit_are_errors(kind: Any, y: npt.NDArray[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message), np.errstate(over="ignore"):
        kind(**QUICK).fit(blobs()[0], y)


@pytest.mark.parametrize("kind", ALL)
def test_embeddings_that_do_not_fit_are_errors(kind: Any) -> None:
    X, y = units()
    y = y[:, 0]
    with pytest.raises(ValueError, match=r"1 sample.*minimum of 2"):
        kind(**QUICK).fit(X[:1], y[:1])
    for bad, word in ((np.nan, "NaN"), (np.inf, "infinity"), (1e300, "infinity or a value too large")):
        spoiled = X.astype(np.float64)
        spoiled[3, 1] = bad
        with pytest.raises(ValueError, match=word), np.errstate(over="ignore"):
            kind(**QUICK).fit(spoiled, y)
    head = kind(**{**QUICK, "epochs": 1}).fit(X[:33], y[:33])  # a last batch of one row
    with pytest.raises(ValueError, match="7 features"):
        head.predict(X[:, :7])


def test_a_classifier_learns_what_a_linear_model_cannot() -> None:
    random = np.random.default_rng(0)
    X = random.normal(size=(1200, 4))
    y = (X[:, 0] > 0).astype(int) + 2 * (X[:, 1] * X[:, 2] > 0)  # four classes, half of them an exclusive or
    settings = {**QUICK, "epochs": 30, "hidden_width": 64, "lr_half_period": 1.0}
    head = CVaRMLPClassifier(**settings).fit(X[:800], y[:800])
    assert head.loss_curve_[-1] < 0.6 * head.loss_curve_[0]
    linear = RidgeClassifier().fit(X[:800], y[:800])
    assert linear.score(X[800:], y[800:]) < 0.6
    assert head.score(X[800:], y[800:]) > 0.85


@pytest.mark.parametrize("seed", range(3))
def test_training_for_the_tail_makes_the_tail_lighter(seed: int) -> None:
    share = [0.7, 0.2, 0.07, 0.03]
    train, test = (blobs(n, classes=4, scale=0.4, seed=s, share=share) for n, s in ((2000, seed), (4000, seed + 100)))
    settings = {**QUICK, "epochs": 15, "batch_size": 200, "dropout": 0.0, "lr_half_period": 1.0}
    tails, means = [], []
    for alpha in (0.3, 1.0):
        head = CVaRMLPClassifier(**{**settings, "alpha": alpha}).fit(*train)
        for X, y in (train, test):
            losses = -np.log(head.predict_proba(X)[np.arange(len(y)), y])
            tails.append(float(cvar(torch.from_numpy(losses), 0.3)))
            means.append(losses.mean())
    assert tails[0] < 0.9 * tails[2]  # of the training set as a whole
    assert tails[1] < 0.9 * tails[3]
    assert means[0] > means[2]  # what it costs


def test_a_regressor_learns_what_a_linear_model_cannot() -> None:
    X, y = np.random.default_rng(0).uniform(-1, 1, size=(1200, 4)), np.empty((1200, 2))
    y[:, 0], y[:, 1] = X[:, 0], 2 * X[:, 1] * X[:, 2]  # 2 is out of the range that values have as a task
    settings = {**QUICK, "epochs": 30, "hidden_width": 64, "lr_half_period": 1.0}
    for weight in (0.0, 0.5):
        head = CVaRMLPRegressor(**settings, ccc_weight=weight).fit(X[:800], y[:800])
        assert head.score(X[800:], y[800:]) == r2_score(y[800:], head.predict(X[800:])) > 0.8
        assert abs(head.predict(X)).max() > 1, "nothing is clipped"
    assert LinearRegression().fit(X[:800], y[:800]).score(X[800:], y[800:]) < 0.6
    for change in (lambda y: y[:, 0], lambda y: y[:, :1], lambda y: y):
        assert CVaRMLPRegressor(**QUICK).fit(X, change(y)).predict(X[:7]).shape == change(y)[:7].shape


def test_values_of_another_scale_are_scaled_around_it() -> None:
    X, y = values()
    y = 5000 + 300 * y
    scaled = TransformedTargetRegressor(
        make_pipeline(StandardScaler(), CVaRMLPRegressor(**LONGER)), transformer=StandardScaler()
    )
    assert cross_val_score(scaled, X, y, cv=3).min() > 0.6
    assert cross_val_score(scaled.regressor, X, y, cv=3).max() < -100, "a bias of 5000 is too many steps away"


# Weights


TERM = {CVaRMLPClassifier: {}, CVaRMLPMultiLabelClassifier: {"auc_weight": 0.3}, CVaRMLPRegressor: {"ccc_weight": 0.4}}


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("weights", ["random", "ones"])
def test_a_row_of_weight_0_is_left_out_and_equal_weights_are_none(kind: Any, weights: str) -> None:
    X, y = data_of(kind)
    random = np.random.default_rng(1)
    weight = random.uniform(0.1, 1, len(X)) if weights == "random" else np.full(len(X), 3)
    left_out = random.random(len(X)) < 0.3
    head = kind(**QUICK, **TERM[kind])
    without = clone(head).fit(X[~left_out], y[~left_out], weight[~left_out] if weights == "random" else None)
    weight[left_out] = 0
    for scale in (1, 2.0**-600, 2.0**600):
        weighted = clone(head).fit(X, y, scale * weight)
        assert np.array_equal(outputs(weighted, X), outputs(without, X))
    assert not np.array_equal(outputs(weighted, X), outputs(clone(head).fit(X, y), X))


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("settings", [{"alpha": 1.0}, {"alpha": 0.3}, {"alpha": 0.3, "cvar_level": "set", "epochs": 1}])
def test_in_a_batch_of_all_rows_a_weight_is_how_often_a_row_stands_there(kind: Any, settings: dict[str, Any]) -> None:
    X, y = data_of(kind)
    X, y = X[:60], y[:60]
    times = np.random.default_rng(1).integers(0, 4, 60)
    linear = {**QUICK, "hidden_layers": 0, "dropout": 0.0, "batch_size": 500, "epochs": 8}  # no BatchNorm
    head = kind(**{**linear, **settings, **TERM[kind]})
    weighted, repeated = clone(head).fit(X, y, times), clone(head).fit(X.repeat(times, axis=0), y.repeat(times, axis=0))
    np.testing.assert_allclose(weighted.loss_curve_, repeated.loss_curve_, rtol=1e-4)
    np.testing.assert_allclose(outputs(weighted, X), outputs(repeated, X), rtol=1e-3, atol=1e-4)
    assert not np.allclose(outputs(weighted, X), outputs(clone(head).fit(X, y), X), rtol=1e-2)


@pytest.mark.parametrize("kind", ALL)
def test_a_step_with_weights_is_that_of_their_mean(kind: Any) -> None:
    X, y = data_of(kind)
    weights = np.random.default_rng(1).uniform(size=len(X))
    one_step = {**QUICK, "epochs": 1, "batch_size": len(X), "alpha": 1.0, "rho": 0.0, "dropout": 0.0}
    head = kind(**one_step, **({"ccc_weight": 0.0} if kind is CVaRMLPRegressor else {})).fit(X, y, weights)
    outs = head.head_["output_layer.bias"].size
    torch.manual_seed(0)
    module = affcache.MLPHead(8, outs, hidden_layers=1, hidden_width=16, dropout=0.0)
    logits, labels, w = module(torch.from_numpy(X)), torch.from_numpy(y), torch.from_numpy(weights)
    if kind is CVaRMLPClassifier:
        losses = -logits.log_softmax(1)[torch.arange(len(X)), labels]
    elif kind is CVaRMLPMultiLabelClassifier:
        losses = torch.nn.functional.softplus(torch.where(labels == 1, -logits, logits)).mean(1)
    else:
        losses = (logits - labels).square().mean(1)
    loss = (w * losses).sum() / w.sum()
    optimiser = torch.optim.AdamW(module.parameters(), lr=QUICK["lr"], weight_decay=FitSettings.weight_decay)
    loss.backward()
    optimiser.step()
    assert head.loss_curve_ == [pytest.approx(loss.item(), rel=1e-5)]
    weight = module.output_layer.weight.detach().numpy()
    np.testing.assert_allclose(head.head_["output_layer.weight"], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.zeros(300), r"shape \(300,\), 0 to 0; expected \(300,\), .* of at least 0 .*, two of them above zero"),
        (np.eye(300)[0], "two of them above zero"),
        (np.arange(300.0) - 1, r"-1 to 298; expected .* of at least 0"),
        (np.ones(299), r"shape \(299,\), 1 to 1; expected \(300,\)"),
        (np.ones((300, 1)), r"shape \(300, 1\)"),
        (np.full(300, np.nan), "Input sample_weight contains NaN"),
    ],
)
@pytest.mark.parametrize("kind", ALL)
def test_weights_that_do_not_fit_are_errors(kind: Any, weights: npt.NDArray[Any], message: str) -> None:
    X, y = data_of(kind)
    with pytest.raises(ValueError, match=message):
        kind(**QUICK).fit(X, y, sample_weight=weights)


def test_weights_that_leave_one_class_are_an_error() -> None:
    X, y = units()
    with pytest.raises(ValueError, match="y has only one class, "):
        CVaRMLPClassifier(**QUICK).fit(X, y[:, 0], np.arange(300) * y[:, 0])


def test_bagging_draws_rows_by_weights() -> None:
    X, y = blobs()
    bagged = BaggingClassifier(CVaRMLPClassifier(**LONGER), n_estimators=3, random_state=0).fit(X, y)
    assert bagged.score(X, y) > 0.9


def test_the_examples_of_the_docs_run(
    learnable: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store, annotations = learnable("au")
    for made, named in ((store, "data/features/ViT-L-14-openai.h5"), (annotations, "data/Aff-Wild2/annotations")):
        (tmp_path / named).parent.mkdir(parents=True, exist_ok=True)
        made.rename(tmp_path / named)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks):
        (tmp_path / f"example{number}.py").write_text(block)
        names |= runpy.run_path(str(tmp_path / f"example{number}.py"), names)
    assert "cvarmlpclassifier__alpha" in capsys.readouterr().out
