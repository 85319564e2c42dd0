"""Extraction on a cluster: the bytes of a local one, whoever is lost on the way."""

import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import affcache
from affcache.cluster import encoding as encoding_module
from affcache.cluster import encoding as engine_module
from affcache.cluster import pool as pool_module
from affcache.cluster.encoding import Shard, ShardQueue
from affcache.cluster.pool import WorkerPool
from affcache.cluster.worker import CropSample
from affcache.errors import InputError
from tests.cluster.conftest import MEMORY, kill, ray, worker_processes
from tests.conftest import Heard, write_crops

pytestmark = pytest.mark.cluster
VIDEOS = {f"v{index:02d}": range(1, 61) for index in range(8)}  # 480 rows, 30 batches
BATCH = 16


@pytest.fixture
def crops(tmp_path: Path) -> Path:
    root = write_crops(tmp_path / "crops", VIDEOS)
    (root / "v01" / "00007.jpg").write_bytes(b"")
    (root / "v05" / "00001.jpg").write_bytes(b"no image")
    return root


@pytest.fixture
def handed_out(monkeypatch: pytest.MonkeyPatch) -> list[Shard]:
    """Keep account of what workers were given."""
    shards: list[Shard] = []

    class Recorded(ShardQueue):
        def take(self, rows: int) -> Shard | None:
            shard = super().take(rows)
            if shard is not None:
                shards.append(Shard(shard.rows.copy(), shard.losses))
            return shard

    monkeypatch.setattr(encoding_module, "ShardQueue", Recorded)
    return shards


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[WorkerPool]:
    """Keep the pools that extractions make."""
    made: list[WorkerPool] = []

    class Kept(WorkerPool):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(engine_module, "WorkerPool", Kept)
    return made


def wait_for_all(pools: list[WorkerPool]) -> None:
    """Hold the driver until every worker has loaded its encoder; otherwise the first one has done all the work."""
    ray.wait(pools[-1].joining, num_returns=len(pools[-1].joining), timeout=60)


class Once(Heard):
    """Does something at the first progress of the encoding."""

    def __init__(self, what: Callable[[], object]) -> None:
        super().__init__()
        self.what: Callable[[], object] | None = what

    def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
        super().progress(done, total, unit, note)
        if unit == "crop" and self.what is not None:
            what, self.what = self.what, None
            what()


def extract(crops: Path, store: Path, model: str, listener: Any = None, **settings: Any) -> affcache.ExtractResult:
    return affcache.extract(
        crops=(crops,), store=store, model=model, batch_size=BATCH, precision="fp32", listener=listener, **settings
    )


def rows_of(shards: list[Shard]) -> list[int]:
    return sorted(int(row) for shard in shards for row in shard.rows)


def test_bytes_of_a_local_run_for_any_number_of_workers(
    cluster: Any,
    crops: Path,
    tmp_path: Path,
    tiny_encoder: str,
    handed_out: list[Shard],
    pools: list[WorkerPool],
) -> None:
    local = extract(crops, tmp_path / "local.h5", tiny_encoder, view="flip")
    for actors in (1, 2, 4):
        handed_out.clear()
        heard = Once(lambda: wait_for_all(pools) if pools[-1].joining else None)
        store = tmp_path / f"{actors}.h5"
        result = extract(crops, store, tiny_encoder, heard, engine="ray", actors=actors, view="flip")
        assert store.read_bytes() == (tmp_path / "local.h5").read_bytes()
        flipped = store.with_name(f"{actors}.flip.h5")
        assert flipped.read_bytes() == (tmp_path / "local.flip.h5").read_bytes()
        assert (result.engine, result.actors, result.nodes) == ("ray", actors, min(actors, 2))
        assert (result.encoded, result.unreadable) == (local.encoded, local.unreadable) == (478, 2)
        assert result.converted == local.converted
        assert sum(result.shares.values()) == pytest.approx(1)
        assert rows_of(handed_out) == sorted([*range(480)] * 2)  # each view's rows once
        assert heard.steps[-1] == (480, 480)
        assert heard.warnings == []


def test_a_network_of_timm_travels(cluster: Any, crops: Path, tmp_path: Path) -> None:
    words = {"model": "timm:test_vit", "pretrained": "random:0", "image_size": 32, "every": 2}
    extract(crops, tmp_path / "local.h5", **words)
    extract(crops, tmp_path / "ray.h5", engine="ray", actors=2, **words)
    assert (tmp_path / "ray.h5").read_bytes() == (tmp_path / "local.h5").read_bytes()


def test_the_only_worker_killed(
    cluster: Any, crops: Path, tmp_path: Path, tiny_encoder: str, handed_out: list[Shard]
) -> None:
    """Ray makes it again, and it loads the encoder again."""
    extract(crops, tmp_path / "local.h5", tiny_encoder)
    heard = Once(lambda: kill(worker_processes()[0]))
    extract(crops, tmp_path / "ray.h5", tiny_encoder, heard, engine="ray", actors=1)
    assert (tmp_path / "ray.h5").read_bytes() == (tmp_path / "local.h5").read_bytes()
    assert 0 < len([shard for shard in handed_out if shard.losses]) <= 2  # what it had in flight, and no more
    assert rows_of([shard for shard in handed_out if not shard.losses]) == [*range(480)]
    assert all(
        text.startswith("the worker on ") and " is lost, its crops go to others: " in text for text in heard.warnings
    )
    assert len(heard.warnings) == 1


