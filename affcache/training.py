"""One training run: epochs of the core, evaluated and saved one by one, resumable after each."""

import math
import time
from typing import Any

from affcache.errors import ConfigError
from affcache.learner import Learner, learning_rate
from affcache.listener import Listener
from affcache.risk import cvar
from affcache.runs import RunFolder, read_tensors, write_tensors
from affcache.training_data import FrameSource


class Training:
    """The state of one run: the learner, finished epochs and the best of them.

    Args:
        learner: one head with its optimiser.
        folder: the claimed run folder.
        identity: goes into the header of every saved head: task, settings, and the store's description.
    """

    def __init__(self, learner: Learner, folder: RunFolder, identity: dict[str, Any]) -> None:
        self.learner = learner
        self.settings = learner.settings
        self.task = learner.task
        self.folder = folder
        self.identity = identity
        self.epoch = 0  # finished ones
        self.best_value = -math.inf
        self.best_epoch = 0

    def run(self, train: FrameSource, validation: FrameSource, listener: Listener) -> None:
        """Train the epochs that are left."""
        while self.epoch < self.settings.epochs:
            entry = self._one_epoch(train, validation)
            self._save(entry)
            words = f"{self.task.metric} {entry[self.task.metric]:.3f}, best {self.best_value:.3f}"
            listener.progress(self.epoch, self.settings.epochs, "epoch", words)

    def _one_epoch(self, train: FrameSource, validation: FrameSource) -> dict[str, Any]:
        """Train one epoch, evaluate, and return its line of history."""
        start = time.perf_counter()
        rate = learning_rate(self.settings, self.epoch)
        train_loss = float(self.learner.epoch(train, rate)[0])
        self._require_finite(train_loss)
        trained = time.perf_counter()
        (logits,) = self.learner.predict(validation)  # (n, C)
        losses = self.task.losses(logits, validation.labels.to(logits.device))
        self._require_finite(float(losses.mean()))  # the last step may have broken the head
        decided = self.task.decide(self.task.probabilities(logits).cpu().numpy())
        scores = self.task.score(validation.labels.cpu().numpy(), decided, self.task.classes)
        self.epoch += 1
        return {
            "epoch": self.epoch,
            "train_loss": train_loss,
            "validation_loss": float(losses.mean()),
            "validation_cvar": float(cvar(losses, self.settings.alpha)),
            self.task.metric: scores.value,
            "learning_rate": rate,
            "seconds": round(time.perf_counter() - start, 3),
            "training_seconds": round(trained - start, 3),
        }

    def _require_finite(self, loss: float) -> None:
        """Refuse to go on with, or to keep, a head that diverged."""
        if not math.isfinite(loss):
            raise ConfigError(
                f"The training diverged in epoch {self.epoch + 1}: the loss is {loss}. Expected a finite loss. "
                "Lower --lr or --rho, or try --normalize l2. The epochs before it are kept in "
                f"{self.folder.path}."
            )

    def _save(self, entry: dict[str, Any]) -> None:
        """Write the epoch: history, the head if it is the best so far, and last what ``restore`` continues from."""
        self.folder.append_history(entry)
        if entry[self.task.metric] > self.best_value:
            self.best_value, self.best_epoch = entry[self.task.metric], self.epoch
            best = {"epoch": self.epoch, self.task.metric: self.best_value}
            write_tensors(self.folder.head, self.learner.heads.state_dict(0), {**self.identity, **best})
        progress = {"epoch": self.epoch, "best_value": self.best_value, "best_epoch": self.best_epoch}
        write_tensors(self.folder.last, self.learner.state(), {**self.identity, **progress})

    def restore(self) -> None:
        """Continue from the last finished epoch, as if there had been no interruption."""
        if not self.folder.last.exists():  # killed in the first one
            self.folder.keep_history(0)
            return
        tensors, progress = read_tensors(self.folder.last)
        self.learner.load_state(tensors)
        self.epoch, self.best_value = progress["epoch"], progress["best_value"]
        self.best_epoch = progress["best_epoch"]
        self.folder.keep_history(self.epoch)
