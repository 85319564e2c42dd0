"""What trained heads say of faces, as columns of a table: probabilities, smoothed and calibrated, and decisions."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from affcache.errors import ConfigError, InputError
from affcache.prediction.model import Model
from affcache.prediction.whole_videos import frame_values, logits_of_persons
from affcache.scoring.ensemble import Weights, averaged, rule_of_average, shares_of
from affcache.scoring.rule import DecisionRule
from affcache.scoring.trained import CALL, encoder_name
from affcache.tasks.task import Task

Embeddings = npt.NDArray[np.float16]
Columns = npt.NDArray[np.int64]  # (D,) of a model's embedding among those of all encoders side by side


@dataclass(frozen=True)
class Said:
    """What is said of n faces in the order of persons and frames."""

    probabilities: npt.NDArray[Any]  # (n, C)
    logits: torch.Tensor  # (n, C)
    videos: npt.NDArray[np.int64]  # (n,) whose face it is, rising
    frame_numbers: npt.NDArray[np.int64]  # (n,) rising for each person


@dataclass(frozen=True)
class TaskHeads:
    """The heads of one task, which are averaged, and the rule by which they decide."""

    task: Task
    models: tuple[Model, ...]
    inputs: tuple[Columns, ...]  # of each model
    rule: DecisionRule

    def columns(self, naming: str) -> list[tuple[str, pa.DataType]]:
        """Return names and types of the task's columns: what is said of each output, then what is decided."""
        task = self.task
        said = [(self._name(output, "p", naming), pa.float32()) for output in task.classes]
        if task.exclusive:
            return [*said, (task.name, pa.string())]
        if task.has_classes:
            return [*said, *((self._name(output, "c", naming), pa.bool_()) for output in task.classes)]
        return said

    def _name(self, output: str, kind: str, naming: str) -> str:
        unit = re.fullmatch(r"AU(\d+)", output)
        if naming == "openface" and unit and self.task.kind == "units":
            return f"AU{int(unit[1]):02d}_{kind}"
        return f"{self.task.name}_{output}{'_present' if kind == 'c' else ''}"

    def say(
        self,
        logits: Sequence[torch.Tensor],
        persons: npt.NDArray[Any],
        frames: npt.NDArray[Any],
        shares: torch.Tensor | None = None,
    ) -> list[npt.NDArray[Any]]:
        """Return the values (n,) of the task's columns.

        Args:
            logits: (n, C) of each head.
            persons: int (n,), whose faces they are.
            frames: int (n,), the numbers of their frames.
            shares: (R, n), how much each head counts in each frame; None where the rule's weights say it.
        """
        order = np.lexsort((frames, persons))
        if shares is None and self.rule.weights is not None:
            shares = shares_of(np.ones((len(logits), len(frames)), dtype=bool), self.rule.weights)
        probabilities, mean_logits = averaged(self.task, logits, shares)
        said = Said(probabilities[order], mean_logits[order], persons[order], frames[order])
        applied = self.rule.apply(said, self.task).probabilities
        decided = self.rule.decide(applied, self.task)
        back = np.argsort(order)
        columns = list(applied[back].T.astype(np.float32))
        if self.task.exclusive:
            columns.append(np.asarray(self.task.classes, dtype=object)[decided[back]])
        elif self.task.has_classes:
            columns += list(decided[back].T == 1)
        return columns


def heads_by_task(
    models: Sequence[Model], rule: DecisionRule, weights: Weights | None, *, fitted: bool
) -> list[TaskHeads]:
    """Put models of one task together, in the order given; one of several tasks counts for each of them.

    Args:
        models: of any encoders.
        rule: what counts unless a fitted one does.
        weights: of the models; None for those of the rule.
        fitted: whether the rule that was fitted for each task's runs counts.

    Raises:
        InputError: two tasks of one name differ.
        ConfigError: no rule was fitted, or several.
    """
    inputs, found = columns_of_models(models), []
    views = [(number, one) for number, model in enumerate(models) for one in model.by_task]
    for name in dict.fromkeys(one.task.name for _, one in views):
        numbers, alike = zip(*((number, one) for number, one in views if one.task.name == name), strict=True)
        if any(model.task != alike[0].task for model in alike):
            words = ", ".join(model.trained.source for model in alike)
            raise InputError(f"The tasks {name} of {words} differ. Expected runs of one task, with the same outputs.")
        own = _fitted_rule(alike) if fitted else rule
        if weights is not None:
            own = replace(own, weights=tuple(weights[number] for number in numbers))
        found.append(TaskHeads(alike[0].task, alike, tuple(inputs[number] for number in numbers), own))
    return found


def encoders_of_models(models: Sequence[Model]) -> dict[str, tuple[Model, int]]:
    """Return the encoders of all models, each once: by its fingerprint a model that has it, and its number there."""
    found: dict[str, tuple[Model, int]] = {}
    for model in models:
        for number, fingerprint in enumerate(model.trained.encoder_fingerprints):
            found.setdefault(fingerprint, (model, number))
    return found


def located(models: Sequence[Model], names: Sequence[str], tags: Sequence[str]) -> list[Model]:
    """Return models whose encoders are where it is said, each encoder once, in the order of ``encoders_of_models``.

    Raises:
        ConfigError: another number is said than there are encoders.
    """
    encoders, places = encoders_of_models(models), []
    for name, said in (("--model", names), ("--pretrained", tags)):
        if said and len(said) != len(encoders):
            known = " + ".join(encoder_name(model.trained.encoders[number]) for model, number in encoders.values())
            raise ConfigError(
                f"{name} is given {len(said)} times, and the runs are on {len(encoders)} encoders: {known}. Expected "
                "one for each, in this order."
            )
        places.append(dict(zip(encoders, said, strict=True)) if said else {})
    found = []
    for model in models:
        own = [[of.get(one) for one in model.trained.encoder_fingerprints] if of else None for of in places]
        found.append(Model(model.trained, *own))
    return found


