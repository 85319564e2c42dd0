"""The recipe "paper" on embeddings of real photographs: macro F1 on people that no training frame shows."""

from pathlib import Path

import numpy as np
import pytest

from affcache.scoring.score import score
from affcache.training.fit import FitResult, fit
from tests.conftest import REAL

SEEDS = (0, 1, 2)
EXPECTED = 0.345  # the published code gives 0.349 to 0.356 here, a balanced logistic regression 0.337

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not REAL.is_dir(), reason="shared/real is not beside the checkout"),
]


def test_the_defaults_reach_the_published_codes_score(real_store: Path, tmp_path: Path) -> None:
    results: list[FitResult] = [
        fit(task="expr", store=real_store, annotations=REAL / "annotations", run=tmp_path / str(seed), seed=seed)
        for seed in SEEDS
    ]
    values = [result.value for result in results]
    print(f"macro F1 of seeds {SEEDS}: {', '.join(f'{value:.4f}' for value in values)}; mean {np.mean(values):.4f}")
    assert np.mean(values) >= EXPECTED
    for result in results:
        scored = score(run=Path(result.run))
        assert scored.scores.value == result.value
        assert (scored.epoch, scored.frames) == (result.best_epoch, result.validation_frames)
