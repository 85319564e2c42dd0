"""The settings of an ablation: the recipe of a fit, and what of it is varied."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from affcache.settings import STORE_TEXT, EngineSettings, setting
from affcache.training.settings import TrainingSettings


@dataclass(frozen=True)
class AblateSettings(TrainingSettings, EngineSettings):
    """Train a grid of heads off one read of the store, with seeds, and compare them."""

    vary: tuple[str, ...] = setting(
        (),
        "A setting of fit and its values, alpha=0.3,0.5,1, or stores, store=a.h5,b.h5,a.h5+b.h5; several span a grid.",
        default_text="nothing",
    )
    list: Path | None = setting(
        None, "TOML file of named settings: a table each, with the settings of fit in it.", default_text="none"
    )
    preset: str = setting(
        "none",
        "A ready-made grid: paper (erm, cvar and for au cvar+auc, each without and with SAM), alpha, or rho.",
        choices=("none", "paper", "alpha", "rho"),
    )
    seeds: int = setting(3, "Heads of each setting, with the seeds 0, 1, 2, ...")
    base: str = setting(
        "",
        "What others are compared with: a name, or values, alpha=1,rho=0.",
        default_text="the defaults, or the first",
    )
    store: tuple[Path, ...] = setting(
        (), "The embedding store; of several the embeddings of a frame stand side by side.", default_text=STORE_TEXT
    )
    out: Path | None = setting(
        None,
        "Folder to write; what is finished in it is kept and skipped.",
        default_text="ablations/<task>-<what is varied>",
    )
    folds: int | None = setting(
        None,
        "Cross-validate: cut all labelled frames, of both splits, into so many folds, each tested by who never saw it.",
        default_text="none: train on train, report on validation",
    )
    fold_by: str = setting(
        "video",
        "What is in one fold alone: a video, or a folder of videos, which may be a person.",
        choices=("video", "folder"),
    )
    select: str = setting(
        "auto",
        "Where epochs and settings are chosen: on validation (the tested fold), which is reported too, or on held-out "
        "training videos (the next fold).",
        choices=("auto", "validation", "heldout"),
        default_text="validation; with --folds heldout",
    )
    held_out: float = setting(
        0.2, "Share of the training videos that --select heldout sets aside, by their names; with --folds, a fold."
    )
    keep: str = setting(
        "best",
        "Whose heads are kept for affcache score: the best run's, all, or none.",
        choices=("best", "all", "none"),
    )
    yes: bool = setting(False, "Start also what is projected to take more than a day.")

    @property
    def chosen_on(self) -> str:
        """Where epochs and settings are chosen: validation or heldout."""
        usual = "heldout" if self.folds else "validation"
        return usual if self.select == "auto" else self.select

    @staticmethod
    def varies_store(text: str) -> bool:
        """Say whether an entry of ``vary`` is of stores."""
        return text.partition("=")[0].strip() == "store"

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if sum(map(self.varies_store, self.vary)) > 1:
            yield "--vary store is given twice; expected all stores in one place."
        yield from self.expect("seeds", at_least=1)
        yield from self.expect("folds", at_least=2)
        if self.folds == 2 and self.chosen_on == "heldout":
            yield (
                "--folds is 2, but one fold is tested, one chooses epochs, and none is left to train; expected at "
                "least 3, or --select validation."
            )
        if self.fold_by != "video" and self.folds is None:
            yield f"--fold-by is {self.fold_by} without --folds; expected --folds K with it."
        yield from self.expect("held_out", more_than=0, less_than=1)
        if self.preset != "none" and self.list is not None:
            yield "--preset and --list are both given; expected one of them, with as many --vary as you like."
