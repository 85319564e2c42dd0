"""Damages inputs at random and reads them: ``python -m tests.end_to_end.damage SEED KIND=COUNT...``

Each reading may end in an AffcacheError or in a right result. Whatever else comes up is printed, and where a reading
takes longer than ``SECONDS``, even within a library that hears no signal, the process ends with a stack.
"""

import faulthandler
import io
import json
import random
import resource
import shutil
import sys
import tarfile
import tempfile
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from affcache.ablation.grid import read_list
from affcache.ablation.summary import Outcome, Trial
from affcache.commands import SETTINGS
from affcache.config import find_config
from affcache.crops.archives import UnreadableCropError
from affcache.crops.crop_list import keep_listed
from affcache.crops.folders import open_archive
from affcache.crops.images import decode_crop
from affcache.errors import AffcacheError
from affcache.exchange.exporting import export_embeddings
from affcache.exchange.importing import import_embeddings
from affcache.files import write_json, write_tensors
from affcache.progress import Listener
from affcache.scoring.predict import TrainedRun
from affcache.store.description import fingerprint
from affcache.store.hdf5 import lookup3
from affcache.store.reading import EmbeddingStore
from affcache.submission.template import read_frame_counts, read_template
from affcache.tasks.label_files import read_label_file
from affcache.tasks.tasks import TASKS
from affcache.training.fit import fit
from affcache.training.run_folder import RunFolder
from tests.conftest import crop_list, make_learnable, write_store
from tests.exchange.sources import SHUFFLED, matrix, write_clip_retrieval, write_published
from tests.exchange.tables import write_table

SECONDS = 20
MEMORY = 2**30  # bytes that reading may take beside what the process has
EXTREMES = (b"\0", b"\xff", b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 7, (2**40).to_bytes(8, "little"), b"\x01\0\0\0")
TEXTS = (
    "\u2028", "\x85", "\x0c", "\x1c", "\r", "\n", "\r\n", "\ufeff", "\0", ",", "\t", "/", '"', "-", "9" * 25,
    "9" * 5000, "1e999", "nan", "2.5", "-1", "[" * 3000, "{" * 3000, "null", "true", "é", "../", "1_0", " ", "=", "#",
)  # fmt: skip
Damage = Callable[[bytes, random.Random], bytes]
Read = Callable[[Path], None]  # of a folder; raises AssertionError where a result is wrong


def damaged(contents: bytes, chance: random.Random) -> bytes:
    """Change, cut, double or replace some bytes."""
    at = chance.randrange(len(contents) + 1)
    length = chance.choice((1, 1, 2, 4, 8, 100, 1000))
    kind = chance.randrange(8)
    if kind == 0:
        return contents[:at]
    if kind == 1:
        return contents[:at] + contents[at + length :]
    if kind == 2:
        return contents[:at] + contents[at : at + length] * chance.choice((2, 5)) + contents[at + length :]
    if kind == 3:
        extreme = chance.choice(EXTREMES)
        return contents[:at] + extreme + contents[at + len(extreme) :]
    if kind == 4:
        return contents[:at] + chance.choice(TEXTS).encode() + contents[at:]
    if kind == 5:
        return contents[:at] + chance.randbytes(length) + contents[at + length :]
    changed = bytearray(contents or b"\0")
    for _ in range(chance.choice((1, 1, 1, 3))):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def damaged_store(contents: bytes, chance: random.Random) -> bytes:
    """Damage a store, mostly its structure, and often mend the checksums over it, as somebody with a purpose would."""
    if chance.random() < 0.3:
        return damaged(contents, chance)
    changed = bytearray(contents)
    blocks = [at for at in range(0, len(contents), 4096) if contents[at : at + 4] in (b"OHDR", b"OCHK", b"GCOL")]
    for _ in range(chance.choice((1, 1, 2))):
        at = chance.choice([0, *blocks]) + chance.randrange(chance.choice((48, 600)))
        value = chance.choice((*EXTREMES, chance.randbytes(1), chance.randbytes(2), bytes([changed[at] ^ 1])))
        changed[at : at + len(value)] = value
    if chance.random() < 0.7:
        mend_checksums(changed)
    return bytes(changed[: len(contents)])


