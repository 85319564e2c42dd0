"""The settings of stage two: what a training run and its scoring can be told."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affcache.errors import ConfigError
from affcache.settings import ANNOTATIONS, STORE_TEXT, Settings, flag, setting
from affcache.tasks.knobs import KNOBS, KNOBS_OF_LOSSES, with_knobs

if TYPE_CHECKING:  # tasks load torch
    from affcache.tasks.task import Task

CHOSEN_ON = {  # where an epoch or a strength was chosen, as config.json has it
    "validation": "on the validation split",
    "folds": "on folds of both splits",
    "heldout": "on held-out training videos",
    "": "",  # it was given: nobody knows
}
POOLED = "mean+std"  # how a video becomes one embedding unless it is said
POOLS = ("auto", "none", "mean", POOLED, f"{POOLED}+quantiles")


@dataclass(frozen=True)
@with_knobs
class TrainingSettings(Settings):
    """What a head and its training can be told. The defaults are the recipe "paper" (arXiv 2403.09915)."""

    task: str = setting(
        "expr",
        "What to predict: expr, au, va, all three at once (mtl), a [task.NAME] of affcache.toml, or FILE.toml with one "
        "of your own.",
    )
    annotations: Path | None = setting(
        None,
        "Folder with the label files, as the organisers lay them out; or one table, CSV or Parquet.",
        default_text=f"where a task of your own says, else {ANNOTATIONS}",
    )
    partial: str = setting(
        "keep",
        "Frames that some units or values are labelled of: keep what there is, or drop them, as the organisers do.",
        choices=("keep", "drop"),
    )
    task_weights: str = setting(
        "", "What each loss of several tasks counts, as in expr=2,va=0.5.", default_text="1 each"
    )
    head: str = setting(
        "mlp",
        "What is trained: mlp, linear, (ridge) a linear layer in closed form, or another in training/heads.py.",
    )
    pool: str = setting(
        "auto",
        "Where a label is of a whole video, what of its frames' embeddings is the head's input: statistics; or (none) "
        "each frame by itself, with the video's label. auto is mean+std there, and none where frames have labels.",
        choices=POOLS,
    )
    epochs: int = setting(32, "Passes over the training frames.")
    batch_size: int = setting(32, "Frames per step.")
    stride: int = setting(1, "Frames of a video that follow one another, of which each epoch draws one anew.")
    frames_per_epoch: int | None = setting(None, "Frames drawn anew for each epoch.", default_text="all of them")
    lr: float = setting(1e-3, "Learning rate of AdamW at the start.")
    lr_minimum: float = setting(1e-5, "Learning rate at the bottom of the cosine.")
    lr_half_period: float = setting(0.25, "Epochs from top to bottom of the cosine, as a fraction of all epochs.")
    weight_decay: float = setting(1e-4, "Decoupled weight decay of AdamW.")
    alpha: float = setting(0.5, "CVaR level in (0, 1]: the share of worst losses that counts; 1 is the plain mean.")
    cvar_level: str = setting(
        "batch",
        "Where CVaR's threshold comes from: each batch's own losses, or (set) tracked over the last 32 batches.",
        choices=("batch", "set"),
    )
    cvar_within: str = setting(
        "batch",
        "Whose worst share counts: the batch's, or the mean over the classes or videos in it of each one's own.",
        choices=("batch", "class", "video"),
    )
    class_weights: str = setting(
        "none",
        "What a loss stands for: balanced gives every class, or a unit's presence and absence, the same total.",
        choices=("none", "balanced"),
    )
    loss: str = setting(
        "",
        f"What a frame's mistake costs: {', '.join(name for of_kind in KNOBS_OF_LOSSES.values() for name in of_kind)}.",
        default_text="the first of these that the task can have",
    )
    logit_adjustment: float = setting(0.0, "Strength of adding the classes' log shares to the logits in training.")
    auc_weight: float = setting(0.0, "Share of the pairwise AUC term in the loss of au, in [0, 1); published: 0.2.")
    auc_margin: float = setting(0.6, "Margin of the pairwise AUC term, in logits.")
    ccc_weight: float = setting(0.5, "Share of 1 - CCC of the batch in the loss of va, in [0, 1).")
    rho: float = setting(0.5, "Radius of SAM's perturbation, in parameter norm; 0 is plain AdamW.")
    adaptive: bool = setting(False, "Scale the perturbation by the size of each parameter (ASAM).")
    clip_norm: float | None = setting(None, "Largest norm of a gradient; larger ones are scaled.", default_text="any")
    precision: str = setting(
        "fp32", "Number format of products with hidden layers' weights; all else is fp32.", choices=("fp32", "bf16")
    )
    dropout: float = setting(0.6, "Dropout probability after each hidden layer, in [0, 1).")
    hidden_layers: int = setting(3, "Hidden layers of the head; 0 makes it linear.")
    hidden_width: int = setting(768, "Units of each hidden layer.")
    normalize: str = setting(
        "none",
        "What to do to an embedding first: nothing, scale it to length 1, or (standard) each dimension by the mean and "
        "the deviation of the training frames.",
        choices=("none", "l2", "standard"),
    )
    device: str = setting("auto", "Where the head trains: auto, cpu, cuda, cuda:1, ...")
    memory: float | None = setting(
        None, "GB of embeddings held at a time; if there are more, they stream.", default_text="half the device's"
    )

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from self.expect("epochs", "hidden_width", "stride", at_least=1)
        yield from self.expect("batch_size", "frames_per_epoch", at_least=2)  # BatchNorm needs two frames
        yield from self.expect("lr", more_than=0, less_than=math.inf)
        yield from self.expect("memory", "lr_half_period", more_than=0)
        yield from self.expect("lr_minimum", "hidden_layers", at_least=0)
        yield from self.expect("weight_decay", "rho", at_least=0, less_than=math.inf)
        yield from self.expect("hidden_layers", at_most=1000)
        yield from self.expect("hidden_width", at_most=2**14)
        yield from self.expect("epochs", "batch_size", "stride", "frames_per_epoch", at_most=2**31)
        if 0 < self.lr < self.lr_minimum:
            yield f"--lr is {self.lr:g}, below --lr-minimum {self.lr_minimum:g}; expected at least that. Lower both."
        yield from self.expect("alpha", more_than=0, at_most=1)
        yield from self.expect("dropout", at_least=0, less_than=1)
        yield from self.expect("logit_adjustment", "auc_margin", at_least=0)
        for name, knob in KNOBS.items():
            if not knob.allows(getattr(self, name)):
                yield f"{flag(name)} is {getattr(self, name)}; expected {knob.span}."
        yield from self.expect("clip_norm", more_than=0)
        yield from self.expect("auc_weight", "ccc_weight", at_least=0, less_than=1)
        if self.cvar_within != "batch" and (self.cvar_level == "set" or self.class_weights != "none"):
            yield "--cvar-within goes with neither --cvar-level set nor --class-weights; expected one of the three."

    def weights_of(self, task: "Task") -> list[float]:
        """Return what the loss of each of several tasks counts.

        Raises:
            ConfigError: a name is of none of them, or a weight is no number of at least 0.
        """
        weights = {part.name: 1.0 for part in task.parts}
        for entry in filter(None, self.task_weights.split(",")):
            name, _, text = (part.strip() for part in entry.partition("="))
            try:
                weight = float(text)
            except ValueError:
                weight = -1.0
            if name not in weights or not 0 <= weight < math.inf:
                raise ConfigError(
                    f"--task-weights has {entry.strip()!r}; expected a number of at least 0 for some of "
                    f"{', '.join(weights)}, as in {next(iter(weights))}=0.5."
                )
            weights[name] = weight
        return list(weights.values())

    def knobs(self, task: "Task") -> dict[str, float]:
        """Return what the loss of a task takes by keyword; of several tasks, what any of their losses does."""
        if task.parts:
            return {name: value for part in task.parts for name, value in self.knobs(part).items()}
        of_kind = KNOBS_OF_LOSSES[task.kind]
        return {name: getattr(self, name) for name in sorted(of_kind.get(self.loss, of_kind[next(iter(of_kind))]))}

    def require_fitting(self, task: "Task") -> None:
        """Refuse settings that a task, its loss or the head has no use for.

        Raises:
            ConfigError: there are some; says all of them.
        """
        task.loss(self.loss)  # says which there are
        if task.parts:
            self.weights_of(task)
        problems = list(self._unfitting(task))
        if problems:
            raise ConfigError("\n".join(problems))

    def _unfitting(self, task: "Task") -> Iterator[str]:
        taken, each = self.knobs(task), task.parts or (task,)
        for name, knob in KNOBS.items():
            if name not in taken and getattr(self, name) != knob.default:
                losses = {loss: own for one in each for loss, own in KNOBS_OF_LOSSES[one.kind].items()}
                others = [f" or --loss {loss}" for loss, own in losses.items() if name in own]
                yield (
                    f"{flag(name)} is {getattr(self, name)}, but the loss of task {task.name} doesn't take it; "
                    f"expected {knob.default:g}{''.join(others)}."
                )
        if task.level == "frame" and self.pool not in ("auto", "none"):
            yield f"--pool is {self.pool}, but a label of task {task.name} is of a frame; expected none."
        if not task.has_classes:
            for name, off in (("logit_adjustment", 0.0), ("class_weights", "none")):
                if getattr(self, name) != off:
                    yield f"{flag(name)} is {getattr(self, name)}, but {task.name} has no classes; expected {off}."
            if self.cvar_within == "class":
                yield f"--cvar-within is class, but {task.name} has no classes; expected batch or video."
        if self.task_weights and not task.parts:
            yield f"--task-weights is {self.task_weights}, but {task.name} is one task; expected it without."
        if self.auc_weight and all(one.batch_term_weight != "auc_weight" for one in each):
            yield f"--auc-weight is {self.auc_weight}, but {task.name} has no AUC term, only units have; expected 0."
        if self.head == "ridge" and not any(one.exclusive for one in each) and self.class_weights != "none":
            yield f"--class-weights is balanced, but one ridge solves for all {task.outputs} units; expected none."


@dataclass(frozen=True)
class FitSettings(TrainingSettings):
    """Train a head on a store and labels. The defaults are the recipe "paper" (arXiv 2403.09915)."""

    store: tuple[Path, ...] = setting(
        (), "The embedding store; of several the embeddings of a frame stand side by side.", default_text=STORE_TEXT
    )
    run: Path | None = setting(None, "Run folder to write.", default_text="runs/<task>-<date>-<time>")
    resume: bool = setting(False, "Continue an interrupted run from its last finished epoch.")
    seed: int = setting(0, "Seed of initial weights, order of frames and dropout.")
    held_out: float = setting(
        0.0, "Share of the training videos set aside, by their names, for score to fit decision rules on; [0, 1)."
    )
    train_on: str = setting(
        "train",
        "Which labelled frames train: those of the split train, or all: validation's too, for the last fit.",
        choices=("train", "all"),
    )
    keep_epoch: int | None = setting(
        None, "The epoch whose head is kept, and the last one trained.", default_text="the best on validation"
    )
    strength: float | None = setting(
        None, "Strength of the ridge head that is kept.", default_text="the best on validation"
    )
    as_: Path | None = setting(
        None, "Run, or folder of an ablation, whose settings and chosen epoch or strength to take.", default_text="none"
    )

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from self.expect("seed", at_least=0, less_than=2**63)
        yield from self.expect("held_out", at_least=0, less_than=1)
        yield from self.expect("keep_epoch", at_least=1, at_most=self.epochs)
        yield from self.expect("strength", more_than=0, less_than=math.inf)
        useless = "keep_epoch" if self.head == "ridge" else "strength"
        if getattr(self, useless) is not None:
            yield f"{flag(useless)} is given, but --head {self.head} has none; expected it left out."
        if self.resume and self.run is None:
            yield "--resume doesn't say which run to continue; expected --run DIR with it."

    def require_choice(self) -> None:
        """Refuse to train on all frames without an epoch or a strength; raises ConfigError."""
        if self.train_on == "all" and not self.chosen_before:
            number = "--strength S" if self.head == "ridge" else "--keep-epoch E"
            raise ConfigError(
                f"--train-on all leaves no frames to choose on. Expected what was chosen before. Say {number}, or "
                "--as RUN: a run whose best validation chose, or the folder of 'affcache ablate --folds K'."
            )

    @property
    def chosen_before(self) -> bool:
        """Whether the epoch or the strength is given, and this training chooses nothing."""
        return self.keep_epoch is not None or self.strength is not None

    @property
    def last_epoch(self) -> int:
        """How many epochs are trained; the learning rate's cosine spans ``epochs``."""
        return self.keep_epoch or self.epochs

    @property
    def tried(self) -> str:
        """What is chosen: an epoch or a strength."""
        return "strength" if self.head == "ridge" else "epoch"

    @property
    def trained_on_validation(self) -> str:
        """Say what a score on validation is worth, where its frames were trained on; else ""."""
        return "" if self.train_on == "train" else "It was trained on validation too: its score there means nothing."

    def resolved(self, task: "Task") -> "FitSettings":
        """Return the settings with what ``auto`` stands for where the task's labels are of whole videos."""
        return replace(self, pool=resolved_pool(self.pool, task)) if task.level == "video" else self


def resolved_pool(pool: str, task: "Task") -> str:
    """Return what ``--pool`` stands for with a task: none, or statistics of whole videos."""
    if task.level == "frame":
        return "none"
    return POOLED if pool == "auto" else pool


def chosen_on(config: Mapping[str, Any]) -> str:
    """Return where the epoch or strength of a run was chosen, a key of ``CHOSEN_ON``: what its config.json says."""
    settings, said = config["settings"], str(config.get("chosen_on"))
    given = settings.get("keep_epoch") is not None or settings.get("strength") is not None
    return said if said in CHOSEN_ON else "" if given else "validation"  # of an affcache that didn't say
