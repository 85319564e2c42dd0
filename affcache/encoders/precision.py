"""The number format of the encoder: the fastest one that a device has, held against fp32 before it is used."""

from importlib.resources import files

import numpy as np
import numpy.typing as npt
import torch

from affcache.crops.images import decode_crop
from affcache.devices import processor_facts
from affcache.encoders.encoder import Encoder

AGREEMENT = 0.999  # smallest cosine to fp32's embeddings that counts as the same
BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
CHECK_FACES = 4  # shipped practice faces that are encoded in both formats


def fast_precisions(device: torch.device) -> tuple[str, ...]:
    """Return the formats that are faster than fp32 on a device, the preferred one first."""
    if device.type == "cuda":
        return ("bf16", "fp16") if torch.cuda.is_bf16_supported() else ("fp16",)
    # without instructions for it bf16 is emulated, and slower; fp16 is slow on the CPU tried
    return ("bf16",) if torch.backends.mkldnn.is_available() and BF16_FLAGS & processor_flags() else ()


def processor_flags() -> frozenset[str]:
    """Return what Linux says that the processor can do; nothing on other systems."""
    return frozenset(processor_facts().get("flags", "").split())


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
    root = files("affcache.data") / "sample" / "cropped_aligned"
    videos = sorted(entry.name for entry in root.iterdir() if entry.is_dir())[:CHECK_FACES]
    crops = [min((root / video).iterdir(), key=lambda entry: entry.name) for video in videos]
    return [decode_crop(crop.read_bytes()).pixels for crop in crops]
