"""Thousands of damaged files among sound ones: no crash, no hang, no gigabytes, no row shifted, each one listed."""

import io
import json
import os
import random
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
from PIL import Image

from affcache import EmbeddingStore, extract
from affcache.crops.images import FORMATS, LARGEST_SIDE, SMALLEST_SIDE
from tests.crops.test_images import smooth_pixels

SOME = 400
A_SOUND_ONE_EVERY = 20
REPOSITORY = Path(__file__).parents[2]
SECONDS = 300  # a hang, on any machine
MEMORY_MB = 2_500  # torch alone takes 900; the largest image that is let through, 8,000 pixels square, takes 192


def sound_files() -> list[bytes]:
    """One file of each kind that is read, and of the modes that people's tools write."""
    face = Image.fromarray(smooth_pixels(112, 112))
    files = []
    for mode, kind, options in [
        ("RGB", "JPEG", {"quality": 80}),
        ("RGB", "JPEG", {"progressive": True}),
        ("L", "JPEG", {}),
        ("CMYK", "JPEG", {}),
        ("RGB", "PNG", {}),
        ("RGBA", "PNG", {}),
        ("P", "PNG", {}),
        ("RGB", "WEBP", {}),
        ("RGB", "BMP", {}),
        ("RGB", "TIFF", {"compression": "tiff_lzw"}),
        ("P", "GIF", {}),
    ]:
        buffer = io.BytesIO()
        face.convert(mode).save(buffer, kind, **options)
        files.append(buffer.getvalue())
    return files


def with_size(data: bytes, side: int) -> bytes:
    """Return the file with another width and height declared, where its kind keeps them at a known place."""
    changed = bytearray(data)
    if data.startswith(b"\xff\xd8"):
        start = next(i for i in range(2, len(data)) if data[i] == 0xFF and data[i + 1] in (0xC0, 0xC2))
        changed[start + 5 : start + 9] = min(side, 65_535).to_bytes(2, "big") * 2
    elif data.startswith(b"\x89PNG"):
        changed[16:24] = side.to_bytes(4, "big") * 2
    elif data.startswith(b"BM"):
        changed[18:26] = side.to_bytes(4, "little") * 2
    elif data.startswith(b"GIF"):
        changed[6:10] = min(side, 65_535).to_bytes(2, "little") * 2
    else:  # WebP and TIFF: some number, somewhere near the start
        changed[20:24] = side.to_bytes(4, "little")
    return bytes(changed)


def flipped(data: bytes, generator: random.Random) -> bytes:
    changed = bytearray(data)
    reach = generator.choice((40, 700, len(data)))
    for _ in range(generator.choice((1, 2, 8, 60))):
        changed[generator.randrange(min(reach, len(data)))] ^= generator.randrange(1, 256)
    return bytes(changed)


def another_type(data: bytes, generator: random.Random) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.jpg", data)
    noise = generator.randbytes(2_000)
    kinds = (b"", b"\0" * 4096, b"text\n" * 300, archive.getvalue(), b"%PDF-1.7\n", b"%!PS-Adobe-3.0 EPSF-3.0\n", noise)
    kinds += (
        b"\xff\xd8\xff" + noise,
        b"\x89PNG\r\n\x1a\n" + noise,
        b"II*\0" + noise,
        b"RIFF\x10\0\0\0WEBPVP8 " + noise,
    )
    return generator.choice(kinds)


def declared_size(generator: random.Random) -> int:
    if generator.random() < 0.006:
        return LARGEST_SIDE - 1  # is let through, and takes half a second
    return generator.choice((0, 1, 7, 8, 300, LARGEST_SIDE + 1, 30_000, 2**31 - 1))


