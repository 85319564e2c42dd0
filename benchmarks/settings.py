"""The settings of the benchmarks."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from affcache.settings import MODEL, MODEL_TEXT, Settings, setting


@dataclass(frozen=True)
class BenchExtractSettings(Settings):
    """Measure the extraction pipeline's rate against the bare encoder's."""

    crops: tuple[Path, ...] = setting(
        (), "Folder or archive of crops; may be given several times.", default_text="the shipped practice faces"
    )
    model: str = setting(MODEL, MODEL_TEXT)
    pretrained: str = setting("random:0", "Weights, as for extract; random ones are as fast as any.")
    image_size: int | None = setting(None, "As for extract.", default_text="the network's own")
    precision: str = setting(
        "auto", "Number format of the encoder, as for extract.", choices=("auto", "fp32", "bf16", "fp16")
    )
    batch_size: int | None = setting(
        None, "Crops per encoder call.", default_text="what fits up to 512 on a GPU, 16 on the CPU"
    )
    workers: int | None = setting(None, "Threads that read and decode crops.", default_text="one per core, at most 16")
    device: str = setting("auto", "Where the encoder runs: auto, cpu, cuda, cuda:1, ...")
    compile: str = setting("off", "Let torch compile the encoder.", choices=("on", "off"))
    seconds: float = setting(20.0, "How long each measurement takes, in seconds, about.")
    rounds: int = setting(3, "Measurements of each, bare and pipeline in turn.")

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each value that is out of range."""
        yield from self.expect("batch_size", "workers", "rounds", at_least=1)
        yield from self.expect("seconds", more_than=0)


@dataclass(frozen=True)
class BenchPredictSettings(Settings):
    """Measure predict on a video against finding its faces alone, and against encoding them alone."""

    video: Path | None = setting(None, "Video to predict, of one face.", default_text="none")
    detector: str = setting("yunet", "Face detector: yunet, fetched on first use, or the path of its file.")
    model: str = setting(MODEL, MODEL_TEXT)
    pretrained: str = setting("random:0", "Weights, as for extract; random ones are as fast as any.")
    workers: int | None = setting(None, "Threads that find faces.", default_text="one per core, at most 16")
    device: str = setting("auto", "Where the encoder runs: auto, cpu, cuda, cuda:1, ...")
    times: int = setting(1, "How often the video is predicted in each round.")
    rounds: int = setting(3, "Measurements of each, in turn.")

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each value that is out of range."""
        yield from self.expect("workers", "times", "rounds", at_least=1)


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
        yield from self.expect("rows", at_least=4096)  # one random read
        yield from self.expect("width", "reads", at_least=1)


@dataclass(frozen=True)
class BenchFitSettings(Settings):
    """Measure a training step against the matrix products that it needs and against the reference loop."""

    rows: int = setting(20_000, "Random embeddings to train on.")
    width: int = setting(768, "Values in an embedding.")
    batch_size: int = setting(32, "Frames per step.")
    precision: str = setting(
        "fp32", "Number format of products with weights, the step's and the bare ones.", choices=("fp32", "bf16")
    )
    device: str = setting("auto", "Where the head trains: auto, cpu, cuda, cuda:1, ...")
    steps: int = setting(200, "Steps of each measurement; the reference loop makes a tenth of them.")
    rounds: int = setting(5, "Measurements of each, in turn.")
    published: str = setting(
        "on", "Whether to measure the reference loop, a stand-in for the published one.", choices=("on", "off")
    )

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each value that is out of range."""
        yield from self.expect("width", "steps", "rounds", at_least=1)
        yield from self.expect("batch_size", at_least=2)  # BatchNorm needs two frames
        yield from self.expect("rows", at_least=self.batch_size)


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
        yield from self.expect("width", "steps", "rounds", at_least=1)
        yield from self.expect("batch_size", at_least=2)  # BatchNorm needs two frames
        yield from self.expect("rows", at_least=self.batch_size)
        if not self.heads or min(self.heads) < 2:
            yield f"--heads is {self.heads}; expected numbers of at least 2, each is compared with one head."


@dataclass(frozen=True)
class BenchGpuSettings(Settings):
    """Measure everything that only a GPU can tell, within a budget of time."""

    device: str = setting("auto", "What is measured: auto, cuda, cuda:1, or cpu for a rehearsal at toy sizes.")
    toy: bool = setting(False, "Toy sizes on a GPU too: do all parts run? The numbers mean nothing.")
    parts: tuple[str, ...] = setting((), "Measure only this part; several times for several.", default_text="all")
    budget: float = setting(390.0, "Seconds in which it ends; parts that would go over it are left out.")
    out: Path = setting(Path("gpu.json"), "File that takes the results, written anew after each part.")

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each value that is out of range."""
        yield from self.expect("budget", more_than=0)
        if not self.out.absolute().parent.is_dir():
            yield f"--out is {self.out}, in a folder that isn't there; expected a file in one that is."
