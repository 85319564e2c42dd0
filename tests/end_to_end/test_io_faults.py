"""Every command that writes, on a disk that fails at its n-th operation, and again: sound bytes, or a message.

AFFCACHE_TEST_FAULTS=1 lets every operation fail in every way; one in eleven is what CI has time for.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import make_learnable, write_crops, write_tiny_encoder

STEP = int(os.environ.get("AFFCACHE_TEST_FAULTS", "11"))
REPOSITORY = Path(__file__).parents[2]
SOURCE = REPOSITORY / "tests" / "data" / "io_faults.c"
COMPILER = shutil.which("cc") or shutil.which("gcc")

# Forks a process for every command: importing takes longer than most of them.
SERVER = """
import ctypes, json, os, signal, sys, traceback
import affcache.ablation.ablate, affcache.exchange.importing, affcache.extraction.extract, affcache.reporting.report
import affcache.scoring.score, affcache.submission.submit, affcache.training.fit, matplotlib.figure, pyarrow.parquet
import affcache.prediction.predict, affcache.prediction.publish
from affcache.cli.app import main
faults = ctypes.CDLL(None)
print(flush=True)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
        signal.alarm(120)
        os.chdir(job["folder"])
        os.dup2(os.open(job["log"], os.O_CREAT | os.O_TRUNC | os.O_WRONLY), 2)
        os.dup2(2, 1)
        sys.argv, code = ["affcache", *job["words"]], 1
        faults.arm(job["folder"].encode(), job["position"], job["fault"], job["lasting"])
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
        count = faults.counted()
        faults.arm(b"", 0, 0, 0)
        print(f"\\noperations: {count}", flush=True)
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
FAULTS = {  # an errno, or -1 to kill; and whether all that takes room fails from then on
    "EIO": (errno.EIO, 0),
    "ENOSPC": (errno.ENOSPC, 1),
    "EDQUOT": (errno.EDQUOT, 1),
    "SIGKILL": (-1, 0),
}
DATA = "--store expr.h5 --annotations labels"
RECIPE = "--hidden-layers 1 --hidden-width 8 --device cpu"
COMMANDS = {
    "extract": "extract --crops crops --store faces.h5 --view flip --device cpu --model local-dir:encoder",
    "fit": f"fit --task expr {DATA} {RECIPE} --epochs 3 --run new",
    "ridge": f"fit --task expr {DATA} --head ridge --device cpu --run new",
    "score": "score run --device cpu",
    "figures": "score run --device cpu --figures pictures",
    "report": "report run --device cpu",
    "submit": "submit run --frames frames.csv --store expr.h5 --device cpu --out submission.txt",
    "predict": "predict expr.h5 --run run --out said.parquet --device cpu",
    "csv": "predict expr.h5 --run run --out said.csv --page said.html --device cpu",
    "publish": "publish run --out shared --data crops --license mit",
    "ablate": f"ablate {DATA} {RECIPE} --epochs 2 --vary alpha=0.5,1 --seeds 2 --out grid",
    "import": "import expr.parquet --store back.h5",
    "table": "import units.csv --name units --store units.h5",
    "npy": "export expr.h5 --format npy --out npy",
    "parquet": "export expr.h5 --format parquet --out again.parquet",
    "safetensors": "export expr.h5 --format safetensors --out expr.safetensors",
}
Run = Callable[..., tuple[int, str]]  # a command, position and fault -> exit code and what was said


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults").resolve()


