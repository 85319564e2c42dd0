"""The demo: the whole pipeline, all tasks, on the shipped sample of rendered faces, offline."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import affcache
from affcache.errors import ConfigError
from affcache.files import shipped
from affcache.progress import Listener
from affcache.settings import Settings, command, setting

if TYPE_CHECKING:  # they load torch; the command line needs the settings alone
    from affcache.extraction.extract import ExtractResult
    from affcache.scoring.score import ScoreResult

TASKS_SHOWN = ("expr", "au", "va")
RANDOM_WEIGHTS = "random:0"
RANDOM_NOTICE = (
    "The encoder of this demo has random weights: it never saw a face. The faces are rendered. These scores show that "
    "the pipeline works, and say nothing about Aff-Wild2 or about CLIP."
)
SAMPLE_NOTICE = (
    "The faces of this demo are rendered. These scores show that the pipeline works, and say nothing about Aff-Wild2."
)


@dataclass(frozen=True)
class DemoSettings(Settings):
    """Run the whole pipeline on the shipped sample."""

    out: Path = setting(Path("demo"), "Folder for the store and the runs.")
    model: str | None = setting(
        None, "Encoder to use instead of a small one with random weights, as for extract.", default_text="small, random"
    )
    pretrained: str = setting("", "Pretrained tag or checkpoint file that goes with --model.")
    seed: int = setting(0, "Seed of the heads' training.")


@dataclass(frozen=True)
class DemoResult:
    """What the demo found."""

    out: str
    notice: str  # what the scores do and don't show; belongs beside them wherever they are shown
    extraction: "ExtractResult"
    scores: "dict[str, ScoreResult]"

    def to_json(self) -> dict[str, Any]:
        """Return the result as one JSON object, with a score under each task's name."""
        scores = {task: result.to_json() for task, result in self.scores.items()}
        return {**scores, "notice": self.notice, "out": self.out, "extraction": self.extraction.to_json()}


@command(DemoSettings)
def demo(settings: DemoSettings, listener: Listener) -> DemoResult:
    """Extract, fit and score all tasks on the shipped sample.

    Raises:
        ConfigError: the output folder already holds something.
        InputError: the weights of --model can't be loaded.
    """
    out = settings.out
    if out.exists() and any(out.iterdir()):
        raise ConfigError(
            f"{out} already holds something. Expected an empty or new folder for the demo. Choose another with "
            "--out DIR, or delete that one."
        )
    store = out / "store.h5"
    scores = {}
    with shipped("sample") as sample, shipped("practice_encoder") as practice_encoder:
        model, pretrained = settings.model, settings.pretrained
        if model is None:
            model, pretrained = f"local-dir:{practice_encoder}", RANDOM_WEIGHTS
        listener.message(f"1. extract: the sample's crops through {settings.model or 'a small random encoder'}")
        extraction = affcache.extract(
            crops=(sample / "cropped_aligned",), store=store, model=model, pretrained=pretrained, listener=listener
        )
        for number, task in enumerate(TASKS_SHOWN, start=2):
            listener.message(f"{number}. fit and score: task {task}")
            run, annotations = out / "runs" / task, sample / "annotations"
            affcache.fit(
                task=task, store=store, annotations=annotations, run=run, seed=settings.seed, listener=listener
            )
            scores[task] = affcache.score(run=(run,), annotations=annotations, listener=listener)
    notice = SAMPLE_NOTICE if settings.model else RANDOM_NOTICE
    return DemoResult(str(out), notice, extraction, scores)
