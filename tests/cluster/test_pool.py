"""What the driver does about workers, against a stand-in for Ray that does as it is told."""

import os
import re
import stat
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from affcache.cluster import connection, pool
from affcache.cluster import encoding as engine
from affcache.cluster.connection import Node, WorkerSize
from affcache.cluster.encoding import ClusterEncoding, require_everywhere
from affcache.cluster.pool import JOIN_RETRIES, WorkerPool
from affcache.cluster.worker import CropSample, Joined, Reply, versions
from affcache.errors import AffcacheError, ConfigError, InputError
from affcache.extraction.pipeline import ExtractionStats
from tests.conftest import Heard

DESCRIPTION = {"precision": "fp32", "batch_size": 16}
SIZE = WorkerSize("cpu", 1.0, 1)
SAMPLE = CropSample([], [], [])


class RayError(Exception):
    pass


class RayTaskError(RayError):
    pass


class Reference:
    """What a remote call returns; its outcome is made when somebody asks for it."""

    def __init__(self, outcome: Callable[[], Any]) -> None:
        self.outcome = outcome


class StandIn:
    """Ray, with calls that are done at once, but for a few waits in which nothing is."""

    def __init__(self, patience: int = 0, nodes: Sequence[dict[str, Any]] = ()) -> None:
        self.patience = patience
        self.killed: list[Any] = []
        self.given = list(nodes)
        self.exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)
        strategies = SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node, soft: node)
        self.util = SimpleNamespace(scheduling_strategies=strategies)

    def nodes(self) -> list[dict[str, Any]]:
        return self.given

    def wait(self, references: list[Any], num_returns: int = 1, timeout: float = 0) -> tuple[list[Any], list[Any]]:
        if self.patience:
            self.patience -= 1
            return [], references
        return references[:num_returns], references[num_returns:]

    def get(self, reference: Reference) -> Any:
        found = reference.outcome()
        if isinstance(found, RayError):
            raise found
        return found

    def kill(self, actor: Any) -> None:
        self.killed.append(actor)

    def remote(self, function: Any) -> Any:
        def call(*arguments: Any) -> Reference:
            return Reference(lambda: function(*arguments))

        return SimpleNamespace(options=lambda **options: SimpleNamespace(remote=call))


class Actors:
    """Makes actors whose calls have the outcomes that stand in lists, the last one for ever.

    A call of one that is starting fails at once as often as it may be retried, as Ray's do; ``starting`` says how often
    an actor is looked at until it is there, each time that it is made.
    """

    def __init__(self, *joins: Sequence[Any], encodes: Sequence[Any] = (), starting: int = 0) -> None:
        self.joins, self.encodes = [list(of_actor) for of_actor in joins], list(encodes)
        self.made = self.asked_to_join = 0
        self.starting = self.left = starting

    def options(self, **options: Any) -> "Actors":
        return self

    def remote(self) -> Any:
        joins = self.joins[min(self.made, len(self.joins) - 1)]
        self.made += 1

        def next_of(outcomes: list[Any]) -> Any:
            found = outcomes.pop(0) if len(outcomes) > 1 else outcomes[0]
            return found() if callable(found) else found

        def call(outcome: Callable[[], Any], retries: int) -> Any:
            while self.left:
                self.left -= 1
                if retries == 0:
                    return RayError("The actor is temporarily unavailable")
                retries -= 1
            return outcome()

        def join(job: Any, recorded: Any, answer: Reference, retries: int) -> Reference:
            def outcome() -> Any:
                self.asked_to_join += 1
                found = next_of(joins)
                if isinstance(found, RayError):
                    self.left = self.starting
                return found

            return Reference(lambda: call(outcome, retries) if answer.outcome() is True else answer.outcome())

        def encode(rows: Any, batch_size: int, mirror: bool) -> Reference:
            found = next_of(self.encodes)
            return Reference(lambda: found if found is not True else reply_to(rows))

        def method(function: Callable[..., Reference]) -> Any:
            return SimpleNamespace(
                options=lambda max_task_retries: SimpleNamespace(remote=partial(function, retries=max_task_retries))
            )

        def answer(retries: int) -> Reference:
            return Reference(lambda: call(lambda: True, retries))

        return SimpleNamespace(answer=method(answer), join=method(join), encode_shard=SimpleNamespace(remote=encode))


