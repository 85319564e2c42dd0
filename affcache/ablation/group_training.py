"""A group of cells trained side by side: epochs of the core, the best of each head remembered, resumable."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from affcache.ablation.trials import LoadedSplits, Outcome
from affcache.errors import StoreError
from affcache.files import Tensors, read_tensors, write_tensors
from affcache.training.epochs import Entry, has_diverged, train_epoch
from affcache.training.learner import Learner
from affcache.training.objective import ClassCounts
from affcache.training.settings import FitSettings

SECONDS_BETWEEN_CHECKPOINTS = 30.0

Report = Callable[[int, str], None]  # epochs of heads finished now, how it stands


class GroupTraining:
    """The state of a group: the learner, and of each head its history and its best epoch.

    A head that diverges is out: its numbers go on being computed beside the others', which they can't reach.

    Args:
        cells: names of H cells of one source.
        recipes: their settings, which have one form.
        source: the frames.
        device: where they train.
        checkpoint: file to continue from after a kill; None for none.
    """

    def __init__(
        self,
        cells: Sequence[str],
        recipes: Sequence[FitSettings],
        source: LoadedSplits,
        device: torch.device,
        checkpoint: Path | None,
    ) -> None:
        self.cells = list(cells)
        self.source = source
        self.task = source.task
        self.checkpoint = checkpoint
        counts = ClassCounts.of(self.task, source.train.labels.cpu())
        self.learner = Learner(list(recipes), self.task, source.width, device, counts, source.videos)
        self.epochs = recipes[0].epochs
        self.epoch = 0  # finished ones
        self.histories: list[list[Entry]] = [[] for _ in cells]
        self.diverged: list[int | None] = [None] * len(cells)
        self.best_epochs = [0] * len(cells)
        self.best_values = [-math.inf] * len(cells)
        self.best_heads: list[Tensors] = [{} for _ in cells]

    def run(self, report: Report) -> None:
        """Train the epochs that are left; now and then write the checkpoint."""
        saved = time.monotonic()
        while self.epoch < self.epochs and not all(self.diverged):
            entries = train_epoch(self.learner, self.source.train, self.source.selection, self.epoch)
            self.epoch += 1
            for head, entry in enumerate(entries):
                self._take(head, entry)
            report(len(self.cells), f"epoch {self.epoch} of {self.epochs}, {self._standing()}")
            if self.epoch < self.epochs and time.monotonic() - saved >= SECONDS_BETWEEN_CHECKPOINTS:
                self.save()
                saved = time.monotonic()
        report(len(self.cells) * (self.epochs - self.epoch), self._standing())

    def _take(self, head: int, entry: Entry) -> None:
        """Take up a head's line of history, and the head itself where it is the best so far."""
        if self.diverged[head] is not None:
            return
        if has_diverged(entry):
            self.diverged[head] = self.epoch
            return
        self.histories[head].append(entry)
        if entry[self.task.metric] > self.best_values[head]:
            self.best_values[head], self.best_epochs[head] = entry[self.task.metric], self.epoch
            state = self.learner.heads.state_dict(head)
            self.best_heads[head] = {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}

    def _standing(self) -> str:
        return f"best {self.task.metric} of this group's {len(self.cells)} heads {max(self.best_values):.3f}"

    def outcomes(self) -> list[Outcome]:
        """Score each head's best epoch on validation, all in one pass. The training is over then."""
        for head, state in enumerate(self.best_heads):
            if state:  # a head may have diverged at once
                self.learner.heads.load_state_dict(head, state)
        logits = self.learner.predict(self.source.validation)  # (H, n, C)
        return [self._outcome(head, of_head) for head, of_head in enumerate(logits)]

    def _outcome(self, head: int, logits: torch.Tensor) -> Outcome:
        """Return what a head's logits (n, C) on validation say; nothing where it diverged."""
        history, epoch, diverged = self.histories[head], self.best_epochs[head], self.diverged[head]
        if diverged is not None:
            return Outcome(None, None, epoch, diverged, history, None, [])
        return Outcome.of(self.source, logits, self.best_values[head], epoch, history)

    def save(self) -> None:
        """Write everything that a continued training needs, so that it equals an uninterrupted one."""
        if self.checkpoint is None:
            return
        tensors = self.learner.state()
        for head, state in enumerate(self.best_heads):
            tensors |= {f"best.{head}.{name}": tensor for name, tensor in state.items()}
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        progress = {
            "cells": self.cells,
            "epoch": self.epoch,
            "histories": self.histories,
            "diverged": self.diverged,
            "best_epochs": self.best_epochs,
            "best_values": [value if math.isfinite(value) else None for value in self.best_values],
        }
        write_tensors(self.checkpoint, tensors, progress)

    def restore(self) -> int:
        """Continue from the checkpoint if there is one of these cells; return how many epochs it had finished."""
        if self.checkpoint is None:
            return 0
        try:
            tensors, progress = read_tensors(self.checkpoint)
        except StoreError:  # none, or none that can be read: its work is made again
            return 0
        if progress["cells"] != self.cells:
            return 0
        self.learner.load_state({name: tensor for name, tensor in tensors.items() if not name.startswith("best.")})
        for head in range(len(self.cells)):
            prefix = f"best.{head}."
            self.best_heads[head] = {
                name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)
            }
        self.epoch, self.histories, self.diverged = progress["epoch"], progress["histories"], progress["diverged"]
        self.best_epochs = progress["best_epochs"]
        self.best_values = [-math.inf if value is None else value for value in progress["best_values"]]
        return self.epoch
