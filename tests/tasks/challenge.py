"""Files of the multi-task challenge, written for tests."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from affcache.tasks.challenge_file import FILES, HEADER

Line = tuple[float | None, float | None, int | None, Sequence[int] | None]  # valence, arousal, expression, units


def challenge_lines(labels: Mapping[tuple[str, int], Line]) -> list[str]:
    """Return a line for each (video, frame number), with the marks where there is no label."""
    lines = []
    for (video, number), (valence, arousal, expression, units) in labels.items():
        values = [-5 if valence is None else valence, -5 if arousal is None else arousal]
        values += [-1 if expression is None else expression, *(units or [-1] * 12)]
        lines.append(",".join([f"{video}/{number:05d}.jpg", *map(str, values)]))
    return lines


def write_challenge(folder: Path, split: str, labels: Mapping[tuple[str, int], Line]) -> Path:
    """Write the file of a split."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILES[split]
    path.write_text("\n".join([HEADER, *challenge_lines(labels)]) + "\n")
    return path