def joined(node: str = "n1") -> Joined:
    return Joined(node, node, "cpu", DESCRIPTION)


def reply_to(rows: Any) -> Reply:
    features = np.asarray(rows)[:, None].astype(np.float16)
    return Reply((features, np.ones(len(rows), np.uint8)), ExtractionStats(), 1.0, ["careful"] if rows[0] == 0 else [])


def pool_of(ray: StandIn, actors: Actors, wanted: int, heard: Heard) -> WorkerPool:
    return WorkerPool(ray, actors, None, SIZE, wanted, {}, heard)  # type: ignore[arg-type]  # a module elsewhere


def rows_encoded(workers: WorkerPool) -> list[int]:
    encoding = ClusterEncoding(workers, 16, mirror=False)
    found = [(rows, encoded) for rows, encoded in encoding.run(np.arange(160))]
    assert all((encoded[0][:, 0] == rows).all() for rows, encoded in found)
    return sorted(int(row) for rows, _ in found for row in rows)


def test_the_error_of_the_only_worker_is_raised() -> None:
    ray = StandIn()
    with pytest.raises(InputError, match="Node n1 doesn't see the crops"):
        pool_of(ray, Actors([InputError("Node n1 doesn't see the crops")]), 3, Heard())
    assert len(ray.killed) == 1


def test_a_later_worker_that_can_not_is_left_out_and_not_made_again() -> None:
    ray, heard = StandIn(), Heard()
    actors = Actors([joined()], [InputError("Node n2 doesn't see the crops")], encodes=[True])
    workers = pool_of(ray, actors, 2, heard)
    assert rows_encoded(workers) == [*range(160)]
    assert (actors.made, len(workers.workers), len(ray.killed)) == (2, 1, 1)
    assert sorted(heard.warnings) == [
        "going on without the worker on a node that it had not reached: Node n2 doesn't see the crops",
        "on node n1: careful",
    ]


@pytest.mark.parametrize("lost", [RayError("The actor died\nlong story"), None])
def test_a_lost_worker_joins_again_and_its_shards_are_made_again(lost: Any) -> None:
    """A process that was replaced before the driver heard of it (None) is no different."""
    ray, heard, joins = StandIn(), Heard(), [joined(), joined("n2")]
    workers = pool_of(ray, Actors(joins, encodes=[True, lost, lost, True]), 1, heard)
    assert rows_encoded(workers) == [*range(160)]
    assert workers.workers[0].node == "n2"
    why = "its process was replaced" if lost is None else "The actor died"
    assert heard.warnings.count(f"the worker on n1 is lost, its crops go to others: {why}") == 1


def test_an_error_in_the_middle_leaves_its_worker_out_and_the_last_one_ends_the_run() -> None:
    ray, error = StandIn(), InputError("The crops folder is gone")
    workers = pool_of(ray, Actors([joined()], encodes=[True, error]), 2, Heard())
    with pytest.raises(InputError, match="The crops folder is gone"):
        rows_encoded(workers)
    assert len(ray.killed) == 2


def test_bugs_of_a_worker_are_shown_as_such() -> None:
    ray = StandIn()
    workers = pool_of(ray, Actors([joined()], encodes=[RayTaskError("ZeroDivisionError")]), 1, Heard())
    with pytest.raises(RayTaskError):
        rows_encoded(workers)
    with pytest.raises(RayTaskError):
        pool_of(ray, Actors([RayTaskError("ZeroDivisionError")]), 1, Heard())


