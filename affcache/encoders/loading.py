"""Loading an encoder: which kind it is, its weights, its number format, and the device it runs on."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch

from affcache.encoders import open_clip
from affcache.encoders.encoder import Encoder, ImageTower, Weights
from affcache.encoders.precision import choose_precision
from affcache.errors import ConfigError

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
        pretrained: a pretrained tag of that model, the path of a checkpoint file, or ``random:SEED`` for seeded random
            weights. Tags and files are not looked at for hf-hub: and local-dir:, which bring their own.
        activation: ``quick_gelu`` or ``gelu``; ``auto`` takes what the tag or the model's own configuration says, and
            is refused for a checkpoint file whose activation can't be known.
        precision: ``fp32``, ``bf16``, ``fp16``; ``auto`` takes the fastest one of this device that agrees with fp32
            on a few faces (see ``affcache.precision``).
        device: where to run.

    Raises:
        ConfigError: unknown model or tag, an activation that has to be said, or a device with too little memory.
        InputError: the weights can't be loaded.
    """
    return encoder_of(load_weights(model, pretrained, activation=activation), precision=precision, device=device)


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
