"""The text file beside a store that names every crop which can't be read, with the reason."""

from pathlib import Path

import numpy as np

from affcache.crops.crop_list import CropList
from affcache.store.reading import UNREADABLE, EmbeddingStore


def list_unreadable(store: EmbeddingStore, crops: CropList, reasons: dict[int, str]) -> Path | None:
    """Name every unreadable crop, with the reason, in a text file beside the store; remove a list of none."""
    path = store.path.with_name(store.path.name + ".unreadable.txt")
    rows = np.flatnonzero(store.status == UNREADABLE)
    if not len(rows):
        path.unlink(missing_ok=True)
        return None
    known: dict[str, str] = {}  # from the list that an earlier run left
    if path.is_file():
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        known = dict(line.split("\t", 1) for line in lines if "\t" in line)
    named = [(str(crops.path(int(row))), reasons.get(int(row))) for row in rows]
    text = "".join(f"{crop}\t{reason or known.get(crop, 'unreadable')}\n" for crop, reason in named)
    path.write_text(text, encoding="utf-8", errors="surrogateescape")  # file names may be any bytes
    return path
