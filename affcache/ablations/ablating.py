"""An ablation as a whole: a grid read, its missing cells trained, and all of them compared."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from affcache.ablate_settings import AblateSettings
from affcache.ablations.cell_folder import Cell
from affcache.ablations.figures import write_figures
from affcache.ablations.grid import Grid, Setting, as_text, build_grid
from affcache.ablations.grid_run import BestHeads, GridRun, epochs_of
from affcache.ablations.projection import duration, project, require_asked_for
from affcache.ablations.sources import LoadedSource, Source
from affcache.ablations.summary import Summary, summarise
from affcache.ablations.tables import latex, markdown, write_results, write_summary
from affcache.config import build
from affcache.devices import resolve_device
from affcache.errors import ConfigError
from affcache.fitting import SMALLEST_TAIL, tail_of
from affcache.listener import Listener
from affcache.memory import default_memory
from affcache.runs import write_text
from affcache.settings_base import flag
from affcache.tasks import find_task

SECONDS_BETWEEN_TABLES = 30.0  # of an unfinished grid
MANY = 10_000  # cells; a grid of more is projected before they are made one by one

Sources = dict[tuple[Path, str], Source]


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
    best: dict[str, Any] | None  # the run with the best metric where epochs were chosen
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
    start, grid, device = time.perf_counter(), build_grid(settings), resolve_device(settings.device)
    if grid.cells <= MANY:  # mistakes show before anything is read
        for point in grid:
            point.fit_settings(grid.recipe, 0)
        grid.base_index()
    sources = _open_sources(grid, settings, listener)
    out = settings.out or Path("ablations") / settings.task
    with _alone_in(out):
        ablation = _Ablation(settings, grid, sources, out, device, listener)
        trained = ablation.train()
        rows, files = ablation.write(with_figures=True)
    return AblateResult(
        out=str(out),
        select=settings.select,
        cells=grid.cells,
        trained=trained,
        seconds=time.perf_counter() - start,
        device=str(device),
        rows=rows,
        best=ablation.best(),
        files=[str(file) for file in files],
    )


class _Ablation:
    """The cells of a grid, and which of them are finished."""

    def __init__(
        self,
        settings: AblateSettings,
        grid: Grid,
        sources: Sources,
        out: Path,
        device: torch.device,
        listener: Listener,
    ) -> None:
        self.settings, self.grid, self.sources, self.out = settings, grid, sources, out
        self.device, self.listener = device, listener
        self.memory = settings.memory or default_memory(device)
        self.written = time.monotonic()  # the tables
        self.loaded: tuple[Source, LoadedSource] | None = None  # one at a time
        if grid.cells > MANY:
            self._project(grid.cells)
        self.points = list(grid)
        self.cells = [[self._cell(point, seed) for seed in range(grid.seeds)] for point in self.points]
        self.outcomes = [{c.settings.seed: c.read() for c in of if c.finished} for of in self.cells]
        finished = [(cell, self.outcomes[i][cell.settings.seed]) for i, of in enumerate(self.cells) for cell in of
                    if cell.settings.seed in self.outcomes[i]]  # fmt: skip
        self.heads = BestHeads(settings.keep, finished)

    def _cell(self, point: Setting, seed: int) -> Cell:
        recipe = point.fit_settings(self.grid.recipe, seed)
        return Cell.of(point, recipe, self.sources[point.store, recipe.task], self.out)

    def train(self) -> int:
        """Train what isn't finished; return how many heads."""
        every = [cell for of in self.cells for cell in of]
        pending = [cell for cell in every if not cell.finished]
        words = f"{len(self.points):,} settings x {self.grid.seeds} seeds: {len(every):,} heads"
        if len(pending) < len(every):
            words += f", {len(every) - len(pending):,} of them finished before"
        self.listener.message(words)
        if not pending:
            return 0
        self._warn_of_tails()
        if self.grid.cells <= MANY:
            self._project(len(pending))
        run = GridRun(self.out, self.heads, self.device, epochs_of(pending), self.listener)
        for source in self.sources.values():
            of_source = [cell for cell in pending if cell.source is source]
            if of_source:
                run.run(of_source, self._load(source), self._after_group)
        return len(pending)

    def _after_group(self) -> None:
        for index, of in enumerate(self.cells):
            for cell in of:
                if cell.settings.seed not in self.outcomes[index] and cell.finished:
                    self.outcomes[index][cell.settings.seed] = cell.read()
        if time.monotonic() - self.written >= SECONDS_BETWEEN_TABLES:
            self.write(with_figures=False)
            self.written = time.monotonic()

    def write(self, *, with_figures: bool) -> tuple[list[Summary], list[Path]]:
        """Write the tables of what is finished, and the figures; return the rows and the files."""
        rows = summarise(self.points, self.outcomes, self.grid.base_index(), self.settings.task)
        heldout, varied = self.settings.select == "heldout", self.grid.varied
        runs = [(cell, self.outcomes[index][cell.settings.seed]) for index, of in enumerate(self.cells) for cell in of
                if cell.settings.seed in self.outcomes[index]]  # fmt: skip
        files = [self.out / name for name in ("results.csv", "summary.csv", "summary.md", "summary.tex")]
        write_results(files[0], runs, varied)
        write_summary(files[1], rows, varied)
        write_text(files[2], markdown(rows, heldout))
        write_text(files[3], latex(rows, heldout))
        return rows, [*files, *(write_figures(self.out / "figures", self.grid, rows) if with_figures else [])]

    def best(self) -> dict[str, Any] | None:
        """Return the best run of the first task, and where its head is or how it is trained again."""
        if not self.heads.best:
            return None
        selected, cell = next(iter(self.heads.best.values()))
        kept = cell.folder.head.is_file()
        return {
            "setting": cell.setting.name,
            "seed": cell.settings.seed,
            "value": cell.read().value,
            "selected": selected,
            "run": str(cell.folder.path) if kept else None,
            "fit": fit_command(cell),
        }

    def _load(self, source: Source) -> LoadedSource:
        if self.loaded is None or self.loaded[0] is not source:
            self.loaded = None  # before the next one takes its place in memory
            self.loaded = (source, source.load(self.device, self.memory, self.listener))
        return self.loaded[1]

    def _project(self, cells: int) -> None:
        """Say how long so many cells will take, and refuse what takes too long unasked."""
        count, tried = len(self.grid), min(5, len(self.grid))
        recipes = [self.grid[i * count // tried].fit_settings(self.grid.recipe, 0) for i in range(tried)]
        alike = [one for one in recipes if one.task == recipes[0].task]
        first = self.sources[self.grid[0].store, recipes[0].task]
        seconds = cells * project(alike, self._load(first), self.device)
        require_asked_for(cells, seconds, self.settings.yes)
        self.listener.message(f"{cells:,} heads to train: at most about {duration(seconds)} on {self.device}")

    def _warn_of_tails(self) -> None:
        """Warn of settings whose CVaR rests on a few losses a batch."""
        few = []
        for of in self.cells:
            cell = of[0]
            recipe, tail = cell.settings, tail_of(cell.settings, cell.source.task, len(cell.source.train))
            if recipe.alpha < 1 and recipe.cvar_level == recipe.cvar_within == "batch" and tail < SMALLEST_TAIL:
                few.append(f"{cell.setting.name} ({tail:g})")
        if few:
            self.listener.warning(
                f"CVaR's tail is fewer than {SMALLEST_TAIL} losses a batch, so that its gradient is noisy, for "
                f"{len(few)} settings: {', '.join(few[:3])}{', ...' if len(few) > 3 else ''}"
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
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / ".lock", timeout=0):
            yield
    except Timeout:
        raise ConfigError(
            f"Another 'affcache ablate' is at work in {out}. Expected to be alone there. Wait for it, or choose "
            "another --out DIR."
        ) from None


def fit_command(cell: Cell) -> str:
    """Return the call of ``affcache fit`` that trains a cell's setting again by itself."""
    defaults, words = type(cell.settings)(), ["affcache fit"]
    for name, value in asdict(cell.settings).items():
        if name in ("run", "resume", "memory", "device") or value == getattr(defaults, name):
            continue
        words.append(flag(name) if value is True else f"{flag(name)} {as_text(value)}")
    return " ".join(words)
