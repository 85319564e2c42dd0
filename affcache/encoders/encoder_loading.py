"""Loading an encoder: its weights, their hash, its description, its number format, and the device it runs on."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import open_clip
import torch
import torchvision

from affcache.crops.images import Preprocessing
from affcache.encoders.encoder import Encoder, ImageTower
from affcache.encoders.open_clip import OWN_WEIGHTS, RANDOM_WEIGHTS, build_network, preprocessing_of
from affcache.encoders.precision import choose_precision
from affcache.errors import ConfigError


def load_encoder(
    model: str,
    pretrained: str = "",
    *,
    activation: str = "auto",
    precision: str = "auto",
    device: torch.device | str = "cpu",
) -> Encoder:
    """Build an open_clip image tower with its weights.

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


@dataclass(frozen=True)
class Weights:
    """The image half of an open_clip model in fp32 on the CPU, before it goes to a device."""

    tower: torch.nn.Module
    preprocessing: Preprocessing
    description: Mapping[str, Any]  # what a store keeps, but for the width, which shows when it runs


def load_weights(model: str, pretrained: str = "", *, activation: str = "auto") -> Weights:
    """Build an open_clip image tower with its weights; as ``load_encoder``."""
    if model.startswith(OWN_WEIGHTS) and not pretrained.startswith(RANDOM_WEIGHTS):
        pretrained = ""
    network, config = build_network(model, pretrained, activation)
    preprocessing = preprocessing_of(network)
    tower = network.visual  # the image half; the text half would double the memory
    assert isinstance(tower, torch.nn.Module)
    description = _describe(model, pretrained, config, preprocessing, _weights_sha256(tower))
    return Weights(tower.eval().requires_grad_(False), preprocessing, description)


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


def _describe(
    model: str, pretrained: str, config: Mapping[str, Any], preprocessing: Preprocessing, weights_sha256: str
) -> dict[str, Any]:
    """Return what a store keeps of an encoder in fp32, but for the width, which shows when it runs."""
    return {
        "model": model,
        "pretrained": pretrained,
        "architecture": {"embed_dim": config.get("embed_dim"), **config["vision_cfg"]},
        "weights_sha256": weights_sha256,
        "activation": "quick_gelu" if config["quick_gelu"] else "gelu",
        "image_size": list(preprocessing.size),
        "resize": f"{preprocessing.resize_mode} {preprocessing.interpolation} antialias",
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "precision": "fp32",
        "projected": True,
        "normalised": False,
        "versions": {
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "open_clip": open_clip.__version__,
        },
    }


def _weights_sha256(tower: torch.nn.Module) -> str:
    """Hash the names, shapes and values of all weights, wherever they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
