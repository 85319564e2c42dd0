"""A submission as a whole: runs predict a test set's crops, gaps are filled, and the file is written and checked."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from affcache.errors import ConfigError, InputError
from affcache.progress import Listener, Result
from affcache.scoring.postprocess import DecisionRule, find_rule
from affcache.scoring.predict import Predictions, TrainedRun, open_runs
from affcache.settings import command
from affcache.store.reading import ENCODED
from affcache.submission.files import (
    Template,
    check_submission,
    read_frame_counts,
    read_template,
    require_template_of,
    write_submission,
)
from affcache.submission.settings import SubmitSettings


@dataclass(frozen=True)
class SubmitResult(Result):
    """What a submission holds."""

    out: str
    task: str
    runs: tuple[str, ...]
    lines: int  # after the header
    videos: int
    filled: int  # lines of frames without a crop, in videos that have some
    videos_without_crops: tuple[str, ...]  # all of their lines hold the mean over all other videos
    rule: DecisionRule


@command(SubmitSettings)
def submit(settings: SubmitSettings, listener: Listener) -> SubmitResult:
    """Write a submission file: a prediction for every line of a template, in its order.

    Probabilities of frames without a crop are interpolated between the nearest frames of the video, and repeated at
    its ends. The file is read back and compared with the template.

    Raises:
        InputError: no run; a template that can't be read; no video of it has crops in the store.
        StoreError: the store is of another encoder, incomplete or damaged.
        ConfigError: neither or both of template and frames are given, or a rule can't be fitted.
    """
    if (settings.template is None) == (settings.frames is None):
        raise ConfigError(
            "Expected one of --template FILE, the organisers' list of frames, and --frames FILE, videos with their "
            "frame counts."
        )
    if settings.store is None:
        raise ConfigError("Expected --store FILE: the embeddings of the test videos, which 'affcache extract' makes.")
    template = read_template(settings.template) if settings.template else read_frame_counts(settings.frames or Path())
    runs = open_runs(settings.run, settings.store, settings.device, listener)
    task, store = runs[0].task, runs[0].store
    require_template_of(template, task)
    on_training = runs
    if settings.fits_rules:
        on_training = [TrainedRun.open(run.folder, None, settings.device, Listener()) for run in runs]
    rule = find_rule(settings, on_training, runs[0].settings.annotations, listener, reported="")
    wanted = np.isin(np.array(store.video_names), list(set(template.videos)))  # (V,)
    rows = np.flatnonzero(wanted[store.video_of_rows()] & (np.asarray(store.status) == ENCODED))
    if not len(rows):
        raise InputError(
            f"No video of the template has a crop in {store.path}: the template has {template.videos[0]}, ..., the "
            f"store {store.video_names[0]}, .... Expected the crops of the test videos. Extract them with 'affcache "
            "extract --crops DIR --store FILE'."
        )
    predictions = Predictions.of(runs, rows, settings.views, listener)
    probabilities = rule.probabilities(predictions, task)
    filled, count, missing = fill_gaps(template, predictions, probabilities)
    if missing:
        listener.warning(
            f"{len(missing)} videos of the template have no crop in {store.path}: {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}. Their lines hold the mean over all other videos."
        )
    write_submission(settings.out, template, rule.decide(filled, task), task)
    check_submission(settings.out, template, task)
    return SubmitResult(
        out=str(settings.out),
        task=task.name,
        runs=tuple(str(run.folder.path) for run in runs),
        lines=len(template),
        videos=len(set(template.videos)),
        filled=count,
        videos_without_crops=tuple(missing),
        rule=rule,
    )


def fill_gaps(
    template: Template, predictions: Predictions, probabilities: npt.NDArray[Any]
) -> tuple[npt.NDArray[np.float64], int, list[str]]:
    """Give every frame of a template probabilities.

    Args:
        template: n frames.
        predictions: which frames of which videos were predicted.
        probabilities: float (m, C), theirs.

    Returns:
        float64 (n, C); how many were filled in for want of a crop, in videos with crops; and the videos without any,
        whose frames have the mean over all that were predicted.
    """
    videos, starts, counts = np.unique(predictions.videos, return_index=True, return_counts=True)
    names = [predictions.store.video_names[video] for video in videos]
    rows = {name: slice(first, first + count) for name, first, count in zip(names, starts, counts, strict=True)}
    found = np.empty((len(template), probabilities.shape[1]))
    lines: dict[str, list[int]] = {}
    for line, video in enumerate(template.videos):
        lines.setdefault(video, []).append(line)
    filled = 0
    for video, of_video in lines.items():
        wanted = template.frame_numbers[of_video]
        if video not in rows:
            found[of_video] = probabilities.mean(axis=0)
            continue
        known = predictions.frame_numbers[rows[video]]
        for column in range(found.shape[1]):
            found[of_video, column] = np.interp(wanted, known.astype(np.float64), probabilities[rows[video], column])
        filled += int((~np.isin(wanted, known)).sum())
    return found, filled, [video for video in lines if video not in rows]