DAMAGES: list[Callable[[bytes, random.Random], bytes]] = [
    lambda data, generator: data[: generator.randrange(len(data))],
    flipped,
    another_type,
    lambda data, generator: with_size(data, declared_size(generator)),
    lambda data, generator: data + generator.randbytes(generator.randrange(1, 300)),
    lambda data, generator: data[: len(data) // 2] + data[len(data) // 2 + generator.randrange(1, 90) :],
]


def readable_by_pillow(data: bytes) -> bool:
    """Pillow's own verdict, without anything of affcache's; libjpeg's where data end early, which Pillow hides."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if min(image.size) < SMALLEST_SIDE or max(image.size) > LARGEST_SIDE:
                return False
            image.convert("RGB")
    except Exception:
        return False
    try:
        simplejpeg.decode_jpeg(data, "RGB")
    except ValueError as error:
        return not ("premature end of data" in str(error) or "marker 0xd9 instead" in str(error))
    return True


@pytest.fixture(scope="module", params=[600, pytest.param(10_000, marks=pytest.mark.slow)])
def damaged(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, npt.NDArray[np.bool_]]:
    """A folder of damaged and sound crops in two videos, and which rows Pillow reads."""
    root = tmp_path_factory.mktemp("damaged") / "crops"
    generator = random.Random(0)
    sound = sound_files()
    readable = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks
        for row in range(request.param * A_SOUND_ONE_EVERY // (A_SOUND_ONE_EVERY - 1)):
            data = generator.choice(sound)
            if row % A_SOUND_ONE_EVERY:
                data = generator.choice(DAMAGES)(data, generator)
            path = root / f"video{row // 6_000}" / f"{row % 6_000 + 1:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            readable.append(readable_by_pillow(data))
    return root, np.array(readable)


def test_damaged_files(damaged: tuple[Path, npt.NDArray[np.bool_]], tmp_path: Path, tiny_encoder: str) -> None:
    root, readable = damaged
    words = ["extract", "--crops", str(root), "--store", str(tmp_path / "s.h5"), "--model", tiny_encoder, "--json"]
    words += ["--precision", "fp32", "--device", "cpu", "--workers", "4"]
    with (tmp_path / "errors").open("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "affcache.cli", *words], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=errors
        )
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        process.stdout.close()
        errors.seek(0)
        said = errors.read()
    assert process.returncode == 0, said
    # decoders don't spill their remarks over the screen, but for libtiff, which nobody can silence in one thread
    assert len([line for line in said.splitlines() if not line.startswith("tempfile.tif: ")]) < 30, said
    result = json.loads(output)
    rows = len(readable)
    assert (result["rows"], result["encoded"], result["unreadable"]) == (rows, readable.sum(), rows - readable.sum())
    assert rows - readable.sum() > 0.3 * rows
    assert result["seconds"] < SECONDS
    assert usage.ru_maxrss / 1024 < MEMORY_MB
    store = EmbeddingStore.open(tmp_path / "s.h5")
    store.verify()
    np.testing.assert_array_equal(store.status == 1, readable)
    listed = Path(result["unreadable_list"]).read_text(encoding="utf-8").splitlines()
    names = [str(root / f"video{row // 6_000}" / f"{row % 6_000 + 1:05d}.jpg") for row in np.flatnonzero(~readable)]
    assert [line.split("\t")[0] for line in listed] == names
    assert all(line.split("\t")[1] not in ("", "unreadable") for line in listed)


def test_sound_crops_among_damaged_ones_have_their_own_embeddings(
    damaged: tuple[Path, npt.NDArray[np.bool_]], tmp_path: Path, tiny_encoder: str
) -> None:
    root, readable = damaged
    for path in sorted((root / "video0").iterdir())[:SOME]:  # a part is enough: rows are rows
        (tmp_path / "crops" / "v").mkdir(parents=True, exist_ok=True)
        os.link(path, tmp_path / "crops" / "v" / path.name)
    (tmp_path / "sound" / "v").mkdir(parents=True)
    for row in np.flatnonzero(readable[:SOME]):
        name = f"{row + 1:05d}.jpg"
        os.link(tmp_path / "crops" / "v" / name, tmp_path / "sound" / "v" / name)
    options = {"model": tiny_encoder, "precision": "fp32", "batch_size": 1, "device": "cpu"}
    extract(crops=(tmp_path / "crops",), store=tmp_path / "mixed.h5", **options)
    extract(crops=(tmp_path / "sound",), store=tmp_path / "sound.h5", **options)
    mixed, sound = EmbeddingStore.open(tmp_path / "mixed.h5"), EmbeddingStore.open(tmp_path / "sound.h5")
    assert len(mixed) == SOME
    assert (sound.status == 1).all()
    np.testing.assert_array_equal(mixed.frame_number[mixed.status == 1], sound.frame_number)
    np.testing.assert_array_equal(mixed.features[mixed.status == 1], sound.features)
