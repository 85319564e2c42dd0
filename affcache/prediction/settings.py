"""The settings of using trained heads on faces that nobody labelled."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from affcache.faces.settings import DetectionSettings
from affcache.scoring.settings import NEWEST
from affcache.settings import Settings, setting

LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")  # as the hub calls them

OVERLAYS = (".mp4", ".jpg", ".jpeg", ".png", "")


@dataclass(frozen=True)
class PredictSettings(DetectionSettings):
    """Predict with trained heads: photos, videos, crops or an embedding store in, a table with a row a face out."""

    inputs: tuple[Path, ...] = setting(
        (),
        "Photos, videos, folders of them, folders or archives of crops, what 'affcache faces' made, or stores.",
        default_text="none",
    )
    store: tuple[Path, ...] = setting(
        (),
        "A store, as among the inputs; for heads of several encoders one of each, in any order.",
        default_text="none",
    )
    run: tuple[Path, ...] = setting(
        (),
        "Run folder, published folder or hf-hub:OWNER/NAME; of several of one task the probabilities are averaged.",
        default_text=NEWEST,
    )
    out: Path | None = setting(None, "Table to write: FILE.csv or FILE.parquet.", default_text="none")
    columns: str = setting(
        "affcache",
        "How columns are called: openface has action units as AU01_c (present) and AU01_p (its probability).",
        choices=("affcache", "openface"),
    )
    weights: str = setting(
        "",
        "How much each run counts where several are averaged: numbers in their order, 0.6,0.4.",
        default_text="all alike",
    )
    smooth: str = setting(
        "none", "Smooth over the frames of a person: by their mean or their median.", choices=("none", "mean", "median")
    )
    smooth_width: int | None = setting(None, "Frame numbers in a smoothing window, odd.", default_text="none")
    decide: str = setting(
        "plain",
        "How probabilities become decisions: plain, or by the rule that score --decide fitted or --calibrate fitted.",
        choices=("plain", "fitted"),
    )
    overlay: Path | None = setting(
        None,
        "Video (.mp4) or picture with boxes, ids and the leading outputs drawn in; a folder for several inputs.",
        default_text="none",
    )
    page: Path | None = setting(
        None, "HTML page with a timeline of every person, and frames to look at.", default_text="none"
    )
    device: str = setting("auto", "Where encoder and heads run: auto, cpu, cuda, cuda:1, ...")
    batch_size: int | None = setting(
        None, "Crops per encoder call.", default_text="what fits up to 512 on a GPU, 16 on the CPU"
    )
    model: tuple[str, ...] = setting(
        (),
        "Where the heads' encoder is now, if it isn't where it was; of several, of each in the order of the runs.",
        default_text="as the runs say",
    )
    pretrained: tuple[str, ...] = setting((), "Likewise, of its weights.", default_text="as the runs say")

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from self.expect("batch_size", at_least=1)
        if self.out is not None and self.out.suffix.lower() not in (".csv", ".parquet"):
            yield f"--out is {self.out}; expected a file that ends in .csv or .parquet, which say its kind."
        if self.weights and self.decide == "fitted":
            yield "--weights and --decide fitted are both given; expected one: a fitted rule has its own weights."
        if (self.smooth == "none") != (self.smooth_width is None):
            yield "--smooth and --smooth-width go together; expected both or none."
        if self.smooth_width is not None and (self.smooth_width < 1 or self.smooth_width % 2 == 0):
            yield f"--smooth-width is {self.smooth_width}; expected an odd number, so that a frame is in the middle."
        if self.smooth_width is not None and 1 < self.smooth_width <= 2 * self.every:
            yield (
                f"--smooth-width is {self.smooth_width} frame numbers, in which no other of each {self.every}th frame "
                f"lies; expected at least {2 * self.every + 1}."
            )
        if self.overlay is not None and self.overlay.suffix.lower() not in OVERLAYS:
            yield f"--overlay is {self.overlay}; expected FILE.mp4, or FILE.jpg or .png of a photo, or a folder."
        if self.page is not None and self.page.suffix.lower() not in (".html", ".htm"):
            yield f"--page is {self.page}; expected a file that ends in .html."


@dataclass(frozen=True)
class PublishSettings(Settings):
    """Make a folder of a run's head that others can load: head, description, model card. Nothing is uploaded."""

    run: Path | None = setting(None, "Run folder, or a published head to publish anew.", default_text=NEWEST)
    out: Path | None = setting(None, "Folder to write, empty or new.", default_text="none; it is needed")
    data: str = setting("", "What the model card calls the training data.", default_text="not named")
    license: str = setting("unknown", "Licence of the head, as the hub calls it, such as cc-by-nc-4.0.")
    card: Path | None = setting(None, "Markdown file that goes into the model card.", default_text="none")
    onnx: bool = setting(
        False, "Write the head as ONNX too, alone and behind its encoder; pip install 'affcache[onnx]' enables it."
    )

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not LICENCE.fullmatch(self.license):
            yield f"--license is {self.license!r}; expected a name as the hub has them, such as mit or cc-by-nc-4.0."
