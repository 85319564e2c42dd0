"""How long a grid will take, measured on a few of its heads before it starts."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from affcache.ablation.sources import LoadedSource
from affcache.devices import wait_for
from affcache.errors import ConfigError
from affcache.progress import duration_text
from affcache.training.data import Frames, batches, epoch_length
from affcache.training.learner import Learner
from affcache.training.objective import ClassCounts
from affcache.training.settings import FitSettings

LONGEST = 24 * 3600.0  # seconds; what takes longer has to be asked for
TRIED, WARM_UP, STEPS = 5, 4, 12
SIDE_BY_SIDE = {"cuda": 16}  # heads tried at a time; on a CPU one says enough
TRIED_FRAMES = 2048  # of an evaluation


def project(recipes: Sequence[FitSettings], source: LoadedSource, device: torch.device) -> float:
    """Return the seconds that a head takes, the mean of a few settings tried for a moment each.

    On a CPU one is tried at a time; side by side they share some of it, so that a grid takes somewhat less.
    """
    tried = [recipe for recipe in recipes if recipe.head != "ridge"][:TRIED]
    return sum(_seconds_of(recipe, source, device) for recipe in tried) / len(tried) if tried else 1.0


def _seconds_of(recipe: FitSettings, source: LoadedSource, device: torch.device) -> float:
    counts = ClassCounts.of(source.task, source.train.labels)
    videos = source.videos
    heads = SIDE_BY_SIDE.get(device.type, 1)
    learner = Learner(
        [replace(recipe, seed=seed) for seed in range(heads)],
        source.task,
        source.width,
        device,
        counts,
        videos,
    )
    embeddings = next(iter(source.train.evaluation_batches()))[:TRIED_FRAMES].clone()
    frames = Frames(embeddings, source.train.labels[: len(embeddings)], source.train.videos[: len(embeddings)])
    size = min(recipe.batch_size, len(frames))
    generator = torch.Generator().manual_seed(0)  # the caller's random numbers stay his own
    order = torch.randint(0, len(frames), (heads, (WARM_UP + STEPS) * size), generator=generator)
    order = order.to(frames.labels.device)
    taken = batches(order, size)
    for batch in taken[:WARM_UP]:
        learner.step(frames, batch)
    step = _timed(lambda: [learner.step(frames, batch) for batch in taken[WARM_UP:]], device) / STEPS
    evaluation = _timed(lambda: learner.predict(frames), device) / len(frames)
    length = epoch_length(source.train.videos.cpu(), stride=recipe.stride, frames_per_epoch=recipe.frames_per_epoch)
    return recipe.epochs * (-(-length // recipe.batch_size) * step + len(source.selection) * evaluation) / heads


def _timed(work: Callable[[], object], device: torch.device) -> float:
    wait_for(device)
    start = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - start


def require_asked_for(cells: int, seconds: float, asked: bool) -> None:
    """Refuse what takes longer than a day unless it was asked for.

    Raises:
        ConfigError: it wasn't.
    """
    if seconds > LONGEST and not asked:
        raise ConfigError(
            f"The grid has {cells:,} heads to train: about {duration_text(seconds)}. Expected at most a day unless "
            "--yes is given. Say it, or vary less, or with fewer --seeds or --epochs, --stride or --frames-per-epoch."
        )
