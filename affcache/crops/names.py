"""Names of videos: where folders give them, and which video a label file, a list or a template means."""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path

from affcache.errors import InputError

RELEASE = "cropped_aligned"  # how the folders of Aff-Wild2's crops begin
MOST_PARTS = 64  # of a name, or of a path, that are looked at


def canonical(video: str) -> str:
    """Return a video's name in the form in which names are compared: an accent may be a character of its own, or not.

    macOS writes names decomposed (NFD), nearly all else composed (NFC); they look the same.
    """
    return unicodedata.normalize("NFC", video)


def plain_path(path: str) -> str:
    """Return a path without the parts that say nothing."""
    return "/".join(part for part in path.split("/") if part not in ("", "."))


def names_below(folders: Sequence[str]) -> list[str]:
    """Name videos by their folders, in an archive or in paths: without the folders that all of them lie in.

    Nor do folders of Aff-Wild2's releases count, unless two videos would then share a name.

    Args:
        folders: (V,) each another; never "".
    """
    parts = [folder.split("/") for folder in folders]
    together = zip(*(one[:-1] for one in parts), strict=False)
    shared = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, together))
    names = ["/".join(one[shared:]) for one in parts]
    rest = [name.partition("/")[2] for name in names]
    in_releases = all(rest) and all(name.startswith(RELEASE) for name in names)
    return rest if in_releases and len(set(map(canonical, rest))) == len(rest) else names


class VideoNames:
    """Finds known videos by what a label file, a list or a template calls them; forms of accents don't matter.

    A name that is known as a whole is that video. Else it may be short, the end of one known name and no other; or it
    may have folders before it, as a path has: then it is the longest known name that it ends in, if that ends no other.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._index = {canonical(name): index for index, name in enumerate(names)}
        self._ends: dict[str, list[int]] = {}  # what follows a "/" in a name -> videos
        for name, index in self._index.items():
            for end in _ends(name):
                self._ends.setdefault(end, []).append(index)

    def match(self, asked: Iterable[str], source: Path) -> dict[str, int]:
        """Return the index of the video that each name means; names that mean none are left out.

        Two names may mean one video only where one is the end of the other.

        Raises:
            InputError: a name may mean several videos, or two may mean one; ``source`` is what has the names.
        """
        found: dict[str, int] = {}
        longest: dict[int, str] = {}
        for name in asked:
            plain = plain_path(canonical(name))
            meant = self._meant(plain)
            if len(meant) > 1:
                videos = ", ".join(self.names[index] for index in meant[:3]) + ", ..." * (len(meant) > 3)
                raise InputError(
                    f"{source}: {name} may be any of {len(meant)} videos, {videos}. Expected a name that only one "
                    f"has. Write the folders above too, as in {self.names[meant[0]]}."
                )
            for index in meant:
                shorter, longer = sorted((longest.get(index, plain), plain), key=len)
                if not f"/{longer}".endswith(f"/{shorter}"):
                    raise InputError(
                        f"{source}: {shorter} and {longer} may both be the video {self.names[index]}. Expected one of "
                        "them. Take the other out, or extract from a folder further up, so that names tell them apart."
                    )
                found[name], longest[index] = index, longer
        return found

    def _meant(self, name: str) -> list[int]:
        """Return the videos that a plain name may mean."""
        if name in self._index:
            return [self._index[name]]
        meant = self._ends.get(name, [])
        for end in _ends(name):
            if end in self._index:
                return sorted({*meant, self._index[end], *self._ends.get(end, ())})
        return meant


def _ends(name: str) -> Iterator[str]:
    """Yield what follows each "/" in a name, the longest first."""
    parts = name.split("/")[1:][-MOST_PARTS:]
    for first in range(len(parts)):
        yield "/".join(parts[first:])