def mend_checksums(contents: bytearray) -> None:
    contents[44:48] = lookup3(bytes(contents[:44])).to_bytes(4, "little")
    for at in range(0, len(contents), 4096):
        if contents[at : at + 4] == b"OHDR":
            flags = contents[at + 5]
            start = at + 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
            end = start + (1 << (flags & 3))
            end += int.from_bytes(contents[start:end], "little")
        elif contents[at : at + 4] == b"OCHK":
            end = at + 429  # of the store below
        else:
            continue
        if end + 4 <= len(contents):
            contents[end : end + 4] = lookup3(bytes(contents[at:end])).to_bytes(4, "little")


def stores(folder: Path) -> Read:
    features = np.random.default_rng(0).normal(size=(5000, 8)).astype(np.float16)
    sound = write_store(
        folder / "s.h5", {"a": range(1, 4001), "b_left": range(2, 2002, 2)}, features, unreadable=[3, 4500]
    )
    names = ("features", "status", "frame_number", "video_start")
    before = {name: np.array(getattr(sound, name)) for name in names}
    videos, encoder = sound.video_names, sound.encoder

    def read(folder: Path) -> None:
        store = EmbeddingStore.open(folder / "s.h5")
        store.summary()
        store.fingerprint()
        store.verify()
        if not store.index_sha256:  # as the oldest stores: nothing holds names and numbers
            return
        assert store.video_names == videos
        assert fingerprint(store.encoder) == fingerprint(encoder)
        for name in names:
            np.testing.assert_array_equal(getattr(store, name), before[name])

    return read


def labels(folder: Path) -> Read:
    rows = {
        "expr": ["4", "-1", "0", "7"] * 5,
        "au": ["0,1" * 1 + ",0" * 10] * 9,
        "va": ["0.5,-0.25", "-5,-5", "1,-1"] * 5,
    }
    for task, lines in rows.items():
        (folder / f"{task}.txt").write_text("\n".join([TASKS[task].header, *lines]) + "\n")

    def read(folder: Path) -> None:
        for task in rows:
            try:
                found, valid = read_label_file(folder / f"{task}.txt", TASKS[task])
            except AffcacheError:
                continue
            lines = (folder / f"{task}.txt").read_bytes().decode("utf-8-sig").rstrip().split("\n")[1:]
            expected = np.array([[float(value) for value in line.split(",")] for line in lines])
            expected = np.where((expected == -5) & (task == "va"), np.nan, expected)  # as labels have it
            assert len(found) == len(valid) == len(lines)
            np.testing.assert_allclose(found.ravel(), expected.ravel(), rtol=1e-6)

    return read


def lists(folder: Path) -> Read:
    lines = [f"{video}/{frame:05d}.jpg" for video in ("a", "b_left") for frame in range(1, 30)]
    (folder / "list.txt").write_text("image,x\n" + "\n".join(lines))
    (folder / "template.txt").write_text("image_location,\n" + ",\n".join(lines) + ",\n")
    (folder / "counts.csv").write_text("video,count\na,20\nb_left,30\n")
    crops = crop_list({"a": range(1, 20), "b_left": range(5, 30)})
    readers: dict[str, Callable[[Path], Any]] = {
        "list.txt": lambda path: keep_listed(crops, path),
        "template.txt": read_template,
        "counts.csv": read_frame_counts,
    }

    def read(folder: Path) -> None:
        for name, reader in readers.items():
            try:
                found = reader(folder / name)
            except AffcacheError:
                continue
            count = len(found[0]) if isinstance(found, tuple) else len(set(found.locations))
            assert 0 < count <= 10_000_000

    return read


