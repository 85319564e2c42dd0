"""Inputs damaged at random: only named errors or right results, no hang, little memory, and no changed row verifies.

A few seconds of each reader run here. ``AFFCACHE_ALL_DAMAGE=1`` in the environment takes hours: 20,000 stores and 5,000
of every other kind. A failure names its seed: the number after the kind, whose last nine digits are the round.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.damage import KINDS, MEMORY

FULL = dict.fromkeys(KINDS, 5000) | {"stores": 20_000}
# a tenth of it, where a reading takes milliseconds: a run is continued, an import writes a store or starts a process
USUAL = {kind: count // 10 for kind, count in FULL.items()} | {"imports": 50, "runs": 20, "hdf5": 15, "tables": 50}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system doesn't say what memory a process has")
def test_no_damage_does_harm() -> None:
    counts = FULL if os.environ.get("AFFCACHE_ALL_DAMAGE") else USUAL
    words = [sys.executable, "-W", "error", "-m", "tests.end_to_end.damage", "0"]
    words += [f"{kind}={count}" for kind, count in counts.items()]
    process = subprocess.run(words, capture_output=True, text=True)
    assert process.returncode == 0, f"it ended, or hung: {process.stderr[-4000:]}"
    found = json.loads(process.stdout)
    assert "\n".join(failure for kind in found for failure in kind["failures"]) == ""
    assert {kind["kind"]: kind["memory"] for kind in found if kind["memory"] > MEMORY} == {}
    assert {kind["kind"]: kind["read"] for kind in found} == counts