def columns_of_models(models: Sequence[Model]) -> list[Columns]:
    """Return which values of all encoders' embeddings, side by side, are each model's."""
    encoders = encoders_of_models(models)
    widths = [model.trained.widths[number] for model, number in encoders.values()]
    first = dict(zip(encoders, accumulate([0, *widths]), strict=False))
    width = dict(zip(encoders, widths, strict=True))
    return [
        np.concatenate([first[one] + np.arange(width[one]) for one in model.trained.encoder_fingerprints])
        for model in models
    ]


def require_different_columns(heads: Sequence[TaskHeads], naming: str, others: Sequence[str]) -> None:
    """Refuse tasks of which two columns, or one and another of the table, would share a name; raises ConfigError."""
    seen = dict.fromkeys(others, "the table's own")
    for one in heads:
        for name, _ in one.columns(naming):
            if name in seen:
                raise ConfigError(
                    f"The column {name} of task {one.task.name} would stand twice: {seen[name]} has it too. Expected "
                    "different names. Predict with these runs one after the other, or leave --columns out."
                )
            seen[name] = f"task {one.task.name}"


def _fitted_rule(models: Sequence[Model]) -> DecisionRule:
    """Return the rule that was fitted: for one run as it has it, for several as score fitted it for their average."""
    sources = [model.trained.source for model in models]
    rule = models[0].rule if len(models) == 1 else rule_of_average([model.trained for model in models])
    if rule is None:
        what = "has no rule that was fitted" if len(models) == 1 else "have no rule that was fitted for their average"
        raise ConfigError(
            f"--decide fitted: {' '.join(sources)} {what}. Expected one. Fit it with 'affcache score "
            f"{' '.join(sources)} --decide fitted', or leave that flag out."
        )
    return rule


class LogitsOfHeads:
    """Logits of every head for embeddings that come in parts, so that only what is said of them is kept.

    Where videos are pooled, their embeddings are kept until it is known whose they are.

    Args:
        heads: of all tasks.
    """

    def __init__(self, heads: Sequence[TaskHeads]) -> None:
        self._heads, self.models = heads, [model for one in heads for model in one.models]
        self._inputs = [columns for one in heads for columns in one.inputs]
        self._waiting: list[Embeddings] = []
        self._count = 0
        self._values: list[list[torch.Tensor]] = [[] for _ in self.models]

    def add(self, embeddings: Embeddings) -> None:
        """Take the next embeddings (k, D), of all encoders side by side."""
        self._waiting.append(embeddings)
        self._count += len(embeddings)
        if self._count >= CALL:
            self._say()

    def _say(self) -> None:
        if self._waiting:
            embeddings = np.concatenate(self._waiting)
            for model, columns, values in zip(self.models, self._inputs, self._values, strict=True):
                values.append(frame_values(model.trained, torch.from_numpy(embeddings[:, columns])))
            self._waiting, self._count = [], 0

    def columns(
        self, rows: npt.NDArray[np.int64], persons: npt.NDArray[np.int64], frames: npt.NDArray[Any], naming: str
    ) -> dict[str, pa.Array]:
        """Return the columns of all tasks, as ``output_columns``, by all that came since the last call.

        Where labels are of whole videos, all faces of a person have what is said of the video.
        """
        return output_columns(self._heads, self._result(persons[rows], frames[rows]), rows, persons, frames, naming)

    def _result(self, persons: npt.NDArray[np.int64], frames: npt.NDArray[Any]) -> list[torch.Tensor]:
        """Return the logits (n, C) of each head, of all that came since the last call."""
        self._say()
        values = [torch.cat(parts) if parts else torch.empty(0) for parts in self._values]
        self._values = [[] for _ in self.models]
        return [
            logits_of_persons(model.trained, one, persons, frames)
            for model, one in zip(self.models, values, strict=True)
        ]


def output_columns(
    heads: Sequence[TaskHeads],
    logits: Sequence[torch.Tensor],
    rows: npt.NDArray[np.int64],
    persons: npt.NDArray[np.int64],
    frames: npt.NDArray[Any],
    naming: str,
    shares: torch.Tensor | None = None,
) -> dict[str, pa.Array]:
    """Return the columns of all tasks for the n rows of a table.

    Args:
        heads: of all tasks.
        logits: (m, C) of each of their heads.
        rows: int (m,), the rows of the table that they are of; elsewhere columns are empty.
        persons: int (n,), whose face it is in each row.
        frames: int (n,), numbers of frames.
        naming: affcache or openface.
        shares: (R, m), how much each head counts; of one task alone. None where the rule says it.
    """
    columns, first = {}, 0
    empty = np.ones(len(frames), dtype=bool)
    empty[rows] = False
    for one in heads:
        own = logits[first : first + len(one.models)]
        first += len(own)
        values = one.say(own, persons[rows], frames[rows], shares)
        for (name, kind), column in zip(one.columns(naming), values, strict=True):
            whole = np.zeros(len(frames), dtype=object if pa.types.is_string(kind) else column.dtype)
            whole[rows] = column
            columns[name] = pa.array(whole, kind, mask=empty)
    return columns
