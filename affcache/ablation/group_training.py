"""A group of trials trained side by side, or a ridge solved; what a kill leaves of it is continued."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from affcache.ablation.trials import LoadedSplits, Outcome, Trial
from affcache.errors import StoreError
from affcache.files import Tensors, read_tensors, write_tensors
from affcache.training.epochs import Best, Epochs, Run
from affcache.training.objective import ClassCounts
from affcache.training.plain import new_learner
from affcache.training.ridge import Ridge
from affcache.training.settings import FitSettings

SECONDS_BETWEEN_CHECKPOINTS = 30.0

Report = Callable[[int, str], None]  # epochs of heads finished now, how it stands


@dataclass(frozen=True)
class Group:
    """Trials that train side by side; a ridge is alone."""

    trials: Sequence[str]  # names
    recipes: Sequence[FitSettings]
    checkpoint: Path  # absolute; to continue from after a kill

    @classmethod
    def of(cls, trials: Sequence[Trial], out: Path) -> "Group":
        """Return the group of some trials, its checkpoint in the ablation's folder."""
        checkpoint = out.absolute() / "groups" / f"{trials[0].name}.safetensors"
        return cls([trial.name for trial in trials], [trial.settings for trial in trials], checkpoint)

    def discard_checkpoint(self) -> None:
        """Remove what the group would continue from: all its results are written."""
        self.checkpoint.unlink(missing_ok=True)


@dataclass(frozen=True)
class Trained:
    """What a group's training found."""

    outcomes: Sequence[Outcome]
    heads: Sequence[Tensors]  # of the best epoch; empty where a head diverged at once


def train_group(
    group: Group, splits: LoadedSplits, device: torch.device, report: Report, *, keep_checkpoint: bool = True
) -> Trained:
    """Train the heads of one group, or solve its ridge; now and then write the checkpoint."""
    run, heads, saved = _run_of(group, splits, device), len(group.trials), time.monotonic()
    done = _restore(run, group) if keep_checkpoint and isinstance(run, Epochs) else 0
    if done:
        report(done * heads, "continued")
    for entries in run.run(splits.train, splits.selection):
        done = entries[0]["epoch"]
        report(heads if run.unit == "epoch" else 0, f"{run.unit} {done} of {run.steps}, {_standing(run, splits)}")
        due = time.monotonic() - saved >= SECONDS_BETWEEN_CHECKPOINTS
        if keep_checkpoint and due and isinstance(run, Epochs) and done < run.steps:
            _save(run, group)
            saved = time.monotonic()
    report(heads * (run.steps - done) if run.unit == "epoch" else 1, _standing(run, splits))
    logits = run.predict_best(splits.validation)  # (H, n, C)
    outcomes = [_outcome(best, of_head, splits) for best, of_head in zip(run.best, logits, strict=True)]
    return Trained(outcomes, [best.head for best in run.best])


def _run_of(group: Group, splits: LoadedSplits, device: torch.device) -> Run:
    """Return what trains the group's heads."""
    task, recipes = splits.task, list(group.recipes)
    if recipes[0].head == "ridge":
        return Ridge(recipes[0], task, splits.width)
    counts = ClassCounts.of(task, splits.train.labels.cpu())
    learner, _ = new_learner(recipes, task, splits.width, device, counts, splits.videos)
    return Epochs(learner)


def _standing(run: Run, splits: LoadedSplits) -> str:
    return f"best {splits.task.metric} of this group's {len(run.best)} heads {max(one.value for one in run.best):.3f}"


def _outcome(best: Best, logits: torch.Tensor, splits: LoadedSplits) -> Outcome:
    """Return what a head's logits (n, C) on validation say; nothing where it diverged."""
    if best.diverged is not None:
        return Outcome(None, None, best.epoch, best.diverged, best.history, None, [])
    return Outcome.of(splits, logits, best.value, best.epoch, best.history)


def _save(run: Epochs, group: Group) -> None:
    tensors, progress = run.state()
    group.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(group.checkpoint, tensors, {**progress, "trials": list(group.trials)})


def _restore(run: Epochs, group: Group) -> int:
    """Continue from the checkpoint if there is one of these trials; return how many epochs it had finished."""
    try:
        tensors, progress = read_tensors(group.checkpoint)
    except StoreError:  # none, or none that can be read: its work is made again
        return 0
    if progress.get("trials") != list(group.trials):
        return 0
    run.load_state(tensors, progress)
    return run.done
