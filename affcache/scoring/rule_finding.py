"""Where a decision rule is fitted: on training videos that the runs held out, or on validation if that was said."""

from collections.abc import Sequence
from pathlib import Path

import torch

from affcache.errors import ConfigError
from affcache.progress import Listener
from affcache.scoring.decision_rule import DecisionRule, fit_rule, plain_rule
from affcache.scoring.predict import OpenedRun
from affcache.scoring.predictions import Predictions
from affcache.scoring.settings import PredictionSettings
from affcache.tasks.annotations import join_labels
from affcache.tasks.splits import hold_out

SAY_WIDTH = " Smoothing needs no fitting with --smooth-width N."


def find_rule(
    settings: PredictionSettings,
    runs: Sequence[OpenedRun],
    annotations: Path,
    device: torch.device,
    listener: Listener,
    *,
    reported: str,
) -> DecisionRule:
    """Return the rule that the settings ask for, fitted where they say.

    Args:
        settings: what is asked for.
        runs: whose averaged predictions are decided on.
        annotations: where the labels of the frames to fit on are.
        device: where the heads run.
        listener: receives progress.
        reported: the split that will be scored, or "" where none is.

    Raises:
        ConfigError: it is to be fitted on held-out videos, but the runs held none out, or not the same.
    """
    task, first = runs[0].task, runs[0]
    if not settings.fits_rules:
        return plain_rule(settings, task)
    if settings.fit_on == "validation":
        joined, where = join_labels(first.store, annotations, task, "validation"), "validation"
    else:
        shares = {run.settings.held_out for run in runs}
        if shares == {0.0} or len(shares) > 1:
            found = "trained on all training videos" if shares == {0.0} else "held out different shares of them"
            paths = ", ".join(str(run.folder.path) for run in runs)
            raise ConfigError(
                f"A rule can't be fitted on held-out training videos: {paths} {found}. Expected runs that held the "
                "same out. Train with 'affcache fit --held-out 0.2', or fit on validation with --fit-on validation: "
                "scores there are optimistic then."
                f"{SAY_WIDTH if settings.smooth != 'none' and settings.smooth_width is None else ''}"
            )
        train = join_labels(first.store, annotations, task, "train")
        _, joined = hold_out(first.store, train, shares.pop())
        where = "held-out training videos"
    predictions = Predictions.of(runs, joined.rows, device, settings.views, listener)
    return fit_rule(settings, task, predictions, joined.labels, where, optimistic=where == reported)