def test_an_interrupted_driver_continues(
    cluster: Any, crops: Path, tmp_path: Path, tiny_encoder: str, handed_out: list[Shard]
) -> None:
    extract(crops, tmp_path / "local.h5", tiny_encoder)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(crops, tmp_path / "ray.h5", tiny_encoder, Once(interrupt), engine="ray", actors=1)
    counts = affcache.EmbeddingStore.open(tmp_path / "ray.h5").counts
    assert 0 < counts["pending"] < 480
    handed_out.clear()
    result = extract(crops, tmp_path / "ray.h5", tiny_encoder, engine="ray", actors=1)
    assert result.encoded_now == counts["pending"] == len(rows_of(handed_out))
    assert (tmp_path / "ray.h5").read_bytes() == (tmp_path / "local.h5").read_bytes()


def test_archives_are_read_in_place(
    cluster: Any, crops: Path, tmp_path: Path, tiny_encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = Path(shutil.make_archive(str(tmp_path / "faces"), "zip", crops))
    extract(crops, tmp_path / "local.h5", tiny_encoder)
    monkeypatch.chdir(tmp_path)  # workers have another working folder
    extract(Path(archive.name), tmp_path / "ray.h5", tiny_encoder, engine="ray", actors=1)
    assert (tmp_path / "ray.h5").read_bytes() == (tmp_path / "local.h5").read_bytes()


def test_crops_that_go_stop_the_run_and_name_the_folder(
    cluster: Any, crops: Path, tmp_path: Path, tiny_encoder: str
) -> None:
    heard = Once(lambda: (crops / "v07").rename(tmp_path / "gone"))
    with pytest.raises(InputError, match=r"v07 can't be read any more .*Reconnect it and run the same command again"):
        extract(crops, tmp_path / "ray.h5", tiny_encoder, heard, engine="ray", actors=1)
    store = affcache.EmbeddingStore.open(tmp_path / "ray.h5")
    assert store.counts["encoded"] > 0
    assert (store.status[420:] == 0).all()
    assert np.isfinite(store.features).all()


def test_a_node_that_does_not_see_the_crops_is_named_before_work_starts(
    cluster: Any, crops: Path, tmp_path: Path, tiny_encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = CropSample.of
    monkeypatch.setattr(CropSample, "of", lambda crops: replace(of(crops), paths=[tmp_path / "elsewhere"]))
    with pytest.raises(InputError, match=rf"^Node {socket.gethostname()} .*doesn't see the crops: .*elsewhere is not"):
        extract(crops, tmp_path / "ray.h5", tiny_encoder, engine="ray")
    assert not (tmp_path / "ray.h5").exists()


def test_a_node_that_joins_is_used(
    cluster: Any,
    crops: Path,
    tmp_path: Path,
    tiny_encoder: str,
    monkeypatch: pytest.MonkeyPatch,
    pools: list[WorkerPool],
) -> None:
    extract(crops, tmp_path / "local.h5", tiny_encoder)
    monkeypatch.setattr(pool_module, "SECONDS_BETWEEN_LOOKS", 0.0)
    before = {node["NodeID"] for node in ray.nodes()}

    def add_node() -> None:
        heard.what = lambda: wait_for_all(pools)  # at the next progress
        cluster.add_node(num_cpus=2, **MEMORY)
        cluster.wait_for_nodes()

    heard = Once(add_node)
    result = extract(crops, tmp_path / "ray.h5", tiny_encoder, heard, engine="ray")
    assert (tmp_path / "ray.h5").read_bytes() == (tmp_path / "local.h5").read_bytes()
    assert (result.actors, result.nodes) == (3, 3)
    (newcomer,) = [w for w in pools[-1].workers if w.joined is not None and w.joined.node_id not in before]
    assert newcomer.rate > 0, "it has encoded a shard"


def test_a_node_killed(
    cluster: Any,
    crops: Path,
    tmp_path: Path,
    tiny_encoder: str,
    handed_out: list[Shard],
    pools: list[WorkerPool],
) -> None:
    """There is no room for its worker elsewhere, so that the other has to do all the work. The last of the file."""
    extract(crops, tmp_path / "local.h5", tiny_encoder)

    def kill_node() -> None:
        wait_for_all(pools)
        cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False)

    heard = Once(kill_node)
    extract(crops, tmp_path / "ray.h5", tiny_encoder, heard, engine="ray", actors=2)
    assert (tmp_path / "ray.h5").read_bytes() == (tmp_path / "local.h5").read_bytes()
    assert len([shard for shard in handed_out if shard.losses]) <= 2
    assert rows_of([shard for shard in handed_out if not shard.losses]) == [*range(480)]
