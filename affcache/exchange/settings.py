"""The settings of import and export."""

from dataclasses import dataclass
from pathlib import Path

from affcache.settings import STORE_TEXT, Settings, setting


@dataclass(frozen=True)
class ImportSettings(Settings):
    """Make an embedding store of embeddings that another tool, or affcache export, wrote."""

    sources: tuple[Path, ...] = setting(
        (),
        "What to import: HDF5 files, folders with img_emb/ and metadata/, or what affcache export wrote.",
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
