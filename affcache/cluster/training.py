"""Groups of an ablation's heads as tasks of a cluster: Ray schedules them, and does lost ones again elsewhere."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from operator import methodcaller
from types import ModuleType
from typing import Any

import torch

from affcache.ablation.settings import AblateSettings
from affcache.ablation.summary import Outcome
from affcache.ablation.train import Group, LocalTrainer, Report, Trained, train_group
from affcache.cluster.connection import (
    Travelling,
    WorkerSize,
    connected,
    living_nodes,
    result_or_loss,
    worker_size,
)
from affcache.devices import GIGABYTE, default_memory
from affcache.errors import AffcacheError, ConfigError, InputError
from affcache.progress import Listener, counted
from affcache.training.data import Frames, FrameSource
from affcache.training.settings import FitSettings
from affcache.training.splits import LoadedSplits

ROOM_FOR_HEADS = 1.0  # GB of shared memory, beside frames; it is taken as it is needed
RETRIES = 5  # of a group whose worker or machine was lost
SECONDS_BETWEEN_LOOKS = 1.0  # at how far the groups are


def changed(splits: LoadedSplits, change: Callable[[torch.Tensor], Any]) -> LoadedSplits:
    """Return splits with the tensors of their frames changed; what is one in two places stays so.

    Raises:
        ConfigError: they are streamed from a file.
    """
    train, validation = _changed(splits.train, change), _changed(splits.validation, change)
    selection = validation if splits.selection is splits.validation else _changed(splits.selection, change)
    return replace(splits, train=train, selection=selection, validation=validation)


def _changed(frames: FrameSource, change: Callable[[torch.Tensor], Any]) -> Frames:
    if not isinstance(frames, Frames):
        raise ConfigError(
            "--engine ray keeps all embeddings in memory, on every machine of the cluster, and they don't fit "
            "--memory. Expected enough for them. Raise --memory GB, or let --engine local stream them."
        )
    return Frames(*(change(tensor) for tensor in (frames.embeddings, frames.labels, frames.videos)))


def _begun(size: WorkerSize, splits: LoadedSplits) -> tuple[torch.device, LoadedSplits]:
    """Settle how a worker computes; return its device, and the splits with their frames there."""
    torch.set_num_threads(size.cores)
    device = torch.device(size.device)
    return device, changed(splits, methodcaller("to", device))


class Tally:
    """How many epochs of heads each group has finished; an actor, since groups train on many machines."""

    def __init__(self) -> None:
        self._finished: dict[int, tuple[int, str]] = {}

    def tell(self, group: int, epochs: int, note: str) -> None:
        """Take note of a group; one that is done again begins again."""
        self._finished[group] = epochs, note

    def read(self) -> tuple[int, str]:
        """Return the epochs of all groups, and what the one that spoke last said."""
        notes = [note for _, note in self._finished.values()]
        return sum(epochs for epochs, _ in self._finished.values()), notes[-1] if notes else ""


@dataclass
class ClusterTrainer:
    """Trains groups in a cluster, several at a time."""

    ray: ModuleType
    size: WorkerSize
    at_once: int
    keep: str  # whose heads are wanted: best, all or none
    _shared: tuple[LoadedSplits, Any] | None = None  # one at a time, with its reference

    @property
    def device(self) -> torch.device:
        """Where heads train."""
        return torch.device(self.size.device)

    @cached_property
    def heads_memory(self) -> float:
        """Bytes that the heads of a group may take, as a worker sees it; on a CPU they share the machine's."""
        memory = float(self.ray.get(self._remote(_heads_memory).remote(self.size.device)))
        most = max(self.size.room([node]) for node in living_nodes(self.ray))
        return memory / (most if self.size.device == "cpu" else 1)

    def project(self, recipes: Sequence[FitSettings], splits: LoadedSplits) -> float:
        """Return the seconds that a head takes, tried on a worker, divided by how many groups train at a time."""
        seconds = float(self.ray.get(self._remote(_project).remote(recipes, self._share(splits), self.size)))
        return seconds / self.at_once

    def train(self, groups: Sequence[Group], splits: LoadedSplits, report: Report) -> Iterator[tuple[int, Trained]]:
        """Yield the index of each group with what was found, as they finish.

        Raises:
            InputError: a group's worker was lost again and again.
        """
        ray = self.ray
        shared = self._share(splits)
        tally = ray.remote(Tally).options(num_cpus=0, max_restarts=-1).remote()
        remote = self._remote(_train)
        index_of = {
            remote.remote(index, group, shared, self.size, self.keep, tally): index
            for index, group in enumerate(groups)
        }
        known = 0
        while index_of:
            done, _ = ray.wait(list(index_of), num_returns=1, timeout=SECONDS_BETWEEN_LOOKS)
            with suppress(ray.exceptions.RayError):  # it is with a machine that is lost; a new one is on its way
                epochs, note = ray.get(tally.read.remote())
                report(epochs - known, note)
                known = epochs
            for reference in done:
                index = index_of.pop(reference)
                yield index, self._result(reference, groups[index])
        ray.kill(tally)

    def _result(self, reference: Any, group: Group) -> Trained:
        trained, why = result_or_loss(self.ray, reference)
        if why:
            raise InputError(
                f"The workers that trained the {len(group.trials)} heads of {group.trials[0]} and beside it were lost "
                f"{RETRIES + 1} times: {why}. Expected one to survive: see whether memory ran out. "
                "Groups that are finished are kept; the same command continues."
            )
        if isinstance(trained, AffcacheError):
            raise trained
        assert isinstance(trained, Trained)
        return replace(trained, outcomes=[_own(outcome) for outcome in trained.outcomes])

    def _share(self, splits: LoadedSplits) -> Any:
        """Put the frames where every machine copies them once."""
        if self._shared is None or self._shared[0] is not splits:
            self._shared = None  # before the next one takes its place in memory
            self._shared = splits, self.ray.put(changed(splits, Travelling))
        return self._shared[1]

    def _remote(self, function: Any) -> Any:
        return self.ray.remote(function).options(**self.size.options, max_retries=RETRIES, scheduling_strategy="SPREAD")


