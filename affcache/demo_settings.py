"""The settings of demo."""

from dataclasses import dataclass
from pathlib import Path

from affcache.settings import Settings, setting


@dataclass(frozen=True)
class DemoSettings(Settings):
    """Run the whole pipeline on the shipped sample."""

    out: Path = setting(Path("demo"), "Folder for the store and the runs.")
    model: str | None = setting(
        None, "open_clip model to use instead of a small one with random weights.", default_text="small, random"
    )
    pretrained: str = setting("", "Pretrained tag or checkpoint file that goes with --model.")
    seed: int = setting(0, "Seed of the heads' training.")
