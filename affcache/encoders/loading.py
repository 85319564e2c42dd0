"""Loading an encoder: which kind it is, its weights, the device it runs on, and its number format.

The fastest format that a device has is held against fp32 before it is used.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from affcache.crops.images import decode_crop
from affcache.devices import processor_facts, resolve_device
from affcache.encoders import open_clip
from affcache.encoders.encoder import Encoder, ImageTower, Weights
from affcache.errors import ConfigError
from affcache.files import shipped

AGREEMENT = 0.999  # smallest cosine to fp32's embeddings that counts as the same
BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
CHECK_FACES = 4  # shipped practice faces that are encoded in both formats
# by the word before the colon of --model; open_clip's models need none. A further kind is a file and a line here:
# a function from model, pretrained and activation to the network, its preprocessing and its description
ENCODERS: Mapping[str, Callable[[str, str, str], Weights]] = {"open_clip": open_clip.load_weights}


def load_encoder(
    model: str,
    pretrained: str = "",
    *,
    activation: str = "auto",
    precision: str = "auto",
    device: torch.device | str = "cpu",
) -> Encoder:
    """Build an encoder with its weights.

    Args:
        model: an open_clip model name, ``hf-hub:owner/name`` or ``local-dir:path``.
        pretrained: a pretrained tag of that model; the path of a checkpoint file, or ``TAG:FILE`` for one that is
            prepared as the weights of a tag are; or ``random:SEED`` for seeded random weights. Tags and files are not
            looked at for hf-hub: and local-dir:, which bring their own.
        activation: ``quick_gelu`` or ``gelu``; ``auto`` takes what the tag or the model's own configuration says, and
            is refused for a checkpoint file whose activation can't be known.
        precision: ``fp32``, ``bf16``, ``fp16``; ``auto`` takes the fastest one of this device that agrees with fp32
            on a few faces.
        device: where to run: auto, cpu, cuda, cuda:1, ...

    Raises:
        ConfigError: unknown model, tag or device; an activation or a preprocessing that has to be said; or a device
            with too little memory.
        InputError: the weights can't be loaded.
    """
    there = resolve_device(str(device))  # before weights are loaded, which takes a while
    return encoder_of(load_weights(model, pretrained, activation=activation), precision=precision, device=there)


def load_weights(model: str, pretrained: str = "", *, activation: str = "auto") -> Weights:
    """Build an image tower with its weights; as ``load_encoder``."""
    kind, _, name = model.partition(":")
    if kind not in ENCODERS:  # also hf-hub: and local-dir:, which open_clip knows
        kind, name = "open_clip", model
    return ENCODERS[kind](name, pretrained, activation)


def encoder_of(weights: Weights, *, precision: str = "auto", device: torch.device | str = "cpu") -> Encoder:
    """Put weights on a device in a number format; as ``load_encoder``."""
    device, preprocessing, description = torch.device(device), weights.preprocessing, weights.description
    try:
        tower = ImageTower(weights.tower, preprocessing, torch.float32).to(device)
        encoder = Encoder(tower, preprocessing, device, description)
        width = encoder.encode([np.zeros((*preprocessing.size, 3), dtype=np.uint8)]).shape[1]
        encoder = replace(encoder, description={**description, "width": width})
        return choose_precision(encoder) if precision == "auto" else encoder.in_precision(precision)
    except torch.OutOfMemoryError:
        raise ConfigError(
            f"{description['model']} doesn't fit the memory of {device}. Expected room for its weights, in fp32 at "
            "first, and one crop. Free the device, or use another --device or a smaller --model."
        ) from None


def fast_precisions(device: torch.device) -> tuple[str, ...]:
    """Return the formats that are faster than fp32 on a device, the preferred one first."""
    if device.type == "cuda":
        return ("bf16", "fp16") if torch.cuda.is_bf16_supported() else ("fp16",)
    # without instructions for it bf16 is emulated, and slower; fp16 is slow on the CPU tried
    flags = processor_facts().get("flags", "").split()
    return ("bf16",) if torch.backends.mkldnn.is_available() and BF16_FLAGS.intersection(flags) else ()


def choose_precision(encoder: Encoder) -> Encoder:
    """Take the first fast format whose embeddings agree with those of an encoder in fp32, else stay with fp32."""
    candidates = fast_precisions(encoder.device)
    if not candidates:
        return encoder
    faces = check_faces()
    expected = encoder.encode(faces)
    for precision in candidates:
        candidate = encoder.in_precision(precision)
        if smallest_cosine(candidate.encode(faces), expected) >= AGREEMENT:
            return candidate
    return encoder


def smallest_cosine(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the smallest cosine between matching rows of two (B, D) tensors; NaN where one isn't finite."""
    return float(torch.nn.functional.cosine_similarity(ours.double(), theirs.double(), dim=1).min())


def check_faces() -> list[npt.NDArray[np.uint8]]:
    """Return some of the shipped practice faces, uint8 (112, 112, 3)."""
    with shipped("sample") as sample:
        videos = sorted(entry for entry in (sample / "cropped_aligned").iterdir() if entry.is_dir())[:CHECK_FACES]
        return [decode_crop(min(video.iterdir()).read_bytes()).pixels for video in videos]