@pytest.mark.parametrize("starting", [0, 100])
def test_a_worker_lost_again_and_again_while_it_loads_is_an_error(starting: int) -> None:
    actors = Actors([RayError("out of memory")], starting=starting)
    with pytest.raises(
        InputError, match=rf"^A worker was lost {JOIN_RETRIES + 1} times while it loaded the encoder: out of memory"
    ):
        pool_of(StandIn(), actors, 1, Heard())
    assert actors.asked_to_join == JOIN_RETRIES + 1


def test_a_worker_that_starts_slowly_is_not_a_lost_one() -> None:
    actors = Actors([*[RayError("out of memory")] * JOIN_RETRIES, joined()], starting=100)
    workers = pool_of(StandIn(), actors, 1, Heard())
    assert [worker.node for worker in workers.present] == ["n1"]


def test_losses_before_a_worker_joined_do_not_count_when_it_is_lost_later() -> None:
    of_one = [*[RayError("out of memory")] * JOIN_RETRIES, joined()]
    workers = pool_of(StandIn(), Actors(of_one * 2, encodes=[RayError("The actor died"), True]), 1, Heard())
    assert rows_encoded(workers) == [*range(160)]


def test_waiting_for_room_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "SECONDS_BETWEEN_REMINDERS", 0.0)
    heard = Heard()
    pool_of(StandIn(patience=2), Actors([joined()]), 1, heard)
    assert (
        heard.messages
        == ["waiting for a worker, which takes 1 cores: none has room, or it is loading; see 'ray status'"] * 2
    )


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (RayError("No module named 'affcache'\nmore"), r"^Node n1 can't run affcache: No module named 'affcache'\. "),
        (InputError("Node n1 doesn't see the crops"), r"^Node n1 doesn't see the crops$"),
        ({**versions(), "affcache": "0.0.1"}, r"^Node n1 has affcache 0\.0\.1, and the driver "),
    ],
)
def test_a_machine_that_can_not_help_ends_the_run_before_it_begins(
    found: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "look_around", lambda sample, node: found)
    ray: Any = StandIn()
    with pytest.raises(AffcacheError, match=message) as caught:
        require_everywhere(ray, [Node("1", "n1", 2, 0)], SIZE, SAMPLE, Heard())
    assert isinstance(caught.value, InputError if isinstance(found, InputError) else ConfigError)


def test_another_torch_is_warned_of_and_machines_without_room_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    heard, asked, ray = Heard(), [], StandIn()

    def look(sample: CropSample, node: str) -> dict[str, str]:
        asked.append(node)
        return {**versions(), "torch": "1.0"}

    monkeypatch.setattr(engine, "look_around", look)
    machines = [Node("1", "n1", 2, 0), Node("2", "n2", 0.5, 0)]
    require_everywhere(ray, machines, SIZE, SAMPLE, heard)  # type: ignore[arg-type]  # a module elsewhere
    assert asked == ["n1"]
    (warning,) = heard.warnings
    assert warning.startswith("node n1 has ")
    assert warning.endswith("embeddings can differ by rounding")


def test_a_ray_that_others_can_reach_is_warned_of() -> None:
    heard = Heard()
    nodes = [{"NodeManagerAddress": "127.0.0.1"}]
    connection._require_loopback(StandIn(nodes=nodes), heard)  # type: ignore[arg-type]  # a module elsewhere
    assert heard.warnings == []
    nodes = [{"NodeManagerAddress": "127.0.0.1"}, {"NodeManagerAddress": "192.0.2.7"}]
    connection._require_loopback(StandIn(nodes=nodes), heard)  # type: ignore[arg-type]  # a module elsewhere
    (warning,) = heard.warnings
    assert warning.startswith("Ray listens on 127.0.0.1, 192.0.2.7, where whoever reaches its ports")


@pytest.mark.parametrize("before", [None, "kept"])
def test_the_token_is_readable_to_its_owner_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    path = tmp_path / ".ray" / "auth_token"
    if before:
        path.parent.mkdir()
        path.write_text(before)
        path.chmod(0o644)
    umask = os.umask(0)
    try:
        connection.keep_token_private()
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert re.fullmatch(before or "[0-9a-f]{64}", path.read_text())
