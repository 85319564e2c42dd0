"""What tests of faces share: white squares count as faces, and YuNet's file where it is here."""

from pathlib import Path

import pytest

from affcache.faces import detector
from tests.conftest import REAL
from tests.faces.clips import squares

WEIGHTS = REAL / "detector" / detector.YUNET_FILE


@pytest.fixture
def square_faces(monkeypatch: pytest.MonkeyPatch) -> None:
    """White squares are faces, for the detector that is the default."""
    monkeypatch.setattr(detector, "DETECTORS", {detector.YUNET: squares})
    monkeypatch.setattr("affcache.faces.find.DETECTORS", {detector.YUNET: squares})


@pytest.fixture(scope="session")
def weights() -> Path:
    """YuNet's file."""
    if not WEIGHTS.is_file():
        pytest.skip("the detector's file is not here: expected it in real/detector of the shared folder")
    return WEIGHTS


@pytest.fixture(scope="session")
def media() -> Path:
    """The folder of real photos and videos."""
    folder = REAL / "media"
    if not folder.is_dir():
        pytest.skip("the real photos and videos are not here: expected them in real/media of the shared folder")
    return folder
