"""What an ablation found, and what is best in it: of each task a run, or with folds a setting; to be trained again."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from affcache.ablation.grid import stores_text
from affcache.ablation.summary import Outcome, Summary, Trial
from affcache.files import write_json
from affcache.training.epochs import Entry
from affcache.training.run_folder import fit_command
from affcache.training.settings import FitSettings

Finished = Sequence[tuple[Trial, Outcome]]


@dataclass(frozen=True)
class Best:
    """The best of one task."""

    task: str
    setting: str
    seed: int | None  # None for a setting, of which all seeds and folds chose together
    value: float  # the metric that is reported
    selected: float  # the metric by which it was chosen
    run: str | None  # the folder with its head, where that was kept
    fit: str  # the call that trains it
    chosen: dict[str, Any]  # task and settings as in config.json, with the epoch or strength that was chosen; stores

    def to_json(self) -> dict[str, Any]:
        """Return it as one JSON object."""
        return {name: value for name, value in vars(self).items() if name != "chosen"}


def best_rows(rows: Sequence[Summary]) -> list[int]:
    """Return which row of each task is best where epochs were chosen; of those that are alike the first."""
    best: dict[str, tuple[float, int]] = {}
    for index, row in enumerate(rows):
        if row.selected is not None and row.selected > best.get(row.task, (-math.inf, 0))[0]:
            best[row.task] = row.selected, index
    return [index for _, index in best.values()]


def best_run(trial: Trial, outcome: Outcome) -> Best:
    """Return a trial as the best; trained again it chooses its epoch again."""
    assert outcome.value is not None  # it is valid, as what is best is
    assert outcome.selected is not None
    settings, task = trial.settings, trial.splits.task.name
    run = str(trial.folder.path) if trial.folder.head.is_file() else None
    chosen = _described(trial, _choosing(settings, outcome.history, outcome.best_epoch))
    values = (outcome.value, outcome.selected)
    return Best(task, trial.variant.name, settings.seed, *values, run, fit_command(settings), chosen)


def best_setting(row: Summary, finished: Finished) -> Best:
    """Return a setting as the best, with the epoch or strength at which the mean over its seeds and folds is best.

    Args:
        row: the setting.
        finished: its trials.
    """
    assert row.mean is not None
    assert row.selected is not None
    trial, histories = finished[0][0], [outcome.history for _, outcome in finished if outcome.diverged is None]
    chosen = _choosing(trial.settings, histories[0], best_step(histories, row.metric))
    described = _described(trial, chosen)
    return Best(row.task, row.variant.name, None, row.mean, row.selected, None, fit_command(chosen), described)


def _described(trial: Trial, chosen: FitSettings) -> dict[str, Any]:
    stores = [str(store.absolute()) for store in chosen.store]
    return {**trial.splits.describe_task(chosen), "store": stores, "chosen_on": trial.splits.chosen_on}


def _choosing(settings: FitSettings, history: Sequence[Entry], step: int) -> FitSettings:
    """Return settings with what was chosen, the number of an epoch or of a strength; nothing is held out to choose."""
    if settings.head == "ridge":
        return replace(settings, held_out=0.0, strength=history[step - 1]["strength"])
    return replace(settings, held_out=0.0, keep_epoch=step)


def best_step(histories: Sequence[Sequence[Entry]], metric: str) -> int:
    """Return the epoch, or the number of the strength, from 1, at which the mean over histories is best."""
    curves = np.array([[entry[metric] for entry in history] for history in histories])  # (runs, epochs)
    return int(curves.mean(axis=0).argmax()) + 1


def write_best(path: Path, found: Sequence[Best]) -> None:
    """Write what ``affcache fit --as`` reads."""
    write_json(path, {"best": [{"setting": one.setting, "seed": one.seed, **one.chosen} for one in found]})


@dataclass(frozen=True)
class AblateResult:
    """What an ablation found."""

    out: str
    select: str
    cells: int
    trained: int  # in this call
    seconds: float
    device: str
    rows: list[Summary]
    best: list[dict[str, Any]]  # of each task the run, or with folds the setting, that is best where epochs were chosen
    files: list[str]
    folds: int | None = None

    @property
    def heldout(self) -> bool:
        """Whether epochs and settings were chosen on held-out training videos."""
        return self.select == "heldout"

    def to_json(self) -> dict[str, Any]:
        """Return the result as one JSON object."""
        names = ["task", "metric", "count", "diverged", "mean", "deviation", "selected", "is_base"]
        names += ["fold_mean", "fold_deviation"] if self.folds else []
        settings = [
            {
                "name": row.variant.name,
                "values": dict(row.variant.values),
                "store": stores_text(row.variant.store),
                **{name: getattr(row, name) for name in names},
                "difference": row.difference.to_json() if row.difference else None,
                **({"interval": row.interval.to_json()} if row.interval else {}),
            }
            for row in self.rows
        ]
        return {**{name: value for name, value in vars(self).items() if name != "rows"}, "settings": settings}
