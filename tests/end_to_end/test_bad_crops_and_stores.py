"""What people meet on the command line: bad crops, bad stores, a full disk, Ctrl-C; a message and an exit code each."""

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from affcache.cli.app import app
from affcache.store.reading import EmbeddingStore
from affcache.store.writing import StoreWriter, create_store
from tests.conftest import NAMED_ONLY, crop_list, write_crops, write_tiny_encoder

REPOSITORY = Path(__file__).parents[2]
Command = Callable[..., Result]


@pytest.fixture
def affcache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run a command line in an empty folder, where no affcache.toml is."""
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def extract(affcache: Command, tmp_path: Path, tiny_encoder: str) -> Command:
    """Run 'affcache extract' on crops/ with the tiny encoder into s.h5; further words come last and win."""
    words = ("extract", "--crops", "crops", "--store", "s.h5", "--model", tiny_encoder, "--device", "cpu")
    return lambda *further: affcache(*words, *further)


def check_refusal(result: Result, message: str) -> None:
    """Exit 2, nothing on standard output, and the message at the end of standard error."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert f"Error: {message}" in result.stderr
    assert "Traceback" not in result.output


def put(name: str, contents: bytes) -> None:
    path = Path("crops") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents)


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


PIXELS = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
JPEG = encoded(Image.fromarray(PIXELS), "JPEG")


def test_no_crops_found(extract: Command) -> None:
    Path("crops/v").mkdir(parents=True)
    check_refusal(extract(), "No crops found in crops. Expected files like <folder>/<video>/00001.jpg. Say where")
    put("00001.jpg", JPEG)
    check_refusal(
        extract(), "No crops found in crops. Expected files like <folder>/<video>/00001.jpg. crops itself holds"
    )
    assert not Path("s.h5").exists()


def test_no_crops_folder(extract: Command, affcache: Command) -> None:
    check_refusal(
        extract(), "The crops folder crops does not exist or is not a folder. Expected a folder that holds one"
    )
    check_refusal(
        affcache("extract"), "The crops folder data/Aff-Wild2/cropped_aligned does not exist or is not a folder."
    )


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        (JPEG[: len(JPEG) // 2], "damaged: image file is truncated"),
        (b"", "the file is empty (0 bytes)"),
        (b"this is text\n" * 100, "not an image"),
        (encoded(Image.new("RGB", (1, 1)), "PNG"), "1x1 pixels; a face crop has 8 to 8000 on a side"),
    ],
    ids=["truncated", "zero bytes", "not an image", "1x1"],
)
def test_an_only_crop_that_can_not_be_read(extract: Command, contents: bytes, reason: str) -> None:
    put("v/00001.jpg", contents)
    result = extract()
    check_refusal(result, f"None of the 1 crops could be read. The first one, crops/v/00001.jpg: {reason}")
    assert "mend them, then run the same command again with --retry-unreadable." in result.stderr
    assert Path("s.h5.unreadable.txt").read_text().startswith(f"crops/v/00001.jpg\t{reason}")
    put("v/00001.jpg", JPEG)
    mended = extract("--retry-unreadable")
    assert mended.exit_code == 0
    assert "1: 1 encoded, 0 unreadable" in mended.stdout


@pytest.mark.parametrize(
    ("contents", "mode"),
    [
        (encoded(Image.fromarray(PIXELS[:, :, 0]), "JPEG"), "L"),
        (encoded(Image.fromarray(PIXELS).convert("CMYK"), "JPEG"), "CMYK"),
        (encoded(Image.fromarray(PIXELS[:, :, 0].astype(np.uint16) * 257), "PNG"), "I;16"),
    ],
    ids=["grey", "cmyk", "16-bit"],
)
def test_an_only_crop_that_is_converted(extract: Command, affcache: Command, contents: bytes, mode: str) -> None:
    put("v/00001.png", contents)
    result = extract()
    assert result.exit_code == 0, result.output
    assert "1: 1 encoded, 0 unreadable" in result.stdout
    assert ["converted", "1", mode] in [line.split() for line in result.stdout.splitlines()]
    assert affcache("verify", "s.h5").exit_code == 0


