"""From file to pixels: JPEG decoders against one another, and archives against folders.

    python -m benchmarks.reading --crops my/faces

Prints one JSON object: wall microseconds a crop for each decoder in one and two threads, whether their pixels are the
same, and for a folder, a zip and a tar of the same crops the microseconds to list one and to read one.
"""

import io
import json
import os
import tarfile
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

from affcache.crops.folders import find_crops
from affcache.crops.images import decode_crop
from benchmarks.shared import script_parser, spread, temporary_folder

ROUNDS = 5
MEMBERS = 100_000


def by_pillow(data: bytes) -> np.ndarray:
    """Decode with Pillow alone."""
    return np.asarray(Image.open(io.BytesIO(data), formats=("JPEG",)).convert("RGB"))


def by_torchvision(data: bytes) -> np.ndarray:
    """Decode with torchvision."""
    tensor = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    return tensor.permute(1, 2, 0).numpy()


DECODERS: dict[str, Callable[[bytes], np.ndarray]] = {
    "Pillow": by_pillow,
    "torchvision": by_torchvision,
    "simplejpeg": lambda data: simplejpeg.decode_jpeg(data, "RGB"),
    "affcache": lambda data: decode_crop(data).pixels,
}


def microseconds(decode: Callable[[bytes], np.ndarray], files: list[bytes], threads: int) -> float:
    """Return the wall time a crop: the median of some rounds, several crops a task."""
    tasks = [files[i : i + 25] for i in range(0, len(files), 25)]
    rounds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(ROUNDS):
            start = time.perf_counter()
            list(pool.map(lambda task: len([decode(data) for data in task]), tasks))
            rounds.append((time.perf_counter() - start) / len(files) * 1e6)
    return sorted(rounds)[ROUNDS // 2]


def pack(files: list[bytes], folder: Path) -> list[Path]:
    """Write MEMBERS crops as a folder, a zip and a tar, 5,000 to a video; return the three."""
    paths = [folder / "crops", folder / "crops.zip", folder / "crops.tar"]
    with zipfile.ZipFile(paths[1], "w") as zip_file, tarfile.open(paths[2], "w") as tar_file:
        for index in range(MEMBERS):
            data, name = files[index % len(files)], f"crops/video{index // 5000:03d}/{index % 5000 + 1:05d}.jpg"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
            zip_file.writestr(name, data)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar_file.addfile(entry, io.BytesIO(data))
    return paths


def listing_and_reading(root: Path) -> dict[str, float]:
    """Return microseconds to list a crop, and to read one at random, from the page cache."""
    start = time.perf_counter()
    crops = find_crops([root])
    listing = (time.perf_counter() - start) / len(crops) * 1e6
    rows = np.random.default_rng(0).permutation(len(crops))[:20_000].tolist()
    for _ in range(2):  # the first time fills the cache
        start = time.perf_counter()
        for row in rows:
            crops.read(row)
        reading = (time.perf_counter() - start) / len(rows) * 1e6
    return {"list": listing, "read": reading}


def main() -> None:
    """Measure, and print one JSON object."""
    parser = script_parser(__doc__)
    parser.add_argument("--crops", type=Path, required=True)
    parser.add_argument("--count", type=int, default=2000, help="JPEGs to decode, spread evenly over all")
    arguments = parser.parse_args()
    found = find_crops([arguments.crops])
    rows = spread(len(found), arguments.count)
    files = [data for data in map(found.read, rows) if data.startswith(b"\xff\xd8")]
    expected = [by_pillow(data) for data in files]
    decoders = {
        name: {
            "1 thread": microseconds(decode, files, 1),
            "2 threads": microseconds(decode, files, 2),
            "as Pillow": all(np.array_equal(decode(d), e) for d, e in zip(files, expected, strict=True)),
        }
        for name, decode in DECODERS.items()
    }
    with temporary_folder() as folder:
        places = {path.suffix or "folder": listing_and_reading(path) for path in pack(files, Path(folder))}
    print(json.dumps({"crops": len(files), "cores": os.cpu_count(), "decoders": decoders, "places": places}))


if __name__ == "__main__":
    main()
