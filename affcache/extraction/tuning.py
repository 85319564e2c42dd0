"""How an encoder is run on its device: crops per call, and whether torch compiles it.

Both change embeddings by rounding alone, but a continued store must equal an uninterrupted one to the byte. So neither
depends on a clock: the batch size is what fits the memory, and a store keeps what it was begun with.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from affcache.devices import resolve_device
from affcache.encoders.encoder import Encoder, Weights
from affcache.encoders.loading import AGREEMENT, check_faces, encoder_of, load_weights, smallest_cosine
from affcache.encoders.open_clip import RANDOM_WEIGHTS, checkpoint_of
from affcache.errors import first_line
from affcache.extraction.settings import EncodingSettings
from affcache.progress import Listener, counted

LARGEST_BATCH = 512  # on an H200 calls of 32 to 1,024 differ by 4 %: docs/performance.md
HERE = ("local-dir:", "onnx:", "python:")  # models that are not fetched, or fetch themselves
USUAL_SIDE = 224  # pixels of most encoders' input
CPU_BATCH = 16  # near the best of 1 to 64 for transformers; a convolutional network liked 8 a little better


def prepare_encoder(settings: EncodingSettings, recorded: Mapping[str, Any], listener: Listener) -> Encoder:
    """Load the encoder, and settle how it is run: as the store was begun, else as suits the device.

    Args:
        settings: model, weights, precision, device, batch size, compile.
        recorded: the encoder that the store to continue was begun with; empty for a new one.
        listener: hears what was chosen.

    Returns:
        The encoder; its description carries ``batch_size`` and ``compiled`` for a store to keep.
    """
    return tune_encoder(load_wanted(settings, listener), settings, recorded, listener)


def load_wanted(settings: EncodingSettings, listener: Listener) -> Weights:
    """Load the weights that the settings name, and say what is worth knowing of them."""
    say_loading(settings, listener)
    weights = load_weights(
        settings.model,
        settings.pretrained,
        activation=settings.activation,
        image_size=settings.image_size,
        mean=settings.colours("mean"),
        std=settings.colours("std"),
    )
    for remark in remarks_on(weights.description):
        listener.message(remark)
    return weights


def remarks_on(description: Mapping[str, Any]) -> list[str]:
    """Return sentences on an encoder that a user should read before it works for hours."""
    remarks = [f"the licence of its weights: {description['licence']}"] if description.get("licence") else []
    height, width = description["image_size"]
    if height * width > 2 * USUAL_SIDE**2:
        times = height * width / USUAL_SIDE**2
        remarks.append(
            f"it looks at {height} x {width} pixels, {times:.1f} times as many as at {USUAL_SIDE} x {USUAL_SIDE}, "
            f"where Aff-Wild2's crops have 112 x 112: --image-size {USUAL_SIDE} is quicker, if the network can"
        )
    return remarks


def say_loading(settings: EncodingSettings, listener: Listener) -> None:
    """Say that the encoder is loaded, which takes a while, and longer where its weights have to be fetched."""
    model, pretrained = settings.model, settings.pretrained
    here = model.startswith(HERE) or pretrained.startswith(RANDOM_WEIGHTS) or checkpoint_of(pretrained)[1]
    remark = "" if here else "; its weights are fetched if they are not here yet"
    listener.message(f"loading the encoder {model}{remark}")


def tune_encoder(
    weights: Weights, settings: EncodingSettings, recorded: Mapping[str, Any], listener: Listener
) -> Encoder:
    """Put weights on their device, and settle how they are run; as ``prepare_encoder``."""
    precision = recorded.get("precision", "auto") if settings.precision == "auto" else settings.precision
    encoder = encoder_of(weights, precision=precision, device=resolve_device(settings.device))
    batch_size = settings.batch_size or recorded.get("batch_size") or find_batch_size(encoder)
    wanted = recorded.get("compiled", False) if settings.compile == "auto" else settings.compile == "on"
    if wanted:
        encoder = compile_encoder(encoder, batch_size, listener)
    how = {"batch_size": batch_size, "compiled": encoder.compiled is not None}
    listener.message(
        f"encoding to D = {encoder.width} on {encoder.device} in {encoder.precision}, "
        f"{counted(batch_size, 'crop')} a call" + (", compiled" if how["compiled"] else "")
    )
    return replace(encoder, description={**encoder.description, **how})


def find_batch_size(encoder: Encoder) -> int:
    """Return the crops per encoder call: on a GPU the largest power of two, up to 512, that its memory takes.

    Raises:
        torch.OutOfMemoryError: not even one crop fits.
    """
    if encoder.device.type != "cuda":
        return CPU_BATCH
    crop = np.zeros((*encoder.preprocessing.size, 3), dtype=np.uint8)
    size = LARGEST_BATCH
    while size > 1:
        try:
            encoder.submit([crop] * size).wait()
            return size
        except torch.OutOfMemoryError:
            size //= 2
        torch.cuda.empty_cache()  # outside the handler, which keeps the failed call's tensors alive
    return size


def compile_encoder(encoder: Encoder, batch_size: int, listener: Listener) -> Encoder:
    """Compile a plain encoder with torch for calls of one size; keep it where that fails or changes the embeddings."""
    listener.message("compiling the encoder; this takes about a minute (--compile off does without)")
    faces = check_faces()[:batch_size]
    expected = encoder.encode(faces)
    compiled = replace(encoder, compiled=torch.compile(encoder.network, dynamic=False), fixed_batch=batch_size)
    try:
        cosine = smallest_cosine(compiled.encode(faces), expected)
    except Exception as error:  # a missing compiler, a driver, a graph it can't take: torch raises nearly anything
        listener.warning(f"torch.compile failed ({type(error).__name__}: {first_line(error)}); going on without it")
        return encoder
    if not cosine >= AGREEMENT:
        listener.warning(f"the compiled encoder agrees with the plain one to {cosine:.5f} only; going on without it")
        return encoder
    return compiled
