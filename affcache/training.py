"""The training loop: light heads over frames in memory, CVaR in the loss, SAM as optimiser, resumable per epoch."""

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
from affcache.objective import ClassCounts, Objective
from affcache.risk import cvar
from affcache.runs import RunFolder, read_tensors, write_tensors
from affcache.sam import SAM, clip_stacked_gradients
from affcache.settings import FitSettings
from affcache.stacked_heads import StackedHeads
from affcache.store import EmbeddingStore
from affcache.tasks import Task

EVALUATION_BATCH = 8192  # frames per forward pass without gradients


@dataclass(frozen=True)
class Frames:
    """Embeddings with their labels in memory, on the device that trains: a batch is one index into them."""

    embeddings: torch.Tensor  # (n, D) float16
    labels: torch.Tensor  # (n,) or (n, values)
    videos: torch.Tensor  # (n,) int64, the video of each

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def load(cls, store: EmbeddingStore, joined: JoinedLabels, device: torch.device) -> "Frames":
        """Copy the joined rows of a store to a device."""
        embeddings = torch.from_numpy(np.asarray(store.features[joined.rows]))
        videos = torch.from_numpy(store.video_of_rows()[joined.rows].astype(np.int64))
        return cls(embeddings.to(device), torch.from_numpy(joined.labels).to(device), videos.to(device))


def predict(heads: StackedHeads, embeddings: torch.Tensor, normalize: str) -> torch.Tensor:
    """Return the logits (H, n, C) of float16 embeddings (n, D), as trained heads give them."""
    batches = embeddings.split(EVALUATION_BATCH)
    return torch.cat([heads.evaluate(prepare(batch, normalize)) for batch in batches], dim=1)  # (H, n, C)


def prepare(embeddings: torch.Tensor, normalize: str) -> torch.Tensor:
    """Turn stored float16 embeddings into the head's float32 input, scaled to length 1 for "l2"."""
    prepared = embeddings.float()
    return torch.nn.functional.normalize(prepared, dim=-1) if normalize == "l2" else prepared


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
        counts: how often each class stands in the training labels; None for a task without classes.
        videos: how many videos the store has.
    """

    def __init__(
        self,
        settings: FitSettings,
        task: Task,
        width: int,
        device: torch.device,
        folder: RunFolder,
        identity: dict[str, Any],
        counts: ClassCounts | None = None,
        videos: int = 0,
    ) -> None:
        self.settings = settings
        self.task = task
        self.device = device
        self.folder = folder
        self.identity = identity
        products = torch.bfloat16 if settings.precision == "bf16" else None
        initial = [build_head(settings, width, task)]
        self.heads = StackedHeads(initial, dropout=[settings.dropout], products=products, device=device)
        self.heads.parameters.grad = self.heads.gradients
        base = torch.optim.AdamW(
            [self.heads.parameters], lr=settings.lr, weight_decay=settings.weight_decay, fused=True
        )
        self.optimiser = SAM(base, settings.rho, adaptive=settings.adaptive, stacked=True)
        self.objective = Objective(task, [settings], counts, self.heads.parameters, videos)
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
        losses = [self._step(train, batch) for batch in _batches(len(train), self.settings.batch_size)]
        train_loss = float(torch.stack(losses).mean())
        self._require_finite(train_loss)
        trained = time.perf_counter()
        (logits,) = predict(self.heads, validation.embeddings, self.settings.normalize)  # (n, C)
        losses_of_validation = self.task.losses(logits, validation.labels)
        validation_loss = float(losses_of_validation.mean())
        self._require_finite(validation_loss)  # the last step may have broken the head
        decided = self.task.decide(self.task.probabilities(logits).cpu().numpy())
        scores = self.task.score(validation.labels.cpu().numpy(), decided, self.task.classes)
        self.epoch += 1
        return {
            "epoch": self.epoch,
            "train_loss": train_loss,
            "validation_loss": validation_loss,
            "validation_cvar": float(cvar(losses_of_validation, self.settings.alpha)),
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
        batch = batch.to(self.device)[None]  # (1, B)
        loss = self._gradients(train, batch, first_pass=True)
        if self.settings.rho:
            with self.optimiser.perturbed():
                self._gradients(train, batch, first_pass=False)
        if self.settings.clip_norm:
            clip_stacked_gradients(self.heads.gradients, self.settings.clip_norm)
        self.optimiser.step()
        return loss

    def _gradients(self, train: Frames, batch: torch.Tensor, *, first_pass: bool) -> torch.Tensor:
        """Compute the gradients on a batch of row numbers (1, B); return the loss (1,)."""
        embeddings = prepare(train.embeddings[batch], self.settings.normalize)  # (1, B, D)
        logits = self.heads.forward(embeddings, count_batch=first_pass).requires_grad_()  # (1, B, C)
        loss = self.objective(logits, train.labels[batch], train.videos[batch], first_pass=first_pass)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        self.heads.backward(gradient)
        self.heads.parameters.grad = self.heads.gradients
        return loss.detach()

    def _save(self, entry: dict[str, Any]) -> None:
        """Write the epoch: history, the head if it is the best so far, and last what ``restore`` continues from."""
        self.folder.append_history(entry)
        if entry[self.task.metric] > self.best_value:
            self.best_value, self.best_epoch = entry[self.task.metric], self.epoch
            best = {"epoch": self.epoch, self.task.metric: self.best_value}
            write_tensors(self.folder.head, self.heads.state_dict(0), {**self.identity, **best})
        optimiser = self.optimiser.state_dict()["base"]
        tensors = {f"head.{name}": tensor for name, tensor in self.heads.state_dict(0).items()}
        tensors |= {f"objective.{name}": tensor for name, tensor in self.objective.state().items()}
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
        self.heads.load_state_dict(0, _with_prefix(tensors, "head."))
        self.objective.load_state(_with_prefix(tensors, "objective."))
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in _with_prefix(tensors, "optimiser.").items():
            index, _, entry = name.partition(".")
            state.setdefault(int(index), {})[entry] = tensor
        groups = self.optimiser.state_dict()["base"]["param_groups"]
        self.optimiser.load_state_dict(
            {**self.optimiser.state_dict(), "base": {"state": state, "param_groups": groups}}
        )
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