def _own(outcome: Outcome) -> Outcome:
    """Copy what lies in Ray's memory, which is read only."""
    statistics = outcome.statistics
    return outcome if statistics is None else replace(outcome, statistics=statistics.copy())


def _heads_memory(device: str) -> float:
    return LocalTrainer(torch.device(device)).heads_memory


def _project(recipes: Sequence[FitSettings], shared: LoadedSplits, size: WorkerSize) -> float:
    device, splits = _begun(size, shared)
    return LocalTrainer(device).project(recipes, splits)


def _train(
    index: int, group: Group, shared: LoadedSplits, size: WorkerSize, keep: str, tally: Any
) -> Trained | AffcacheError:
    """Train a group on a worker. Checkpoints are kept where the ablation's folder can be seen from here."""
    device, splits = _begun(size, shared)
    finished = 0

    def report(epochs: int, note: str) -> None:
        nonlocal finished
        finished += epochs
        tally.tell.remote(index, finished, note)

    seen = (group.checkpoint.parent.parent / ".lock").exists()
    try:
        trained = train_group(group, splits, device, report, keep_checkpoint=seen)
    except AffcacheError as error:
        return error
    return replace(trained, heads=wanted_heads(trained, keep))


def wanted_heads(trained: Trained, keep: str) -> list[dict[str, torch.Tensor]]:
    """Leave out the heads that nobody will keep: those of a large group take half a gigabyte."""
    if keep == "all":
        return list(trained.heads)
    values = [-1e9 if outcome.selected is None else outcome.selected for outcome in trained.outcomes]
    best = max(range(len(values)), key=values.__getitem__)
    return [head if keep == "best" and index == best else {} for index, head in enumerate(trained.heads)]


@contextmanager
def cluster_trainer(settings: AblateSettings, listener: Listener) -> Iterator[tuple[ClusterTrainer, torch.device]]:
    """Be connected to a cluster that trains heads; with the device on which the driver keeps frames.

    Raises:
        ConfigError: Ray isn't installed, there is no cluster, or none of its machines can take a group.
    """
    memory = settings.memory or default_memory(torch.device("cpu"))
    room = int((memory + ROOM_FOR_HEADS) * GIGABYTE)
    with connected(settings.ray_address, room, listener) as ray:
        nodes = living_nodes(ray)
        size = worker_size(nodes, settings.device, settings.actors, None)
        at_once = settings.actors or size.room(nodes)
        listener.message(
            f"{counted(at_once, 'group')} of heads at a time, on {size.device} of {counted(len(nodes), 'node')}"
        )
        keep = "all" if settings.folds and settings.keep == "best" else settings.keep  # what is best shows in the end
        yield ClusterTrainer(ray, size, at_once, keep), torch.device("cpu")
