"""Shares of time, and the sentence that names the bottleneck."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from affcache.extraction.pipeline import STAGES, ExtractionStats, bottleneck, shares_text

SECONDS = st.floats(0, 1e6)


@given(spent=st.lists(st.tuples(st.sampled_from(STAGES), SECONDS), min_size=1))
def test_shares_are_fractions_of_what_was_charged(spent: list[tuple[str, float]]) -> None:
    stats = ExtractionStats()
    for stage, seconds in spent:
        stats.seconds[stage] += seconds
    shares = stats.shares()
    assert list(shares) == list(STAGES)
    whole = sum(seconds for _, seconds in spent)
    if whole > 1e-300:
        assert sum(shares.values()) == pytest.approx(1)
        assert shares["decode"] == pytest.approx(sum(s for stage, s in spent if stage == "decode") / whole)


def test_seconds_are_divided_in_proportion() -> None:
    stats = ExtractionStats()
    stats.divide(8.0, {"copy": 1.0, "encode": 3.0})
    assert stats.seconds == {"decode": 0.0, "copy": 2.0, "encode": 6.0, "write": 0.0}
    stats.divide(5.0, {"copy": 0.0, "encode": 0.0})
    assert sum(stats.seconds.values()) == 8.0
    assert shares_text(stats.shares()) == "decode 0%, copy 25%, encode 75%, write 0%"


def sentence(stage: str, workers: int = 1, device: str = "cuda", precision: str = "bf16") -> str:
    shares = {name: 0.71 if name == stage else 0.29 / 3 for name in STAGES}
    return bottleneck(shares, workers=workers, cores=16, device=device, precision=precision)


def test_the_sentence_names_the_stage_and_the_flag() -> None:
    assert sentence("decode") == (
        "decode-bound (71%): the encoder waits for crops; raise --workers (now 1, of 16 cores)"
    )
    assert "although --workers is 16 on 16 cores" in sentence("decode", workers=16)
    assert "raise --batch-size" in sentence("copy")
    assert "put --store on a faster" in sentence("write")
    assert sentence("encode").endswith("a smaller --model, or a faster GPU")
    assert "takes longest, though it waits 29%" in sentence("encode")
    alone = {"decode": 0.02, "copy": 0.0, "encode": 0.97, "write": 0.01}
    assert "the encoder is the limit;" in bottleneck(alone, workers=1, cores=2, device="cpu", precision="fp32")
    assert sentence("encode", precision="fp32").endswith("--precision bf16")
    faster = "--device cuda" if torch.cuda.is_available() else "a machine with a GPU"  # what is there
    assert faster in sentence("encode", device="cpu")
    assert "where it is exact enough" in sentence("encode", device="cpu", precision="fp32")


def test_nothing_is_said_before_the_start() -> None:
    stats = ExtractionStats()
    assert bottleneck(stats.shares(), workers=1, cores=2, device="cpu", precision="fp32") == ""
