"""Whether a store may be continued: it must be of the same crops, through the same encoder."""

from collections.abc import Mapping
from typing import Any

from affcache.crops.crop_list import CropList
from affcache.errors import StoreError
from affcache.store.layout import differing_fields, fingerprint
from affcache.store.reading import EmbeddingStore

FORWARD = "Choose another --store FILE for these, or delete that store to make it anew."


def require_same_encoder(store: EmbeddingStore, description: Mapping[str, Any]) -> None:
    """Raise StoreError when a store was made with another encoder than the one described, saying what differs."""
    if store.encoder_fingerprint != fingerprint(description):
        lines = "\n  ".join(differing_fields(store.encoder, description))
        raise StoreError(
            f"{store.path} was made with another encoder. Expected the same one; these differ (store against now):\n"
            f"  {lines}\n{FORWARD}"
        )


def require_same_crops(store: EmbeddingStore, crops: CropList) -> None:
    """Raise StoreError when a store was made of other crops, saying what differs."""
    differences = []
    if store.video_names != crops.video_names:
        gone = sorted(set(store.video_names) - set(crops.video_names))
        new = sorted(set(crops.video_names) - set(store.video_names))
        differences += [f"{len(v)} videos {what} (first: {v[0]})" for v, what in ((gone, "gone"), (new, "new")) if v]
    elif len(store) != len(crops):
        differences.append(f"{len(store):,} crops in the store, {len(crops):,} now")
    elif (store.frame_number != crops.frame_number).any() or (store.video_start != crops.video_start).any():
        differences.append("the frame numbers")
    if differences:
        raise StoreError(
            f"{store.path} was made of other crops. Expected the same ones; these differ: {'; '.join(differences)}. "
            f"{FORWARD}"
        )
