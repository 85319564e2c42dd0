"""What an extraction keeps account of on its way: where the time went, what could not be read, what was converted."""

from collections import Counter
from dataclasses import dataclass, field

from affcache.extraction.timing import StageClock


@dataclass
class Account:
    """Of one process, or gathered from several."""

    clock: StageClock = field(default_factory=StageClock)
    unreadable: dict[int, str] = field(default_factory=dict)  # row -> why its crop can't be read
    modes: Counter[str] = field(default_factory=Counter)  # crops read, by Pillow's mode

    def take(self, other: "Account") -> None:
        """Add what another process kept account of."""
        for stage, seconds in other.clock.seconds.items():
            self.clock.add(stage, seconds)
        self.unreadable |= other.unreadable
        self.modes.update(other.modes)
