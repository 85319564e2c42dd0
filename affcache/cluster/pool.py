"""The workers of a cluster: made where there is room, made anew where they were lost, more as machines join."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from affcache.cluster.connection import WorkerSize, living_nodes, result_or_loss
from affcache.cluster.worker import Joined
from affcache.errors import AffcacheError, InputError
from affcache.progress import Listener

JOIN_RETRIES = 5  # times that a worker may be lost while it loads the encoder
SHARDS_A_WORKER = 2  # in flight: the second decodes while the first encodes
SECONDS_BETWEEN_LOOKS = 5.0  # for machines that joined
SECONDS_BETWEEN_REMINDERS = 30.0


@dataclass
class Worker:
    """One actor, as the driver sees it."""

    actor: Any
    joining: Any  # reference to what ``join`` returns; None once it has joined
    joined: Joined | None = None
    losses: int = 0  # since it last joined
    busy: int = 0  # shards that it has
    rate: float = 0.0  # crops per second, of its last shard

    @property
    def node(self) -> str:
        """Where it is, or was."""
        return self.joined.node if self.joined else "a node that it had not reached"


@dataclass
class WorkerPool:
    """Keeps workers alive."""

    ray: ModuleType
    actor_class: Any  # what ``ray.remote`` made of the worker's class
    job: Any  # what ``join`` takes
    size: WorkerSize  # what a worker takes of a machine
    actors: int | None  # how many; None for as many as there is room for
    description: Mapping[str, Any]  # of the encoder; empty for a new store, until the first worker settles it
    listener: Listener  # hears of workers that come and go
    workers: list[Worker] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._made = 0
        self._looked = self._reminded = time.monotonic()
        self._add()
        self.description = self._settle()
        self._grow()

    def _add(self) -> None:
        options = {"max_restarts": -1, "max_concurrency": SHARDS_A_WORKER, "scheduling_strategy": "SPREAD"}
        actor = self.actor_class.options(**self.size.options, **options).remote()
        self.workers.append(Worker(actor, self._join(actor)))
        self._made += 1

    def _join(self, actor: Any) -> Any:
        # Ray makes a lost worker again, here or elsewhere. While one starts, each look at it uses up a retry, and a
        # slow machine would run out of them: so ``join`` waits for a process that answers, and is called once.
        answer = actor.answer.options(max_task_retries=-1).remote()
        return actor.join.options(max_task_retries=0).remote(self.job, self.description, answer)

    def _settle(self) -> Mapping[str, Any]:
        """Wait for the first worker, which decides what a new store says of the encoder."""
        (worker,) = self.workers
        while worker.joined is None:
            done, _ = self.ray.wait([worker.joining], timeout=1.0)
            if done:
                self.take_join(worker.joining)
            self._remind()
        return worker.joined.description

    def _grow(self) -> None:
        """Make as many workers as were asked for, or as there is room for. Those left out count as made."""
        self._looked = time.monotonic()
        wanted = self.actors or self.size.room(living_nodes(self.ray))
        while self._made < wanted:
            self._add()

    def tend(self) -> None:
        """Look now and then whether machines joined, and say so when no worker is there."""
        if self.actors is None and time.monotonic() - self._looked >= SECONDS_BETWEEN_LOOKS:
            self._grow()
        self._remind()

    def _remind(self) -> None:
        if self.present:
            self._reminded = time.monotonic()
        elif time.monotonic() - self._reminded >= SECONDS_BETWEEN_REMINDERS:
            self._reminded = time.monotonic()
            takes = "a GPU" if self.size.device == "cuda" else f"{self.size.cpus:g} cores"
            self.listener.message(
                f"waiting for a worker, which takes {takes}: none has room, or it is loading; see 'ray status'"
            )

    @property
    def joining(self) -> list[Any]:
        """References to wait for besides shards."""
        return [worker.joining for worker in self.workers if worker.joining is not None]

    @property
    def present(self) -> list[Worker]:
        """Workers that can be given shards."""
        return [worker for worker in self.workers if worker.joining is None]

    def take_join(self, reference: Any) -> None:
        """Take up a worker that is ready, or leave it out.

        Raises:
            AffcacheError: it was the last one.
        """
        worker = next(worker for worker in self.workers if worker.joining == reference)
        joined, why = result_or_loss(self.ray, reference)
        if why:
            worker.losses += 1
            if worker.losses <= JOIN_RETRIES:
                worker.joining = self._join(worker.actor)
                return
            joined = InputError(f"A worker was lost {worker.losses} times while it loaded the encoder: {why}")
        if isinstance(joined, AffcacheError):
            self.leave_out(worker, joined)
        else:
            worker.joined, worker.joining, worker.losses = joined, None, 0
            self.pass_on(worker, joined.remarks)

    def pass_on(self, worker: Worker, remarks: Sequence[str]) -> None:
        """Say what a worker warns of."""
        for text in remarks:
            self.listener.warning(f"on node {worker.node}: {text}")

    def leave_out(self, worker: Worker, error: AffcacheError) -> None:
        """Do without a worker from now on.

        Raises:
            AffcacheError: it was the last one.
        """
        if worker not in self.workers:  # its other shard said the same before
            return
        self.workers.remove(worker)
        self.ray.kill(worker.actor)
        if not self.workers:
            raise error
        self.listener.warning(f"going on without the worker on {worker.node}: {error}")

    def lost(self, worker: Worker, why: str) -> None:
        """Take note that a worker's process or machine is gone; Ray makes it again."""
        if worker in self.workers and worker.joining is None:
            self.listener.warning(f"the worker on {worker.node} is lost, its crops go to others: {why}")
            worker.joining = self._join(worker.actor)

    def facts(self) -> dict[str, Any]:
        """Return where it ran."""
        joined = [worker.joined for worker in self.workers if worker.joined]
        return {
            "engine": "ray",
            "device": joined[0].device if joined else self.size.device,
            "workers": self.size.workers,
            "actors": len(joined),
            "nodes": len({one.node_id for one in joined}),
        }

    def close(self) -> None:
        """End all workers."""
        for worker in self.workers:
            self.ray.kill(worker.actor)
