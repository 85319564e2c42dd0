"""The settings of every command: one frozen dataclass each, a sentence with the unit for each field.

These classes are the only place where a setting's name, default and meaning stand. The command line is made from
them, affcache.toml is checked against them, and the Python functions take the same names.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from affcache.ablate_settings import AblateSettings
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
class ExtractSettings(Settings):
    """Encode face crops into an embedding store."""

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
        yield from self.at_least("batch_size", 1)
        yield from self.at_least("workers", 1)
        if not self.crops:
            yield "--crops is empty; expected at least one folder."


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
class DoctorSettings(ExtractSettings):
    """Check device, model, crops and disk for an extraction with these settings, and say how long it will take."""


@dataclass(frozen=True)
class BenchExtractSettings(Settings):
    """Measure the extraction pipeline's rate against the bare encoder's."""

    crops: tuple[Path, ...] = setting(
        (), "Folder or archive of crops; may be given several times.", default_text="the shipped practice faces"
    )
    model: str = setting(MODEL, "open_clip model name, hf-hub:OWNER/NAME, or local-dir:FOLDER.")
    pretrained: str = setting("random:0", "Weights, as for extract; random ones are as fast as any.")
    precision: str = setting(
        "auto", "Number format of the encoder, as for extract.", choices=("auto", "fp32", "bf16", "fp16")
    )
    batch_size: int | None = setting(
        None, "Crops per encoder call.", default_text="what fits up to 512 on a GPU, 16 on the CPU"
    )
    workers: int | None = setting(None, "Threads that read and decode crops.", default_text="one per core, at most 16")
    device: str = setting("auto", "Where the encoder runs: auto, cpu, cuda, cuda:1, ...")
    compile: str = setting("auto", "Let torch compile the encoder: auto does on a GPU.", choices=("auto", "on", "off"))
    seconds: float = setting(20.0, "How long each measurement takes, in seconds, about.")
    rounds: int = setting(3, "Measurements of each, bare and pipeline in turn.")

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each value that is out of range."""
        for name in ("batch_size", "workers", "rounds"):
            yield from self.at_least(name, 1)
        yield from self.at_least("seconds", 0, excluded=True)


@dataclass(frozen=True)
class BenchStoreSettings(Settings):
    """Measure a store's reads and writes against plain files and chunked HDF5."""

    rows: int = setting(200_000, "Rows of the matrix; 4,096 or more.")
    width: int = setting(768, "Values in a row.")
    reads: int = setting(20, "Random reads of 4,096 rows from each layout.")
    folder: Path | None = setting(
        None, "Folder on the disk to measure, for temporary files.", default_text="the system's temporary folder"
    )

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each value that is out of range."""
        yield from self.at_least("rows", 4096)  # one random read
        for name in ("width", "reads"):
            yield from self.at_least(name, 1)


@dataclass(frozen=True)
class BenchFitSettings(Settings):
    """Measure a training step against its bare matrix products and against the published loop."""

    rows: int = setting(20_000, "Random embeddings to train on.")
    width: int = setting(768, "Values in an embedding.")
    batch_size: int = setting(32, "Frames per step.")
    precision: str = setting(
        "fp32", "Number format of the step's matrix products; the bare ones are fp32.", choices=("fp32", "bf16")
    )
    device: str = setting("auto", "Where the head trains: auto, cpu, cuda, cuda:1, ...")
    steps: int = setting(200, "Steps of each measurement; the published loop makes a tenth of them.")
    rounds: int = setting(5, "Measurements of each, in turn.")
    published: str = setting("on", "Whether to measure the published loop's stand-in too.", choices=("on", "off"))

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each value that is out of range."""
        for name in ("width", "steps", "rounds"):
            yield from self.at_least(name, 1)
        yield from self.at_least("batch_size", 2)  # BatchNorm needs two frames
        yield from self.at_least("rows", self.batch_size)


@dataclass(frozen=True)
class BenchAblateSettings(Settings):
    """Measure what heads trained side by side cost, against one head alone."""

    heads: tuple[int, ...] = setting(
        (4, 16, 64), "How many side by side; several times for several.", default_text="4, 16 and 64"
    )
    rows: int = setting(20_000, "Random embeddings to train on.")
    width: int = setting(768, "Values in an embedding.")
    batch_size: int = setting(32, "Frames per step.")
    precision: str = setting("fp32", "Number format of the step's matrix products.", choices=("fp32", "bf16"))
    device: str = setting("auto", "Where the heads train: auto, cpu, cuda, cuda:1, ...")
    steps: int = setting(192, "Steps of one head in each measurement; H heads make an H-th of them, but at least 3.")
    rounds: int = setting(5, "Measurements of each, in turn.")

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each value that is out of range."""
        for name in ("width", "steps", "rounds"):
            yield from self.at_least(name, 1)
        yield from self.at_least("batch_size", 2)  # BatchNorm needs two frames
        yield from self.at_least("rows", self.batch_size)
        if not self.heads or min(self.heads) < 2:
            yield f"--heads is {self.heads}; expected numbers of at least 2, each is compared with one head."


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
