"""scikit-learn estimators over the training core: the head, CVaR and SAM for any embeddings, without files.

Defaults are ``FitSettings``' own, the recipe "paper"; what the parameters mean stands there.
"""

import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import issparse
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_array, check_random_state, column_or_1d
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_is_fitted, validate_data

from affcache.devices import resolve_device
from affcache.errors import ConfigError
from affcache.settings import build
from affcache.tasks.kinds import Classes, Units, Values
from affcache.tasks.knobs import KNOBS_OF_LOSSES
from affcache.tasks.task import Task
from affcache.training.data import EVALUATION_BATCH, Frames, Scaler
from affcache.training.epochs import Epochs
from affcache.training.learner import build_head
from affcache.training.objective import ClassCounts
from affcache.training.plain import new_learner
from affcache.training.settings import FitSettings

FLOATS = (np.float32, np.float16)  # what a head trains on as it is; all else becomes the first
Array = npt.NDArray[Any]
SHARED = (  # settings that are parameters
    "epochs", "batch_size", "lr", "lr_minimum", "lr_half_period", "weight_decay", "alpha", "cvar_level", "loss", "rho",
    "adaptive", "clip_norm", "precision", "dropout", "hidden_layers", "hidden_width", "normalize",
)  # fmt: skip
OF_CLASSES = ("class_weights", "logit_adjustment")


def _with_parameters(kind: type[Task], *more: str) -> Callable[..., None]:
    """Return an ``__init__`` that takes settings by name, with their defaults, random_state and device.

    They are those that are shared, what the losses of a kind of task take, and more. scikit-learn asks the signature
    for the parameters, and wants them set as they are given.
    """
    knobs = sorted(frozenset().union(*KNOBS_OF_LOSSES[kind.kind].values()))
    defaults = {name: getattr(FitSettings, name) for name in (*SHARED, *knobs, *more)}
    defaults |= {"random_state": None, "device": "cpu"}
    keyword = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=of) for n, of in defaults.items()]
    signature = inspect.Signature([inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD), *keyword])

    def __init__(self: Any, **values: Any) -> None:
        for name, value in {**defaults, **signature.bind(self, **values).kwargs}.items():
            setattr(self, name, value)

    __init__.__signature__ = signature  # type: ignore[attr-defined]
    return __init__


class CVaRMLP(BaseEstimator):  # type: ignore[misc]  # scikit-learn is untyped
    """An estimator that is an MLP head trained by the core; what y means, and what logits mean, is its children's."""

    _kind: ClassVar[type[Task]]

    def _task(self, outputs: int) -> Task:
        """Return the task of a head with this many logits."""
        return self._kind(self._kind.kind, tuple(map(str, range(outputs))))

    def _validated(self, X: Any, y: Any, sample_weight: Any, **checks: bool) -> tuple[Array, Any, Array | None]:
        """Return checked embeddings, y and float32 weights up to 1, without rows of weight 0; None where all are 1."""
        X, y = validate_data(self, X, y, dtype=FLOATS, ensure_min_samples=2, **checks)
        if sample_weight is None:
            return X, y, None
        given = check_array(sample_weight, dtype=np.float64, ensure_2d=False, input_name="sample_weight")
        weights = (given / (given.max() or 1)).astype(np.float32)
        if given.shape != (len(X),) or (given < 0).any() or (weights > 0).sum() < 2:
            raise ValueError(
                f"sample_weight has shape {given.shape}, {given.min():g} to {given.max():g}; expected ({len(X)},), a "
                "number of at least 0 for each row of X, two of them above zero. Leave it out to weigh all alike."
            )
        kept = weights > 0
        return X[kept], y[kept], None if (weights[kept] == 1).all() else weights[kept]

    def _settings(self, task: Task) -> FitSettings:
        """Return the parameters as settings, the seed drawn unless it is given; ValueError where one is wrong."""
        random = check_random_state(self.random_state)
        values = self.get_params(deep=False)
        given = values.pop("random_state")
        values["seed"] = int(given) if isinstance(given, Integral) else int(random.randint(2**31 - 1))
        plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}
        with _value_errors():
            settings = build(FitSettings, {**plain, "task": task.name})
            settings.require_fitting(task)
        return settings

    def _train(self, X: Array, labels: Array, weights: Array | None, outputs: int) -> None:
        """Train a head on checked embeddings (n, D), labels (n,) or (n, C) and weights (n,), and keep it."""
        task = self._task(outputs)
        settings = self._settings(task)
        device = self._device()
        targets = torch.tensor(labels, dtype=getattr(torch, task.label_dtype))
        videos = torch.zeros(len(X), dtype=torch.int64, device=device)
        shares = None if weights is None else _tensor(weights).to(device)
        frames = Frames(_tensor(X).to(device), targets.to(device), videos, shares)
        scaler, counts = Scaler.fit(settings.normalize, frames.evaluation_batches()), ClassCounts.of(task, targets)
        learner, why = new_learner(
            [settings], task, X.shape[1], device, counts, 0, scaler, weighted=weights is not None
        )
        if why:
            warnings.warn(why, stacklevel=3)
        run = Epochs(learner)
        losses = [entry["train_loss"] for (entry,) in run.run(frames)]
        head = {name: tensor.cpu().numpy().copy() for name, tensor in learner.module_state(0).items()}
        finite = all(np.isfinite(array).all() for array in head.values())  # the last step may have broken it
        if not (finite and math.isfinite(losses[-1])):
            raise ValueError(
                f"The training diverged in epoch {len(losses)}: the loss or weights of the head are not finite. Lower "
                "lr or rho, or scale the embeddings first, for instance with normalize='l2'."
            )
        self._fitted_settings, self._scaler = settings, learner.scaler.to(torch.device("cpu"))
        self.head_ = head
        self.loss_curve_ = losses
        self.n_iter_ = len(losses)

    def _logits(self, X: Any) -> torch.Tensor:
        """Return float64 logits (n, C) on the CPU; in float64, one row more or less in a call changes no other's."""
        check_is_fitted(self, "head_")
        X = validate_data(self, X, dtype=FLOATS, reset=False)
        device = self._device()
        with torch.device("meta"):  # no weights are drawn: the caller's random numbers stay his own
            head = build_head(self._fitted_settings, X.shape[1], self._task(len(self.head_["output_layer.bias"])))
        state = {name: torch.tensor(array, dtype=torch.float64, device=device) for name, array in self.head_.items()}
        head.load_state_dict(state, assign=True)
        head.eval()
        scaler = self._scaler.to(device)
        with torch.no_grad():
            parts = _tensor(X).split(EVALUATION_BATCH)
            return torch.cat([head(scaler(part.to(device)).double()) for part in parts]).cpu()

    def _device(self) -> torch.device:
        with _value_errors():
            return resolve_device(self.device)


