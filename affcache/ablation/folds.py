"""Cross-validation: labelled frames cut into folds, and what all folds together say, each frame by who never saw it."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from affcache.ablation.settings import AblateSettings
from affcache.ablation.summary import Outcome, Trial
from affcache.errors import StoreError
from affcache.files import read_tensors, remove
from affcache.progress import Listener, counted
from affcache.scoring.predict import FramesDecided, write_predictions
from affcache.scoring.rule import DecisionRule
from affcache.store.pooled import PooledStore
from affcache.tasks.metrics import mean_by_video
from affcache.tasks.splits import find_folds, group_frames
from affcache.tasks.task import Task
from affcache.training.splits import JoinedSplits

PREDICTIONS = "out_of_fold"  # the folder of their files


def cut_into_folds(joined: JoinedSplits, settings: AblateSettings, listener: Listener) -> list[JoinedSplits]:
    """Return for each fold the splits with which it is tested: train on the others, validate on it.

    Where epochs are chosen on held-out frames, those are the next fold's (the first's for the last), which then
    doesn't train.

    Args:
        joined: has all labelled frames in train.
        settings: say how many folds, what stays together, and where epochs are chosen.
        listener: is told the size of each fold, and warned of what flatters or can't be learned.

    Raises:
        ConfigError, InputError: as ``find_folds``.
    """
    assert settings.folds is not None
    every, count, choosing = joined.train, settings.folds, settings.chosen_on == "heldout"
    fold_of = find_folds(joined.store, joined.task, every, count, settings.fold_by, listener)
    parts = [every.at(fold_of == fold) for fold in range(count)]
    names = [group_frames(joined.store, part)[0] for part in parts]
    of_frames = joined.store.unit == "frame"  # else each is a video
    sizes = [
        f"{len(of)} with {len(part):,}" if of_frames else f"{len(part):,}"
        for of, part in zip(names, parts, strict=True)
    ]
    listener.message(f"{count} folds, of videos{' with frames' * of_frames}: {', '.join(sizes)}")
    cut = []
    for fold, part in enumerate(parts):
        chosen_on = (fold + 1) % count if choosing else fold
        cut.append(
            replace(
                joined,
                train=every.at((fold_of != fold) & (fold_of != chosen_on)),
                selection=parts[chosen_on],
                validation=part,
                fold=(fold + 1, count),
            )
        )
    _warn_of_classes(joined.task, cut, listener)
    return cut


def _warn_of_classes(task: Task, folds: Sequence[JoinedSplits], listener: Listener) -> None:
    """Warn of what is labelled in a fold and nowhere in its training frames."""
    there = np.stack([task.videos_of_outputs(of.validation_sums) > 0 for of in folds])  # (K, C)
    never: dict[str, list[str]] = {}
    for number, of in enumerate(folds, start=1):
        trained = [one.validation is not of.validation and one.validation is not of.selection for one in folds]
        for output in np.flatnonzero(there[number - 1] & ~there[trained].any(axis=0)):
            never.setdefault(task.classes[output], []).append(str(number))
    if never:
        words = ", ".join(f"{name} (fold {' and '.join(numbers)})" for name, numbers in never.items())
        listener.warning(
            f"Labelled in a fold and in none of the frames that its heads train on: {words}. They can't be recognised "
            "there. Expected each in more videos; fewer --folds may help."
        )


def pooled(folds: Sequence[Outcome], task: Task) -> Outcome:
    """Return what the heads of all folds found as if one had: each video by the head that never saw it.

    The value is the metric of all frames together; where a head diverged there is none.
    """
    broken = [one.diverged for one in folds if one.diverged is not None]
    if broken:
        return Outcome(None, None, 0, broken[0], [], None, [])
    sums = np.concatenate([one.statistics for one in folds if one.statistics is not None])  # (G, C, S)
    return Outcome(
        value=float(task.metric_of(sums.sum(axis=0))),
        selected=statistics.fmean(one.selected for one in folds if one.selected is not None),
        best_epoch=0,
        diverged=None,
        history=[],
        statistics=sums,
        videos=[name for one in folds for name in one.videos],
        of_folds=tuple(one.value for one in folds if one.value is not None),
    )


def write_out_of_fold(
    folder: Path, settings: Mapping[str, Sequence[Sequence[Trial]]], listener: Listener
) -> list[Path]:
    """Write what the heads of all folds predict of each labelled frame, a file for each setting and seed.

    Args:
        folder: of the ablation.
        settings: by what they are called in the files' names: for each seed, a finished trial for each fold.
        listener: is warned where predictions weren't kept.
    """
    files = []
    for name, seeds in settings.items():
        for trials in seeds:
            try:
                probabilities = torch.cat([read_tensors(one.probabilities)[0]["probabilities"] for one in trials])
            except (StoreError, KeyError):
                listener.warning(
                    f"{trials[0].variant.name}, seed {trials[0].settings.seed}: its predictions were not kept, so that "
                    "none are written. Expected them in its cells. Delete these, or give another --out DIR, and call "
                    "again."
                )
                continue
            path = folder / PREDICTIONS / f"{name}-seed{trials[0].settings.seed}.h5"
            _write(path, trials, probabilities.numpy())
            files.append(path)
    for other in set((folder / PREDICTIONS).glob("*.h5")).difference(files):  # of another grid in this folder
        remove(other)
    return files


def _write(path: Path, trials: Sequence[Trial], probabilities: np.ndarray) -> None:
    parts, first = [trial.splits.validation for trial in trials], trials[0].splits
    store, rows = first.store, np.concatenate([part.rows for part in parts])
    order = rows.argsort()
    fold = np.repeat(np.arange(1, len(parts) + 1, dtype=np.int32), [len(part) for part in parts])
    attributes = {
        "task": first.task.name, "split": "out of fold", "run": " ".join(f"cells/{one.name}" for one in trials),
        "store": str(first.store.path), "setting": trials[0].variant.name, "seed": trials[0].settings.seed,
    }  # fmt: skip
    rows, probabilities = rows[order], probabilities[order]
    if first.task.level == "video" and not isinstance(store, PooledStore):  # one thing is said of a video's frames
        videos = store.video_of_rows()[rows]
        means, begin = mean_by_video(probabilities, videos)
        store, rows, order = PooledStore.of(store, "none"), videos[begin], order[begin]
        probabilities = means.astype(np.float32)
    columns = {
        "probabilities": probabilities,
        "decided": first.task.decide(probabilities),
        "labels": np.concatenate([part.labels for part in parts])[order],
        "fold": fold[order],
    }
    said = FramesDecided(first.task, DecisionRule(), store, rows, columns)
    write_predictions(path, attributes, [said])


def fold_words(folds: int | None) -> str:
    """Say how many folds each seed has, after the count of seeds."""
    return f" x {counted(folds, 'fold')}" if folds else ""
