"""affcache's parts, and its training core, against a recording of the published training loop (arXiv 2403.09915)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch

from affcache.tasks.losses import cross_entropy
from affcache.tasks.tasks import TASKS
from affcache.training.data import Frames
from affcache.training.heads import MLPHead
from affcache.training.learner import Learner
from affcache.training.risk import cvar
from affcache.training.sam import SAM, frozen_batch_norm
from affcache.training.settings import FitSettings
from tests.conftest import REAL, record_losses

RECORDING = REAL.parent / "oracle" / "expr_cvar_sam.npz"
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not RECORDING.is_file(), reason="shared/oracle is not beside the checkout"),
]
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


def start_of(recording: Arrays) -> dict[str, torch.Tensor]:
    start = {name.removeprefix("start."): value for name, value in recording.items() if name.startswith("start.")}
    return {name: torch.from_numpy(np.asarray(value)) for name, value in start.items()}


def by_modules(recording: Arrays) -> Followed:
    """Follow with an ``MLPHead``, autograd, ``cvar`` and ``SAM``, as a user's own loop has them."""
    head = MLPHead(768, 8, dropout=0)
    head.load_state_dict(start_of(recording))
    base = torch.optim.AdamW(head.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=1e-4)
    optimiser = SAM(base, rho=0.5)
    embeddings, labels = torch.from_numpy(recording["x"]).float(), torch.from_numpy(recording["y"])
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
        logits = head.eval()(embeddings[:64]).numpy()
    return Followed(np.array(first), np.array(second), logits)


def by_core(recording: Arrays, *, factored: bool = False) -> Followed:
    """Follow with what ``fit`` trains with: ``Learner``, its stacked heads, its objective.

    Written out, as here, norms are rounded as in the recording; factored, as is the default, they are exact.
    """
    learner = Learner([FitSettings(task="expr", dropout=0)], TASKS["expr"], 768, torch.device("cpu"))
    learner.factored = factored
    learner.heads.load_state_dict(0, start_of(recording))
    labels = torch.from_numpy(recording["y"])
    frames = Frames(torch.from_numpy(recording["x"]), labels, torch.zeros_like(labels))
    losses = record_losses(learner)
    for rows in recording["order"].astype(np.int64):
        learner.step(frames, torch.from_numpy(rows)[None])
    values = np.array([loss.item() for loss in losses]).reshape(-1, 2)
    first = Frames(frames.embeddings[:64], labels[:64], frames.videos[:64])
    return Followed(values[:, 0], values[:, 1], learner.predict(first)[0].numpy())


@pytest.fixture(scope="module", params=[by_modules, by_core])
def followed(recording: Arrays, request: pytest.FixtureRequest) -> Followed:
    follow: Callable[[Arrays], Followed] = request.param
    with one_thread():
        return follow(recording)


def difference(found: npt.NDArray[np.float64], expected: npt.NDArray[np.generic], steps: int) -> float:
    """The largest relative difference over the first steps."""
    return float(np.max(np.abs(found[:steps] / expected[:steps] - 1)))


def test_the_parameters_have_the_published_names(recording: Arrays) -> None:
    names = [name.removeprefix("start.") for name in recording if name.startswith("start.")]
    assert list(MLPHead(768, 8).state_dict()) == names


# First passes are held to what was asked for over 10 and 30 steps. Measured in float32 over 10, 30 and 60 steps, first
# and second passes: the core, written out, 6.6e-7, 1.8e-6, 3.8e-6 and 3.7e-7, 1.4e-6, 9.8e-6; modules on one thread
# 4.4e-7, 8.5e-4, 1.8e-2 and 2.8e-7, 2.0e-3, 2.9e-2. Rounding grows with the steps, from one bit of a SAM step: the same
# mathematics in float64 is 5.3e-6, 6.4e-3 and 4.6e-2 away from the recording, whose norms are float32's, taken layer by
# layer; one norm of all parameters in float32 is off by 3e-5, and the core was then 5e-3 away after 10 steps.
# The core with factors, whose norms are exact, lies as far away as float64 may: 4.0e-6, 1.4e-4 and 1.7e-2 here.


def test_the_losses_of_first_passes_follow(recording: Arrays, followed: Followed) -> None:
    assert difference(followed.first, recording["first"], 10) < 1e-5
    assert difference(followed.first, recording["first"], 30) < 1e-3
    assert difference(followed.first, recording["first"], 60) < 1e-1


def test_the_losses_of_second_passes_follow(recording: Arrays, followed: Followed) -> None:
    assert difference(followed.second, recording["second"], 10) < 1e-5
    assert difference(followed.second, recording["second"], 30) < 1e-2
    assert difference(followed.second, recording["second"], 60) < 1e-1


def test_after_the_last_step_the_decisions_agree(recording: Arrays, followed: Followed) -> None:
    expected = recording["logits_eval_64"]
    assert np.array_equal(followed.logits.argmax(axis=1), expected.argmax(axis=1))


def test_with_exact_norms_the_losses_follow_as_far_as_exact_mathematics_does(recording: Arrays) -> None:
    with one_thread():
        found = by_core(recording, factored=True)
    for losses, name in ((found.first, "first"), (found.second, "second")):
        assert difference(losses, recording[name], 10) < 1e-5
        assert difference(losses, recording[name], 30) < 1e-2
    assert np.array_equal(found.logits.argmax(axis=1), recording["logits_eval_64"].argmax(axis=1))