def _tensor(X: Array) -> torch.Tensor:
    """Return a tensor over the array's memory where torch can write to it, else over a copy."""
    return torch.from_numpy(np.require(X, requirements=["C", "W"]))


@contextmanager
def _value_errors() -> Iterator[None]:
    """Turn what is wrong with a setting into scikit-learn's ValueError, with names instead of flags."""
    try:
        yield
    except ConfigError as error:
        raise ValueError(re.sub(r"--[a-z-]+", lambda it: it[0][2:].replace("-", "_"), str(error))) from None


class CVaRMLPClassifier(ClassifierMixin, CVaRMLP):  # type: ignore[misc]
    """Multi-class classifier: an MLP on embeddings, trained with CVaR of the cross-entropies and SAM.

    A scikit-learn estimator. Parameters are named as ``FitSettings``' fields, with its defaults; ``device`` is ``cpu``,
    ``auto``, ``cuda`` or ``cuda:1``, and ``random_state`` an int, a ``RandomState`` or None. With an int, two fits are
    equal, and the same as ``affcache fit`` with that seed after as many epochs. The head of the last epoch is kept.

    Attributes:
        classes_: (C,) the class labels, sorted.
        n_features_in_: D, the width of an embedding.
        head_: name -> float32 array, the state of an ``MLPHead``.
        n_iter_: epochs trained.
        loss_curve_: mean training loss of each epoch.
    """

    _kind = Classes
    __init__ = _with_parameters(Classes, *OF_CLASSES)

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "CVaRMLPClassifier":
        """Train a head.

        Args:
            X: float array (n, D) of embeddings, n at least 2. float16 and float32 are kept, all else becomes float32.
            y: array (n,) of class labels of any kind, at least two different ones.
            sample_weight: array (n,) of numbers from 0 on, how much of the whole the loss of each row stands for; None
                where all do alike. A row of weight 0 is left out.

        Returns:
            itself.

        Raises:
            ValueError: X, y or a parameter is not what it must be, or the training diverges.
        """
        X, y, weights = self._validated(X, y, sample_weight)
        check_classification_targets(y)
        classes, labels = np.unique(y, return_inverse=True)
        _require_two(classes, self)
        self._train(X, labels, weights, len(classes))
        self.classes_ = classes
        return self

    def decision_function(self, X: Any) -> npt.NDArray[np.float64]:
        """Return the logits (n, C) of embeddings (n, D); for two classes the second's minus the first's, (n,)."""
        logits = self._logits(X).numpy()
        return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

    def predict_proba(self, X: Any) -> npt.NDArray[np.float64]:
        """Return the probabilities (n, C) of the classes, in the order of ``classes_``."""
        logits = self._logits(X)
        return self._task(logits.shape[1]).probabilities(logits).numpy()

    def predict(self, X: Any) -> Array:
        """Return the most probable class (n,) of each embedding (n, D)."""
        most = self._logits(X).argmax(dim=1).numpy()
        return self.classes_[most]