def toml(folder: Path) -> Read:
    (folder / "affcache.toml").write_text(
        'crops = ["a", "b"]\nseed = 3\n[fit]\ntask = "au"\nrho = 0.1\n[ablate]\nvary = { alpha = [0.5, 1] }\n'
    )
    (folder / "list.toml").write_text('[erm]\nalpha = 1\nrho = 0\n[cvar]\nalpha = 0.3\nnormalize = "l2"\n')

    def read(folder: Path) -> None:
        for reader in (lambda: find_config(folder, SETTINGS), lambda: read_list(folder / "list.toml")):
            try:
                reader()
            except AffcacheError:
                continue

    return read


def runs(folder: Path) -> Read:
    store, annotations = make_learnable(folder, frames=8)
    recipe: dict[str, Any] = {"epochs": 2, "hidden_layers": 1, "hidden_width": 4, "batch_size": 16, "memory": 0.5}
    fit(store=store, annotations=annotations, run=folder / "run", **recipe)

    def read(folder: Path) -> None:
        run = RunFolder(folder / "run")
        try:
            opened = TrainedRun.on_store(run.path, (store,), "cpu", Listener())
            opened.logits_of_rows(np.arange(5), "plain", lambda count: None)
            opened.folder.read_history()
        except AffcacheError:
            pass
        fit(store=store, annotations=annotations, run=folder / "run", resume=True, **recipe)

    return read


def trials(folder: Path) -> Read:
    outcome = {"value": 0.5, "selected": 0.4, "best_epoch": 1, "diverged": None}
    write_json(folder / "result.json", outcome)
    (folder / "history.jsonl").write_text('{"epoch": 1, "train_loss": 0.5}\n')
    import torch

    sums = torch.rand(3, 8, 3, dtype=torch.float64)
    write_tensors(folder / "videos.safetensors", {"sums": sums}, {"videos": ["a", "b", "c"]})

    def read(folder: Path) -> None:
        found = Trial(None, None, None, RunFolder(folder)).read()  # type: ignore[arg-type]  # it reads the folder alone
        assert isinstance(found, Outcome)
        assert found.statistics is None or len(found.statistics) == len(found.videos)

    return read


def archives(folder: Path) -> Read:
    files = {f"v/{frame:05d}.jpg": bytes([frame]) * 300 for frame in range(5)}
    with zipfile.ZipFile(folder / "a.zip", "w") as packed, tarfile.open(folder / "b.tar", "w") as tar:
        for number, (name, data) in enumerate(files.items()):
            packed.writestr(name, data, compress_type=zipfile.ZIP_DEFLATED if number % 2 else zipfile.ZIP_STORED)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

    def read(folder: Path) -> None:
        for name in ("a.zip", "b.tar"):
            try:
                archive = open_archive(folder / name)
                for entry, member in archive.entries():
                    try:
                        data = archive.read(member)
                    except UnreadableCropError:
                        continue
                    assert name == "b.tar" or data in files.values(), entry
                archive.close()
            except AffcacheError:
                continue

    return read


def pictures(folder: Path) -> Read:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 36, 3), dtype=np.uint8)
    for kind, name in (
        ("JPEG", "jpg"),
        ("PNG", "png"),
        ("WEBP", "webp"),
        ("BMP", "bmp"),
        ("TIFF", "tif"),
        ("GIF", "gif"),
    ):
        Image.fromarray(pixels).save(folder / f"a.{name}", kind)
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(folder / "b.png")
    Image.fromarray(pixels).convert("CMYK").save(folder / "c.jpg")

    def read(folder: Path) -> None:
        for path in folder.iterdir():
            try:
                crop = decode_crop(path.read_bytes())
            except UnreadableCropError:
                continue
            assert crop.pixels.dtype == np.uint8
            assert crop.pixels.shape[2:] == (3,)

    return read


