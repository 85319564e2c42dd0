"""Stage one over up to three million crops, through a stand-in encoder: seconds and peak memory of each step.

    python -m benchmarks.many_rows --folder /tmp/many --rows 30000 300000 3000000

The crops are hard links to a few rendered faces, so they cost directory entries and no data; the store is real. The
encoder is a one-layer transformer on one 64-pixel patch with random weights: what is measured is everything else. Each
step is a process of its own, as a user would run it; half-way through encoding the process is killed (SIGKILL) and the
same command run again. Memory is the process's peak, everything mapped included.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.resources import as_file, files
from pathlib import Path

from affcache.store.reading import EmbeddingStore
from benchmarks.shared import script_parser

FRAMES_A_VIDEO = 5_000
ENCODER = {
    "model_cfg": {
        "embed_dim": 768,
        "vision_cfg": {"image_size": 64, "layers": 1, "width": 64, "patch_size": 64, "head_width": 64},
        "text_cfg": {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 1, "layers": 1},
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
}
LIST = (
    "import sys; from pathlib import Path; from affcache.crops.folders import find_crops; "
    "find_crops([Path(sys.argv[1])])"
)


def link_crops(root: Path, rows: int) -> None:
    """Make rows crops, FRAMES_A_VIDEO to a video, as hard links to one real file a video."""
    with as_file(files("affcache.data") / "sample" / "cropped_aligned") as sample:
        faces = sorted(sample.glob("*/*.jpg"))
        for video in range(-(-rows // FRAMES_A_VIDEO)):
            folder = root / f"video{video:05d}"
            folder.mkdir(parents=True)
            shutil.copy(faces[video % len(faces)], folder / "00001.jpg")
            for frame in range(2, min(FRAMES_A_VIDEO, rows - video * FRAMES_A_VIDEO) + 1):
                os.link(folder / "00001.jpg", folder / f"{frame:05d}.jpg")


def run(words: list[str], kill_when: "tuple[Path, int] | None" = None) -> dict[str, float]:
    """Run a Python process to its end, or kill it once a store has so many rows; return its cost."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen([sys.executable, *words], stdout=output, stderr=subprocess.DEVNULL)
        ended = 0
        while not ended:
            ended, status, usage = os.wait4(process.pid, os.WNOHANG if kill_when else 0)
            if kill_when and not ended:
                time.sleep(0.5)
                store, rows = kill_when
                if store.exists() and EmbeddingStore.open(store).counts["encoded"] >= rows:
                    os.kill(process.pid, signal.SIGKILL)  # Popen.kill might reap it
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode not in (0, -signal.SIGKILL):
            raise SystemExit(f"{words} ended with {process.returncode}")
        cost = {"seconds": round(time.perf_counter() - start, 1), "peak_mb": round(usage.ru_maxrss / 1024)}
        output.seek(0)
        text = output.read()
    result = json.loads(text) if text.startswith(b"{") else {}
    if result.get("encoded_now"):
        cost["microseconds_a_crop"] = round(1e6 / result["rate"])
        cost |= {stage: round(share, 3) for stage, share in result["shares"].items()}
    return cost


def measure(folder: Path, rows: int, batch_size: int) -> dict[str, object]:
    """Measure listing, encoding with a kill half-way, verifying, and a command that finds nothing to do."""
    crops, store = folder / f"crops-{rows}", folder / f"{rows}.h5"
    if not crops.exists():
        link_crops(crops, rows)
    store.unlink(missing_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(ENCODER))
    command = ["-m", "affcache.cli", "extract", "--crops", str(crops), "--store", str(store), "--json"]
    command += ["--model", f"local-dir:{folder}", "--pretrained", "random:0", "--device", "cpu"]
    command += ["--batch-size", str(batch_size), "--precision", "fp32"]
    steps = {
        "list": run(["-c", LIST, str(crops)]),
        "encode, killed at half": run(command, kill_when=(store, rows // 2)),
        "encode, continued": run(command),
        "nothing to do": run(command),
        "verify": run(["-m", "affcache.cli", "verify", str(store), "--json"]),
    }
    return {"rows": rows, "steps": steps}


def main() -> None:
    """Measure each number of rows, and print one JSON object a line."""
    parser = script_parser(__doc__)
    parser.add_argument(
        "--folder", type=Path, required=True, help="on the disk to measure; crops and stores stay there"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[30_000, 300_000, 3_000_000])
    parser.add_argument("--batch-size", type=int, default=256)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    one = arguments.folder / "crops-16"
    if not one.exists():
        link_crops(one, 16)
    print(json.dumps({"model alone": measure(arguments.folder, 16, 16)["steps"]}), flush=True)
    for rows in arguments.rows:
        print(json.dumps(measure(arguments.folder, rows, arguments.batch_size)), flush=True)


if __name__ == "__main__":
    main()
