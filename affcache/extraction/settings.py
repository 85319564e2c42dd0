"""The settings of stage one: what extract and doctor can be told."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from affcache.settings import (
    CROPS,
    CROPS_TEXT,
    MODEL,
    MODEL_TEXT,
    PRETRAINED,
    STORE_TEXT,
    EngineSettings,
    Settings,
    default_store,
    flag,
    setting,
)


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
    every: int = setting(1, "Encode each K-th frame of a video only: frames 1, 1 + K, 1 + 2 K, ...")
    model: str = setting(MODEL, MODEL_TEXT)
    pretrained: str = setting(
        PRETRAINED,
        "Pretrained tag, checkpoint FILE or TAG:FILE, or random:SEED for random weights; of timm FILE or random:SEED.",
    )
    activation: str = setting(
        "auto", "Activation that open_clip's weights were trained with.", choices=("auto", "quick_gelu", "gelu")
    )
    image_size: int | None = setting(
        None, "Pixels on a side that crops are resized to, where the network can.", default_text="the network's own"
    )
    mean: str | None = setting(
        None, "Mean of red, green and blue, R,G,B for values in [0, 1].", default_text="what goes with the weights"
    )
    std: str | None = setting(None, "Likewise, their standard deviation.", default_text="what goes with the weights")
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
        yield from self.expect("batch_size", "workers", "every", at_least=1)
        yield from self.expect("image_size", at_least=16, at_most=2048)
        for name in ("mean", "std"):
            if getattr(self, name) is not None and self.colours(name) is None:
                yield f"{flag(name)} is {getattr(self, name)!r}; expected three numbers, such as 0.485,0.456,0.406."
        if not self.crops:
            yield "--crops is empty; expected at least one folder."

    def usual_store(self) -> Path:
        """Return where the store lies unless --store says otherwise."""
        return default_store(self.model, self.pretrained, self.image_size, self.every)

    def colours(self, name: str) -> tuple[float, ...] | None:
        """Return mean or std as numbers; None where it isn't said, or isn't three numbers (std above 0)."""
        try:
            found = tuple(map(float, (getattr(self, name) or "").split(",")))
        except ValueError:
            return None
        sound = len(found) == 3 and all(map(math.isfinite, found)) and (name == "mean" or min(found) > 0)
        return found if sound else None


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
