"""Several stores side by side: the frames that all of them have, with their embeddings one after the other."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from affcache.crops.names import canonical
from affcache.errors import ConfigError, InputError
from affcache.progress import Listener, counted
from affcache.store.description import SIDE_BY_SIDE, fingerprint
from affcache.store.frames import ENCODED, FrameIndex, Rows, shared_frames
from affcache.store.reading import BLOCK_ROWS, EmbeddingStore


@dataclass(frozen=True)
class JoinedStores(FrameIndex):
    """Stores of the same frames, read as one: an embedding is the concatenation of theirs, in their order."""

    parts: tuple[EmbeddingStore, ...]
    rows_of_parts: tuple[Rows, ...]  # (N,) of each: its row of every frame here; rising within a video

    def __repr__(self) -> str:
        widths = " + ".join(str(part.width) for part in self.parts)
        return f"<JoinedStores {self.path}: {len(self):,} x ({widths}), videos: {len(self.video_names):,}>"

    @property
    def width(self) -> int:
        """D, the number of values in one embedding."""
        return sum(part.width for part in self.parts)

    @property
    def known_names(self) -> tuple[str, ...]:
        here = set(map(canonical, self.video_names))
        every = {canonical(name): name for part in self.parts for name in part.video_names}
        return (*self.video_names, *(name for key, name in every.items() if key not in here))

    @property
    def encoder(self) -> dict[str, Any]:
        """The descriptions of all encoders, in the order of their embeddings."""
        return {SIDE_BY_SIDE: [part.encoder for part in self.parts]}

    @property
    def encoder_fingerprint(self) -> str:
        """A sha256 over what of all encoders changes the numbers."""
        return fingerprint(self.encoder)

    @property
    def views(self) -> list[str]:
        """The names of the further views that all of them have."""
        return [name for name in self.parts[0].views if all(name in part.views for part in self.parts)]

    def read(self, rows: Rows) -> npt.NDArray[np.float16]:
        """Return the embeddings (n, D) of some rows, as stored."""
        found, first = np.empty((len(rows), self.width), np.float16), 0
        for part, of in zip(self.parts, self.rows_of_parts, strict=True):
            for start in range(0, len(rows), BLOCK_ROWS):  # no second copy of all
                block = slice(start, start + BLOCK_ROWS)
                found[block, first : first + part.width] = part.features[of[rows[block]]]
            first += part.width
        return found

    def fingerprint(self) -> str:
        """Return a sha256 over what the stores hold."""
        return hashlib.sha256("\n".join(part.fingerprint() for part in self.parts).encode()).hexdigest()

    def view(self, name: str) -> "JoinedStores":
        """Open another view of the same crops, such as "flip", of each of the stores; StoreError as of one."""
        return replace(self, parts=tuple(part.view(name) for part in self.parts))

    def require_complete(self) -> None:
        """Raise StoreError unless every row of each store is encoded or known to be unreadable, and summed."""
        for part in self.parts:
            part.require_complete()

    def verify(self, on_block: Callable[[int, int], None] | None = None) -> None:
        """Read everything and check it, store by store; as ``EmbeddingStore.verify``."""
        for part in self.parts:
            part.verify(on_block)


AnyStore: TypeAlias = EmbeddingStore | JoinedStores


def open_stores(paths: Sequence[Path], listener: Listener) -> AnyStore:
    """Open a store, or several side by side, which must be complete; say what isn't in all of them.

    Raises:
        StoreError: one isn't there, is none, or is incomplete.
        InputError: no frame is in all of them.
        ConfigError: one is named twice.
    """
    if twice := {path for path in paths if sum(path.resolve() == other.resolve() for other in paths) > 1}:
        raise ConfigError(
            f"--store names {sorted(twice)[0]} twice. Expected stores that stand side by side, each once; "
            "'affcache ablate --vary store=a.h5,b.h5' compares stores."
        )
    stores = [EmbeddingStore.open(path) for path in paths]
    for store in stores:
        store.require_complete()
    if len(stores) == 1:
        return stores[0]
    joined = join_stores(stores)
    listener.message(account_of(joined))
    return joined


def join_stores(stores: Sequence[EmbeddingStore]) -> JoinedStores:
    """Put stores side by side, by video and frame number.

    Raises:
        InputError: no frame is in all of them.
    """
    frames, rows = shared_frames(stores)
    if not len(frames):
        examples = "; ".join(
            f"{store.path} has {store.video_names[0]}, frame {store.frame_number[0]}, ..."
            if len(store)
            else f"{store.path} has none"
            for store in stores
        )
        raise InputError(
            f"No frame has an embedding in all of {', '.join(str(store.path) for store in stores)}: {examples}. "
            "Expected stores of the same videos and frames, whose names and numbers agree. Extract or import them "
            "from the same crops, or name one --store FILE."
        )
    return JoinedStores(**vars(frames), parts=tuple(stores), rows_of_parts=tuple(rows))


def account_of(joined: JoinedStores) -> str:
    """Say in one line how many frames are in all stores, and how many each has that are left out."""
    left = [
        f"{counted(count, 'frame')} of {part.path}, not in all others"
        for part in joined.parts
        if (count := int((part.status == ENCODED).sum()) - len(joined))
    ]
    whole = f"{len(joined.parts)} stores side by side: {counted(len(joined), 'frame')} x {joined.width}"
    return f"{whole}; left out: {', '.join(left) or 'nothing'}"
