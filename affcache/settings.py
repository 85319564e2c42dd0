"""The settings of every command: one frozen dataclass each, a sentence with the unit for each field.

These classes are the only place where a setting's name, default and meaning stand. The command line is made from
them, affcache.toml is checked against them, and the Python functions take the same names.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from affcache.ablate_settings import AblateSettings
from affcache.bench_settings import BenchAblateSettings, BenchExtractSettings, BenchFitSettings, BenchStoreSettings
from affcache.engine_settings import EngineSettings
from affcache.fit_settings import FitSettings
from affcache.score_settings import ReportSettings, ScoreSettings, SubmitSettings
from affcache.settings_base import (
    ANNOTATIONS,
    CROPS,
    FEATURES,
    MODEL,
    PRETRAINED,
    RUNS,
    Settings,
    default_store,
    flag,
    setting,
)

__all__ = [
    "ANNOTATIONS",
    "COMMANDS",
    "CROPS",
    "FEATURES",
    "MODEL",
    "PRETRAINED",
    "RUNS",
    "AblateSettings",
    "BenchAblateSettings",
    "BenchExtractSettings",
    "BenchFitSettings",
    "BenchStoreSettings",
    "FitSettings",
    "ReportSettings",
    "ScoreSettings",
    "Settings",
    "SubmitSettings",
    "default_store",
    "flag",
    "setting",
]


@dataclass(frozen=True)
class EncodingSettings(Settings):
    """Which crops, which encoder, and how it is run."""

    crops: tuple[Path, ...] = setting(
        CROPS,
        "Folder that holds one folder of crops per video, or a .zip or .tar of it; may be given several times over.",
        default_text="data/Aff-Wild2/cropped_aligned and cropped_aligned_new_50_vids beside it",
    )
    crop_list: Path | None = setting(
        None,
        "Encode only the crops that this text file names, a path a line; s-Aff-Wild2's label files serve as they are.",
        default_text="every crop found",
    )
    store: Path | None = setting(
        None, "The embedding store to make or to continue.", default_text="data/features/<model>-<pretrained>.h5"
    )
    model: str = setting(MODEL, "open_clip model name, hf-hub:OWNER/NAME, or local-dir:FOLDER.")
    pretrained: str = setting(PRETRAINED, "Pretrained tag, checkpoint file, or random:SEED for seeded random weights.")
    activation: str = setting(
        "auto", "Activation the weights were trained with.", choices=("auto", "quick_gelu", "gelu")
    )
    precision: str = setting(
        "auto",
        "Number format of the encoder: auto is the fastest of the device that agrees with fp32, or the store's own.",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    batch_size: int | None = setting(
        None, "Crops per encoder call.", default_text="the store's own; what fits up to 512 on a GPU, 16 on the CPU"
    )
    workers: int | None = setting(None, "Threads that read and decode crops.", default_text="one per core, at most 16")
    device: str = setting("auto", "Where the encoder runs: auto, cpu, cuda, cuda:1, ...")
    compile: str = setting(
        "auto",
        "Let torch compile the encoder: auto does on a GPU from 50,000 crops on.",
        choices=("auto", "on", "off"),
    )
    view: str = setting(
        "plain",
        "What to encode: the crops as they are, or (flip) mirrored ones too, into a second matrix beside the first.",
        choices=("plain", "flip"),
    )
    retry_unreadable: bool = setting(False, "Try crops again that could not be read before.")

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each value that is out of range."""
        yield from super().problems()
        yield from self.at_least("batch_size", 1)
        yield from self.at_least("workers", 1)
        if not self.crops:
            yield "--crops is empty; expected at least one folder."


@dataclass(frozen=True)
class ExtractSettings(EncodingSettings, EngineSettings):
    """Encode face crops into an embedding store."""


@dataclass(frozen=True)
class SampleSettings(Settings):
    """Render practice faces with known expressions and action units, in Aff-Wild2's layout."""

    videos: int = setting(30, "Videos to render, train and validation together.")
    frames: int = setting(40, "Frames per video, about.")
    seed: int = setting(0, "Seed of identities, timelines, poses and lighting.")

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each value that is out of range."""
        yield from self.at_least("frames", 1)
        yield from self.at_least("seed", 0)


@dataclass(frozen=True)
class DemoSettings(Settings):
    """Run the whole pipeline on the shipped sample."""

    out: Path = setting(Path("demo"), "Folder for the store and the runs.")
    model: str | None = setting(
        None, "open_clip model to use instead of a small one with random weights.", default_text="small, random"
    )
    pretrained: str = setting("", "Pretrained tag or checkpoint file that goes with --model.")
    seed: int = setting(0, "Seed of the heads' training.")


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
    store: Path | None = setting(
        None, "The embedding store to make.", default_text="data/features/<model>-<pretrained>.h5"
    )
    model: str | None = setting(
        None, "Encoder that made the embeddings, as open_clip names it.", default_text="what an export says, or unknown"
    )
    pretrained: str = setting("", "Pretrained tag of that encoder.")


@dataclass(frozen=True)
class ExportSettings(Settings):
    """Write the embeddings of a store, with their frames and provenance, for other tools."""

    store: Path | None = setting(
        None, "The embedding store to export.", default_text="data/features/<model>-<pretrained>.h5"
    )
    format: str = setting(
        "npy",
        "What to write: npy is a folder, the others are one file.",
        choices=("npy", "parquet", "safetensors"),
    )
    out: Path | None = setting(
        None, "Where it goes: a folder for npy, else a file.", default_text="beside the store, named after it"
    )


@dataclass(frozen=True)
class DoctorSettings(EncodingSettings):
    """Check device, model, crops and disk for an extraction with these settings, and say how long it will take."""


COMMANDS: dict[str, type[Settings]] = {
    "extract": ExtractSettings,
    "fit": FitSettings,
    "score": ScoreSettings,
    "ablate": AblateSettings,
    "submit": SubmitSettings,
    "report": ReportSettings,
    "sample": SampleSettings,
    "demo": DemoSettings,
    "doctor": DoctorSettings,
    "bench fit": BenchFitSettings,
    "bench extract": BenchExtractSettings,
    "bench ablate": BenchAblateSettings,
    "bench store": BenchStoreSettings,
    "import": ImportSettings,
    "export": ExportSettings,
}
