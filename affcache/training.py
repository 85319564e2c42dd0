"""The training loop: a light head over frames in memory, CVaR in the loss, SAM as optimiser, resumable per epoch."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from affcache.annotations import JoinedLabels
from affcache.errors import ConfigError
from affcache.heads import MLPHead
from affcache.listener import Listener
from affcache.runs import RunFolder, read_tensors, write_tensors
from affcache.sam import SAM, frozen_batch_norm
from affcache.settings import FitSettings
from affcache.store import EmbeddingStore
from affcache.tasks import Task

EVALUATION_BATCH = 8192  # frames per forward pass without gradients


@dataclass(frozen=True)
class Frames:
    """Embeddings with their labels in memory, on the device that trains: a batch is one index into them."""

    embeddings: torch.Tensor  # (n, D) float16
    labels: torch.Tensor  # (n,) or (n, values)

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def load(cls, store: EmbeddingStore, joined: JoinedLabels, device: torch.device) -> "Frames":
        """Copy the joined rows of a store to a device."""
        embeddings = torch.from_numpy(np.asarray(store.features[joined.rows]))
        return cls(embeddings.to(device), torch.from_numpy(joined.labels).to(device))


def predict(head: MLPHead, embeddings: torch.Tensor, normalize: str) -> torch.Tensor:
    """Return the logits (n, C) of float16 embeddings (n, D), in evaluation mode, without gradients."""
    head.eval()
    with torch.inference_mode():
        batches = embeddings.split(EVALUATION_BATCH)
        return torch.cat([head(prepare(batch, normalize)) for batch in batches])  # (n, C)


def prepare(embeddings: torch.Tensor, normalize: str) -> torch.Tensor:
    """Turn stored float16 embeddings into the head's float32 input, scaled to length 1 for "l2"."""
    prepared = embeddings.float()
    return torch.nn.functional.normalize(prepared, dim=1) if normalize == "l2" else prepared


def build_head(settings: FitSettings, width: int, task: Task) -> MLPHead:
    """Build the untrained head that the settings describe, for embeddings of the given width."""
    return MLPHead(
        width,
        task.outputs,
        hidden_layers=settings.hidden_layers,
        hidden_width=settings.hidden_width,
        dropout=settings.dropout,
    )


def learning_rate(settings: FitSettings, epoch: int) -> float:
    """Return the learning rate of an epoch (counted from 0): a cosine that swings between lr and its minimum."""
    phase = math.pi * epoch / (settings.lr_half_period * settings.epochs)
    return settings.lr_minimum + (settings.lr - settings.lr_minimum) * (1 + math.cos(phase)) / 2


