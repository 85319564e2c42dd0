"""What the scikit-learn estimators share: parameters, the loop over epochs, logits of a trained head."""

import math
import re
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from affcache.devices import resolve_device
from affcache.errors import ConfigError
from affcache.settings import build
from affcache.tasks.tasks import Task
from affcache.training.data import EVALUATION_BATCH, Frames, prepare
from affcache.training.learner import Learner, build_head, learning_rate
from affcache.training.objective import ClassCounts
from affcache.training.settings import FitSettings

FLOATS = (np.float32, np.float16)  # what a head trains on as it is; all else becomes the first

Array = npt.NDArray[Any]


class CVaRMLP(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn is untyped
    """A classifier that is an MLP head trained by the core; what y means, and what logits mean, is its children's."""

    def __init__(
        self,
        *,
        epochs: int = FitSettings.epochs,
        batch_size: int = FitSettings.batch_size,
        lr: float = FitSettings.lr,
        lr_minimum: float = FitSettings.lr_minimum,
        lr_half_period: float = FitSettings.lr_half_period,
        weight_decay: float = FitSettings.weight_decay,
        alpha: float = FitSettings.alpha,
        cvar_level: str = FitSettings.cvar_level,
        class_weights: str = FitSettings.class_weights,
        label_smoothing: float = FitSettings.label_smoothing,
        focal_gamma: float = FitSettings.focal_gamma,
        logit_adjustment: float = FitSettings.logit_adjustment,
        rho: float = FitSettings.rho,
        adaptive: bool = FitSettings.adaptive,
        clip_norm: float | None = FitSettings.clip_norm,
        precision: str = FitSettings.precision,
        dropout: float = FitSettings.dropout,
        hidden_layers: int = FitSettings.hidden_layers,
        hidden_width: int = FitSettings.hidden_width,
        normalize: str = FitSettings.normalize,
        random_state: int | np.random.RandomState | None = None,
        device: str = "cpu",
    ) -> None:
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.lr_minimum = lr_minimum
        self.lr_half_period = lr_half_period
        self.weight_decay = weight_decay
        self.alpha = alpha
        self.cvar_level = cvar_level
        self.class_weights = class_weights
        self.label_smoothing = label_smoothing
        self.focal_gamma = focal_gamma
        self.logit_adjustment = logit_adjustment
        self.rho = rho
        self.adaptive = adaptive
        self.clip_norm = clip_norm
        self.precision = precision
        self.dropout = dropout
        self.hidden_layers = hidden_layers
        self.hidden_width = hidden_width
        self.normalize = normalize
        self.random_state = random_state
        self.device = device

    @abstractmethod
    def _task(self, outputs: int) -> Task:
        """Return the task of a head with this many logits."""

    def _settings(self, task: str) -> FitSettings:
        """Return the parameters as settings, the seed drawn unless it is given; ValueError where one is wrong."""
        random = check_random_state(self.random_state)
        values = self.get_params(deep=False)
        given = values.pop("random_state")
        values["seed"] = int(given) if isinstance(given, Integral) else int(random.randint(2**31 - 1))
        plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}
        with _value_errors():
            return build(FitSettings, {**plain, "task": task})

    def _train(self, X: Array, labels: Array, outputs: int) -> None:
        """Train a head on checked embeddings (n, D) and labels (n,) or (n, C), and keep it."""
        task = self._task(outputs)
        settings = self._settings(task.name)
        device = self._device()
        targets = torch.tensor(labels, dtype=torch.int64)
        videos = torch.zeros(len(X), dtype=torch.int64, device=device)
        frames = Frames(_tensor(X).to(device), targets.to(device), videos)
        learner = Learner([settings], task, X.shape[1], device, ClassCounts.of(task, targets))
        losses: list[float] = []
        for epoch in range(settings.epochs):
            losses.append(float(learner.epoch(frames, learning_rate(settings, epoch))[0]))
            if not math.isfinite(losses[-1]):
                break
        head = {name: tensor.cpu().numpy().copy() for name, tensor in learner.heads.state_dict(0).items()}
        finite = all(np.isfinite(array).all() for array in head.values())  # the last step may have broken it
        if not (finite and math.isfinite(losses[-1])):
            raise ValueError(
                f"The training diverged in epoch {len(losses)}: the loss or weights of the head are not finite. Lower "
                "lr or rho, or scale the embeddings first, for instance with normalize='l2'."
            )
        self._fitted_settings = settings
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
        normalize = self._fitted_settings.normalize
        with torch.no_grad():
            parts = _tensor(X).split(EVALUATION_BATCH)
            return torch.cat([head(prepare(part.to(device), normalize).double()) for part in parts]).cpu()

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
