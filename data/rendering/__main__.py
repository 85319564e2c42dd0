"""Renders practice faces with known expressions and action units, laid out as Aff-Wild2 lays out its data.

python -m data.rendering practice
python -m data.rendering practice --videos 200 --frames 300 --seed 7
"""

import argparse
import json
import sys
from pathlib import Path

from affcache.errors import InputError

from .sample import SampleSummary, SplitSummary, write_sample


def main(words: list[str] | None = None) -> int:
    """Render a sample, and say what can be done with it; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m data.rendering", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder to write; new or empty")
    parser.add_argument("--videos", type=int, default=30, help="videos, a third of them for validation [default: 30]")
    parser.add_argument("--frames", type=int, default=40, help="frames per video, about [default: 40]")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of identities, timelines, poses and lighting [default: 0]"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    given = parser.parse_args(words)
    try:
        summary = write_sample(
            given.folder, videos=given.videos, frames=given.frames, seed=given.seed, progress=show_progress
        )
    except InputError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    finally:
        print(file=sys.stderr)
    print(json.dumps(summary.to_json()) if given.json else text_of(summary))
    return 0


def show_progress(done: int, total: int) -> None:
    """Say on standard error how many frames are drawn."""
    print(f"\r{done:,} of {total:,} frames", end="", file=sys.stderr, flush=True)


def text_of(summary: SampleSummary) -> str:
    """Say what was written, and the two commands that go on with it."""

    def line(name: str, split: SplitSummary) -> str:
        return f"{name:10}  {split.crops:,} crops of {split.videos} videos"

    folder = summary.folder
    store = folder / "store.h5"
    return "\n".join(
        [
            f"{'folder':10}  {folder}",
            line("train", summary.train),
            line("validation", summary.validation),
            f"next: affcache extract --crops {folder / 'cropped_aligned'} --store {store}",
            f"      affcache fit --task expr --store {store} --annotations {folder / 'annotations'}",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
