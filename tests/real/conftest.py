"""The store of the real crops, made once a session for all tests of this folder."""

from pathlib import Path

import pytest

import affcache
from tests.conftest import REAL


@pytest.fixture(scope="session")
def real_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the 4,103 real crops, made with the real encoder (D = 1280)."""
    if not REAL.is_dir():
        pytest.skip(
            f"the real crops are not here: expected them in {REAL.name}/ of the shared folder beside the checkout"
        )
    path = tmp_path_factory.mktemp("real") / "real.h5"
    result = affcache.extract(
        crops=(REAL / "cropped_aligned",), store=path, model=f"local-dir:{REAL / 'encoder'}", device="cpu"
    )
    assert (result.rows, result.encoded, result.unreadable) == (4103, 4103, 0)
    return path
