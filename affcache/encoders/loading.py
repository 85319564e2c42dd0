"""Loading an encoder: which kind it is, its weights, the device it runs on, and its number format.

The fastest format that a device has is held against fp32 before it is used.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from affcache.crops.images import decode_crop
from affcache.devices import processor_facts, resolve_device
from affcache.encoders import onnx_file, open_clip, own, timm_models
from affcache.encoders.encoder import Encoder, ImageTower, Wanted, Weights, prepared
from affcache.errors import AffcacheError, ConfigError
from affcache.files import shipped
from affcache.settings import PRETRAINED

AGREEMENT = 0.999  # smallest cosine to fp32's embeddings that counts as the same
BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
LARGEST_STD = 4.0  # of values in [0, 1]; 1 where nothing is divided
CHECK_FACES = 4  # shipped practice faces that are encoded in both formats
# by the word before the colon of --model; open_clip's models need none. A further kind is a file and a line here:
# a function from what is wanted to the network, its preprocessing and its description
ENCODERS: Mapping[str, Callable[[Wanted], Weights]] = {
    "open_clip": open_clip.load_weights,
    "timm": timm_models.load_weights,
    "onnx": onnx_file.load_weights,
    "python": own.load_weights,
}
SELF_CONTAINED = ("onnx", "python")  # kinds whose name says the weights, too


def load_encoder(
    model: str,
    pretrained: str = "",
    *,
    activation: str = "auto",
    image_size: int | Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    precision: str = "auto",
    device: torch.device | str = "cpu",
) -> Encoder:
    """Build an encoder with its weights.

    Args:
        model: an open_clip model name, ``hf-hub:owner/name`` or ``local-dir:path``; ``timm:NAME.TAG``; ``onnx:FILE``;
            or ``python:package.module:function``.
        pretrained: a pretrained tag of an open_clip model; the path of a checkpoint file, or ``TAG:FILE`` for one that
            is prepared as the weights of a tag are; or ``random:SEED`` for seeded random weights. Tags and files are
            not looked at for hf-hub: and local-dir:, which bring their own. timm: takes a file or random:SEED.
        activation: ``quick_gelu`` or ``gelu``; ``auto`` takes what the tag or the model's own configuration says, and
            is refused for a checkpoint file whose activation can't be known. Of open_clip's models alone.
        image_size: pixels on a side, or (height, width), that images are resized to; None for the network's own.
        mean: of red, green and blue in [0, 1], subtracted from pixels; None for what goes with the weights.
        std: likewise, by which they are divided.
        precision: ``fp32``, ``bf16``, ``fp16``; ``auto`` takes the fastest one of this device that agrees with fp32
            on a few faces.
        device: where to run: auto, cpu, cuda, cuda:1, ...

    Raises:
        ConfigError: unknown model, tag or device; an activation or a preprocessing that has to be said; an image size
            that can't be had; or a device with too little memory.
        InputError: the weights can't be loaded, or what was loaded is no encoder.
    """
    there = resolve_device(str(device))  # before weights are loaded, which takes a while
    weights = load_weights(model, pretrained, activation=activation, image_size=image_size, mean=mean, std=std)
    return encoder_of(weights, precision=precision, device=there)


def load_weights(
    model: str,
    pretrained: str = "",
    *,
    activation: str = "auto",
    image_size: int | Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Weights:
    """Build an image tower with its weights; as ``load_encoder``."""
    kind, name = kind_of(model)
    if kind != "open_clip" and activation != "auto":
        raise ConfigError(
            f"--activation is {activation}, but {model} is no model of open_clip. Expected auto: others bring theirs."
        )
    if kind != "open_clip" and pretrained == PRETRAINED:  # a default that is meant for the default model
        pretrained = ""
    if kind in SELF_CONTAINED and pretrained:
        raise ConfigError(f"--pretrained is {pretrained}, but {model} brings its weights. Expected none: leave it out.")
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size or (0, 0)
    wanted = Wanted(
        name,
        pretrained,
        activation,
        (height, width) if height else None,
        _colours("mean", mean),
        _colours("std", std),
    )
    weights = ENCODERS[kind](wanted)
    own = weights.preprocessing
    preprocessing = replace(own, mean=wanted.mean or own.mean, std=wanted.std or own.std)
    if not all(0 <= value <= 1 for value in preprocessing.mean) or max(preprocessing.std) > LARGEST_STD:
        raise ConfigError(
            f"{model} has mean {preprocessing.mean} and std {preprocessing.std}, which aren't of values in [0, 1]: all "
            "crops would look nearly alike to it. Expected both for pixels / 255. Divide them by 255."
        )
    description = {**weights.description, **prepared(preprocessing)}
    return replace(weights, preprocessing=preprocessing, description=description)


def _colours(name: str, values: Sequence[float] | None) -> tuple[float, ...] | None:
    if values is not None and (
        len(values) != 3 or not np.isfinite(values).all() or (name == "std" and min(values) <= 0)
    ):
        raise ConfigError(f"{name} is {values}; expected three numbers, for red, green and blue in [0, 1].")
    return None if values is None else tuple(map(float, values))


def kind_of(model: str) -> tuple[str, str]:
    """Return the kind of an encoder, a key of ``ENCODERS``, and its name among those."""
    kind, _, name = model.partition(":")
    return (kind, name) if kind in ENCODERS else ("open_clip", model)  # which knows hf-hub: and local-dir:


def load_described(
    description: Mapping[str, Any],
    *,
    model: str | None = None,
    pretrained: str | None = None,
    precision: str = "auto",
    device: torch.device | str = "cpu",
) -> Encoder:
    """Load again the encoder that a store's or a head's description names. Whether it is the same is not checked.

    Args:
        description: of an encoder whose weights are known: the attribute of a store, or what a head was trained on.
        model: where it is now, if it isn't where it was.
        pretrained: likewise.
        precision: as for ``load_encoder``.
        device: likewise.

    Raises:
        ConfigError: as ``load_encoder``; or it is a function of Python, which nobody but the user may name: a head from
            elsewhere could name any.
        InputError: as ``load_encoder``.
    """
    name, tag = model or str(description["model"]), pretrained or str(description.get("pretrained") or "")
    if model and not pretrained and model != description["model"]:
        tag = ""  # it was the other's
    kind, _ = kind_of(name)
    if kind == "python" and not model:
        raise ConfigError(
            f"It is the function {name}, which is code that runs here. Expected you to name it: say --model {name}, or "
            f'model="{name}" in Python, if you trust it.'
        )
    return load_encoder(
        name,
        tag,
        activation=description.get("activation", "auto") if kind == "open_clip" else "auto",
        image_size=description.get("image_size"),
        mean=description.get("mean"),
        std=description.get("std"),
        precision=precision,
        device=device,
    )


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
        try:
            candidate = encoder.in_precision(precision)
            agrees = smallest_cosine(candidate.encode(faces), expected) >= AGREEMENT
        except torch.OutOfMemoryError:
            raise
        except (AffcacheError, RuntimeError, TypeError):  # a module of the user's own that can't be copied or cast
            continue
        if agrees:
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
