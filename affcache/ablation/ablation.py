"""The cells of a grid: which are finished, training the others, and all results written."""

import time
from pathlib import Path
from typing import Any

import torch

from affcache.ablation.figures import write_figures
from affcache.ablation.grid import Grid, Setting
from affcache.ablation.projection import require_asked_for
from affcache.ablation.settings import AblateSettings
from affcache.ablation.sources import LoadedSource, Source
from affcache.ablation.summary import Summary, summarise
from affcache.ablation.tables import latex, markdown, write_results, write_summary
from affcache.ablation.train import BestHeads, GridRun, epochs_of
from affcache.ablation.trainer import Trainer
from affcache.ablation.trials import Cell, Outcome
from affcache.devices import default_memory
from affcache.progress import Listener, duration_text
from affcache.training.fit import SMALLEST_TAIL, tail_of
from affcache.training.run_folder import fit_command, write_text

SECONDS_BETWEEN_TABLES = 30.0  # of an unfinished grid
MANY = 10_000  # cells; a grid of more is projected before they are made one by one
FEW_SEEDS = 3
TRIED = 5  # settings for a projection

Sources = dict[tuple[Path, str], Source]  # by store and task


class Ablation:
    """A grid at work in a folder.

    Args:
        settings: of the ablation.
        grid: what is trained.
        sources: store and labels for every store and task of the grid.
        out: the folder.
        trainer: trains heads.
        device: where frames are kept.
        listener: receives messages and progress.

    Raises:
        ConfigError: the grid is huge and takes more than a day.
        StoreError: a finished result is damaged.
    """

    def __init__(
        self,
        settings: AblateSettings,
        grid: Grid,
        sources: Sources,
        out: Path,
        trainer: Trainer,
        device: torch.device,
        listener: Listener,
    ) -> None:
        self.settings, self.grid, self.sources, self.out = settings, grid, sources, out
        self.trainer, self.device, self.listener = trainer, device, listener
        self.memory = settings.memory or default_memory(device)
        self._loaded: tuple[Source, LoadedSource] | None = None  # one at a time
        self._written = time.monotonic()  # the tables
        if grid.cells > MANY:
            self._project(grid.cells)
        self.points = list(grid)
        self.cells = [self._cell(point, seed) for point in self.points for seed in range(grid.seeds)]
        self.outcomes = {cell.name: cell.read() for cell in self.cells if cell.finished}
        self.heads = BestHeads(settings.keep, self._finished())

    def _cell(self, point: Setting, seed: int) -> Cell:
        recipe = self.grid.fit_settings(point, seed)
        return Cell.of(point, recipe, self.sources[point.store, recipe.task], self.out)

    def _finished(self) -> list[tuple[Cell, Outcome]]:
        """Return the finished cells with their outcomes, in the order of the grid."""
        return [(cell, self.outcomes[cell.name]) for cell in self.cells if cell.name in self.outcomes]

    def train(self) -> int:
        """Train what isn't finished; return how many heads."""
        pending = [cell for cell in self.cells if cell.name not in self.outcomes]
        words = f"{len(self.points):,} settings x {self.grid.seeds} seeds: {len(self.cells):,} heads"
        if self.outcomes:
            words += f", {len(self.outcomes):,} of them finished before"
        self.listener.message(words)
        if self.grid.seeds < FEW_SEEDS:
            self.listener.message(f"with fewer than {FEW_SEEDS} seeds, intervals say little of what seeds do")
        without = sum(not cell.folder.head.is_file() for cell, outcome in self._finished() if outcome.diverged is None)
        if self.settings.keep == "all" and without:
            self.listener.warning(
                f"{without} heads finished before were not kept then, and --keep counts for heads that are trained. "
                "Train them again with another --out DIR, or one by one with 'affcache fit'."
            )
        if not pending:
            return 0
        self._warn_of_tails()
        if self.grid.cells <= MANY:
            self._project(len(pending))
        run = GridRun(self.out, self.heads, self.trainer, len(self.cells), epochs_of(pending), self.listener)
        for source in self.sources.values():
            of_source = [cell for cell in pending if cell.source is source]
            if of_source:
                run.run(of_source, self._load(source), self._take)
        return len(pending)

    def _take(self, outcomes: dict[str, Outcome]) -> None:
        """Take up the outcomes of a group that is finished."""
        self.outcomes |= outcomes
        if time.monotonic() - self._written >= SECONDS_BETWEEN_TABLES:
            self.write(with_figures=False)
            self._written = time.monotonic()

    def write(self, *, with_figures: bool) -> tuple[list[Summary], list[Path]]:
        """Write the tables of what is finished, and the figures; return the rows and the files."""
        seeds, finished = self.grid.seeds, self.outcomes
        by_setting = [
            {cell.settings.seed: finished[cell.name] for cell in self.cells[i : i + seeds] if cell.name in finished}
            for i in range(0, len(self.cells), seeds)
        ]
        rows = summarise(self.points, by_setting, self.grid.base_index(), self.settings.task)
        heldout, varied = self.settings.select == "heldout", self.grid.varied
        files = [self.out / name for name in ("results.csv", "summary.csv", "summary.md", "summary.tex")]
        write_results(files[0], self._finished(), varied)
        write_summary(files[1], rows, varied)
        write_text(files[2], markdown(rows, heldout))
        write_text(files[3], latex(rows, heldout))
        if with_figures:
            figures = write_figures(self.out / "figures", self.grid, rows)
            for other in set((self.out / "figures").glob("*.*")).difference(figures):  # of another grid in this folder
                other.unlink()
            files += figures
        return rows, files

    def best(self) -> list[dict[str, Any]]:
        """Return the best run of each task, where its head is, and how it is trained again."""
        return [
            {
                "task": task,
                "setting": cell.setting.name,
                "seed": cell.settings.seed,
                "value": self.outcomes[cell.name].value,
                "selected": selected,
                "run": str(cell.folder.path) if cell.folder.head.is_file() else None,
                "fit": fit_command(cell.settings),
            }
            for task, (selected, cell) in self.heads.best.items()
        ]

    def _load(self, source: Source) -> LoadedSource:
        if self._loaded is None or self._loaded[0] is not source:
            self._loaded = None  # before the next one takes its place in memory
            self._loaded = (source, source.load(self.device, self.memory, self.listener))
        return self._loaded[1]

    def _project(self, cells: int) -> None:
        """Say how long so many cells will take, and refuse what takes too long unasked."""
        count, tried = len(self.grid), min(TRIED, len(self.grid))
        recipes = [self.grid.fit_settings(self.grid[i * count // tried], 0) for i in range(tried)]
        alike = [one for one in recipes if one.task == recipes[0].task]
        first = self.sources[self.grid[0].store, recipes[0].task]
        seconds = cells * self.trainer.project(alike, self._load(first))
        require_asked_for(cells, seconds, self.settings.yes)
        self.listener.message(f"{cells:,} heads to train: about {duration_text(seconds)} on {self.trainer.device}")

    def _warn_of_tails(self) -> None:
        """Warn of settings whose CVaR rests on a few losses a batch."""
        few = []
        for cell in self.cells[:: self.grid.seeds]:  # the first of each setting
            recipe, tail = cell.settings, tail_of(cell.settings, cell.source.task, len(cell.source.train))
            if recipe.alpha < 1 and recipe.cvar_level == recipe.cvar_within == "batch" and tail < SMALLEST_TAIL:
                few.append(f"{cell.setting.name} ({tail:g})")
        if few:
            self.listener.warning(
                f"CVaR's tail is fewer than {SMALLEST_TAIL} losses a batch, so that its gradient is noisy, for "
                f"{len(few)} settings: {', '.join(few[:3])}{', ...' if len(few) > 3 else ''}"
            )