class CVaRMLPMultiLabelClassifier(ClassifierMixin, CVaRMLP):  # type: ignore[misc]
    """Multi-label classifier: an MLP on embeddings, trained with CVaR of the binary cross-entropies and SAM.

    A scikit-learn estimator, with the parameters of ``CVaRMLPClassifier`` and those of the pairwise AUC term. A label
    is predicted where its probability is above one half. A y of one dimension with two classes counts as one label.

    Attributes:
        classes_: (C, 2), 0 and 1 for each label; the two classes (2,) where y had one dimension.
        n_features_in_, head_, n_iter_, loss_curve_: as for ``CVaRMLPClassifier``.
    """

    _kind = Units
    __init__ = _with_parameters(Units, *OF_CLASSES, "auc_weight", "auc_margin")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        tags.classifier_tags.multi_class = False
        return tags

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "CVaRMLPMultiLabelClassifier":
        """Train a head.

        Args:
            X: float array (n, D) of embeddings, n at least 2. float16 and float32 are kept, all else becomes float32.
            y: array or sparse matrix (n, C) of 0 and 1, C at least 2; or (n,) of two classes, which is one label.
            sample_weight: as for ``CVaRMLPClassifier``; a pair of the AUC term weighs the product of its rows'.

        Returns:
            itself.

        Raises:
            ValueError: X, y or a parameter is not what it must be, or the training diverges.
        """
        X, y, weights = self._validated(X, y, sample_weight, multi_output=True)
        y = y.toarray() if issparse(y) else y
        check_classification_targets(y)
        kind = type_of_target(y, input_name="y")
        if kind == "binary":
            classes, labels = np.unique(column_or_1d(y, warn=True), return_inverse=True)
            _require_two(classes, self)
            self._train(X, labels[:, None], weights, 1)
            self.classes_ = classes
            return self
        if kind != "multilabel-indicator" or not np.isin(y, (0, 1)).all():
            raise ValueError(
                f"Only binary classification is supported. The type of the target is {kind}; expected a matrix (n, C) "
                "of 0 and 1, or two classes (n,). For one of several classes use CVaRMLPClassifier."
            )
        self._train(X, y, weights, y.shape[1])
        self.classes_ = np.tile(np.arange(2), (y.shape[1], 1))  # (C, 2), as scorers and cross_val_predict need it
        return self

    def decision_function(self, X: Any) -> npt.NDArray[np.float64]:
        """Return the logits (n, C) of embeddings (n, D), above 0 where a label is predicted; (n,) for one label."""
        logits = self._logits(X).numpy()
        return logits[:, 0] if self.classes_.ndim == 1 else logits

    def predict_proba(self, X: Any) -> npt.NDArray[np.float64]:
        """Return the probabilities (n, C) of the labels' presence; of both classes, (n, 2), for one label."""
        logits = self._logits(X)
        if self.classes_.ndim == 1:
            logits = torch.cat([-logits, logits], dim=1)
        return self._task(logits.shape[1]).probabilities(logits).numpy()

    def predict(self, X: Any) -> Array:
        """Return int64 labels (n, C) of 0 and 1 for embeddings (n, D); (n,) of ``classes_`` for one label."""
        present = (self._logits(X) > 0).long().numpy()
        return self.classes_[present[:, 0]] if self.classes_.ndim == 1 else present


class CVaRMLPRegressor(RegressorMixin, CVaRMLP):  # type: ignore[misc]
    """Regressor of one value or several: an MLP on embeddings, trained with CVaR of the squared errors, CCC, and SAM.

    A scikit-learn estimator, with those parameters of ``CVaRMLPClassifier`` that need no classes, and ``ccc_weight``,
    the share in the loss of 1 - CCC of the batch. It trains on y as it is, and predicts without clipping: values far
    from [-1, 1] are best scaled first, as by scikit-learn's ``TransformedTargetRegressor``.

    Attributes:
        n_features_in_, head_, n_iter_, loss_curve_: as for ``CVaRMLPClassifier``.
    """

    _kind = Values
    __init__ = _with_parameters(Values, "ccc_weight")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "CVaRMLPRegressor":
        """Train a head.

        Args:
            X: float array (n, D) of embeddings, n at least 2. float16 and float32 are kept, all else becomes float32.
            y: array (n,) or (n, C) of numbers; they become float32.
            sample_weight: as for ``CVaRMLPClassifier``; CCC is that of weighted moments.

        Returns:
            itself.

        Raises:
            ValueError: X, y or a parameter is not what it must be, or the training diverges.
        """
        X, y, weights = self._validated(X, y, sample_weight, multi_output=True, y_numeric=True)
        values = check_array(y, dtype=np.float32, ensure_2d=False, input_name="y")
        columns = values.reshape(len(X), -1)  # (n, C)
        self._train(X, columns, weights, columns.shape[1])
        self._shape = values.shape[1:]  # of a row of y
        return self

    def predict(self, X: Any) -> npt.NDArray[np.float64]:
        """Return the values of embeddings (n, D), (n,) or (n, C) as y was."""
        return self._logits(X).numpy().reshape(-1, *self._shape)


def _require_two(classes: Array, estimator: CVaRMLP) -> None:
    if len(classes) < 2:
        raise ValueError(
            f"y has only one class, {classes[0]!r}. {type(estimator).__name__} learns to tell classes apart: expected "
            "at least two of them in y."
        )
