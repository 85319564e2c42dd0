"""affcache's head, CVaR and SAM against a recording of the published training loop (arXiv 2403.09915)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch

from affcache.heads import MLPHead
from affcache.losses import cross_entropy
from affcache.risk import cvar
from affcache.sam import SAM, frozen_batch_norm
from tests.conftest import REAL

RECORDING = REAL.parent / "oracle" / "expr_cvar_sam.npz"
pytestmark = pytest.mark.skipif(not RECORDING.is_file(), reason="shared/oracle is not beside the checkout")
Arrays = dict[str, npt.NDArray[np.generic]]


@dataclass(frozen=True)
class Followed:
    """What affcache's parts gave on the recording's batches."""

    first: npt.NDArray[np.float64]  # (steps,) losses of SAM's first passes
    second: npt.NDArray[np.float64]  # (steps,) of its second passes
    logits: npt.NDArray[np.float32]  # (64, 8) in evaluation mode after the last step


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in one order, as in the recording."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def recording() -> Arrays:
    with np.load(RECORDING) as file:
        return dict(file)


def starting_head(recording: Arrays, dtype: torch.dtype) -> MLPHead:
    head = MLPHead(768, 8, dropout=0)
    start = {name.removeprefix("start."): value for name, value in recording.items() if name.startswith("start.")}
    assert set(start) == set(head.state_dict()), "the same names: layers.0.weight ... output_layer.bias"
    tensors = {name: torch.from_numpy(np.asarray(value)) for name, value in start.items()}
    head.load_state_dict(tensors)
    return head.to(dtype)


def follow(recording: Arrays, dtype: torch.dtype) -> Followed:
    with one_thread():
        head = starting_head(recording, dtype)
        base = torch.optim.AdamW(head.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=1e-4)
        optimiser = SAM(base, rho=0.5)
        embeddings = torch.from_numpy(recording["x"]).to(dtype)
        labels = torch.from_numpy(recording["y"])
        first, second = [], []
        for rows in recording["order"].astype(np.int64):
            loss = cvar(cross_entropy(head(embeddings[rows]), labels[rows]), 0.5)
            loss.backward()
            with optimiser.perturbed(), frozen_batch_norm(head):
                perturbed_loss = cvar(cross_entropy(head(embeddings[rows]), labels[rows]), 0.5)
                perturbed_loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            first.append(loss.item())
            second.append(perturbed_loss.item())
        with torch.inference_mode():
            logits = head.eval()(embeddings[:64]).float().numpy()
    return Followed(np.array(first), np.array(second), logits)


@pytest.fixture(scope="module")
def followed(recording: Arrays) -> Followed:
    return follow(recording, torch.float32)


def difference(found: npt.NDArray[np.float64], expected: npt.NDArray[np.generic], steps: int) -> float:
    """The largest relative difference over the first steps."""
    return float(np.max(np.abs(found[:steps] / expected[:steps] - 1)))


def test_the_parameters_have_the_published_names(recording: Arrays) -> None:
    names = [name.removeprefix("start.") for name in recording if name.startswith("start.")]
    assert list(MLPHead(768, 8).state_dict()) == names


# Measured on one CPU, in float32: 1.1e-6, 6.6e-6 and 6.3e-5 over 10, 30 and 60 steps, second passes alike. The bounds
# leave room for other CPUs: rounding grows with the steps, and float64 drifts further from the recording than float32.


def test_the_losses_of_first_passes_follow(recording: Arrays, followed: Followed) -> None:
    assert difference(followed.first, recording["first"], 10) < 1e-5
    assert difference(followed.first, recording["first"], 30) < 1e-3
    assert difference(followed.first, recording["first"], 60) < 2e-2


def test_the_losses_of_second_passes_follow(recording: Arrays, followed: Followed) -> None:
    assert difference(followed.second, recording["second"], 10) < 1e-5
    assert difference(followed.second, recording["second"], 30) < 1e-3


def test_after_the_last_step_the_decisions_agree(recording: Arrays, followed: Followed) -> None:
    expected = recording["logits_eval_64"]
    assert np.array_equal(followed.logits.argmax(axis=1), expected.argmax(axis=1))
