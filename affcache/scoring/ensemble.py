"""Several runs that predict together: their probabilities averaged, frame by frame, by weights that may be fitted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from affcache.errors import ConfigError, InputError
from affcache.files import read_json
from affcache.progress import Listener
from affcache.scoring.predict import Predictions, TrainedRun, require_one_task
from affcache.scoring.published import sha256_of
from affcache.scoring.rule import DecisionRule, are_weights
from affcache.scoring.trained import AVERAGE, TrainedHead, no_rule
from affcache.settings import RUNS
from affcache.store.frames import ABSENT, ENCODED, FrameIndex, Rows, all_frames
from affcache.tasks.annotations import JoinedLabels, join_labels, of_part
from affcache.tasks.multitask import MultiTask
from affcache.tasks.task import Task
from affcache.tasks.tasks import TASKS
from affcache.training.run_folder import RunFolder, newest_run

FEW = 50_000  # frames; up to here nobody waits
DRAWS = 20  # of runs, whose shares are their weights
Weights = tuple[float, ...]  # (R,) of the runs, of any sum


@dataclass(frozen=True)
class Ensemble:
    """R runs of one task, on the frames of which the store of at least one has an embedding."""

    runs: tuple[TrainedRun, ...]
    frames: FrameIndex
    rows_of: tuple[Rows, ...] | None  # of each run, its store's row of every frame; None where all have the same rows

    @classmethod
    def open(
        cls, paths: Sequence[Path], stores: Sequence[Path], device: str, listener: Listener, also: Sequence[Path] = ()
    ) -> "Ensemble":
        """Open runs, each on its own stores or on those of its encoders among some; with none named, the newest one.

        Stores that are for neither these runs nor those of ``also`` are named in a warning.

        Raises:
            InputError: there is none, one is no run folder, or they are of several tasks.
            StoreError, ConfigError: as of ``TrainedRun.on_store``.
        """
        return cls.of(open_runs(paths, stores, device, listener, also), listener)

    @classmethod
    def of(cls, runs: Sequence[TrainedRun], listener: Listener) -> "Ensemble":
        """Put runs together; say which frames not all of them have.

        Raises:
            InputError: they are of several tasks, or of stores that share no frame.
        """
        require_one_task(runs)
        first, *others = runs
        if len({run.settings.partial for run in runs}) > 1:
            listener.warning(
                f"Labels in part count as in the training of {first.source}, --partial {first.settings.partial}; not "
                "all of the runs were trained so"
            )
        if all(_alike(first.store, run.store) for run in others):
            return cls(tuple(runs), first.store, None)
        frames, rows = all_frames([run.store for run in runs])
        if not (sum((own != ABSENT).astype(int) for own in rows) > 1).any():
            raise InputError(
                f"{' and '.join(str(run.store.path) for run in runs)} share no frame, so that nothing can be averaged. "
                "Expected stores of the same videos and frames, whose names and numbers agree. Extract them "
                "from the same crops, or predict with each run alone."
            )
        there = frames.status == ENCODED
        for run, own in zip(runs, rows, strict=True):
            if lacking := int((own[there] == ABSENT).sum()):
                listener.message(
                    f"{lacking:,} of {int(there.sum()):,} {first.task.level}s have no embedding in {run.store.path}, "
                    f"of {run.source}: there the others' average counts"
                )
        return cls(tuple(runs), frames, tuple(rows))

    @classmethod
    def of_each_task(cls, runs: Sequence[TrainedRun], listener: Listener) -> "list[Ensemble]":
        """Put runs together task by task: one of several tasks counts for each of them.

        Raises:
            InputError: they are of several tasks that aren't, together, those of the multi-task challenge.
        """
        by_task: dict[str, list[TrainedRun]] = {}
        for run in runs:
            for one in run.by_task:
                by_task.setdefault(one.task.name, []).append(one)
        together = [part.name for part in TASKS["mtl"].parts]
        several = any(run.task.parts for run in runs) or by_task.keys() >= set(together)
        if not (several and by_task.keys() <= set(together)):
            require_one_task(runs)
        return [cls.of(by_task[name], listener) for name in sorted(by_task, key=[*together, *by_task].index)]

    def join(self, annotations: Path, split: str) -> JoinedLabels:
        """Join the labels of a split to the frames, as in the first run's training: those of all of its tasks at once.

        Raises as ``join_labels``; InputError too where none of several is of this ensemble's task.
        """
        own = self.own(join_labels(self.frames, annotations, self.first.whole, split, self.first.settings.partial))
        if not len(own):
            raise InputError(
                f"No {split} label of task {self.task.name} in {annotations}, which {self.first.source} was trained "
                "for. Expected labels of each of its tasks. Point --annotations at others."
            )
        return own

    def own(self, joined: JoinedLabels) -> JoinedLabels:
        """Return this task's labels, of those of all tasks of the first run at once."""
        whole = self.first.whole
        return of_part(whole, joined, self.task.name) if isinstance(whole, MultiTask) else joined

    @property
    def first(self) -> TrainedRun:
        """The run that is named first: its labels and its folder count."""
        return self.runs[0]

    @property
    def task(self) -> Task:
        """What is predicted."""
        return self.first.task

    def predict(self, rows: Rows, views: str, listener: Listener, weights: Weights | None = None) -> Predictions:
        """Predict some of the frames with every run and view, and average the probabilities.

        Raises:
            InputError: an embedding isn't finite.
            StoreError: a view is missing, or a store or view is incomplete, damaged or can't be read any more.
        """
        return self.average(rows, self.logits(rows, views, listener), weights)

    def logits(self, rows: Rows, views: str, listener: Listener) -> list[torch.Tensor]:
        """Return the logits (n, C) of each run and view; 0 where a run's store hasn't the frame. Raises as predict."""
        kinds = ("plain",) if views == "plain" else ("plain", "flip")
        for store in {run.store.path: run.store for run in self.runs}.values():
            for view in kinds:  # two seconds for a million rows; a damaged one would predict without a word
                (store if view == "plain" else store.view(view)).verify()
        total, done = len(rows) * len(self.runs) * len(kinds), 0

        def on_done(frames: int) -> None:
            nonlocal done
            done += frames
            if total > FEW:
                listener.progress(done, total, "frame")

        found = []
        for number, run in enumerate(self.runs):
            own = rows if self.rows_of is None else self.rows_of[number][rows]
            there = torch.from_numpy(own != ABSENT)
            for view in kinds:
                logits = torch.zeros(len(rows), self.task.outputs)
                logits[there] = run.logits_of_rows(own[own != ABSENT], view, on_done)
                found.append(logits)
        return found

    def average(self, rows: Rows, logits: Sequence[torch.Tensor], weights: Weights | None = None) -> Predictions:
        """Return what runs say together of some frames.

        Args:
            rows: (n,) of the frames.
            logits: (n, C) of each run and view, as ``logits`` returned them.
            weights: of the runs; None for equal ones.
        """
        shares = self.shares(rows, weights, len(logits) // len(self.runs))
        return Predictions(self.frames, rows, *averaged(self.task, logits, shares))

    def shares(self, rows: Rows, weights: Weights | None, views: int = 1) -> torch.Tensor | None:
        """Return how much each run and view counts in each frame, (R * views, n); None where all do alike."""
        if weights is None and self.rows_of is None:
            return None
        there = np.ones((len(self.runs), len(rows)), dtype=bool)
        if self.rows_of is not None:
            there = np.stack([of[rows] != ABSENT for of in self.rows_of])
        return shares_of(there, weights, views)


def open_runs(
    paths: Sequence[Path], stores: Sequence[Path], device: str, listener: Listener, also: Sequence[Path] = ()
) -> list[TrainedRun]:
    """Open runs as ``Ensemble.open`` does, of any tasks."""
    runs = [TrainedRun.on_store(path, stores, device, listener) for path in paths or [newest_run(RUNS).path]]
    others = [TrainedRun.on_store(path, stores, device, Listener()) for path in also if stores]
    warn_of_unused(stores, [*runs, *others], listener)
    return runs


def warn_of_unused(stores: Sequence[Path], runs: Sequence[TrainedRun], listener: Listener) -> None:
    """Say which of the stores given are no run's."""
    used = {part.path for run in runs for part in run.store.parts}
    for path in stores:
        if path not in used:
            listener.warning(f"{path} isn't read: no run was trained on embeddings of its encoder")


def shares_of(there: npt.NDArray[np.bool_], weights: Weights | None, views: int = 1) -> torch.Tensor:
    """Return how much each run and view counts in each frame, float64 (R * views, n); over each frame they sum to 1.

    Args:
        there: (R, n), whether a run says anything of a frame; at least one does.
        weights: (R,) of the runs; None for equal ones. Where only runs of no weight say anything, they count alike.
        views: of each run.
    """
    shares = there * np.asarray(weights or [1.0] * len(there))[:, None]
    shares = np.where(shares.sum(axis=0) > 0, shares, there)
    return torch.from_numpy((shares / (views * shares.sum(axis=0))).repeat(views, axis=0))


def _alike(store: FrameIndex, other: FrameIndex) -> bool:
    return store.path == other.path or (store.has_frames_of(other) and np.array_equal(store.status, other.status))


def averaged(
    task: Task, logits: Sequence[torch.Tensor], shares: torch.Tensor | None = None
) -> tuple[npt.NDArray[Any], torch.Tensor]:
    """Average what several heads, or several views, say: return probabilities (n, C), and logits that stand for them.

    Of one, logits float32 (n, C), both are its own; of several they are float64. ``shares`` (K, n), which sum to 1 for
    each frame, say how much each counts; None where all do alike.
    """
    if len(logits) == 1:
        return task.probabilities(logits[0]).numpy(), logits[0]
    each = torch.stack(list(logits)).double()  # (K, n, C)
    probabilities = torch.stack([task.probabilities(one) for one in each])
    if shares is None:
        return probabilities.mean(0).numpy(), task.averaged(each)
    mean = (probabilities * shares[..., None]).sum(0)
    return mean.numpy(), task.averaged(each, shares[..., None])


def parse_weights(text: str, runs: int) -> Weights | None:
    """Read ``0.6,0.4``: a weight for each run; "" says none.

    Raises:
        ConfigError: another number of them, or they are no weights.
    """
    if not text:
        return None
    try:
        weights = tuple(float(part) for part in text.split(","))
    except ValueError:
        weights = ()
    if len(weights) != runs or not are_weights(weights):
        raise ConfigError(
            f"--weights is {text!r}. Expected a number of at least 0 for each of {runs} runs, in their order, not all "
            "0, such as 0.6,0.4; or fitted."
        )
    return weights


def fit_weights(runs: int, metric: Callable[[Weights], float]) -> Weights:
    """Return weights, multiples of 1/20, by which a metric of the average becomes large.

    Runs are drawn one after the other, with replacement, each the one that helps most; a run's share is its weight
    (Caruana, Niculescu-Mizil, Crew and Ksikes, Ensemble Selection from Libraries of Models, ICML 2004). Of all the
    ensembles on the way, the best is taken, equal weights included: it is never below those, on these frames.

    Args:
        runs: R.
        metric: of weights (R,), the larger the better.
    """
    best, found = metric((1 / runs,) * runs), (1 / runs,) * runs
    drawn = np.zeros(runs)
    for number in range(1, DRAWS + 1):
        tried = [tuple(((drawn + np.eye(runs)[run]) / number).tolist()) for run in range(runs)]
        values = [metric(weights) for weights in tried]
        chosen = int(np.argmax(values))
        drawn[chosen] += 1
        if values[chosen] > best:
            best, found = values[chosen], tried[chosen]
    return found


def rule_of_average(heads: Sequence[TrainedHead]) -> DecisionRule | None:
    """Return the rule that ``score`` fitted for the average of these very heads, in any order; None without one.

    Where several were fitted, in the folders of several runs, the newest counts.

    Raises:
        StoreError: a file that has one is damaged.
    """
    task, ours = heads[0].task, [sha256_of(head.folder.head) for head in heads]
    folders = {RunFolder(head.out.path / AVERAGE).path for head in heads}
    files = [RunFolder(folder).of_split(RunFolder(folder).scores, "validation", "fitted") for folder in folders]
    for path in sorted((one for one in files if one.is_file()), key=lambda one: one.stat().st_mtime, reverse=True):
        try:
            scores = read_json(path)
            said = scores if scores["task"] == task.name else scores.get("parts", {}).get(task.name, {})
            theirs = [str(head) for head in said.get("heads", ())]
            if sorted(ours) == sorted(theirs):
                return _in_order(DecisionRule.from_json(said["rule"], task), ours, theirs)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise no_rule(path, error) from None
    return None


def _in_order(rule: DecisionRule, ours: Sequence[str], theirs: list[str]) -> DecisionRule:
    """Return a rule with the weights of the same heads in another order; one that comes twice has two of them."""
    if rule.weights is None:
        return rule
    left = list(zip(theirs, rule.weights, strict=True))
    weights = []
    for head in ours:
        place = next(number for number, (other, _) in enumerate(left) if other == head)
        weights.append(left.pop(place)[1])
    return replace(rule, weights=tuple(weights))
