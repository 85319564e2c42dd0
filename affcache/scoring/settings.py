"""The settings of what is done with trained heads: scoring them, and submitting what they predict."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from affcache.settings import Settings, setting

NEWEST = "the newest one under runs/"
TRAINED_ON = "the one the run was trained on"


@dataclass(frozen=True)
class PredictionSettings(Settings):
    """How heads decide: averaged over views, smoothed over time, calibrated, with rules that are fitted."""

    views: str = setting(
        "plain",
        "Whose probabilities count: the crops' as they are, or (both) averaged with mirrored ones'.",
        choices=("plain", "both"),
    )
    smooth: str = setting(
        "none", "Smooth over the frames of a video: by their mean or their median.", choices=("none", "mean", "median")
    )
    smooth_width: int | None = setting(
        None, "Frame numbers in a smoothing window, odd.", default_text="the one that is best where rules are fitted"
    )
    decide: str = setting(
        "plain",
        "How probabilities become decisions: plain, or with a bias a class or a threshold a unit that is fitted.",
        choices=("plain", "fitted"),
    )
    calibrate: bool = setting(False, "Divide logits by a temperature that is fitted.")
    weights: str = setting(
        "",
        "How much each of several runs counts in the average: numbers in their order, 0.6,0.4; or fitted.",
        default_text="all alike",
    )
    fit_on: str = setting(
        "heldout",
        "Where rules are fitted: on training videos that fit --held-out set aside, or (optimistic) on validation.",
        choices=("heldout", "validation"),
    )
    device: str = setting("auto", "Where the head runs: auto, cpu, cuda, cuda:1, ...")

    def problems(self) -> Iterator[str]:
        if self.smooth_width is not None and (self.smooth_width < 1 or self.smooth_width % 2 == 0):
            yield f"--smooth-width is {self.smooth_width}; expected an odd number, so that a frame is in the middle."
        if self.smooth_width is not None and self.smooth == "none":
            yield "--smooth-width is given without --smooth; expected --smooth mean or --smooth median with it."

    @property
    def fits_rules(self) -> bool:
        """Whether anything is fitted."""
        fitted = self.decide == "fitted" or self.calibrate or self.weights == "fitted"
        return fitted or (self.smooth != "none" and self.smooth_width is None)


@dataclass(frozen=True)
class SplitSettings(PredictionSettings):
    """Which labelled frames heads are scored on."""

    split: str = setting("validation", "Which labels to score against.", choices=("validation", "train"))
    store: tuple[Path, ...] = setting(
        (), "The embedding store; of runs of several encoders one of each, in any order.", default_text=TRAINED_ON
    )
    annotations: Path | None = setting(
        None, "Folder with the label files, or a table of labels.", default_text=TRAINED_ON
    )


@dataclass(frozen=True)
class ScoreSettings(SplitSettings):
    """Score a run on a split, or several runs whose probabilities are averaged."""

    run: tuple[Path, ...] = setting(
        (), "Run folders to score; the probabilities of several are averaged.", default_text=NEWEST
    )
    against: Path | None = setting(None, "Run to compare with on the same frames.", default_text="none")
    figures: Path | None = setting(None, "Folder for pictures, PNG and SVG.", default_text="none")
