"""What a trained trial of the grid leaves: a run folder with its result, from which all tables are made."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from affcache.ablation.grid import Variant
from affcache.errors import StoreError
from affcache.files import Tensors, read_tensors, write_json, write_tensors, write_text
from affcache.tasks.metrics import Table
from affcache.training.epochs import Best, Entry
from affcache.training.fit import HEADER, JoinedSplits, LoadedSplits
from affcache.training.run_folder import RunFolder, settings_to_json
from affcache.training.settings import FitSettings

RESULT = ("value", "selected", "best_epoch", "diverged")  # of an outcome, in result.json
STATISTICS = "videos.safetensors"
MACHINE_SETTINGS = ("annotations", "device", "memory")  # where and how it is computed, not what


@dataclass(frozen=True)
class Trial:
    """One head of the grid: a setting with a seed, on one store with its labels."""

    variant: Variant
    settings: FitSettings
    splits: JoinedSplits
    folder: RunFolder

    @classmethod
    def of(cls, variant: Variant, settings: FitSettings, splits: JoinedSplits, out: Path) -> "Trial":
        """Name a trial by everything that decides its result, so that it is found again in whatever grid it stands."""
        store, labels = splits.description["store"], splits.description["labels"]
        identity = {
            "settings": {name: v for name, v in settings_to_json(settings).items() if name not in MACHINE_SETTINGS},
            "store": store["fingerprint"],
            "encoder": store["encoder_fingerprint"],
            "labels": {name: of["sha256"] for name, of in {"selection": labels["validation"], **labels}.items()},
        }
        name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        return cls(variant, settings, splits, RunFolder(out / "cells" / name))

    @property
    def name(self) -> str:
        """The folder's name, which no other trial has."""
        return self.folder.path.name

    @property
    def result(self) -> Path:
        """The file of the result, which is written last: the trial is finished once it is there."""
        return self.folder.path / "result.json"

    def write(self, outcome: "Outcome", head: Tensors | None) -> None:
        """Write the run folder, its result last."""
        self.folder.path.mkdir(parents=True, exist_ok=True)
        config = self.splits.describe_run(self.settings)
        write_json(self.folder.config, config)
        write_text(self.folder.history, "".join(json.dumps(entry) + "\n" for entry in outcome.history))
        if outcome.statistics is not None:
            sums = {"sums": torch.from_numpy(outcome.statistics)}
            write_tensors(self.folder.path / STATISTICS, sums, {"videos": outcome.videos})
        if head is not None:
            best = {"epoch": outcome.best_epoch, self.splits.task.metric: outcome.value}
            write_tensors(self.folder.head, head, {**{name: config[name] for name in HEADER}, **best})
        write_json(self.result, {name: getattr(outcome, name) for name in RESULT})

    def read(self) -> "Outcome":
        """Return the result.

        Raises:
            StoreError: it is damaged.
        """
        try:
            found = json.loads(self.result.read_text(encoding="utf-8"))
            history = self.folder.read_history()
            value, selected, best_epoch, diverged = (found[name] for name in RESULT)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"The result in {self.folder.path} can't be read ({error}). Expected what 'affcache ablate' wrote. "
                "Delete that folder and call again: the cell is trained anew."
            ) from None
        if diverged is not None:
            return Outcome(None, None, best_epoch, diverged, history, None, [])
        tensors, header = read_tensors(self.folder.path / STATISTICS)
        return Outcome(value, selected, best_epoch, None, history, tensors["sums"].numpy(), header["videos"])


@dataclass(frozen=True)
class Outcome:
    """What training a trial found."""

    value: float | None  # the metric on validation at the best epoch; None where it diverged
    selected: float | None  # the metric by which that epoch was chosen, there
    best_epoch: int  # counted from 1
    diverged: int | None  # the epoch in which it did
    history: list[Entry]
    statistics: Table | None  # (G, C, S) of validation's videos, for ``Task.metric_of``
    videos: list[str]  # (G,)

    @classmethod
    def of(cls, best: Best, logits: torch.Tensor, splits: LoadedSplits) -> "Outcome":
        """Return what a head's logits (n, C) on validation say; nothing where it diverged."""
        if best.diverged is not None:
            return cls(None, None, best.epoch, best.diverged, best.history, None, [])
        task, names, labels = splits.task, splits.video_names, splits.validation.labels.cpu().numpy()
        decided = task.decide(task.probabilities(logits).cpu().numpy())
        value = task.score(labels, decided).value
        statistics = task.sums_by_video(labels, decided, splits.video_of_frame, len(names))
        return cls(value, best.value, best.epoch, None, best.history, statistics, names)
