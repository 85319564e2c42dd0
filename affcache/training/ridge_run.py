"""A run of ``fit --head ridge``: a linear head in closed form, its strength chosen by the validation metric."""

import math
import time
from typing import Any

import torch

from affcache.progress import Listener
from affcache.tasks.tasks import Task
from affcache.training.data import FrameSource
from affcache.training.heads import MLPHead
from affcache.training.learner import predict
from affcache.training.ridge import STRENGTHS, RidgePath, balanced_weights, class_targets, label_targets
from affcache.training.run_folder import RunFolder, write_tensors
from affcache.training.settings import FitSettings
from affcache.training.stacked import StackedHeads


class RidgeRun:
    """The heads of all strengths from one pass over the training frames; the best is kept.

    Outputs are fitted to 1 and -1 (for va to the values themselves), so that the probabilities that ``score`` writes
    decide well but aren't calibrated.

    Args:
        settings: of them only normalize and class_weights matter.
        task: what is predicted.
        width: D, the width of an embedding.
        folder: the claimed run folder.
        identity: goes into the header of the saved head.
    """

    def __init__(
        self, settings: FitSettings, task: Task, width: int, folder: RunFolder, identity: dict[str, Any]
    ) -> None:
        self.settings = settings
        self.task = task
        self.width = width
        self.folder = folder
        self.identity = identity
        self.epoch = 0  # strengths tried
        self.best_value = -math.inf
        self.best_epoch = 0  # counted from 1, of ``STRENGTHS``

    def restore(self) -> None:
        """Begin anew: it takes seconds."""
        self.folder.keep_history(0)

    def run(self, train: FrameSource, validation: FrameSource, listener: Listener) -> None:
        """Solve, evaluate every strength in one pass over the validation frames, and save the best head."""
        heads = self._solve(train)
        range_of = f"from {STRENGTHS[0]:g} to {STRENGTHS[-1]:g}"
        listener.message(f"solved the ridge for {len(STRENGTHS)} strengths, {range_of}")
        device = train.labels.device
        stacked = StackedHeads(heads, dropout=[0.0] * len(heads), device=device)
        start = time.perf_counter()
        logits = predict(stacked, validation, self.settings.normalize)  # (H, n, C)
        for strength, head, of_head in zip(STRENGTHS, heads, logits, strict=True):
            decided = self.task.decide(self.task.probabilities(of_head).cpu().numpy())
            value = self.task.score(validation.labels.cpu().numpy(), decided, self.task.classes).value
            self.epoch += 1
            seconds = round(time.perf_counter() - start, 3)
            entry = {"epoch": self.epoch, "strength": strength, self.task.metric: value, "seconds": seconds}
            self.folder.append_history(entry)
            if value > self.best_value:
                self.best_value, self.best_epoch = value, self.epoch
                best = {"epoch": self.epoch, "strength": strength, self.task.metric: value}
                write_tensors(self.folder.head, head.state_dict(), {**self.identity, **best})
            start = time.perf_counter()
            words = f"strength {strength:g}: {self.task.metric} {value:.3f}, best {self.best_value:.3f}"
            listener.progress(self.epoch, len(STRENGTHS), "strength", words)

    def _solve(self, train: FrameSource) -> list[MLPHead]:
        """Return a linear head for each strength."""
        labels, weights = train.labels, torch.ones(len(train))
        if self.task.name == "expr":
            targets = class_targets(labels, self.task.outputs)
            if self.settings.class_weights == "balanced":
                weights = balanced_weights(labels)
        else:
            targets = labels.float() if self.task.class_of is None else label_targets(labels)
        path = RidgePath.from_blocks(train.evaluation_batches(), self.width, targets, weights, self.settings.normalize)
        heads = []
        for strength in STRENGTHS:
            weight, bias = path.solution(strength)
            head = MLPHead(self.width, self.task.outputs, hidden_layers=0)
            head.load_state_dict({"output_layer.weight": weight, "output_layer.bias": bias})
            heads.append(head)
        return heads
