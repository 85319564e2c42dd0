"""What an extraction keeps account of on its way: where the time went, what could not be read, what was converted."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

STAGES = ("decode", "copy", "encode", "write")


@dataclass
class ExtractionStats:
    """Of one process, or gathered from several.

    A stage's seconds are those for which it held the run up, as the thread that feeds the encoder sees it. Stages
    overlap, so this is not the work that each one did: while the encoder is busy, decoding costs nothing. The seconds
    add up to the run's duration, but for bookkeeping.
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    unreadable: dict[int, str] = field(default_factory=dict)  # row -> why its crop can't be read
    modes: Counter[str] = field(default_factory=Counter)  # crops read, by Pillow's mode

    def charge(self, stage: str, seconds: float) -> None:
        """Charge seconds to one stage."""
        self.seconds[stage] += seconds

    def divide(self, seconds: float, parts: Mapping[str, float]) -> None:
        """Charge seconds to several stages, in proportion to ``parts``."""
        whole = sum(parts.values()) or 1.0
        for stage, part in parts.items():
            self.charge(stage, seconds * part / whole)

    def shares(self) -> dict[str, float]:
        """Return the fraction of the charged time per stage; each in [0, 1], their sum 1 (or 0 before the start)."""
        spent = sum(self.seconds.values()) or 1.0
        return {stage: seconds / spent for stage, seconds in self.seconds.items()}

    def take(self, other: "ExtractionStats") -> None:
        """Add what another process kept account of."""
        for stage, seconds in other.seconds.items():
            self.charge(stage, seconds)
        self.unreadable |= other.unreadable
        self.modes.update(other.modes)


def shares_text(shares: Mapping[str, float]) -> str:
    """Write shares for people: ``decode 71%, copy 1%, encode 22%, write 6%``."""
    return ", ".join(f"{stage} {share:.0%}" for stage, share in shares.items())


def bottleneck(shares: Mapping[str, float], *, workers: int, cores: int, device: str, precision: str) -> str:
    """Return one sentence: which stage holds the run up, how much, and the flag to turn; empty before the start.

    ``workers`` are threads that decode, on a machine of so many ``cores``.
    """
    stage = max(shares, key=lambda name: shares[name])
    if not shares[stage]:
        return ""
    return (
        f"{stage}-bound ({shares[stage]:.0%}): "
        + {
            "decode": _about_decoding(workers, cores),
            "copy": "moving crops to the device takes longest; raise --batch-size, or make the crops smaller",
            "encode": _about_encoding(device, precision, waiting=1 - shares[stage]),
            "write": "the encoder waits for the disk; put --store on a faster, local one",
        }[stage]
    )


def _about_decoding(workers: int, cores: int) -> str:
    if workers < cores:
        return f"the encoder waits for crops; raise --workers (now {workers}, of {cores} cores)"
    return (
        f"the encoder waits for crops although --workers is {workers} on {cores} cores; read --crops from a faster "
        "disk or one .zip or .tar, or use a machine with more cores"
    )


def _about_encoding(device: str, precision: str, waiting: float) -> str:
    if device.startswith("cuda"):
        faster = "--precision bf16" if precision == "fp32" else "a smaller --model, or a faster GPU"
    else:
        faster = (
            "--device cuda" if precision != "fp32" else "--device cuda, or --precision bf16 where it is exact enough"
        )
    limit = "the encoder is the limit" if waiting < 0.1 else f"the encoder takes longest, though it waits {waiting:.0%}"
    return f"{limit}; what makes it faster is {faster}"
