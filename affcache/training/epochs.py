"""One training run: epochs of the core, evaluated and saved one by one, resumable after each."""

import math
import time
from typing import Any

from affcache.errors import ConfigError
from affcache.files import read_tensors, write_tensors
from affcache.progress import Listener
from affcache.training.data import FrameSource
from affcache.training.learner import Learner, learning_rate
from affcache.training.risk import cvar
from affcache.training.run_folder import RunFolder

Entry = dict[str, Any]  # a line of history
LOSSES = ("train_loss", "validation_loss")


def train_epoch(learner: Learner, train: FrameSource, validation: FrameSource, epoch: int) -> list[Entry]:
    """Train an epoch, counted from 0, and evaluate; return a line of history for each head.

    A head that diverged has a loss that isn't finite, and a metric that is nan.
    """
    start = time.perf_counter()
    rates = [learning_rate(recipe, epoch) for recipe in learner.recipes]
    train_losses = learner.epoch(train, rates).tolist()
    trained = time.perf_counter()
    logits = learner.predict(validation)  # (H, n, C)
    labels = validation.labels.to(logits.device)
    entries = []
    for recipe, rate, train_loss, of_head in zip(learner.recipes, rates, train_losses, logits, strict=True):
        losses = learner.task.losses(of_head, labels)
        entry = {
            "epoch": epoch + 1,
            "train_loss": train_loss,
            "validation_loss": float(losses.mean()),  # the last step may have broken the head
            "validation_cvar": float(cvar(losses, recipe.alpha)),
            learner.task.metric: math.nan,
            "learning_rate": rate,
        }
        if not has_diverged(entry):
            decided = learner.task.decide(learner.task.probabilities(of_head).cpu().numpy())
            scores = learner.task.score(validation.labels.cpu().numpy(), decided, learner.task.classes)
            entry[learner.task.metric] = scores.value
        entries.append(entry)
    seconds = {"seconds": round(time.perf_counter() - start, 3), "training_seconds": round(trained - start, 3)}
    return [{**entry, **seconds} for entry in entries]


def has_diverged(entry: Entry) -> bool:
    """Say whether a line of history is of a head whose training broke down."""
    return not all(math.isfinite(entry[name]) for name in LOSSES)


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
            (entry,) = train_epoch(self.learner, train, validation, self.epoch)
            self._require_finite(entry)
            self.epoch += 1
            self._save(entry)
            words = f"{self.task.metric} {entry[self.task.metric]:.3f}, best {self.best_value:.3f}"
            listener.progress(self.epoch, self.settings.epochs, "epoch", words)

    def _require_finite(self, entry: Entry) -> None:
        """Refuse to go on with, or to keep, a head that diverged."""
        if has_diverged(entry):
            loss = next(entry[name] for name in LOSSES if not math.isfinite(entry[name]))
            raise ConfigError(
                f"The training diverged in epoch {entry['epoch']}: the loss is {loss}. Expected a finite loss. "
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
