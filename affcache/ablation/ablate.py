"""An ablation as a whole: a grid read, its missing trials trained, and all of them compared."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, product
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import torch

from affcache.ablation.figures import write_figures
from affcache.ablation.folds import cut_into_folds, fold_words, pooled, write_out_of_fold
from affcache.ablation.grid import Grid, Stores, build_grid, stores_text
from affcache.ablation.result import AblateResult, Best, best_rows, best_run, best_setting, write_best
from affcache.ablation.settings import AblateSettings
from affcache.ablation.summary import FEW_SEEDS, Outcome, Summary, Trial, summarise, summarise_together
from affcache.ablation.tables import latex, markdown, write_results, write_summary
from affcache.ablation.train import Group, Trainer, form_of, group_trials, require_asked_for
from affcache.devices import default_memory
from affcache.errors import ConfigError
from affcache.files import LOCK, Tensors, locked, remove, write_text
from affcache.progress import Listener, counted, duration_text, metric_name
from affcache.scoring.intervals import without_interval
from affcache.settings import command, existing_store
from affcache.tasks.task import Task
from affcache.tasks.tasks import find_task
from affcache.training.epochs import BEST
from affcache.training.fit import SMALLEST_TAIL, raised_twice, tail_of
from affcache.training.plain import disagreement
from affcache.training.splits import JoinedSplits, LoadedSplits

# what trains, by --engine: functions that give a trainer, imported when they are asked for
TRAINERS = {"local": "affcache.ablation.train:local_trainer", "ray": "affcache.cluster.training:cluster_trainer"}
SECONDS_BETWEEN_TABLES = 30.0  # of an unfinished grid
MANY = 10_000  # trials; a grid of more is projected before they are made one by one
TRIED = 5  # settings for a projection
SplitsOf = dict[tuple[Stores, str, str], Sequence[JoinedSplits]]  # by stores, task and pool: of each fold, or one


@dataclass
class Ablation:
    """A grid at work in a folder.

    Raises:
        ConfigError: the grid is huge and takes more than a day.
        StoreError: a finished result is damaged.
    """

    settings: AblateSettings
    grid: Grid
    splits: SplitsOf  # labels joined to each store, for every store and task of the grid
    out: Path
    trainer: Trainer
    device: torch.device  # where frames are kept
    listener: Listener

    def __post_init__(self) -> None:
        self.memory = self.settings.memory or default_memory(self.device)
        self._loaded: tuple[JoinedSplits, LoadedSplits] | None = None  # one at a time
        self._written = time.monotonic()  # the tables
        self._epochs = (0, 0)  # of heads: trained, and to train in this call
        if self.grid.trials > MANY:
            self._project(self.grid.trials)
        self.variants, self.trials = list(self.grid), list[Trial]()
        for variant in self.variants:
            for seed in range(self.settings.seeds):
                recipe = self.grid.fit_settings(variant, seed)
                every = self.splits[variant.store, recipe.task, recipe.pool]
                self.trials += [Trial.of(variant, recipe, splits, self.out) for splits in every]
        self.outcomes = {trial.name: trial.read() for trial in self.trials if trial.result.is_file()}
        self._best: dict[str, tuple[float, Trial]] = {}  # by task: the metric where epochs were chosen, and whose
        for trial, outcome in self._finished():
            self._take(trial, outcome)

    def _take(self, trial: Trial, outcome: Outcome) -> Trial | None:
        """Take note of a trial; if it is the best of its task so far, return the one that was before, or itself."""
        task, selected = trial.splits.task.name, outcome.selected
        before, beaten = self._best.get(task, (-math.inf, trial))
        if self.settings.folds or selected is None or not selected > before:
            return None  # one fold is harder than another: settings are compared, over all of them
        self._best[task] = (selected, trial)
        return beaten

    def _finished(self) -> list[tuple[Trial, Outcome]]:
        """Return the finished trials with their outcomes, in the order of the grid."""
        return [(trial, self.outcomes[trial.name]) for trial in self.trials if trial.name in self.outcomes]

    def train(self) -> int:
        """Train what isn't finished; return how many heads."""
        pending = [trial for trial in self.trials if trial.name not in self.outcomes]
        words = f"{counted(len(self.variants), 'setting')} x {counted(self.settings.seeds, 'seed')}: "
        words = f"{words.removesuffix(': ')}{fold_words(self.settings.folds)}: {counted(len(self.trials), 'head')}"
        if self.outcomes:
            words += f", {len(self.outcomes):,} of them finished before"
        self.listener.message(words)
        for every in self.splits.values():
            task = every[0].task
            if few := without_interval(task, np.concatenate([of.validation_sums for of in every])):
                self.listener.message(f"differences of {metric_name(task.metric)} have no intervals: {few}")
        if self.settings.seeds < FEW_SEEDS:
            self.listener.message(f"with fewer than {FEW_SEEDS} seeds, intervals say little of what seeds do")
        without = sum(not trial.folder.head.is_file() for trial, found in self._finished() if found.diverged is None)
        if self.settings.keep == "all" and without:
            self.listener.warning(
                f"{without} heads finished before were not kept then, and --keep counts for heads that are trained. "
                "Train them again with another --out DIR, or one by one with 'affcache fit'."
            )
        if not pending:
            return 0
        self._warn_of_tails()
        for twice in dict.fromkeys(raised_twice(trial.settings) for trial in pending):
            if twice:
                self.listener.warning(twice)
        self._warn_of_plain_steps(pending)
        if self.grid.trials <= MANY:
            self._project(len(pending))
        self._epochs = (0, sum(1 if one.settings.head == "ridge" else one.settings.epochs for one in pending))
        for splits in (one for every in self.splits.values() for one in every):
            if of_splits := [trial for trial in pending if trial.splits is splits]:
                self._train(of_splits, self._load(splits))
        return len(pending)

    def _train(self, trials: Sequence[Trial], splits: LoadedSplits) -> None:
        """Train trials of one store, in groups whose size depends on the whole grid: it is the same after a kill."""
        trainer, largest = self.trainer, -(-len(self.trials) // self.trainer.at_once)
        groups = list(group_trials(trials, trainer.device, trainer.heads_memory, largest))
        predicts = self.settings.folds is not None and self.settings.keep != "none"
        work = [Group.of(group, self.out, predicts=predicts) for group in groups]
        for index, trained in trainer.train(work, splits, self._report):
            said: Sequence[torch.Tensor | None] = trained.probabilities or [None] * len(groups[index])
            found = zip(groups[index], trained.outcomes, trained.heads, said, strict=True)
            for trial, outcome, head, probabilities in found:
                if outcome.diverged is not None:
                    self.listener.warning(
                        f"{trial.variant.name}, seed {trial.settings.seed}: diverged in epoch {outcome.diverged}"
                    )
                self._write_trial(trial, outcome, head, probabilities)
            work[index].discard_checkpoint()
            if time.monotonic() - self._written >= SECONDS_BETWEEN_TABLES:
                self.write(with_figures=False)
                self._written = time.monotonic()

    def _write_trial(self, trial: Trial, outcome: Outcome, head: Tensors, probabilities: torch.Tensor | None) -> None:
        """Write a finished trial, with its head if that is kept; the head that was the best before goes then.

        Of folds all are kept for now, since what is best shows when all are trained.
        """
        self.outcomes[trial.name], beaten, keep = outcome, self._take(trial, outcome), self.settings.keep
        wanted = keep == "all" or (keep == "best" and (beaten is not None or bool(self.settings.folds)))
        kept = wanted and outcome.diverged is None and bool(head)  # a cluster sends what may be kept, and no more
        trial.write(outcome, head if kept else None, probabilities if outcome.diverged is None else None)
        if keep == "best" and beaten is not None and beaten is not trial:
            remove(beaten.folder.head)

    def _report(self, epochs: int, note: str) -> None:
        done, total = self._epochs
        self._epochs = (done + epochs, total)
        self.listener.progress(done + epochs, total, "epoch", note)

    def write(self, *, with_figures: bool) -> tuple[list[Summary], list[Path]]:
        """Write the tables of what is finished, and the figures; return the rows and the files."""
        by_variant = [
            {seed: outcome for seed, trials in enumerate(seeds) if (outcome := self._of_seed(trials)) is not None}
            for seeds in self._by_variant
        ]
        folds, base = self.settings.folds or 0, self.grid.base_index()
        of_grid = (self.variants, by_variant, base, self._tasks, folds)
        rows = [*summarise(*of_grid), *summarise_together(*of_grid)]
        varied, heldout = self.grid.varied, self.settings.chosen_on == "heldout"
        files = [self.out / name for name in ("results.csv", "summary.csv", "summary.md", "summary.tex")]
        write_results(files[0], self._finished(), varied, folds=bool(folds))
        write_summary(files[1], rows, varied)
        write_text(files[2], markdown(rows, heldout))
        write_text(files[3], latex(rows, heldout))
        if with_figures:
            figures = write_figures(self.out / "figures", self.grid, rows)
            for other in set((self.out / "figures").glob("*.*")).difference(figures):  # of another grid in this folder
                remove(other)
            files += figures
        return rows, files

    @property
    def _tasks(self) -> list[Task]:
        """The task of each variant; of several at once, those that are labelled."""
        return [seeds[0][0].splits.task for seeds in self._by_variant]

    @property
    def _by_variant(self) -> list[list[list[Trial]]]:
        """The trials of each variant, of each seed, of each fold."""
        folds = self.settings.folds or 1
        seeds = [self.trials[first : first + folds] for first in range(0, len(self.trials), folds)]
        return [seeds[first : first + self.settings.seeds] for first in range(0, len(seeds), self.settings.seeds)]

    def _of_seed(self, trials: Sequence[Trial]) -> Outcome | None:
        """Return what a seed's trial found, or those of all folds together; None while one isn't finished."""
        found = [self.outcomes[trial.name] for trial in trials if trial.name in self.outcomes]
        if len(found) < len(trials):
            return None
        return pooled(found, trials[0].splits.task) if self.settings.folds else found[0]

    def best(self, rows: Sequence[Summary]) -> list[Best]:
        """Return the best run of each task, or of folds the best setting, by the rows of ``write``; write which."""
        found = [best_run(trial, self.outcomes[trial.name]) for _, trial in self._best.values()]
        if self.settings.folds:
            found = [
                best_setting(rows[index], [(one, self.outcomes[one.name]) for one in chain(*self._by_variant[index])])
                for index in best_rows(rows)
            ]
        write_best(self.out / BEST, found)
        return found

    def write_out_of_fold(self, rows: Sequence[Summary]) -> list[Path]:
        """Write the predictions of the base and the best setting of each task; what isn't kept of others goes then."""
        best, named = best_rows(rows), dict[str, list[list[Trial]]]()
        for index, (row, seeds) in enumerate(zip(rows, self._by_variant, strict=False)):  # tasks together come last
            word = "best" if index in best else "base" if row.is_base else ""
            if word and self.settings.keep != "none":
                name = f"{row.task}-{word}" if len({one.task for one in rows}) > 1 else word
                named[name] = [of for of in seeds if all(self.outcomes[one.name].diverged is None for one in of)]
            for trial in chain(*seeds) if self.settings.keep == "best" else ():
                if word != "best":
                    remove(trial.folder.head)
                if not word:
                    remove(trial.probabilities)
        return write_out_of_fold(self.out, named, self.listener)

    def _load(self, splits: JoinedSplits) -> LoadedSplits:
        if self._loaded is None or self._loaded[0] is not splits:
            self._loaded = None  # before the next one takes its place in memory
            self._loaded = (splits, splits.load(self.device, self.memory, self.listener))
        return self._loaded[1]

    def _project(self, trials: int) -> None:
        """Say how long so many trials will take, and refuse what takes too long unasked."""
        count, tried = len(self.grid), min(TRIED, len(self.grid))
        recipes = [self.grid.fit_settings(self.grid[i * count // tried], 0) for i in range(tried)]
        alike = [one for one in recipes if (one.task, one.pool) == (recipes[0].task, recipes[0].pool)]
        first = self.splits[self.grid[0].store, recipes[0].task, recipes[0].pool][0]
        seconds = trials * self.trainer.project(alike, self._load(first))
        require_asked_for(trials, seconds, self.settings.yes)
        self.listener.message(
            f"{counted(trials, 'head')} to train: about {duration_text(seconds)} on {self.trainer.device}, "
            "at its present load"
        )

    def _warn_of_tails(self) -> None:
        """Warn of settings whose CVaR rests on a few losses a batch."""
        few = []
        for trial in self.trials[:: self.settings.seeds * (self.settings.folds or 1)]:  # the first of each setting
            recipe, tail = trial.settings, tail_of(trial.settings, trial.splits)
            of_batches = recipe.cvar_level == recipe.cvar_within == "batch" and recipe.head != "ridge"
            if recipe.alpha < 1 and of_batches and tail < SMALLEST_TAIL:
                few.append(f"{trial.variant.name} ({tail:g})")
        if few:
            self.listener.warning(
                f"CVaR's tail is fewer than {SMALLEST_TAIL} losses a batch, so that its gradient is noisy, for "
                f"{counted(len(few), 'setting')}: {', '.join(few[:3])}{', ...' if len(few) > 3 else ''}"
            )

    def _warn_of_plain_steps(self, pending: Sequence[Trial]) -> None:
        """Warn of heads that train one by one, since their step has no faster form that is the same."""
        forms: dict[Any, list[Trial]] = {}
        for trial in pending:
            forms.setdefault(form_of(trial.settings), []).append(trial)
        for trials in forms.values():
            first, names = trials[0], ", ".join(dict.fromkeys(trial.variant.name for trial in trials))
            if first.settings.head != "ridge" and (why := disagreement(first.settings, first.splits.task)):
                self.listener.warning(f"{names}: trained by the definition of a step, head by head: {why}")


def _warn_of_other_frames(splits: SplitsOf, listener: Listener) -> None:
    """Warn where stores that are compared are scored on other frames."""
    compared: dict[tuple[str, str], dict[Stores, Sequence[JoinedSplits]]] = {}
    for (stores, task, pool), every in splits.items():
        compared.setdefault((task, pool), {})[stores] = every
    for of_stores in compared.values():
        counts = {stores: sum(len(joined.validation) for joined in every) for stores, every in of_stores.items()}
        if len(set(counts.values())) > 1:
            each = ", ".join(f"{stores_text(stores)} {count:,}" for stores, count in counts.items())
            unit = next(iter(of_stores.values()))[0].store.unit
            listener.warning(
                f"The stores have different numbers of validation {unit}s ({each}), so that differences between them "
                f"are also those of their {unit}s. Extract the same crops with every encoder."
            )


@command(AblateSettings)
def ablate(settings: AblateSettings, listener: Listener) -> AblateResult:
    """Train a grid of heads side by side off one read of each store, and compare them.

    Trials that are finished in ``out`` are kept. A head that diverges is reported, and the others go on.

    Raises:
        InputError: labels that can't be read or that join to no crop.
        StoreError: a store is incomplete or damaged.
        ConfigError: a setting is unknown or out of range, the grid takes more than a day and ``yes`` isn't given, or
            another process is at work in ``out``.
    """
    start = time.perf_counter()
    if not settings.store and not any(map(settings.varies_store, settings.vary)):
        settings = replace(settings, store=(existing_store(listener),))
    grid = build_grid(settings)
    if grid.trials <= MANY:  # mistakes show before anything is read
        for variant in grid:
            grid.fit_settings(variant, 0)
        grid.base_index()
    out = settings.out or Path("ablations") / "-".join([find_task(settings.task).name, *grid.words])
    with resolve_name(TRAINERS[settings.engine])(settings, listener) as (trainer, device):
        splits: SplitsOf = {}
        for store, (task, pool) in product(grid.stores, grid.values_of("task", "pool")):
            if len(grid.stores) > 1:
                listener.message(f"{stores_text(store)}:")
            how = {"partial": settings.partial, "train_on": "all" if settings.folds else "train", "pool": pool}
            joined = JoinedSplits.open(store, find_task(task), settings.annotations, listener, **how)
            if grid.held_out:
                joined = joined.holding_out(grid.held_out, "to choose by", listener, select=True)
            splits[store, task, pool] = cut_into_folds(joined, settings, listener) if settings.folds else [joined]
        _warn_of_other_frames(splits, listener)
        refusal = ConfigError(
            f"Another 'affcache ablate' is at work in {out}. Expected to be alone there. Wait for it, or choose "
            "another --out DIR."
        )
        with locked(out / LOCK, refusal, listener):
            ablation = Ablation(settings, grid, splits, out, trainer, device, listener)
            trained = ablation.train()
            rows, files = ablation.write(with_figures=True)
            if settings.folds:
                files += ablation.write_out_of_fold(rows)
            best = ablation.best(rows)
    return AblateResult(
        out=str(out),
        select=settings.chosen_on,
        cells=grid.trials,
        trained=trained,
        seconds=time.perf_counter() - start,
        device=str(trainer.device),
        rows=rows,
        best=[one.to_json() for one in best],
        files=[str(file) for file in files],
        folds=settings.folds,
    )
