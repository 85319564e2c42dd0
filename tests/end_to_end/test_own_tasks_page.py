"""The page on tasks of one's own: its example runs as it stands there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "own-tasks.md"


@pytest.mark.slow
def test_the_example_runs(tmp_path: Path) -> None:
    example, _, rest = PAGE.read_text().partition("## The definition")
    assert rest
    environment = {**os.environ, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    for kind, block in re.findall(r"```(\w+)\n(.*?)```", example, re.DOTALL):
        if kind == "toml":
            (tmp_path / "mood.toml").write_text(block)
            continue
        text = (
            block if kind == "python" else re.sub("^affcache", f"{sys.executable} -m affcache.cli", block, flags=re.M)
        )
        command = [sys.executable, "-c", text] if kind == "python" else ["bash", "-e", "-c", text]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert {"mood.html", "mood.csv", "mood-head", "ablations"} <= {path.name for path in tmp_path.iterdir()}
