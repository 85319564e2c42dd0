"""What tests of predictions share: a run whose encoder is here, and white squares for faces."""

from pathlib import Path
from typing import Any

import pytest

import affcache
from tests.conftest import write_crops, write_labels
from tests.faces.conftest import square_faces  # noqa: F401  # a fixture

QUICK: dict[str, Any] = {"epochs": 2, "hidden_layers": 1, "hidden_width": 16, "batch_size": 16, "device": "cpu"}


@pytest.fixture
def encoded(tiny_encoder: str, tmp_path: Path) -> Path:
    """A run on tmp_path/faces.h5, of crops in tmp_path/crops, by the tiny encoder."""
    crops = write_crops(tmp_path / "crops", {"a": range(1, 9), "b": range(1, 9)})
    affcache.extract(crops=crops, store=tmp_path / "faces.h5", model=tiny_encoder, precision="fp32", device="cpu")
    write_labels(tmp_path / "labels", "expr", "train", {"a": [0, 1, 2, 3, 4, 5, 6, 7]})
    write_labels(tmp_path / "labels", "expr", "validation", {"b": [0, 1, 2, 3, 4, 5, 6, 7]})
    run = tmp_path / "run"
    affcache.fit(store=tmp_path / "faces.h5", annotations=tmp_path / "labels", run=run, **{**QUICK, "batch_size": 4})
    return run
