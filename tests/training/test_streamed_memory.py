"""How much memory streaming takes: what stays in memory, what is refused, what is allocated, what the process holds."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from affcache.errors import ConfigError
from affcache.store import prefetch as read_ahead
from affcache.tasks.tasks import TASKS
from affcache.training import data as streaming
from affcache.training.data import Frames, StreamedFrames, load_frames, load_splits
from affcache.training.fit import fit
from affcache.training.learner import Learner
from affcache.training.settings import FitSettings
from tests.conftest import MakeData, write_store
from tests.training.test_fit import Recorder
from tests.training.test_streamed_training import CPU, FRAME, LITTLE, QUICK, split

MEMORY = [
    (240.5 * FRAME / 1e9, (Frames, Frames), None),
    (float("inf"), (Frames, Frames), None),
    (239.5 * FRAME / 1e9, (StreamedFrames, Frames), 79),
    (LITTLE, (StreamedFrames, Frames), 40),
]


@pytest.mark.parametrize(("memory", "kinds", "chunk"), MEMORY)
def test_what_fits_stays_in_memory_and_what_does_not_is_said(
    learnable: MakeData, monkeypatch: pytest.MonkeyPatch, memory: float, kinds: tuple[type, type], chunk: int | None
) -> None:
    monkeypatch.setattr(streaming, "SMALLEST_CHUNK", 32)
    (store, train), (_, validation) = (split(learnable(), name) for name in ("train", "validation"))
    listener = Recorder()
    sources = load_splits(store, train, validation, CPU, memory, listener)
    assert tuple(map(type, sources)) == kinds
    assert [len(source) for source in sources] == [160, 80]
    said = f"the embeddings take 7.68e-06 GB, more than the {memory:g} GB of --memory: train frames are read from the "
    assert listener.messages == ([f"{said}store as they are needed, {chunk} frames at a time"] if chunk else [])


def test_frames_for_training_stay_before_those_for_validation(
    learnable: MakeData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "SMALLEST_CHUNK", 10)
    monkeypatch.setattr(streaming, "EVALUATION_BATCH", 15)
    (store, train), (_, validation) = (split(learnable(), name) for name in ("train", "validation"))
    listener = Recorder()
    sources = load_splits(store, train, validation, CPU, 190.5 * FRAME / 1e9, listener)
    assert tuple(map(type, sources)) == (Frames, StreamedFrames)
    assert listener.messages[0].endswith("validation frames are read from the store as they are needed")
    sources = load_splits(store, train, validation, CPU, 189.5 * FRAME / 1e9, listener)
    assert tuple(map(type, sources)) == (StreamedFrames, StreamedFrames)
    assert "GB of --memory: train and validation frames are read" in listener.messages[1]


@pytest.mark.parametrize("memory", [1e-9, LITTLE])
def test_memory_that_cannot_shuffle_is_refused(learnable: MakeData, tmp_path: Path, memory: float) -> None:
    store, annotations = learnable()
    values = {"store": store, "annotations": annotations, "run": tmp_path / "run", "memory": memory}
    with pytest.raises(ConfigError, match=r"two chunks of 4,096 frames, since .* Raise --memory"):
        fit(**values)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("memory", [0, -1, float("nan")])
def test_memory_is_more_than_nothing(memory: float) -> None:
    with pytest.raises(ConfigError, match=r"--memory is .*; expected more than 0\."):
        FitSettings(memory=memory)


def test_two_chunks_and_no_more_are_allocated(learnable: MakeData, monkeypatch: pytest.MonkeyPatch) -> None:
    store, train = split(learnable(), "train")
    monkeypatch.setattr(streaming, "SMALLEST_CHUNK", 32)
    made: list[int] = []
    make = read_ahead._empty

    def recorded(rows: int, *rest: Any) -> torch.Tensor:
        made.append(rows * FRAME)
        return make(rows, *rest)

    monkeypatch.setattr(read_ahead, "_empty", recorded)
    limit = len(train) * FRAME // 2
    for recipes in ([QUICK], [QUICK, replace(QUICK, seed=1)]):
        for changes in ({}, {"stride": 2}):
            made.clear()
            heads = [replace(recipe, batch_size=8, **changes) for recipe in recipes]
            learner = Learner(heads, TASKS["expr"], store.width, CPU)
            learner.epoch(load_frames(store, train, CPU, limit), 1e-3)
            assert len(made) == 2
            assert sum(made) <= limit


HELD = """
import sys
from pathlib import Path
import numpy as np, torch
from affcache.tasks.annotations import JoinAccount, JoinedLabels
from affcache.training.learner import Learner
from affcache.training.settings import FitSettings
from affcache.store.reading import EmbeddingStore
from affcache.training.data import load_frames
from affcache.tasks.tasks import TASKS

def memory(entry):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(entry))

store = EmbeddingStore.open(Path(sys.argv[1]))
def frames(rows, share):
    joined = JoinedLabels(np.arange(rows), np.zeros(rows, dtype=np.int64), JoinAccount())
    return load_frames(store, joined, torch.device("cpu"), share * rows * store.width * 2)
recipe = FitSettings(hidden_layers=1, hidden_width=8, batch_size=512, rho=0.0)
learner = Learner([recipe], TASKS["expr"], store.width, torch.device("cpu"))
learner.epoch(few := frames(16384, 0.75), 1e-3), learner.predict(few)  # what torch takes once
before = memory("VmRSS")
for share, epochs in ((0.5, 2), (1.0, 1)):
    source = frames(len(store), share)
    for _ in range(epochs):
        learner.epoch(source, 1e-3), learner.predict(source)
    print(type(source).__name__, (memory("VmHWM") - before) / store.features.nbytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux's /proc")
def test_a_store_twice_the_memory_trains_within_it(tmp_path: Path) -> None:
    rows, width = 1 << 17, 1024  # 268 MB: a chunk is more than what malloc keeps when it is freed
    features = np.random.default_rng(0).normal(size=(4096, width)).astype(np.float16)
    write_store(tmp_path / "store.h5", {"video": range(1, rows + 1)}, np.tile(features, (rows // 4096, 1)))
    words = [sys.executable, "-c", HELD, str(tmp_path / "store.h5")]
    lines = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    held = {kind: float(peak) for kind, peak in map(str.split, lines)}
    assert held["StreamedFrames"] < 0.62, "half the store, and what labels, orders and a step take"
    assert held["Frames"] > 0.95, "so the test would see it"
