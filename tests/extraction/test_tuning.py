"""How the encoder is run: batch size, compiling, running out of memory; and that a store keeps what it began with."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from affcache import ConfigError, EmbeddingStore, ExtractSettings, extract
from affcache.crops.folders import find_crops
from affcache.encoders.encoder import Crops, DeviceBatch, Encoder
from affcache.encoders.loading import load_encoder
from affcache.extraction import tuning
from affcache.extraction.extract import write_embeddings
from affcache.extraction.pipeline import Pipeline
from affcache.store.description import fingerprint
from affcache.store.writing import StoreWriter, create_store
from tests.conftest import write_crops
from tests.extraction.test_extract import Recorder

VIDEOS = {"a": range(1, 41)}


class SmallDevice(Encoder):
    """An encoder on a device that has room for so many crops a call, and keeps count of the calls."""

    room = 7
    calls: list[int]

    def submit(self, crops: Crops) -> DeviceBatch:
        if len(crops) > self.room:
            raise torch.OutOfMemoryError("out of memory")
        self.calls.append(len(crops))
        return super().submit(crops)


@pytest.fixture(scope="module")
def encoder(tiny_encoder: str) -> Encoder:
    return load_encoder(tiny_encoder, precision="fp32")


@pytest.fixture
def small(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> SmallDevice:
    monkeypatch.setattr(SmallDevice, "calls", [], raising=False)
    return SmallDevice(encoder.network, encoder.preprocessing, encoder.device, encoder.description)


def run(encoder: Encoder, folder: Path, batch_size: int) -> tuple[EmbeddingStore, Recorder]:
    crops = find_crops([write_crops(folder / "crops", VIDEOS)])
    path = folder / f"{type(encoder).__name__}-{batch_size}.h5"
    create_store(path, crops, encoder.width, encoder.description, fingerprint(encoder.description))
    recorder = Recorder()
    with StoreWriter(path) as writer:
        write_embeddings(writer, Pipeline(crops, encoder, recorder, batch_size, 2), writer.pending_rows(), recorder)
    return EmbeddingStore.open(path), recorder


def test_out_of_memory_lowers_the_calls_and_the_run_goes_on(
    small: SmallDevice, encoder: Encoder, tmp_path: Path
) -> None:
    store, recorder = run(small, tmp_path, batch_size=16)
    store.verify()
    assert set(small.calls) == {4}  # 16, 8, 4; 40 rows in batches of 16, 16, 8
    assert sum(small.calls) == 40
    assert recorder.warnings == [
        "cpu ran out of memory with 16 crops; going on with 8 a call",
        "cpu ran out of memory with 8 crops; going on with 4 a call",
    ]
    whole, _ = run(encoder, tmp_path, batch_size=16)
    np.testing.assert_allclose(store.features, whole.features, rtol=2e-3, atol=2e-3)


def test_no_room_for_one_crop_is_an_error(small: SmallDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SmallDevice, "room", 0)
    with pytest.raises(ConfigError, match=r"^cpu has not enough memory to encode one crop\."):
        run(small, tmp_path, batch_size=4)


def test_the_batch_size_of_a_gpu_is_what_fits(small: SmallDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = SmallDevice(small.network, small.preprocessing, torch.device("cuda"), small.description)

    def submit(self: SmallDevice, crops: Crops) -> DeviceBatch:
        if len(crops) > self.room:
            raise torch.OutOfMemoryError("out of memory")
        return Encoder.submit(replace(small, device=torch.device("cpu")), crops)

    monkeypatch.setattr(SmallDevice, "submit", submit)
    for room, expected in ((7, 4), (64, 64), (511, 256), (512, 512), (10_000, 512), (1, 1), (0, 1)):
        monkeypatch.setattr(SmallDevice, "room", room)
        assert tuning.find_batch_size(on_gpu) == expected
    assert tuning.find_batch_size(small) == tuning.CPU_BATCH


def test_a_store_keeps_how_it_was_begun(tmp_path: Path, tiny_encoder: str) -> None:
    crops = write_crops(tmp_path / "crops", VIDEOS)
    settings = ExtractSettings(crops=(crops,), store=tmp_path / "s.h5", model=tiny_encoder)
    with pytest.raises(KeyboardInterrupt):
        extract(settings, batch_size=5, precision="fp16", listener=Recorder(interrupt_at=10))
    continued = extract(settings)
    assert (continued.batch_size, continued.precision, continued.encoded_now) == (5, "fp16", 30)
    extract(settings, batch_size=5, precision="fp16", store=tmp_path / "whole.h5")
    assert (tmp_path / "s.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()
    assert extract(settings, batch_size=8).batch_size == 8  # a flag wins; it changes rounding alone


def test_a_model_that_does_not_fit_the_device(tiny_encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Encoder, crops: Crops) -> DeviceBatch:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Encoder, "submit", full)
    with pytest.raises(ConfigError, match=r"^local-dir:.* doesn't fit the memory of cpu\. Expected room"):
        load_encoder(tiny_encoder)


class Compiled:
    """Stands for what torch.compile returns: checks the shape it was made for."""

    def __init__(self, network: torch.nn.Module, factor: float = 1.0) -> None:
        self.network, self.factor = network, factor

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        assert pixels.shape[0] == 8
        return self.network(pixels) * self.factor


def test_a_compiled_encoder_gets_batches_of_one_size(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda network, dynamic: Compiled(network))
    recorder = Recorder()
    compiled = tuning.compile_encoder(encoder, 8, recorder)
    assert recorder.warnings == []
    assert compiled.compiled is not None
    crops = [np.full((40, 40, 3), level, np.uint8) for level in (10, 90, 200)]
    torch.testing.assert_close(compiled.encode(crops), encoder.encode(crops))
    assert fingerprint(compiled.description) == fingerprint(encoder.description)


def test_compiling_that_fails_or_lies_is_done_without(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(network: torch.nn.Module, dynamic: bool) -> Compiled:
        return Compiled(lambda pixels: (_ for _ in ()).throw(RuntimeError("no compiler\nat all")))  # type: ignore

    recorder = Recorder()
    monkeypatch.setattr(torch, "compile", failing)
    assert tuning.compile_encoder(encoder, 8, recorder) is encoder
    monkeypatch.setattr(torch, "compile", lambda network, dynamic: Compiled(network, factor=-1.0))
    assert tuning.compile_encoder(encoder, 8, recorder) is encoder
    assert recorder.warnings == [
        "torch.compile failed (RuntimeError: no compiler); going on without it",
        "the compiled encoder agrees with the plain one to -1.00000 only; going on without it",
    ]


def test_compile_is_a_setting(tmp_path: Path, tiny_encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda network, dynamic: Compiled(network))
    crops = write_crops(tmp_path / "crops", VIDEOS)
    settings = ExtractSettings(crops=(crops,), store=tmp_path / "s.h5", model=tiny_encoder, batch_size=8, compile="on")
    assert extract(settings).compiled
    assert extract(settings, compile="auto").compiled  # as it was begun
    assert not extract(settings, compile="auto", store=tmp_path / "new.h5").compiled
    np.testing.assert_array_equal(
        EmbeddingStore.open(tmp_path / "s.h5").features, EmbeddingStore.open(tmp_path / "new.h5").features
    )
