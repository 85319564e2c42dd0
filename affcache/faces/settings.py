"""The settings of finding faces in photos and videos."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from affcache.settings import MODEL, Settings, setting

DETECTION_SIDE = 1024  # pixels; YuNet loses faces of more than 600, which fill a picture of that size
SAME_PERSON = 0.93  # docs/commands/faces.md has what was measured


@dataclass(frozen=True)
class DetectionSettings(Settings):
    """Which frames are looked at, how faces are found, and how they are cut out."""

    faces: str = setting(
        "all", "Which faces of a frame count: all, or the one with the largest box.", choices=("all", "largest")
    )
    every: int = setting(1, "Look at each K-th frame only: frames 1, 1 + K, 1 + 2 K, ...")
    from_: float = setting(0.0, "Look at frames from this time on, in seconds.")
    to: float | None = setting(None, "Look at frames before this time, in seconds.", default_text="the end")
    detector: str = setting("yunet", "Face detector: yunet, fetched on first use, or the path of its file.")
    confidence: float = setting(0.7, "The least confidence, in (0, 1), with which the detector has to see a face.")
    detection_side: int = setting(
        DETECTION_SIDE, "Pixels of the longer side to which larger pictures are made smaller to find faces."
    )
    align: str = setting(
        "similarity",
        "How faces are cut out: turned and scaled to where aligned crops have eyes, nose and mouth, or (none) the "
        "square around the detector's box.",
        choices=("similarity", "none"),
    )
    margin: float = setting(0.1, "With --align none: what is left around the box, as a share of its longer side.")
    same_person: float = setting(
        SAME_PERSON, "Cosine of two tracks' mean embeddings from which on they are of one person; above 1 never."
    )
    workers: int | None = setting(None, "Threads that find faces.", default_text="one per core, at most 16")

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from self.expect("every", "workers", at_least=1)
        yield from self.expect("from_", at_least=0)
        yield from self.expect("confidence", more_than=0, less_than=1)
        yield from self.expect("detection_side", at_least=64, at_most=8192)
        yield from self.expect("margin", at_least=0, at_most=10)
        yield from self.expect("same_person", at_least=0, at_most=2)
        if self.to is not None and not self.to > self.from_:
            yield f"--to is {self.to:g}; expected more than --from, which is {self.from_:g}."


@dataclass(frozen=True)
class FacesSettings(DetectionSettings):
    """Find faces in photos and videos: aligned crops in Aff-Wild2's layout, and a table with a row for every frame."""

    inputs: tuple[Path, ...] = setting((), "Photos, videos, or folders of them.", default_text="none")
    out: Path | None = setting(None, "Folder for the crops and faces.parquet.", default_text="none")
    size: int = setting(112, "Pixels on a side of the crops; Aff-Wild2's have 112.")
    model: str | None = setting(
        None, f"Encoder, such as {MODEL}, whose embeddings join broken tracks of a person.", default_text="none"
    )
    pretrained: str = setting("", "Pretrained tag or checkpoint that goes with --model.")
    device: str = setting("auto", "Where that encoder runs: auto, cpu, cuda, cuda:1, ...")

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from self.expect("size", at_least=16, at_most=1024)