def test_some_bad_crops_do_not_stop_the_others(extract: Command) -> None:
    write_crops(Path("crops"), {"a": range(1, 9)})
    put("a/00003.jpg", b"")
    result = extract()
    assert result.exit_code == 0
    assert "8: 7 encoded, 1 unreadable" in result.stdout
    assert "listed in s.h5.unreadable.txt" in result.stdout
    assert "next: affcache fit --task expr --store s.h5" in result.stdout
    assert "8 crops in 1 video" in result.stderr


@pytest.fixture
def store(tmp_path: Path, extract: Command) -> Path:
    write_crops(tmp_path / "crops", {"a": range(1, 9), "b": range(1, 5)})
    assert extract().exit_code == 0
    return tmp_path / "s.h5"


def check_all_commands(affcache: Command, extract: Command, message: str) -> None:
    for command in ("info", "verify"):
        check_refusal(affcache(command, "s.h5"), message)
    check_refusal(extract(), message)


def test_a_store_of_another_format_version(affcache: Command, extract: Command, store: Path) -> None:
    with h5py.File(store, "r+") as file:
        file.attrs["format_version"] = 7
    message = "s.h5 has store format version 7; this affcache reads version 1. Use the affcache version that wrote it"
    check_all_commands(affcache, extract, message)


