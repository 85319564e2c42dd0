"""Which devices are taken, and how much memory one has: the machine's, or what a container is allowed."""

import os
from pathlib import Path

import pytest
import torch

from affcache import devices as memory
from affcache.devices import default_memory, device_memory, resolve_device
from affcache.encoders import loading
from affcache.errors import ConfigError

CPU = torch.device("cpu")
MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ((), MACHINE),
        (("max\n",), MACHINE),
        (("1000000000\n",), 10**9),
        (("9223372036854771712\n",), MACHINE),
        (("2000000000\n", "1500000000"), 1_500_000_000),
        (("no number",), MACHINE),
    ],
)
def test_the_least_of_the_machines_memory_and_a_containers_limit(
    limits: tuple[str, ...], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / str(index) for index in range(3)]
    for path, text in zip(paths, limits, strict=False):
        path.write_text(text)
    monkeypatch.setattr(memory, "CGROUP_LIMITS", tuple(paths))
    assert device_memory(CPU) == expected


def test_half_of_it_to_the_megabyte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "device_memory", lambda device: 2_469_135_802)
    assert default_memory(CPU) == 1.234


def test_a_system_that_does_not_say_gets_a_cautious_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CGROUP_LIMITS", ())
    monkeypatch.delattr(os, "sysconf")
    assert default_memory(CPU) == 4


def test_a_gpus_memory_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        total_memory = 80 * 10**9

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties())
    assert default_memory(torch.device("cuda:1")) == 40


NONE_SUCH = ("mps", "xpu", "meta", "gpu", "", "cpu:1", "cuda:", "cuda:-1", "cuda:x", "CUDA")


@pytest.mark.parametrize("gpus", [0, 1, 2])
def test_only_devices_that_are_there_are_taken_and_advised(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    there = ["cpu", *(f"cuda:{index}" for index in range(gpus))]
    assert [str(resolve_device(name)) for name in there] == there
    assert str(resolve_device("auto")) == ("cuda" if gpus else "cpu")
    missing = ["cuda:2", "cuda:999999", *(["cuda"] if not gpus else [])]
    for name in (*NONE_SUCH, *missing):
        with pytest.raises(ConfigError) as caught:
            resolve_device(name)
        assert str(caught.value).endswith(f". Expected {', '.join(['auto', *there])}.")
        assert ("is not there: torch sees" in str(caught.value)) == (name in missing)


def test_a_device_that_is_not_there_is_refused_before_weights_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load_weights", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(ConfigError, match="--device mps is none that affcache computes on"):
        loading.load_encoder("ViT-B-32", "openai", device="mps")
