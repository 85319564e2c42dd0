"""The settings of a report."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from affcache.scoring.settings import NEWEST, SplitSettings
from affcache.settings import CROPS, CROPS_TEXT, setting


@dataclass(frozen=True)
class ReportSettings(SplitSettings):
    """Write a run's report: one HTML file with scores, curves, timelines and the hardest frames."""

    run: Path | None = setting(None, "Run folder to report on.", default_text=NEWEST)
    crops: tuple[Path, ...] = setting(
        CROPS, "Folder or archive of crops, to show frames from; may be given several times.", default_text=CROPS_TEXT
    )
    out: Path | None = setting(None, "File to write.", default_text="report.html in the run folder")

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.weights:
            yield f"--weights is {self.weights!r}, which weighs several runs; expected none: a report is of one."
