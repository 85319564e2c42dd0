"""The settings of import and export."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from affcache.settings import STORE_TEXT, Settings, setting


@dataclass(frozen=True)
class ImportSettings(Settings):
    """Make an embedding store of embeddings or frame features that another tool, or affcache export, wrote."""

    sources: tuple[Path, ...] = setting(
        (),
        "What to import: HDF5 files, folders with img_emb/ and metadata/, what affcache export wrote, or tables: .csv, "
        ".parquet or .npz, by video and frame.",
        default_text="none; at least one is needed",
    )
    list: tuple[Path, ...] = setting(
        (),
        "List of frames, path<TAB>label, of each HDF5 file, in the order of the files; may be given several times.",
        default_text="none",
    )
    store: Path | None = setting(None, "The embedding store to make.", default_text=STORE_TEXT)
    model: str | None = setting(
        None, "Encoder that made the embeddings, as open_clip names it.", default_text="what an export says, or unknown"
    )
    pretrained: str = setting("", "Pretrained tag of that encoder.")
    name: str | None = setting(
        None, "What the features of tables are, instead of an encoder: audio, landmarks.", default_text="not a table"
    )
    columns: str = setting(
        "",
        "Columns of tables that are features: names separated by commas, in which * stands for anything.",
        default_text="all but video and frame",
    )
    missing: str = setting(
        "refuse", "What becomes of rows of tables in which a value is missing or NaN.", choices=("refuse", "drop")
    )

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.name is not None and not re.fullmatch(r"\w[\w.+-]{0,99}", self.name):
            yield f"--name is {self.name!r}; expected letters, digits, and _ . + - between them, such as audio."
        if self.name is None and (self.columns or self.missing != "refuse"):
            yield "--columns and --missing are of tables. Give --name too, or leave them out."
        if self.name is not None and self.list:
            yield "--list is of HDF5 files, --name of tables. Give one of them."


@dataclass(frozen=True)
class ExportSettings(Settings):
    """Write the embeddings of a store, with their frames and provenance, for other tools."""

    store: Path | None = setting(None, "The embedding store to export.", default_text=STORE_TEXT)
    format: str = setting(
        "npy",
        "What to write: npy is a folder, the others are one file.",
        choices=("npy", "parquet", "safetensors"),
    )
    out: Path | None = setting(
        None, "Where it goes: a folder for npy, else a file.", default_text="beside the store, named after it"
    )
