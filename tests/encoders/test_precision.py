"""The number format: the fastest that agrees with fp32, and what happens where it doesn't."""

import numpy as np
import pytest
import torch

from affcache.encoders import loading as loading_module
from affcache.encoders.encoder import DTYPES, Encoder
from affcache.encoders.loading import (
    AGREEMENT,
    check_faces,
    choose_precision,
    fast_precisions,
    load_encoder,
    smallest_cosine,
)
from affcache.store.description import fingerprint


@pytest.fixture(scope="module")
def exact(tiny_encoder: str) -> Encoder:
    return load_encoder(tiny_encoder, precision="fp32")


def test_the_faces_are_faces_that_ship() -> None:
    faces = check_faces()
    assert len(faces) == 4
    assert all(face.shape == (112, 112, 3) and face.dtype == np.uint8 for face in faces)
    assert len({face.tobytes() for face in faces}) == 4


def test_the_smallest_cosine_is_of_the_worst_row() -> None:
    ours = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    theirs = torch.tensor([[2.0, 0.0], [1.0, 0.0]])
    assert smallest_cosine(ours, theirs) == pytest.approx(0.5**0.5)
    assert not smallest_cosine(torch.tensor([[float("nan"), 1.0]]), theirs[:1]) >= AGREEMENT


def test_a_format_that_agrees_is_taken(exact: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading_module, "fast_precisions", lambda device: ("bf16",))
    chosen = choose_precision(exact)
    assert chosen.precision == "bf16"
    assert fingerprint(chosen.description) != fingerprint(exact.description)
    assert {p.dtype for p in chosen.network.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in exact.network.parameters()} == {torch.float32}  # the exact one is left alone


def test_a_format_that_does_not_agree_gives_way_to_the_next(exact: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading_module, "fast_precisions", lambda device: ("bf16", "fp16"))
    cosines = {name: smallest_cosine(exact.in_precision(name).encode(check_faces()), exact.encode(check_faces()))
               for name in ("bf16", "fp16")}  # fmt: skip
    assert cosines["bf16"] < cosines["fp16"] < 1
    monkeypatch.setattr(loading_module, "AGREEMENT", (cosines["bf16"] + cosines["fp16"]) / 2)
    assert choose_precision(exact).precision == "fp16"
    monkeypatch.setattr(loading_module, "AGREEMENT", 1.1)
    assert choose_precision(exact) is exact


def test_without_a_faster_format_fp32_stays(exact: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading_module, "fast_precisions", lambda device: ())
    assert choose_precision(exact) is exact


def test_bf16_on_a_cpu_needs_instructions_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for flags, expected in (({"avx512f", "avx512_bf16"}, ("bf16",)), ({"amx_bf16"}, ("bf16",)), ({"avx512f"}, ())):
        monkeypatch.setattr(loading_module, "processor_facts", lambda flags=flags: {"flags": " ".join(flags)})
        assert fast_precisions(cpu) == expected


def test_auto_is_what_the_processor_has(tiny_encoder: str) -> None:
    expected = "bf16" if "bf16" in fast_precisions(torch.device("cpu")) else "fp32"
    assert load_encoder(tiny_encoder).precision == expected
    assert set(DTYPES) == {"fp32", "bf16", "fp16"}
