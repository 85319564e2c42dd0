"""The command killed at random moments, from its first millisecond to its last, and run again: the bytes are the same.

AFFCACHE_TEST_KILLS=50 sets how often; ten times is what CI has time for.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from affcache.store.reading import EmbeddingStore
from tests.conftest import write_crops

KILLS = int(os.environ.get("AFFCACHE_TEST_KILLS", "10"))
REPOSITORY = Path(__file__).parents[2]
VIDEOS = {f"video{video}": range(1, 301) for video in range(10)}  # 3,000 rows

# the command itself, with commits so frequent that a kill meets every step of one, and a device that isn't in a hurry
COMMAND = """
import sys, time
from affcache.extraction import extract as extraction
from affcache.encoders import encoder
extraction.COMMIT_ROWS = 32
submit = encoder.Encoder.submit
encoder.Encoder.submit = lambda self, crops: (time.sleep(0.004), submit(self, crops))[1]
from affcache.cli.app import main
main()
"""


# extract's words, by the kind of encoder: the tiny one of open_clip, and a small one of timm on each other frame
OF_KIND = {
    "open_clip": [],
    "timm": ["--model", "timm:test_vit", "--pretrained", "random:0", "--image-size", "32", "--every", "2"],
}


def start(folder: Path, store: str, model: list[str]) -> "subprocess.Popen[str]":
    words = ["extract", "--crops", "crops", "--store", store, *model, "--batch-size", "16", "--view", "flip"]
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *words, "--device", "cpu", "--json"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def check_what_is_there(path: Path, whole: EmbeddingStore) -> int:
    """A killed command leaves no file, or one that opens and whose committed rows are right; return how many."""
    if not path.exists():
        return 0
    store = EmbeddingStore.open(path)
    committed = store.status != 0
    assert (store.features[committed] == whole.features[committed]).all()
    assert (store.status[committed] == whole.status[committed]).all()
    return int(committed.sum())


@pytest.mark.kill
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
@pytest.mark.parametrize("kind", OF_KIND)
def test_killed_at_random_moments(tmp_path: Path, tiny_encoder: str, kind: str) -> None:
    model = OF_KIND[kind] or ["--model", tiny_encoder]
    write_crops(tmp_path / "crops", VIDEOS)
    (tmp_path / "crops" / "video3" / "00007.jpg").write_bytes(b"")
    began = time.monotonic()
    with start(tmp_path, "whole.h5", model) as process:
        assert process.communicate()[0].startswith("{")
    duration = time.monotonic() - began
    views = {name: EmbeddingStore.open(tmp_path / name) for name in ("whole.h5", "whole.flip.h5")}
    for store in views.values():
        store.verify()
    generator = random.Random(0)
    rows_at_kills = []
    killed = 0
    while killed < KILLS:
        with start(tmp_path, "s.h5", model) as process:
            try:
                # loading takes most of the time, so most moments are drawn from what comes after it
                process.wait(timeout=duration * generator.choice((generator.random(), generator.uniform(0.3, 0.9))))
            except subprocess.TimeoutExpired:
                process.kill()
            process.communicate()
        if process.returncode == 0:  # done before the kill: begin anew
            for path in tmp_path.glob("s.*"):
                path.unlink()
            continue
        assert process.returncode == -signal.SIGKILL
        killed += 1
        rows = [check_what_is_there(tmp_path / name.replace("whole", "s"), store) for name, store in views.items()]
        rows_at_kills.append(sum(rows))
    with start(tmp_path, "s.h5", model) as process:
        output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert output.startswith("{")
    for name in views:
        assert (tmp_path / name.replace("whole", "s")).read_bytes() == (tmp_path / name).read_bytes()
    assert len(set(rows_at_kills)) > 1, "no kill met the encoding"
    print(f"rows committed at each of {KILLS} kills: {rows_at_kills}")
