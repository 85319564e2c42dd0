"""An ablation as a whole: a grid read, its missing cells trained, and all of them compared."""

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from affcache.ablation.ablation import MANY, Ablation, Sources
from affcache.ablation.grid import Grid, build_grid
from affcache.ablation.settings import AblateSettings
from affcache.ablation.sources import Source
from affcache.ablation.summary import Summary
from affcache.ablation.trainer import LocalTrainer, Trainer
from affcache.devices import resolve_device
from affcache.errors import ConfigError
from affcache.progress import Listener
from affcache.settings import as_text, build
from affcache.tasks.tasks import find_task


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
    with _trainer(settings, listener) as (trainer, device):
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


@contextmanager
def _trainer(settings: AblateSettings, listener: Listener) -> Iterator[tuple[Trainer, torch.device]]:
    """Give what trains the heads, and the device on which this process keeps frames."""
    if settings.engine == "ray":
        from affcache.cluster.training import cluster_trainer  # Ray is an extra, and imported there

        with cluster_trainer(settings, listener) as trainer:
            yield trainer, torch.device("cpu")
    else:
        device = resolve_device(settings.device)
        yield LocalTrainer(device), device


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
