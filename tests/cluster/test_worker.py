"""A worker without a cluster around it: what it sends back, and what it remembers from shard to shard."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from affcache.cluster.connection import WorkerSize
from affcache.cluster.worker import CropSample, EncodingWorker, Job, Reply
from affcache.crops.folders import find_crops
from affcache.encoders.encoder import Crops, DeviceBatch, Encoder
from affcache.encoders.loading import load_encoder
from affcache.errors import InputError
from affcache.extraction.settings import ExtractSettings
from tests.conftest import write_crops

BATCH = 16


class SmallDevice(Encoder):
    """Has room for eight crops a call."""

    def submit(self, crops: Crops) -> DeviceBatch:
        if len(crops) > 8:
            raise torch.OutOfMemoryError("out of memory")
        return super().submit(crops)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_crops(tmp_path / "crops", {"a": range(1, 33), "b": range(1, 33)})


def worker_with(encoder: Encoder, root: Path) -> EncodingWorker:
    crops = find_crops([root])
    worker: Any = EncodingWorker()
    job = Job(ExtractSettings(), None, None, CropSample.of(crops), WorkerSize("cpu", cpus=1, workers=1))
    worker._loaded = job, crops, encoder
    return worker


def test_shards_in_any_order_are_those_of_a_whole(tiny_encoder: str, root: Path) -> None:
    encoder = load_encoder(tiny_encoder, precision="fp32")
    worker = worker_with(encoder, root)
    whole = worker.encode_shard(np.arange(64), BATCH, False)
    assert isinstance(whole, Reply)
    rows = np.r_[32:64, 0:16].astype(np.int64)
    parts = {}
    for shard in (np.arange(32, 64), np.arange(0, 16)):
        reply = worker.encode_shard(shard, BATCH, False)
        assert isinstance(reply, Reply)
        parts[int(shard[0])] = reply.encoded[0]
        assert reply.stats.modes == {"RGB": len(shard)}
        assert reply.seconds > 0
    assert np.concatenate([parts[32], parts[0]]).tobytes() == whole.encoded[0][rows].tobytes()
    mirrored = worker.encode_shard(np.arange(16), BATCH, True)
    assert isinstance(mirrored, Reply)
    assert (mirrored.encoded[0] != parts[0]).any()


def test_a_full_device_is_remarked_once_and_remembered(tiny_encoder: str, root: Path) -> None:
    encoder = load_encoder(tiny_encoder, precision="fp32")
    small = SmallDevice(encoder.network, encoder.preprocessing, encoder.device, encoder.description)
    worker = worker_with(small, root)
    remarks = []
    for first in (0, 16, 32):
        reply = worker.encode_shard(np.arange(first, first + 16), BATCH, False)
        assert isinstance(reply, Reply)
        remarks.append(list(reply.remarks))
    assert remarks == [["cpu ran out of memory with 16 crops; going on with 8 a call"], [], []]


def test_the_wait_for_the_driver_counts_as_writing(tiny_encoder: str, root: Path) -> None:
    worker: Any = worker_with(load_encoder(tiny_encoder, precision="fp32"), root)
    first = worker.encode_shard(np.arange(16), BATCH, False)
    assert first.stats.seconds["write"] == 0
    worker._idle_since -= 5.0
    second = worker.encode_shard(np.arange(16, 32), BATCH, False)
    assert 5.0 < second.stats.seconds["write"] < 10.0


def test_errors_come_back_as_they_are(tiny_encoder: str, root: Path) -> None:
    worker = worker_with(load_encoder(tiny_encoder, precision="fp32"), root)
    (root / "a").rename(root.parent / "gone")
    error = worker.encode_shard(np.arange(16), BATCH, False)
    assert isinstance(error, InputError)
    assert "can't be read any more" in str(error)


def test_a_process_that_is_new_says_so() -> None:
    """The driver may give it a shard before it hears that the worker was made anew."""
    assert EncodingWorker().encode_shard(np.arange(16), BATCH, False) is None
