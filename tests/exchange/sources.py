"""Sources as other tools write them, for tests: small, with known contents."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.parquet

SHUFFLED = ("data/b_left/00002.jpg", "data/a/00010.jpg", "data/b_left/00001.jpg", "data/a/00002.jpg")
IN_ORDER = (3, 1, 2, 0)  # a/2, a/10, b_left/1, b_left/2


def matrix(rows: int, width: int = 3, dtype: str = "float16", seed: int = 0) -> npt.NDArray[Any]:
    """Values that differ from each other; not of length 1."""
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(dtype)


def write_published(
    folder: Path,
    features: npt.NDArray[Any],
    paths: Sequence[str],
    *,
    split: str = "train",
    name: str = "",
    **options: Any,
) -> tuple[Path, Path]:
    """Write an HDF5 file and its list, as the published code does; return both."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = name or split
    with h5py.File(folder / f"{stem}.h5", "w") as file:
        file.create_dataset(f"{split}_features", data=features, **options)
    lines = "".join(f"{path}\t{index % 8}\n" for index, path in enumerate(paths))
    (folder / f"{stem}.txt").write_text(lines, encoding="utf-8")
    return folder / f"{stem}.h5", folder / f"{stem}.txt"


def write_clip_retrieval(
    folder: Path, parts: dict[str, tuple[npt.NDArray[Any], Sequence[str | None]]], column: str = "image_path"
) -> Path:
    """Write a folder of clip-retrieval; the keys are the numbers of the parts as they stand in the names."""
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    for number, (features, paths) in parts.items():
        np.save(folder / "img_emb" / f"img_emb_{number}.npy", features)
        table = pyarrow.table({column: pyarrow.array(paths, pyarrow.string()), "caption": ["" for _ in paths]})
        pyarrow.parquet.write_table(table, folder / "metadata" / f"metadata_{number}.parquet")
    return folder


def unit(features: npt.NDArray[Any]) -> npt.NDArray[np.float16]:
    """Divide each row by its length, in float16, as clip-retrieval does."""
    return (features / np.linalg.norm(features.astype(np.float32), axis=1, keepdims=True)).astype(np.float16)
