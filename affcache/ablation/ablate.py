"""An ablation as a whole: a grid read, its missing cells trained, and all of them compared."""

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from filelock import FileLock, Timeout

from affcache.ablation.figures import write_figures
from affcache.ablation.grid import Grid, Setting, build_grid
from affcache.ablation.settings import AblateSettings
from affcache.ablation.summary import Summary, summarise
from affcache.ablation.tables import latex, markdown, write_results, write_summary
from affcache.ablation.train import BestHeads, GridRun, Trainer, epochs_of, require_asked_for
from affcache.ablation.trials import Cell, LoadedSource, Outcome, Source
from affcache.devices import default_memory
from affcache.errors import ConfigError
from affcache.files import write_text
from affcache.progress import Listener, duration_text
from affcache.settings import as_text, build
from affcache.tasks.tasks import find_task
from affcache.training.fit import SMALLEST_TAIL, tail_of
from affcache.training.run_folder import fit_command

# what trains, by --engine: functions that give a trainer, imported when they are asked for
TRAINERS = {"local": "affcache.ablation.train:local_trainer", "ray": "affcache.cluster.training:cluster_trainer"}
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
    best: list[dict[str, Any]]  # of each task the run with the best metric where epochs were chosen
    files: list[str]

    @property
    def heldout(self) -> bool:
        """Whether epochs and settings were chosen on held-out training videos."""
        return self.select == "heldout"

    def to_json(self) -> dict[str, Any]:
        """Return the result as one JSON object."""
        names = ("task", "metric", "count", "diverged", "mean", "deviation", "selected", "is_base")
        settings = [
            {
                "name": row.setting.name,
                "values": dict(row.setting.values),
                "store": str(row.setting.store),
                **{name: getattr(row, name) for name in names},
                "difference": asdict(row.difference) if row.difference else None,
            }
            for row in self.rows
        ]
        own = ("out", "select", "cells", "trained", "seconds", "device", "best", "files")
        return {**{name: getattr(self, name) for name in own}, "settings": settings}


def ablate(
    settings: AblateSettings | None = None, /, *, listener: Listener | None = None, **values: Any
) -> AblateResult:
    """Train a grid of heads side by side off one read of each store, and compare them.

    Cells that are finished in ``out`` are kept. A head that diverges is reported, and the others go on.

    Args:
        settings: all settings, or none and single ones by name. ``vary`` may be a mapping from names to values, for
            instance ``ablate(vary={"alpha": [0.3, 1.0]}, seeds=5)``.
        listener: receives messages and progress.

    Raises:
        InputError: labels that can't be read or that join to no crop.
        StoreError: a store is incomplete or damaged.
        ConfigError: a setting is unknown or out of range, the grid takes more than a day and ``yes`` isn't given, or
            another process is at work in ``out``.
    """
    if isinstance(values.get("vary"), Mapping):
        values["vary"] = tuple(f"{name}={','.join(map(as_text, of))}" for name, of in values["vary"].items())
    settings, listener = build(AblateSettings, values, over=settings), listener or Listener()
    start, grid = time.perf_counter(), build_grid(settings)
    if grid.cells <= MANY:  # mistakes show before anything is read
        for point in grid:
            grid.fit_settings(point, 0)
        grid.base_index()
    out = settings.out or Path("ablations") / "-".join([settings.task, *grid.words])
    with resolve_name(TRAINERS[settings.engine])(settings, listener) as (trainer, device):
        sources = _open_sources(grid, settings, listener)
        with _alone_in(out):
            ablation = Ablation(settings, grid, sources, out, trainer, device, listener)
            trained = ablation.train()
            rows, files = ablation.write(with_figures=True)
    return AblateResult(
        out=str(out),
        select=settings.select,
        cells=grid.cells,
        trained=trained,
        seconds=time.perf_counter() - start,
        device=str(trainer.device),
        rows=rows,
        best=ablation.best(),
        files=[str(file) for file in files],
    )


def _open_sources(grid: Grid, settings: AblateSettings, listener: Listener) -> Sources:
    """Open every store with the labels of every task that the grid has."""
    tasks: Sequence[Any] = grid.axes.get("task") or [of.get("task", settings.task) for _, of in grid.points]
    sources: Sources = {}
    for store in grid.stores:
        for name in dict.fromkeys(tasks):
            if len(grid.stores) > 1:
                listener.message(f"{store}:")
            sources[store, name] = Source.open(store, find_task(name), settings, listener)
    return sources


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Keep others from training the same grid in the same folder.

    Raises:
        ConfigError: another process is at work there.
    """
    new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / ".lock", timeout=0):
            yield
    except ConfigError:  # refused before anything was done
        if new and [path.name for path in out.iterdir()] == [".lock"]:
            shutil.rmtree(out)
        raise
    except Timeout:
        raise ConfigError(
            f"Another 'affcache ablate' is at work in {out}. Expected to be alone there. Wait for it, or choose "
            "another --out DIR."
        ) from None
