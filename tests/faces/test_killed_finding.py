"""affcache faces killed at random moments, and run again: the same crops and rows, and nothing else."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from affcache.faces.table import read_kept
from tests.faces.clips import moving, picture, write_clip
from tests.faces.test_find_again import content

KILLS = int(os.environ.get("AFFCACHE_TEST_KILLS", "10"))
REPOSITORY = Path(__file__).parents[2]
PREPARED = "prepared"

# the command itself, whose every step on the disk takes so long that a kill meets each of them
COMMAND = f"""
import pathlib, time
from affcache.faces import detector, find
from affcache.cli.app import main
from tests.faces.clips import squares
detector.DETECTORS = {{"yunet": squares}}
def slow(function):
    return lambda *arguments, **named: (time.sleep(0.003), function(*arguments, **named))[1]
find._Finding._keep = slow(find._Finding._keep)
for name in ("replace", "mkdir", "unlink"):
    setattr(pathlib.Path, name, slow(getattr(pathlib.Path, name)))
print("{PREPARED}", flush=True)
main()
"""


def start(folder: Path, out: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, "faces", "in", "--out", out, "--workers", "1", "--json"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def prepared(process: "subprocess.Popen[str]") -> None:
    """Wait until all is imported and the work begins."""
    assert process.stdout is not None
    assert process.stdout.readline().strip() == PREPARED, process.stderr and process.stderr.read()


@pytest.mark.kill
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_killed_at_random_moments(tmp_path: Path) -> None:
    for index in range(4):
        write_clip(tmp_path / "in" / f"clip{index}.mp4", moving(20))
    write_clip(tmp_path / "in" / "two.mp4", [picture((8, 8), (70, 50))] * 20)
    with start(tmp_path, "whole") as process:
        prepared(process)
        began = time.monotonic()
        output, errors = process.communicate()
        duration = time.monotonic() - began
    assert process.returncode == 0, errors
    whole = content(tmp_path / "whole")
    assert len(whole) == 4 * 20 + 40 + 1
    generator = random.Random(0)
    finished_at_kills = []
    while len(finished_at_kills) < KILLS:
        with start(tmp_path, "out") as process:
            prepared(process)
            try:
                process.wait(timeout=duration * generator.uniform(0.02, 0.5))
            except subprocess.TimeoutExpired:
                process.kill()
            process.communicate()
        if process.returncode == 0:  # done before the kill: one input has to be looked at again
            (tmp_path / "in" / "clip1.mp4").touch()
            continue
        assert process.returncode == -signal.SIGKILL
        kept = sorted((tmp_path / "out" / ".faces").glob("*.arrow"))
        finished_at_kills.append(len(kept))
        for path in kept:  # what is kept is whole, and so are its crops
            for row in read_kept(path).to_pylist():
                name = f"{row['crops']}/{row['frame']:05d}.jpg"
                assert (tmp_path / "out" / name).read_bytes() == whole[name]
    with start(tmp_path, "out") as process:
        output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert output.splitlines()[1].startswith("{")
    leftover = {name for name in content(tmp_path / "out") if name != ".lock"}
    assert leftover == set(whole)
    assert all(content(tmp_path / "out")[name] == whole[name] for name in whole)
    assert len(list((tmp_path / "out" / ".faces").iterdir())) == 5
    assert len(set(finished_at_kills)) > 1, "kills met different inputs"
