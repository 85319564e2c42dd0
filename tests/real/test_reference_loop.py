"""The stand-in for the published training loop (arXiv 2403.09915) against a recording of that loop."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.reference_loop import ReferenceLoop, write_reference_file
from tests.conftest import REAL

RECORDING = REAL.parent / "oracle" / "expr_cvar_sam.npz"
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not RECORDING.is_file(), reason="shared/oracle is not beside the checkout"),
]


def test_the_losses_of_first_passes_follow(tmp_path: Path) -> None:
    with np.load(RECORDING) as file:
        recording = dict(file)
    write_reference_file(tmp_path / "features.h5", recording["x"])
    start = {name: torch.from_numpy(np.asarray(value)) for name, value in recording.items()}
    loop = ReferenceLoop(
        tmp_path / "features.h5",
        torch.from_numpy(recording["y"]),
        outputs=8,
        dropout=0,
        order=torch.from_numpy(recording["order"].flatten()),
        start={name.removeprefix("start."): value for name, value in start.items() if name.startswith("start.")},
    )
    losses = np.array(loop.steps(30))
    differences = np.abs(losses / recording["first"][:30] - 1)
    assert differences[:10].max() < 1e-4
    assert differences.max() < 1e-3