def imported(*, hdf5: bool) -> Callable[[Path], Read]:
    def make(folder: Path) -> Read:
        if hdf5:
            write_published(folder, matrix(4), SHUFFLED, name="plain")
            write_published(folder, matrix(4), SHUFFLED, name="packed", chunks=(2, 3), compression="gzip")
            sources: dict[str, tuple[str, ...]] = {"plain.h5": ("plain.txt",), "packed.h5": ("packed.txt",)}
        else:
            write_store(folder / "s.h5", {"a": [1, 2], "b": [5]}, matrix(3), unreadable=[1])
            for form, name in (("npy", "npy"), ("parquet", "x.parquet"), ("safetensors", "x.safetensors")):
                export_embeddings(store=folder / "s.h5", format=form, out=folder / name)
            write_clip_retrieval(folder / "clip", {"0": (matrix(4), SHUFFLED)})
            (folder / "s.h5").unlink()
            sources = {"npy": (), "x.parquet": (), "x.safetensors": (), "clip": ()}

        def read(folder: Path) -> None:
            for name, lists in sources.items():
                store = folder / f"{name}.store.h5"
                try:
                    import_embeddings(
                        sources=folder / name, list=[folder / one for one in lists], store=store, model="m"
                    )
                except AffcacheError:
                    continue
                EmbeddingStore.open(store).verify()

        return read

    return make


def tables(folder: Path) -> Read:
    features = np.arange(36, dtype=np.float32).reshape(12, 3) / 8
    videos, frames = ["a", "b", "c"] * 4, list(range(12))
    of_kind = {"x.csv": (), "x.parquet": (), "lists.parquet": (), "x.npz": (), "columns.npz": ("x", "y", "z")}
    for name, columns in {**of_kind, "x.parquet": ("x", "y", "z")}.items():
        write_table(folder / name, videos, frames, features, columns)

    def read(folder: Path) -> None:
        for name in of_kind:
            store = folder / f"{name}.store.h5"
            for missing in ("refuse", "drop"):
                try:
                    result = import_embeddings(sources=folder / name, store=store, name="own", missing=missing)
                except AffcacheError:
                    continue
                EmbeddingStore.open(store).verify()
                store.unlink()
                assert result.rows + result.rows_left_out < 100

    return read


KINDS: dict[str, tuple[Callable[[Path], Read], Damage]] = {
    "stores": (stores, damaged_store),
    "labels": (labels, damaged),
    "lists": (lists, damaged),
    "toml": (toml, damaged),
    "runs": (runs, damaged),
    "trials": (trials, damaged),
    "archives": (archives, damaged),
    "pictures": (pictures, damaged),
    "imports": (imported(hdf5=False), damaged),
    "hdf5": (imported(hdf5=True), damaged),
    "tables": (tables, damaged),
}


def resident() -> int:
    """Return the most bytes that this process, or one of its children, has had in memory."""
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * 1024


def main(kind: str, count: int, seed: int) -> dict[str, Any]:
    """Damage one file at a time, the others stay sound; return what was found."""
    make, damage = KINDS[kind]
    refused, failures = 0, list[str]()
    with tempfile.TemporaryDirectory() as temporary:
        sound, work = Path(temporary, "sound"), Path(temporary, "work")
        sound.mkdir()
        read = make(sound)
        shutil.copytree(sound, work)
        read(work)  # what is sound is read
        before = resident()
        candidates = sorted(path for path in sound.rglob("*") if path.is_file() and path.parent.name != "labels")
        files = [path for path in candidates if kind != "runs" or path.parent.name == "run"]
        for number in range(count):
            chance = random.Random(seed * 10**9 + number)
            shutil.rmtree(work)
            shutil.copytree(sound, work)
            path = work / chance.choice(files).relative_to(sound)
            path.write_bytes(damage(path.read_bytes(), chance))
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            try:
                read(work)
            except AffcacheError:
                refused += 1
            except BaseException:
                failures.append(f"{kind} {seed * 10**9 + number} {path.name}: {traceback.format_exc()}")
            faulthandler.cancel_dump_traceback_later()
    return {"kind": kind, "read": count, "refused": refused, "failures": failures, "memory": resident() - before}


def limit_memory() -> None:
    """Let no size that a file declares be allocated beyond what this process has and ``MEMORY``, with some room."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + 3 * MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


if __name__ == "__main__":
    seed, *counts = sys.argv[1:]
    limit_memory()
    print(json.dumps([main(kind, int(count), int(seed)) for kind, count in (one.split("=") for one in counts)]))