@pytest.fixture(scope="module")
def run(root: Path) -> Iterator[Run]:
    """Run a command in root/work, with a fault at one of its operations."""
    if COMPILER is None or sys.platform != "linux":
        pytest.skip("faults are made by a library that is compiled and preloaded: that takes Linux and a C compiler")
    library, log = root / "io_faults.so", root / "log"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        cwd=REPOSITORY,
        env={**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdout.readline()

        def call(command: str, position: int = 0, fault: int = 0, lasting: int = 0) -> tuple[int, str]:
            job = {"folder": str(root / "work"), "log": str(log), "words": command.split()}
            job |= {"position": position, "fault": fault, "lasting": lasting}
            print(json.dumps(job), file=server.stdin, flush=True)
            return int(server.stdout.readline()), log.read_text(errors="replace")  # type: ignore[union-attr]

        yield call
        server.stdin.close()


@pytest.fixture(scope="module")
def base(root: Path, run: Run) -> Path:
    """A folder with what the commands read."""
    work = root / "work"
    write_crops(work / "crops", {"a": range(1, 7), "b": range(1, 4)})
    (work / "crops" / "b" / "00004.jpg").write_bytes(b"no picture")
    (work / "encoder").mkdir()
    write_tiny_encoder(work / "encoder", seed=0)
    make_learnable(work)
    (work / "frames.csv").write_text("0-30-640x360,45\n1-30-640x360,40\n")
    rows = "".join(f"{row % 3}-30-640x360,{row},{row}.25,{row % 7}\n" for row in range(10_000))
    (work / "units.csv").write_text(f"video,frame,AU01,AU02\n{rows}")
    for command in (COMMANDS["fit"].replace("new", "run"), "export expr.h5 --format parquet --out expr.parquet"):
        code, said = run(command)
        assert code == 0, said
    return work.rename(root / "base")


def contents(folder: Path) -> dict[str, bytes]:
    """All files but locks and what is half written; of some, what is the same every time."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if name.endswith(".lock") or ".partial" in name or name.startswith("grid/cells/"):
            continue
        found[name] = path.read_bytes()
        if path.name == "history.jsonl":  # but for what a clock says
            lines = [json.loads(line) for line in found[name].splitlines()]
            found[name] = repr([{k: v for k, v in line.items() if "seconds" not in k} for line in lines]).encode()
        elif path.name.endswith(".unreadable.txt"):  # a killed process takes the reasons with it
            found[name] = b"".join(line.partition(b"\t")[0] for line in found[name].splitlines())
    return found


def difference(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


def check(run: Run, base: Path, command: str, sound: dict[str, bytes], position: int, kind: str) -> tuple[str, str]:
    """Let an operation fail, then run the command again; return how it went, and what is wrong with that."""
    work = base.with_name("work")
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(base, work)
    code, said = run(command, position, *FAULTS[kind])
    outcome = {0: "finished", 2: "refused", -signal.SIGKILL: "killed"}.get(code, "broke")
    done = contents(work) == sound
    if outcome == "broke" or "Traceback" in said or (code == 2 and "Error: " not in said):
        return outcome, f"exit code {code}\n{said}"
    if code == 0 and not done:
        return outcome, f"{difference(contents(work), sound)} differ\n{said}"
    if code == 2 and kind == "EIO" and (left := list(work.rglob("*.partial"))):
        return outcome, f"{left} stay behind\n{said}"
    code, said = run(f"{command} --resume" if (work / "new" / "config.json").exists() else command)
    if contents(work) != sound or (code and not done):
        return outcome, f"then {code}, {difference(contents(work), sound)} differ\n{said}"
    return outcome, ""


@pytest.mark.kill
@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_fails_at_any_moment(run: Run, base: Path, name: str) -> None:
    work, command = base.with_name("work"), COMMANDS[name]
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(base, work)
    code, said = run(command)
    assert code == 0, said
    sound, operations = contents(work), int(said.rpartition("operations: ")[2])
    outcomes: Counter[str] = Counter()
    wrong = []
    for first, kind in enumerate(FAULTS, start=1):
        for position in range(min(first, STEP), operations + 1, STEP):
            outcome, problem = check(run, base, command, sound, position, kind)
            outcomes[f"{kind} {outcome}"] += 1
            if problem:
                wrong.append(f"{kind} at operation {position} of {operations}: {outcome}, {problem}")
    print(f"{name}, {operations} operations: {dict(outcomes)}")
    assert not wrong, f"{len(wrong)} of {outcomes.total()}:\n" + "\n".join(wrong[:20])
