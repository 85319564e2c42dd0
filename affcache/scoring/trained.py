"""A trained head opened to predict with, from a run folder, a published folder or the hub: no store is needed."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from affcache.devices import resolve_device
from affcache.errors import ConfigError, InputError, StoreError, first_line
from affcache.files import read_json, read_tensors
from affcache.progress import Listener, counted
from affcache.scoring.published import (
    is_published,
    local_folder,
    read_published,
    settings_of_published,
)
from affcache.scoring.rule import DecisionRule
from affcache.settings import HUB
from affcache.store.description import encoders_of, fingerprint
from affcache.store.pooled import pooled_width
from affcache.tasks.label_sources import labels_of
from affcache.tasks.multitask import MultiTask
from affcache.tasks.task import Task
from affcache.tasks.tasks import task_from_json, task_of_run
from affcache.training.data import EVALUATION_BATCH, Scaler, broken_rows, without_scaler
from affcache.training.learner import build_head
from affcache.training.run_folder import RunFolder, fit_command, settings_from_json
from affcache.training.settings import FitSettings, chosen_on, resolved_pool

# Rows of each call of a head, filled up where there are fewer: a matrix product rounds a row by how many others there
# are, and by its place among them. Of this number, a multiple of all heights of tiles from 4 to 16, every row comes out
# the same wherever it stands, so that a frame is said the same of alone, in a video and in a store.
CALL = 1008
SMALLEST = 1e-30  # deviation of a dimension that varies; float16 has none below 6e-8
AVERAGE = "average"  # below a run's folder: what is found with several averaged
Head = TypeVar("Head", bound="TrainedHead")
SCORES = Path("scores")  # below the working folder: where what is found with a published head is written


@dataclass(frozen=True)
class TrainedHead:
    """The best head of a run, or a published one, on a device."""

    source: str  # where it came from, as the user named it: a folder, or hf-hub:OWNER/NAME
    folder: RunFolder  # where its files lie
    published: bool  # its folder then has no history, and knows no store and no labels
    config: dict[str, Any]  # config.json
    task: Task
    settings: FitSettings
    head: nn.Module  # logits (B, C) of scaled embeddings (B, D), in evaluation mode
    scaler: Scaler
    epoch: int  # of the head, counted from 1
    device: torch.device
    encoder: dict[str, Any]  # the description of what made the embeddings that it was trained on
    encoder_fingerprint: str
    width: int  # D of the embeddings
    whole: Task  # of a head of several tasks at once, seen as that of one of them, all of them; else ``task``

    @classmethod
    def open(cls, location: Path | str, device: str = "auto", listener: Listener | None = None) -> "TrainedHead":
        """Open a run's best head, or a published one, of which every file is checked.

        Args:
            location: a run folder, a published folder, or ``hf-hub:OWNER/NAME``, with ``@REVISION`` where wanted.
            device: where it computes: auto, cpu, cuda, cuda:1, ...
            listener: is told where a run is unfinished.

        Raises:
            InputError: this is neither, or it can't be fetched.
            StoreError: a file is damaged, missing or was changed.
            ConfigError: the device isn't there, or it is of another affcache.
        """
        where, (path, source) = resolve_device(device), local_folder(location)
        folder = RunFolder(path)
        if is_published(path) or source.startswith(HUB):
            return cls._of_published(folder, source, where)
        config = folder.read_config()
        task, settings, store = task_of_run(config), settings_from_json(config["settings"]), config["store"]
        head, scaler, epoch = _load_head(folder, settings, store.get("width"), task)
        if settings.head != "ridge" and (done := len(folder.read_history())) < settings.last_epoch:
            (listener or Listener()).warning(
                f"run {folder.path} is unfinished: {done} of {counted(settings.last_epoch, 'epoch')}. "
                f"Finish it with 'affcache fit --run {folder.path} --resume'."
            )
        encoder, sha256 = store["encoder"], store["encoder_fingerprint"]
        modules = (head.to(where).eval(), scaler.to(where))
        of_head = (config, task, settings, *modules, epoch, where, encoder, sha256, store["width"], task)
        return cls(source, folder, False, *of_head)

    @classmethod
    def _of_published(cls, folder: RunFolder, source: str, where: torch.device) -> "TrainedHead":
        config = read_published(folder.path, source)
        try:
            task = task_from_json(config["task"])
        except (ValueError, TypeError) as error:
            raise StoreError(
                f"{folder.config} has no task that this affcache knows ({first_line(error)}). Expected it as 'affcache "
                "publish' wrote it. Use the affcache that wrote it, or fetch the folder anew."
            ) from None
        settings, width = settings_of_published(config["settings"]), config["width"]
        head, scaler, epoch = _load_head(folder, settings, width, task)
        modules = (head.to(where).eval(), scaler.to(where))
        encoder, sha256 = config["encoder"], config["encoder_fingerprint"]
        of_head = (config, task, settings, *modules, epoch, where, encoder, sha256, width, task)
        return cls(source, folder, True, *of_head)

    @property
    def by_task(self: Head) -> list[Head]:
        """The head as that of each of its tasks, with this one's outputs alone; of one task, itself."""
        if not isinstance(self.task, MultiTask):
            return [self]
        each = zip(self.task.parts, self.task.outputs_of(torch.arange(self.task.outputs)), strict=True)
        return [replace(self, task=part, head=_SomeOutputs(self.head, outputs)) for part, outputs in each]

    @property
    def encoders(self) -> list[dict[str, Any]]:
        """The description of each encoder, in the order in which their embeddings stand side by side."""
        return encoders_of(self.encoder)

    @property
    def widths(self) -> list[int]:
        """How many values the embeddings of each encoder have, in that order; their sum is ``width``."""
        return [int(one["width"]) for one in self.encoders] if len(self.encoders) > 1 else [self.width]

    @property
    def pool(self) -> str:
        """How a whole video becomes one embedding, which the head takes; none where it takes those of frames."""
        return resolved_pool(self.settings.pool, self.task)

    @property
    def encoder_fingerprints(self) -> list[str]:
        """The fingerprint of each encoder, in that order."""
        several = len(self.encoders) > 1
        return [fingerprint(one) for one in self.encoders] if several else [self.encoder_fingerprint]

    @property
    def out(self) -> RunFolder:
        """Where what is found with the head is written: a run's own folder; a published one stays as it is."""
        if not self.published:
            return self.folder
        return RunFolder(SCORES / Path(self.source.removeprefix(HUB)).absolute().name)

    @property
    def annotations(self) -> Path:
        """The labels that a run was trained on; raises ConfigError for a published head, which doesn't know them."""
        if self.published:
            raise ConfigError(said_elsewhere(self.source))
        return labels_of(self.task, self.settings.annotations)

    @property
    def worth(self) -> str:
        """Say what a score on validation is worth: its frames were trained on, or chosen on; else ""."""
        tried, frames, where = self.settings.tried, f"validation {self.task.level}s", chosen_on(self.config)
        chosen = {
            "validation": f"The {tried} was chosen on these {frames}: the score flatters a little.",
            "folds": f"The {tried} was chosen on folds that these {frames} were in: the score flatters a little.",
            "": f"The {tried} was given: where it was chosen on these {frames}, the score flatters a little.",
        }
        return self.settings.trained_on_validation or chosen.get(where, "")

    @property
    def rule(self) -> DecisionRule | None:
        """The rule that was fitted: by score on a run's validation split, or as it was published; None without one.

        Of several tasks at once each has its own, which ``by_task`` gives, and all together have none.

        Raises:
            StoreError: the file that has it is damaged.
        """
        if self.task.parts:
            return None
        path = self.folder.config if self.published else self.scores_file("fitted")
        try:
            if self.published:
                found = self.config.get("postprocessing")
                if found is not None and self.whole is not self.task:
                    found = found[self.task.name]
            else:
                scores = self.scores("fitted")
                found = None if scores is None else scores["rule"]
            return None if found is None else DecisionRule.from_json(found, self.task)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise no_rule(path, error) from None

    def scores_file(self, rule: str) -> Path:
        """Return where score writes what it finds on a run's validation split by a rule, "" or "fitted"."""
        return self.folder.of_split(self.folder.scores, "validation", rule)

    def scores(self, rule: str) -> dict[str, Any] | None:
        """Return what score found on a run's validation split by a rule, "" or "fitted"; None where it found nothing.

        Raises:
            StoreError: the file is damaged.
        """
        path = self.scores_file(rule)
        try:
            found = read_json(path)
            if not (found["task"] == self.whole.name and found["epoch"] == self.epoch):  # of a head before it
                return None
            return found if self.whole is self.task else dict(found["parts"][self.task.name])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError) as error:
            raise no_scores(path, error) from None

    def logits(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the head's logits, as ``score`` computes them.

        Args:
            embeddings: float (n, D), or pooled ones, on any device; float64 is rounded to float32.

        Returns:
            float32 (n, C), on the CPU.

        Raises:
            InputError: another shape, or an embedding that isn't finite.
        """
        self.require_embeddings(embeddings, pooled_width(self.pool, self.width))
        if embeddings.dtype == torch.float64:
            embeddings = embeddings.float()
        found, start = [torch.empty(0, self.task.outputs)], 0
        for group in embeddings.split(EVALUATION_BATCH) if len(embeddings) else ():
            found.append(self.logits_of_group(group, partial(_position_name, start)))
            start += len(group)
        return torch.cat(found)

    def require_embeddings(self, embeddings: torch.Tensor, width: int) -> None:
        """Refuse embeddings that aren't floating-point numbers (n, width); raises InputError."""
        if embeddings.ndim != 2 or embeddings.shape[1] != width or not embeddings.is_floating_point():
            raise InputError(
                f"Embeddings are {str(embeddings.dtype).removeprefix('torch.')} of shape {tuple(embeddings.shape)}. "
                f"Expected floating-point numbers of shape (n, {width}), of the encoder that the head of "
                f"{self.source} was trained on: {encoder_name(self.encoder)}."
            )

    @torch.no_grad()
    def logits_of_group(self, embeddings: torch.Tensor, name: Callable[[int], str]) -> torch.Tensor:
        """Return the logits of at most ``EVALUATION_BATCH`` embeddings; ``name`` says which one is at a position."""
        prepared = self.scaler(embeddings.to(self.device))  # (B, D)
        filled = torch.nn.functional.pad(prepared, (0, 0, 0, -len(prepared) % CALL))
        logits = torch.cat([self.head(one) for one in filled.split(CALL)])[: len(prepared)]  # (B, C)
        if len(wrong := broken_rows(embeddings)):
            raise InputError(
                f"{len(wrong):,} of {len(embeddings):,} frames have an embedding with nan or inf in it, the first is "
                f"{name(int(wrong[0]))}. Expected finite numbers. Extract or import these embeddings again."
            )
        if len(broken := broken_rows(logits)):
            raise StoreError(
                f"The head of {self.source} gives {name(int(broken[0]))} logits that are nan or inf. Expected finite "
                "ones. Restore its folder from a sound copy, or train again."
            )
        return logits.cpu()


class _SomeOutputs(nn.Module):
    """A head of which only some outputs count."""

    def __init__(self, head: nn.Module, outputs: torch.Tensor) -> None:
        super().__init__()
        self.head, self.first, self.last = head, int(outputs[0]), int(outputs[-1]) + 1

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, c) of embeddings (B, D)."""
        return self.head(embeddings)[:, self.first : self.last]  # (B, C) before


def _position_name(start: int, position: int) -> str:
    return f"embedding {start + position:,}"


def no_scores(path: Path, error: Exception) -> StoreError:
    """Return the error for a file of scores that is damaged."""
    return StoreError(
        f"{path} has no scores that can be read ({first_line(error)}). Expected them as 'affcache score' wrote them. "
        "Score the run anew, or delete that file."
    )


def no_rule(path: Path, error: Exception) -> StoreError:
    """Return the error for a file whose rule is damaged."""
    return StoreError(
        f"{path} has no rule that can be read ({first_line(error)}). Expected it as affcache wrote it. Write it "
        "anew with 'affcache score RUN --decide fitted', or delete it."
    )


def said_elsewhere(source: str) -> str:
    """Say what has to be given with a published head."""
    return (
        f"{source} is a published head: it brings neither a store nor labels. Expected to be told where both are. Say "
        "--store FILE, with embeddings of its encoder, and --annotations DIR where it is scored."
    )


def encoder_name(encoder: dict[str, Any]) -> str:
    """Return what an encoder is called, or several whose embeddings stand side by side."""
    each = [[str(one[name]) for name in ("model", "pretrained") if one.get(name)] for one in encoders_of(encoder)]
    return " + ".join(" ".join(words) or "of unknown name" for words in each)


def _load_head(folder: RunFolder, fitted: FitSettings, width: Any, task: Task) -> tuple[nn.Module, Scaler, int]:
    """Return the best head, what is done to embeddings first, and its epoch."""
    if not folder.head.exists() and folder.history.exists():
        raise StoreError(
            f"The head of run {folder.path} was not kept. Expected {folder.head}; 'affcache ablate' keeps heads as "
            f"--keep says. Train it again with '{fit_command(fitted)}'."
        )
    tensors, best = read_tensors(folder.head)
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise StoreError(
            f"{folder.head} holds numbers that are nan or inf. Expected the head as 'affcache fit' wrote it. Restore "
            "it from a sound copy, or train again with 'affcache fit'."
        )
    try:
        width = pooled_width(resolved_pool(fitted.pool, task), width)
        with torch.device("meta"):  # shapes alone: settings that were changed may ask for any memory
            expected = build_head(fitted, width, task).state_dict()
        if any(name not in tensors or tensors[name].shape != like.shape for name, like in expected.items()):
            raise ValueError("other layers")
        head, epoch = build_head(fitted, width, task), int(best["epoch"])
        scaler = Scaler.of_state(fitted.normalize, tensors)
        for name, of in scaler.tensors().items():
            if of.shape != (width,) or of.dtype != torch.float32 or ("deviation" in name and not (of > SMALLEST).all()):
                raise ValueError("no such scaler")
        if len(without_scaler(tensors)) + len(scaler.tensors()) != len(tensors):
            raise ValueError("a scaler that the settings don't ask for")
        head.load_state_dict(without_scaler(tensors))
    except (RuntimeError, ValueError, TypeError, KeyError, OverflowError):
        raise StoreError(
            f"{folder.head} doesn't fit {folder.config}: the head has other layers than the settings there describe. "
            "Expected both files as 'affcache fit' wrote them. Restore them, or train again with 'affcache fit'."
        ) from None
    return head, scaler, epoch