class Training:
    """The state of one run: head, optimiser, finished epochs and the best of them.

    Draws from torch's global generators (initial weights, order of frames, dropout): seed them first.

    Args:
        settings: the recipe.
        task: what is predicted.
        width: D, the width of an embedding.
        device: where the head trains; the frames must lie there.
        folder: the claimed run folder.
        identity: goes into the header of every saved head: task, settings, and the store's description.
    """

    def __init__(
        self,
        settings: FitSettings,
        task: Task,
        width: int,
        device: torch.device,
        folder: RunFolder,
        identity: dict[str, Any],
    ) -> None:
        self.settings = settings
        self.task = task
        self.device = device
        self.folder = folder
        self.identity = identity
        self.head = build_head(settings, width, task).to(device)
        base = torch.optim.AdamW(self.head.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
        self.optimiser = SAM(base, settings.rho)
        self.epoch = 0  # finished ones
        self.best_value = -math.inf
        self.best_epoch = 0

    def run(self, train: Frames, validation: Frames, listener: Listener) -> None:
        """Train the epochs that are left."""
        while self.epoch < self.settings.epochs:
            entry = self._one_epoch(train, validation)
            self._save(entry)
            words = f"{self.task.metric} {entry[self.task.metric]:.3f}, best {self.best_value:.3f}"
            listener.progress(self.epoch, self.settings.epochs, "epoch", words)

    def _one_epoch(self, train: Frames, validation: Frames) -> dict[str, Any]:
        """Train one epoch, evaluate, and return its line of history."""
        start = time.perf_counter()
        rate = learning_rate(self.settings, self.epoch)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.head.train()
        losses = [self._step(train, batch) for batch in _batches(len(train), self.settings.batch_size)]
        train_loss = float(torch.stack(losses).mean())
        self._require_finite(train_loss)
        trained = time.perf_counter()
        logits = predict(self.head, validation.embeddings, self.settings.normalize)  # (n, C)
        validation_loss = float(self.task.loss(logits, validation.labels, 1.0))
        self._require_finite(validation_loss)  # the last step may have broken the head
        decided = self.task.decide(self.task.probabilities(logits).cpu().numpy())
        scores = self.task.score(validation.labels.cpu().numpy(), decided, self.task.classes)
        self.epoch += 1
        return {
            "epoch": self.epoch,
            "train_loss": train_loss,
            "validation_loss": validation_loss,
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

    def _step(self, train: Frames, batch: torch.Tensor) -> torch.Tensor:
        """Make one step on the frames of a batch; return the loss of its first pass, not yet waited for."""
        batch = batch.to(self.device)
        embeddings = prepare(train.embeddings[batch], self.settings.normalize)  # (B, D)
        labels = train.labels[batch]
        loss = self.task.loss(self.head(embeddings), labels, self.settings.alpha)
        loss.backward()
        if self.settings.rho:
            with self.optimiser.perturbed(), frozen_batch_norm(self.head):
                self.task.loss(self.head(embeddings), labels, self.settings.alpha).backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        return loss.detach()

    def _save(self, entry: dict[str, Any]) -> None:
        """Write the epoch: history, the head if it is the best so far, and last what ``restore`` continues from."""
        self.folder.append_history(entry)
        if entry[self.task.metric] > self.best_value:
            self.best_value, self.best_epoch = entry[self.task.metric], self.epoch
            best = {"epoch": self.epoch, self.task.metric: self.best_value}
            write_tensors(self.folder.head, self.head.state_dict(), {**self.identity, **best})
        optimiser = self.optimiser.state_dict()["base"]
        tensors = {f"head.{name}": tensor for name, tensor in self.head.state_dict().items()}
        for index, state in optimiser["state"].items():
            tensors |= {f"optimiser.{index}.{name}": tensor for name, tensor in state.items()}
        tensors["generator"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["generator.cuda"] = torch.cuda.get_rng_state(self.device)
        progress = {"epoch": self.epoch, "best_value": self.best_value, "best_epoch": self.best_epoch}
        write_tensors(self.folder.last, tensors, {**self.identity, **progress})

    def restore(self) -> None:
        """Continue from the last finished epoch, as if there had been no interruption."""
        if not self.folder.last.exists():  # killed in the first one
            self.folder.keep_history(0)
            return
        tensors, progress = read_tensors(self.folder.last)
        self.head.load_state_dict(_with_prefix(tensors, "head."))
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in _with_prefix(tensors, "optimiser.").items():
            index, _, entry = name.partition(".")
            state.setdefault(int(index), {})[entry] = tensor
        groups = self.optimiser.state_dict()["base"]["param_groups"]
        self.optimiser.load_state_dict({"rho": self.settings.rho, "base": {"state": state, "param_groups": groups}})
        torch.set_rng_state(tensors["generator"])
        if self.device.type == "cuda" and "generator.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["generator.cuda"], self.device)
        self.epoch, self.best_value = progress["epoch"], progress["best_value"]
        self.best_epoch = progress["best_epoch"]
        self.folder.keep_history(self.epoch)


def _with_prefix(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _batches(frames: int, size: int) -> Iterator[torch.Tensor]:
    """Yield a shuffled epoch as index tensors; a last batch of one frame joins the one before (BatchNorm needs two)."""
    batches = list(torch.randperm(frames).split(size))
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    return iter(batches)
