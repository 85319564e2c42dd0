"""Shards of work: every pending row once, whole batches, never across a block; sizes of workers; what travels."""

import copy
import itertools
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from affcache.ablation.settings import AblateSettings
from affcache.cluster import encoding as encoding_module
from affcache.cluster.connection import Node, largest_share, require_ray, worker_size
from affcache.cluster.encoding import MOST_LOSSES, ShardQueue, consecutive_runs, share_weights
from affcache.cluster.worker import CropSample
from affcache.crops.folders import find_crops
from affcache.encoders.loading import encoder_of, load_encoder, load_weights
from affcache.errors import ConfigError, InputError
from affcache.extraction.extract import extract
from affcache.extraction.pipeline import consecutive_batches
from affcache.extraction.settings import ExtractSettings
from tests.conftest import write_crops


@given(
    rows=st.sets(st.integers(0, 300), min_size=1),
    size=st.integers(1, 24),
    wanted=st.lists(st.integers(1, 90), min_size=1, max_size=8),
    block=st.integers(8, 64),
    lost=st.sets(st.integers(0, 30)),
)
def test_every_row_is_handed_out_in_the_batches_of_a_local_run(
    rows: set[int], size: int, wanted: list[int], block: int, lost: set[int]
) -> None:
    pending = np.array(sorted(rows), dtype=np.int64)
    before = encoding_module.BLOCK_ROWS
    encoding_module.BLOCK_ROWS = block
    try:
        queue, done, number = ShardQueue(pending, size), [], 0
        while (shard := queue.take(wanted[number % len(wanted)])) is not None:
            if number in lost and shard.losses < MOST_LOSSES - 1:
                queue.give_back(shard, lost=True)
            else:
                done.append(shard.rows)
            number += 1
            assert queue.left == len(pending) - sum(map(len, done))
    finally:
        encoding_module.BLOCK_ROWS = before
    assert sorted(row for shard in done for row in shard) == sorted(rows)
    ours = sorted(batch.tolist() for shard in done for batch in consecutive_batches(shard, size))
    assert ours == sorted(batch.tolist() for batch in consecutive_batches(pending, size))
    for shard in done:
        starts = {int(batch[0]) // block for batch in consecutive_batches(shard, size)}
        assert len(starts) == 1


def test_a_shard_that_ends_every_worker_is_an_error_and_one_that_was_refused_is_not() -> None:
    queue = ShardQueue(np.arange(64), 16)
    for _ in range(MOST_LOSSES - 1):
        shard = queue.take(32)
        assert shard is not None
        queue.give_back(shard, lost=True)
    for _ in range(10):
        shard = queue.take(32)
        assert shard is not None
        queue.give_back(shard, lost=False)
    shard = queue.take(1)
    assert shard is not None
    with pytest.raises(InputError, match=r"^5 workers in turn were lost while they encoded rows 0 to 31\."):
        queue.give_back(shard, lost=True)


@given(rows=st.sets(st.integers(0, 60), min_size=1))
def test_rows_with_gaps_are_cut_where_they_are(rows: set[int]) -> None:
    numbers = np.array(sorted(rows), dtype=np.int64)
    features = numbers[:, None].astype(np.float16)
    runs = list(consecutive_runs(numbers, (features, (numbers % 2 + 1).astype(np.uint8))))
    assert np.concatenate([run for run, _ in runs]).tolist() == sorted(rows)
    for run, (values, status) in runs:
        assert (np.diff(run) == 1).all()
        assert values[:, 0].tolist() == run.tolist()
        assert status.tolist() == (run % 2 + 1).tolist()
    assert all(one[-1] + 1 < other[0] for (one, _), (other, _) in itertools.pairwise(runs))


@given(cpus=st.lists(st.integers(1, 64), min_size=1, max_size=5), actors=st.integers(1, 200))
def test_the_largest_share_of_which_so_many_fit(cpus: list[int], actors: int) -> None:
    share_of = largest_share(cpus, actors)

    def fit(share: float) -> int:
        return sum(int(machine / share + 1e-9) for machine in cpus)

    assert fit(share_of) >= actors
    if share_of >= 1:
        assert share_of == int(share_of)
        assert fit(share_of + 1) < actors


def nodes(*sizes: tuple[float, float]) -> list[Node]:
    return [Node(str(index), f"n{index}", cpus, gpus) for index, (cpus, gpus) in enumerate(sizes)]


def test_workers_take_a_gpu_where_there_are_some_else_cores() -> None:
    with_gpus = nodes((64, 8), (32, 0))
    size = worker_size(with_gpus, "auto", None, None)
    assert (size.device, size.workers, size.room(with_gpus)) == ("cuda", 8, 8)
    assert size.options == {"num_cpus": 1.0, "num_gpus": 1.0}
    assert worker_size(nodes((4, 8)), "cuda", None, None).cpus == 0.5, "fewer cores than GPUs"
    on_cpu = worker_size(with_gpus, "cpu", None, None)
    assert (on_cpu.device, on_cpu.cores, on_cpu.workers, on_cpu.room(with_gpus)) == ("cpu", 32, 16, 3)
    many = worker_size(nodes((2, 0)), "auto", 4, None)
    assert (many.cpus, many.cores, many.workers, many.room(nodes((2, 0)))) == (0.5, 1, 1, 4)
    assert worker_size(nodes((8, 0)), "auto", 2, 5).workers == 5


@pytest.mark.parametrize(
    ("machines", "device", "message"),
    [
        (nodes((8, 0)), "cuda", "no machine of the cluster has a GPU"),
        (nodes((8, 1)), "cuda:1", "expected auto, cpu or cuda with --engine ray"),
        ([], "auto", "The cluster has no machine with a core to spare"),
    ],
)
def test_what_no_machine_can_do_is_refused(machines: list[Node], device: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        worker_size(machines, device, None, None)


def test_weights_travel_to_the_bit(tiny_encoder: str) -> None:
    crops = [np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8) for _ in range(5)]
    expected = load_encoder(tiny_encoder, precision="fp32")
    weights = load_weights(tiny_encoder)
    travelled = copy.deepcopy(share_weights(weights))
    encoder = encoder_of(travelled, precision="fp32")
    assert encoder.description == expected.description
    assert encoder.encode(crops).numpy().tobytes() == expected.encode(crops).numpy().tobytes()
    assert all(not parameter.requires_grad for parameter in encoder.network.parameters())
    low = load_weights(tiny_encoder)
    low.tower.to(torch.bfloat16)  # which NumPy has no type for
    again = copy.deepcopy(share_weights(low)).tower
    assert all(parameter.dtype == torch.bfloat16 for parameter in again.parameters())


@pytest.mark.parametrize("packed", [False, True])
def test_a_machine_that_sees_other_crops_or_none_is_named(tmp_path: Path, packed: bool) -> None:
    root = write_crops(tmp_path / "crops", {"a": range(1, 9), "b": range(1, 9)})
    where = Path(shutil.make_archive(str(tmp_path / "faces"), "zip", root)) if packed else root
    crops = find_crops([where])
    sample = CropSample.of(crops)
    travelled = copy.deepcopy(crops.absolute())  # opens archives anew, as another process does
    sample.require_paths("node7")
    sample.require(travelled, "node7")
    assert [travelled.read(row) for row in range(16)] == [crops.read(row) for row in range(16)]
    other = replace(sample, checksums=[1 if sum_ else None for sum_ in sample.checksums])
    with pytest.raises(InputError, match=r"^Node node7 doesn't see the crops: .*00001.jpg is not the file that the"):
        other.require(travelled, "node7")
    where.rename(tmp_path / "gone")
    with pytest.raises(InputError, match=r"^Node node7 doesn't see the crops: .* is not there, or can't be read\."):
        sample.require_paths("node7")


def test_without_ray_one_sentence_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr("affcache.cluster.connection.find_spec", lambda name: None)
    root = write_crops(tmp_path / "crops", {"a": range(1, 3)})
    message = "--engine ray needs Ray, which is not installed: install it with pip install 'affcache[ray]'."
    with pytest.raises(ConfigError) as caught:
        require_ray()
    assert str(caught.value) == message
    with pytest.raises(ConfigError) as caught:
        extract(crops=(root,), store=tmp_path / "s.h5", engine="ray", model="ViT-B-32", pretrained="random:0")
    assert str(caught.value) == message
    assert not (tmp_path / "s.h5").exists()


def test_a_device_that_ray_does_not_hand_out_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--device is mps; expected auto, cpu or cuda with --engine ray"):
        extract(crops=(tmp_path,), store=tmp_path / "s.h5", engine="ray", device="mps")


@pytest.mark.parametrize("model", ["onnx:encoder.onnx", "python:my.encoder:build"])
def test_an_encoder_that_can_not_travel_is_refused_at_once(tmp_path: Path, model: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--engine ray sends the encoder to other machines, and {model} can't"):
        extract(crops=(tmp_path,), store=tmp_path / "s.h5", engine="ray", model=model)


def test_an_address_where_nothing_listens_is_refused_at_once(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but it doesn't listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        root = write_crops(tmp_path / "crops", {"a": range(1, 3)})
        for work in (
            lambda: require_ray(address),
            lambda: extract(crops=(root,), store=tmp_path / "s.h5", engine="ray", ray_address=address, model="RN50"),
        ):
            with pytest.raises(
                ConfigError, match=rf"^No Ray cluster could be reached at {address}: .*refused\. Expect"
            ):
                work()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"actors": 2}, "--actors is 2, which is of use to --engine ray only"),
        ({"ray_address": "auto"}, "--ray-address is auto, which is of use to --engine ray only"),
        ({"engine": "ray", "actors": 0}, "--actors is 0; expected at least 1"),
        ({"engine": "ray", "ray_address": "ray://head:10001"}, "expected auto or HOST:PORT"),
        ({"engine": "dask"}, "--engine is 'dask'; expected one of local, ray"),
    ],
)
def test_settings_that_can_not_be_meant(given: dict[str, Any], message: str) -> None:
    for kind in (ExtractSettings, AblateSettings):
        with pytest.raises(ConfigError, match=message):
            kind(**given)
