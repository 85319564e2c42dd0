"""The settings of a submission."""

from dataclasses import dataclass
from pathlib import Path

from affcache.scoring.settings import NEWEST, PredictionSettings
from affcache.settings import setting


@dataclass(frozen=True)
class SubmitSettings(PredictionSettings):
    """Write a challenge's submission file: a prediction for every line of the organisers' template."""

    run: tuple[Path, ...] = setting(
        (), "Run folders to predict with; the probabilities of several are averaged.", default_text=NEWEST
    )
    template: Path | None = setting(None, "The organisers' list of frames.", default_text="none")
    frames: Path | None = setting(None, "Instead of a template: a list of videos, video,count.", default_text="none")
    store: tuple[Path, ...] = setting(
        (),
        "The embeddings of the test videos; of runs of several encoders one store of each, in any order.",
        default_text="none; it is needed",
    )
    out: Path = setting(Path("predictions.txt"), "File to write.")
    overwrite: bool = setting(False, "Write over a file that is there.")
