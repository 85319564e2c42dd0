"""The settings of every command: one frozen dataclass each, a sentence with the unit for each field.

These classes are the only place where a setting's name, default and meaning stand. The command line is made from
them, affcache.toml is checked against them, and the Python functions take the same names.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from affcache.errors import ConfigError

CROPS = (Path("data/Aff-Wild2/cropped_aligned"), Path("data/Aff-Wild2/cropped_aligned_new_50_vids"))
ANNOTATIONS = Path("data/Aff-Wild2/annotations")
FEATURES = Path("data/features")
RUNS = Path("runs")
MODEL, PRETRAINED = "ViT-L-14", "openai"


def setting(default: Any, sentence: str, *, choices: tuple[str, ...] = (), default_text: str = "") -> Any:
    """Declare one field: its default, a sentence on what it is (with the unit), and what values it may take."""
    return field(default=default, metadata={"help": sentence, "choices": choices, "default_text": default_text})


class Settings:
    """Base of the settings classes: checks choices and ranges, and reports every problem at once."""

    def __post_init__(self) -> None:
        problems = [*self._choice_problems(), *self.problems()]
        if problems:
            raise ConfigError("\n".join(problems))

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each value that is out of range. Subclasses add theirs."""
        yield from ()

    def _choice_problems(self) -> Iterator[str]:
        for declared in dataclasses.fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            choices, value = declared.metadata["choices"], getattr(self, declared.name)
            if choices and value not in choices:
                yield f"{flag(declared.name)} is {value!r}; expected one of {', '.join(choices)}."

    def at_least(self, name: str, smallest: float, *, excluded: bool = False) -> Iterator[str]:
        """Yield a problem unless the number is at least ``smallest`` (or above it, when that is ``excluded``)."""
        value = getattr(self, name)
        if value is not None and not (value > smallest if excluded else value >= smallest):
            yield f"{flag(name)} is {value}; expected {'more than' if excluded else 'at least'} {smallest}."


def flag(name: str) -> str:
    """Return the command-line flag of a field."""
    return "--" + name.replace("_", "-")


def default_store(model: str = MODEL, pretrained: str = PRETRAINED) -> Path:
    """Return where the store of an encoder lies unless said otherwise: data/features/<model>-<pretrained>.h5."""
    if model.startswith(("hf-hub:", "local-dir:")):
        own = model.partition(":")[2].rstrip("/").rpartition("/")[2]
        parts = [own, pretrained if pretrained.startswith("random:") else ""]
    else:
        parts = [model, Path(pretrained).stem if Path(pretrained).suffix else pretrained]
    name = "-".join(part.replace("/", "-").replace(":", "-") for part in parts if part)
    return FEATURES / f"{name}.h5"


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
class FitSettings(Settings):
    """Train a head on a store and labels. The defaults are the recipe "paper" (arXiv 2403.09915)."""

    task: str = setting("expr", "What to predict, such as expr or au.")
    store: Path | None = setting(None, "The embedding store.", default_text="data/features/<model>-<pretrained>.h5")
    annotations: Path = setting(ANNOTATIONS, "Folder with the label files, as the organisers lay them out.")
    run: Path | None = setting(None, "Run folder to write.", default_text="runs/<task>-<date>-<time>")
    resume: bool = setting(False, "Continue an interrupted run from its last finished epoch.")
    epochs: int = setting(32, "Passes over the training frames.")
    batch_size: int = setting(32, "Frames per step.")
    lr: float = setting(1e-3, "Learning rate of AdamW at the start.")
    lr_minimum: float = setting(1e-5, "Learning rate at the bottom of the cosine.")
    lr_half_period: float = setting(0.25, "Epochs from top to bottom of the cosine, as a fraction of all epochs.")
    weight_decay: float = setting(1e-4, "Decoupled weight decay of AdamW.")
    alpha: float = setting(0.5, "CVaR level in (0, 1]: the share of worst losses that counts; 1 is the plain mean.")
    rho: float = setting(0.5, "Radius of SAM's perturbation, in parameter norm; 0 is plain AdamW.")
    dropout: float = setting(0.6, "Dropout probability after each hidden layer, in [0, 1).")
    hidden_layers: int = setting(3, "Hidden layers of the head; 0 makes it linear.")
    hidden_width: int = setting(768, "Units of each hidden layer.")
    normalize: str = setting(
        "none", "What to do to an embedding first: nothing, or scale it to length 1.", choices=("none", "l2")
    )
    seed: int = setting(0, "Seed of initial weights, order of frames and dropout.")
    device: str = setting("auto", "Where the head trains: auto, cpu, cuda, cuda:1, ...")

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each value that is out of range."""
        for name in ("epochs", "hidden_width"):
            yield from self.at_least(name, 1)
        yield from self.at_least("batch_size", 2)  # BatchNorm needs two frames
        yield from self.at_least("lr", 0, excluded=True)
        yield from self.at_least("lr_half_period", 0, excluded=True)
        for name in ("lr_minimum", "weight_decay", "rho", "hidden_layers", "seed"):
            yield from self.at_least(name, 0)
        if not 0 < self.alpha <= 1:
            yield f"--alpha is {self.alpha}; expected more than 0 and at most 1."
        if not 0 <= self.dropout < 1:
            yield f"--dropout is {self.dropout}; expected at least 0 and less than 1."
        if self.resume and self.run is None:
            yield "--resume doesn't say which run to continue; expected --run DIR with it."


@dataclass(frozen=True)
class ScoreSettings(Settings):
    """Score a run on a split."""

    run: Path | None = setting(None, "Run folder to score.", default_text="the newest one under runs/")
    split: str = setting("validation", "Which labels to score against.", choices=("validation", "train"))
    store: Path | None = setting(None, "The embedding store.", default_text="the one the run was trained on")
    annotations: Path | None = setting(
        None, "Folder with the label files.", default_text="the one the run was trained on"
    )
    device: str = setting("auto", "Where the head runs: auto, cpu, cuda, cuda:1, ...")


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


COMMANDS: dict[str, type[Settings]] = {
    "extract": ExtractSettings,
    "fit": FitSettings,
    "score": ScoreSettings,
    "sample": SampleSettings,
    "demo": DemoSettings,
    "doctor": DoctorSettings,
    "bench extract": BenchExtractSettings,
    "bench store": BenchStoreSettings,
    "import": ImportSettings,
    "export": ExportSettings,
}
