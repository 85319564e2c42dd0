"""The settings of the list of encoders."""

from collections.abc import Iterator
from dataclasses import dataclass

from affcache.settings import Settings, setting


@dataclass(frozen=True)
class EncodersSettings(Settings):
    """List encoders that extract takes, with the width of their embeddings, their input and their licence."""

    word: tuple[str, ...] = setting((), "What names contain; of several words, all.", default_text="any")

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not all(self.word):
            yield "WORD is empty; expected a part of a name, or none."
