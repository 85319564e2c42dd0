"""The stand-in for the published loop does the work it stands for, and what affcache's own parts do."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from affcache.tasks.losses import cross_entropy
from affcache.training.heads import MLPHead
from affcache.training.risk import cvar
from affcache.training.sam import SAM, frozen_batch_norm
from benchmarks import reference_loop
from benchmarks.reference_loop import ReferenceHead, ReferenceLoop, RowFile, find_threshold, objective

ROWS, WIDTH, CLASSES = 100, 24, 5


@pytest.fixture
def path(tmp_path: Path) -> Path:
    features = np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float16)
    reference_loop.write_reference_file(tmp_path / "features.h5", features)
    return tmp_path / "features.h5"


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, CLASSES, ROWS))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_rows_come_back_as_float32_with_their_labels(tmp_path: Path, dtype: type[np.floating]) -> None:
    features = np.random.default_rng(0).standard_normal((7, 3)).astype(dtype)
    reference_loop.write_reference_file(tmp_path / "f.h5", features)
    rows = RowFile(tmp_path / "f.h5", torch.arange(7))
    assert len(rows) == 7
    row, label = rows[4]
    assert row.dtype == torch.float32
    assert torch.equal(row, torch.from_numpy(features[4].astype(np.float32)))
    assert label == 4


def test_every_row_opens_the_file(path: Path, labels: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = ReferenceLoop(path, labels, CLASSES)
    opened = []

    class Counted(h5py.File):
        def __init__(self, *arguments: object) -> None:
            opened.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr(h5py, "File", Counted)
    losses = loop.steps(2)
    assert opened == [(path, "r")] * 64
    assert loop.total_loss == pytest.approx(sum(losses))


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.77, 1.0])
def test_the_search_finds_cvar(alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = torch.from_numpy(np.random.default_rng(2).exponential(size=32)).float()
    probes = []
    plain = reference_loop.objective
    monkeypatch.setattr(reference_loop, "objective", lambda *given: probes.append(given) or plain(*given))
    threshold = find_threshold(losses, alpha)
    # float32 around thresholds of up to 1,000 rounds to 6e-5, where the objective is flat (alpha 1)
    assert objective(losses, threshold, alpha).item() == pytest.approx(cvar(losses, alpha).item(), abs=2e-4)
    assert 10 <= len(probes) <= 60


def test_it_follows_affcaches_own_parts(path: Path, labels: torch.Tensor) -> None:
    order = torch.from_numpy(np.random.default_rng(3).permutation(ROWS)[:96])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # some heads amplify rounding within a few steps
        head = MLPHead(WIDTH, CLASSES, dropout=0)
    loop = ReferenceLoop(path, labels, CLASSES, dropout=0, order=order, start=head.state_dict())
    losses = loop.steps(6)  # the order comes twice
    optimiser = SAM(torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=1e-4), rho=0.5)
    embeddings = torch.stack([row for row, _ in RowFile(path, labels)])
    expected = []
    for rows in [*order.split(32)] * 2:
        loss = cvar(cross_entropy(head(embeddings[rows]), labels[rows]), 0.5)
        loss.backward()
        with optimiser.perturbed(), frozen_batch_norm(head):
            cvar(cross_entropy(head(embeddings[rows]), labels[rows]), 0.5).backward()
        optimiser.step()
        optimiser.zero_grad()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-4)
    for name, value in head.state_dict().items():
        if "running" in name:  # moved by first passes alone
            torch.testing.assert_close(loop.head.state_dict()[name], value, rtol=1e-2, atol=1e-2)
    assert {layer.momentum for layer in loop.head.modules() if isinstance(layer, torch.nn.BatchNorm1d)} == {0.1}


def test_the_perturbation_has_length_rho(path: Path, labels: torch.Tensor) -> None:
    loop = ReferenceLoop(path, labels, CLASSES, rho=0.25)
    for parameter in loop.parameters:
        parameter.grad = torch.ones_like(parameter)
    before = [parameter.detach().clone() for parameter in loop.parameters]
    originals = loop._perturb()
    assert all(torch.equal(kept, start) for kept, start in zip(originals, before, strict=True))
    moved = torch.cat([(now - start).flatten() for now, start in zip(loop.parameters, before, strict=True)])
    assert moved.norm().item() == pytest.approx(0.25, rel=1e-3)
    assert all(parameter.grad is None for parameter in loop.parameters)


def test_it_learns_and_a_seed_decides_its_start_and_shuffling(path: Path, labels: torch.Tensor) -> None:
    first = ReferenceLoop(path, labels, CLASSES, dropout=0).steps(30)
    assert np.mean(first[-3:]) < np.mean(first[:3]) / 2
    assert ReferenceLoop(path, labels, CLASSES, dropout=0).steps(2) == pytest.approx(first[:2])
    assert ReferenceLoop(path, labels, CLASSES, dropout=0, seed=1).steps(2) != pytest.approx(first[:2], rel=1e-3)


def test_the_head_has_the_published_shape() -> None:
    assert list(ReferenceHead(9, 8, 0.6).state_dict()) == list(MLPHead(9, 8).state_dict())
    dropouts = [module.p for module in ReferenceHead(9, 8, 0.6).modules() if isinstance(module, torch.nn.Dropout)]
    assert dropouts == [0.6] * 3


def test_too_few_rows(path: Path, labels: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="31 rows; expected at least one batch of 32"):
        ReferenceLoop(path, labels[:31], CLASSES)
