"""The settings of stage one: what extract and doctor can be told."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from affcache.settings import CROPS, CROPS_TEXT, MODEL, PRETRAINED, STORE_TEXT, EngineSettings, Settings, setting


@dataclass(frozen=True)
class EncodingSettings(Settings):
    """Which crops, which encoder, and how it is run."""

    crops: tuple[Path, ...] = setting(
        CROPS,
        "Folder that holds one folder of crops per video, or a .zip or .tar of it; may be given several times over.",
        default_text=CROPS_TEXT,
    )
    crop_list: Path | None = setting(
        None,
        "Encode only the crops that this text file names, a path a line; s-Aff-Wild2's label files serve as they are.",
        default_text="every crop found",
    )
    store: Path | None = setting(None, "The embedding store to make or to continue.", default_text=STORE_TEXT)
    model: str = setting(MODEL, "open_clip model name, hf-hub:OWNER/NAME, or local-dir:FOLDER.")
    pretrained: str = setting(
        PRETRAINED, "Pretrained tag, checkpoint FILE or TAG:FILE, or random:SEED for random weights."
    )
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
        "Let torch compile the encoder: auto does where the store was begun so.",
        choices=("auto", "on", "off"),
    )
    view: str = setting(
        "plain",
        "What to encode: the crops as they are, or (flip) mirrored ones too, into a second matrix beside the first.",
        choices=("plain", "flip"),
    )
    retry_unreadable: bool = setting(False, "Try crops again that could not be read before.")

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from self.expect("batch_size", "workers", at_least=1)
        if not self.crops:
            yield "--crops is empty; expected at least one folder."


@dataclass(frozen=True)
class ExtractSettings(EncodingSettings, EngineSettings):
    """Encode face crops into an embedding store."""


@dataclass(frozen=True)
class DoctorSettings(EncodingSettings):
    """Check device, model, crops and disk for an extraction with these settings, and say how long it will take."""

    detector: str | None = setting(
        None,
        "Face detector that tells aligned crops from photos: yunet, fetched, or its file.",
        default_text="one here",
    )
