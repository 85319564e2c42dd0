"""Tables of frame features as other tools write them, for tests."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.parquet

KINDS = ("csv", "parquet", "npz")


def write_table(
    path: Path, videos: Sequence[str], frames: Sequence[int], features: npt.NDArray[Any], names: Sequence[str] = ()
) -> Path:
    """Write a table by its suffix; one column a feature, or without names one of lists, or one array, but in CSV."""
    names = names or [f"x{column}" for column in range(features.shape[1])] if path.suffix == ".csv" else names
    keys: dict[str, Any] = {"video": list(videos), "frame": list(frames)}
    columns: Mapping[str, Any] = {name: features[:, column] for column, name in enumerate(names)}
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*keys, *columns])
            writer.writerows(zip(*keys.values(), *(column.tolist() for column in columns.values()), strict=True))
    elif path.suffix == ".parquet":
        lists = pyarrow.array(list(features.astype("f4")), pyarrow.list_(pyarrow.float32()))
        pyarrow.parquet.write_table(pyarrow.table({**keys, **(columns or {"embedding": lists})}), path)
    else:
        np.savez(path, **{name: np.array(key) for name, key in keys.items()}, **(columns or {"embedding": features}))
    return path
