"""``python -m data.rendering``: what it writes and says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data.rendering.__main__ import main

ROOT = Path(__file__).parents[2]
SMALL = ["--videos", "2", "--frames", "8"]


def test_it_writes_practice_data_and_says_what_is_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "practice"
    assert main([str(folder), *SMALL]) == 0
    shown = capsys.readouterr().out
    assert f"next: affcache extract --crops {folder / 'cropped_aligned'}" in shown
    assert main([str(folder), *SMALL]) == 2, "the folder is taken"
    assert str(folder) in capsys.readouterr().err


def test_json_in_the_projects_root(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "data.rendering", str(tmp_path / "new"), *SMALL, "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    found = json.loads(done.stdout)
    assert found["train"]["videos"] + found["validation"]["videos"] == 2
