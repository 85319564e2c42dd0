"""What settings classes are made of: fields with a sentence, checks that report all problems, default places."""

import dataclasses
from collections.abc import Iterator
from dataclasses import field
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