def test_a_store_cut_short(affcache: Command, extract: Command, store: Path) -> None:
    os.truncate(store, store.stat().st_size // 2)
    message = "s.h5 can't be read as an embedding store: it is cut short, damaged or no store at all"
    check_all_commands(affcache, extract, message)


def test_no_store_and_no_hdf5_file(affcache: Command, extract: Command) -> None:
    for command in ("info", "verify"):
        check_refusal(affcache(command, "s.h5"), "There is no embedding store at s.h5. Make one with 'affcache extract")
    Path("s.h5").write_bytes(JPEG)
    write_crops(Path("crops"), {"a": [1]})
    check_all_commands(affcache, extract, "s.h5 can't be read as an embedding store")
    assert Path("s.h5").read_bytes() == JPEG


def test_a_store_from_another_encoder(extract: Command, store: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = write_tiny_encoder(tmp_path / "other", seed=1)
    result = extract("--model", other)
    check_refusal(result, "s.h5 was made with another encoder. Expected the same one; these differ")
    assert "  weights_sha256: '" in result.stderr
    assert "Choose another --store FILE for these, or delete that store to make it anew." in result.stderr


def test_a_store_of_other_crops(extract: Command, store: Path) -> None:
    put("c/00001.jpg", JPEG)
    message = "s.h5 was made of other crops. Expected the same ones; these differ: 1 video new (first: c)."
    check_refusal(extract(), message)


def test_a_store_that_is_being_written(extract: Command, affcache: Command, store: Path) -> None:
    holder = "import sys\nfrom pathlib import Path\nfrom affcache.progress import Listener\n"
    holder += "from affcache.store.writing import writing_lock\n"
    holder += "with writing_lock(Path(sys.argv[1]), Listener()):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(store)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        check_refusal(extract(), "s.h5 is being written by another process. Wait until that is done, or stop")
        assert affcache("info", "s.h5").exit_code == 0  # looking is allowed
        other.kill()
    assert extract().exit_code == 0


def test_no_space_on_the_disk(extract: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    write_crops(Path("crops"), {"a": range(1, 9)})
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 100, 100))
        result = extract()
    check_refusal(
        result, "No space for the store s.h5: 8 rows of 24 values need 0.000 GB, 0.000 GB are free. Free some"
    )
    assert not list(Path().glob("s.h5*[!k]"))
    assert extract().exit_code == 0


def test_a_store_where_none_can_be(extract: Command) -> None:
    write_crops(Path("crops"), {"a": [1]})
    Path("file").touch()
    result = extract("--store", "file/s.h5")
    check_refusal(result, "file can't be written: File exists. Expected a folder that can be written, with room.")


def test_an_encoder_without_weights(extract: Command) -> None:
    write_crops(Path("crops"), {"a": [1]})
    result = extract("--model", "local-dir:nowhere")
    check_refusal(result, "There is no open_clip_config.json in the folder of --model local-dir:nowhere. Expected an")


def test_verify_of_damaged_and_unfinished_stores(affcache: Command, store: Path) -> None:
    assert "s.h5 is sound: 12 rows, every block matches its checksum" in affcache("verify", "s.h5").stdout
    with h5py.File(store, "r+") as file:
        file["features"][3, 1] += 1
    check_refusal(affcache("verify", "s.h5"), "s.h5: block 0 (rows 0 to 11) is corrupt: its features don't match their")
    unfinished = store.with_name("unfinished.h5")
    create_store(unfinished, crop_list({"a": range(5)}), 4, {"model": "m"}, NAMED_ONLY)
    with StoreWriter(unfinished) as writer:
        writer.commit(0, np.ones((2, 4), np.float16), np.ones(2, np.uint8))
    check_refusal(
        affcache("verify", "unfinished.h5"), "unfinished.h5 is incomplete: 3 of 5 rows are still to be encoded"
    )
    looked = affcache("info", "unfinished.h5")
    assert looked.exit_code == 0
    assert "False" in next(line for line in looked.stdout.splitlines() if line.startswith("complete"))


def only_json(result: Result) -> dict[str, object]:
    """The one JSON object that standard output is."""
    assert result.stdout.count("\n") == 1
    assert result.stdout.endswith("\n")
    parsed = json.loads(result.stdout)
    assert isinstance(parsed, dict)
    return parsed


def test_json_is_one_object_in_success_and_failure(affcache: Command, extract: Command, store: Path) -> None:
    summary = only_json(affcache("info", "s.h5", "--json"))
    assert (summary["rows"], summary["complete"], summary["width"]) == (12, True, 24)
    assert only_json(affcache("verify", "s.h5", "--json"))["sound"] is True
    store.unlink()
    result = only_json(extract("--json"))
    assert (result["rows"], result["encoded"], result["unreadable"]) == (12, 12, 0)
    assert {"rate", "shares"} <= result.keys()
    os.truncate(store, 1000)
    for failed in (extract("--json"), affcache("info", "s.h5", "--json"), affcache("verify", "s.h5", "--json")):
        assert failed.exit_code == 2
        error = only_json(failed)
        assert error["error"] == "StoreError"
        assert str(error["message"]).startswith("s.h5 can't be read as an embedding store")
        assert f"Error: {error['message']}" in failed.stderr
    assert only_json(extract("--json", "--crops", "none"))["error"] == "InputError"
    assert only_json(extract("--json", "--batch-size", "0")) == {
        "error": "ConfigError",
        "message": "--batch-size is 0; expected at least 1.",
    }


CROPS = 40
INTERRUPTING = """
import os, signal
from affcache.cli.app import main
from affcache.extraction.extract import BackgroundWriter
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have told its background processes to ignore it
add = BackgroundWriter.add
def interrupted(background, rows, encoded):
    add(background, rows, encoded)
    if rows[0] >= 8:
        os.kill(os.getpid(), signal.SIGINT)
BackgroundWriter.add = interrupted
main()
"""


def test_ctrl_c_keeps_what_is_done_and_the_same_command_continues(
    extract: Command, affcache: Command, tmp_path: Path, tiny_encoder: str
) -> None:
    write_crops(tmp_path / "crops", {"a": range(1, CROPS + 1)})
    words = ["extract", "--crops", "crops", "--store", "s.h5", "--model", tiny_encoder]
    words += ["--batch-size", "4", "--workers", "1", "--device", "cpu"]
    one_core = {**os.environ, "OMP_NUM_THREADS": "1"}  # more would have more batches under way, and decoded ahead
    command = [sys.executable, "-c", INTERRUPTING, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=one_core, check=False)
    assert done.returncode == 130, done.stderr
    assert done.stdout == ""
    continues = f"what was finished is kept; this continues: {shlex.join(['affcache', *words])}"
    assert f"Interrupted: {continues}" in done.stderr
    assert "Traceback" not in done.stderr
    counts = EmbeddingStore.open(tmp_path / "s.h5").counts
    assert counts["unreadable"] == 0
    assert 8 <= counts["encoded"] < CROPS
    continued = affcache(*words)
    assert continued.exit_code == 0, continued.output
    assert f"continuing: {counts['encoded']} of {CROPS:,} rows are committed" in continued.stderr
    assert f"{CROPS:,}: {CROPS:,} encoded, 0 unreadable" in continued.stdout
    assert affcache(*words[:4], "whole.h5", *words[5:]).exit_code == 0
    assert (tmp_path / "s.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()
