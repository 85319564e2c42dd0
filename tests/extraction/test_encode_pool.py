"""Calls of the encoder: one thread each on a CPU, several at once, and none that goes on when nobody waits."""

import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from affcache.encoders.encoder import Crops, DeviceBatch, Encoder
from affcache.encoders.loading import load_encoder
from affcache.extraction.encode_pool import EncodePool, calls_at_once, one_thread_a_call
from affcache.progress import Listener

CROPS = [np.full((40, 40, 3), value, np.uint8) for value in (0, 90, 255)]


@pytest.fixture(scope="module")
def encoder(tiny_encoder: str) -> Encoder:
    return load_encoder(tiny_encoder, precision="fp32")


class Watched(Encoder):
    """Says with how many threads each call computes, and holds it until another call has begun."""

    def submit(self, crops: Crops) -> DeviceBatch:
        seen.append((torch.get_num_threads(), threading.get_ident()))
        together.wait(timeout=10)
        return super().submit(crops)


seen: list[tuple[int, int]] = []
together = threading.Barrier(2)


def watched(encoder: Encoder) -> Watched:
    seen.clear()
    return Watched(encoder.network, encoder.preprocessing, encoder.device, encoder.description)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_call_computes_with_one_thread_beside_others(encoder: Encoder, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with EncodePool(watched(encoder), 16, Listener(), cores=2) as calls:
            waits = [calls.begin(CROPS), calls.begin(CROPS)]
            (ours,), (same,) = (wait()[0] for wait in waits)
        assert [of for of, _ in seen] == [1, 1]
        assert len({thread for _, thread in seen}) == 2
        assert torch.get_num_threads() == threads
        with one_thread_a_call(encoder):
            alone = encoder.encode(CROPS).numpy()
        assert ours.tobytes() == same.tobytes() == alone.tobytes()
    finally:
        torch.set_num_threads(before)


def test_as_many_calls_as_torch_would_use_threads(encoder: Encoder) -> None:
    assert calls_at_once(encoder, None) == torch.get_num_threads()
    assert calls_at_once(encoder, 7) == 7
    assert calls_at_once(replace(encoder, compiled=encoder.network), 7) == 1, "a compiled one has threads built in"
    assert calls_at_once(replace(encoder, device=torch.device("cuda")), 7) == 2


class Slow(torch.nn.Module):
    """A network of many layers."""

    def __init__(self, done: list[int]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.LayerNorm(4) for _ in range(400))
        self.done = done

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        values = torch.zeros(len(pixels), 4)
        for number, layer in enumerate(self.layers):
            values = layer(values)
            self.done.append(number)
            time.sleep(0.01)
        return values


def test_a_call_that_nobody_waits_for_ends_at_the_next_layer(encoder: Encoder) -> None:
    done: list[int] = []
    slow: Any = replace(encoder, network=Slow(done))
    with EncodePool(slow, 16, Listener(), cores=1) as calls:
        calls.begin(CROPS)
        while not done:
            time.sleep(0.001)
    assert 0 < len(done) < 100
    assert not any(layer._forward_pre_hooks for layer in slow.network.layers)
