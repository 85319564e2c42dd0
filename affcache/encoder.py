"""The frozen image encoder: any open_clip model, with the right activation, preprocessing, precision and a fingerprint.

Closes three traps. A pretrained tag that needs QuickGELU gets it, although open_clip builds GELU for the plain model
name and only warns. Inputs are cast with the weights. Resizing is batched but equals open_clip's own transform.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import open_clip
import torch
import torchvision

from affcache.errors import ConfigError
from affcache.images import Preprocessing
from affcache.open_clip_models import OWN_WEIGHTS, RANDOM_WEIGHTS, build_network, preprocessing_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FIELDS_THAT_DO_NOT_CHANGE_NUMBERS = ("model", "pretrained", "versions")


@dataclass(frozen=True)
class Encoder:
    """A frozen image tower ready to encode batches of crops. Build one with ``load_encoder``."""

    network: torch.nn.Module
    preprocessing: Preprocessing
    device: torch.device
    dtype: torch.dtype
    description: Mapping[str, Any]  # the store's ``encoder`` attribute

    @property
    def fingerprint(self) -> str:
        """sha256 over the fields of the description that change the numbers, in canonical JSON."""
        return fingerprint(self.description)

    @property
    def width(self) -> int:
        """D, the number of values in one embedding."""
        return int(self.description["width"])

    @torch.inference_mode()
    def encode(self, crops: list[npt.NDArray[np.uint8]]) -> torch.Tensor:
        """Encode a batch of RGB crops.

        Args:
            crops: B uint8 arrays of shape (height, width, 3); sizes may differ.

        Returns:
            float32 tensor (B, D) on the CPU: raw ``encode_image`` output, not normalised.
        """
        pixels = self._resize(crops)  # (B, 3, H, W) uint8
        embeddings = self.network(self.preprocessing.normalise(pixels, self.dtype))
        if isinstance(embeddings, (tuple, list)):  # CoCa returns (pooled, tokens)
            embeddings = embeddings[0]
        return embeddings.float().cpu()  # (B, D)

    def _resize(self, crops: list[npt.NDArray[np.uint8]]) -> torch.Tensor:
        """Resize each group of equally large crops in one go, and put them back in order."""
        of_shape: dict[tuple[int, ...], list[int]] = {}
        for index, crop in enumerate(crops):
            of_shape.setdefault(crop.shape, []).append(index)
        pixels = torch.empty(
            (len(crops), 3, *self.preprocessing.size),
            dtype=torch.uint8,
            device=self.device,
            memory_format=torch.channels_last,
        )
        for indices in of_shape.values():
            batch = torch.from_numpy(np.stack([crops[i] for i in indices]))  # (b, height, width, 3)
            pixels[indices] = self.preprocessing.resize(batch.to(self.device).permute(0, 3, 1, 2))
        return pixels


def fingerprint(description: Mapping[str, Any]) -> str:
    """Return the sha256 over the fields of an encoder description that change the embeddings."""
    deciding = {k: v for k, v in description.items() if k not in FIELDS_THAT_DO_NOT_CHANGE_NUMBERS}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def differing_fields(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Say which number-changing fields of two encoder descriptions differ, a line each, values included."""
    names = [n for n in {**ours, **theirs} if n not in FIELDS_THAT_DO_NOT_CHANGE_NUMBERS]
    return [f"{n}: {ours.get(n)!r} against {theirs.get(n)!r}" for n in names if ours.get(n) != theirs.get(n)]


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
        precision: ``fp32``, ``bf16``, ``fp16``; ``auto`` is bf16 on a GPU that has it, fp16 on older ones, fp32 else.
        device: where to run.

    Raises:
        ConfigError: unknown model or tag, or an activation that has to be said.
        InputError: the weights can't be loaded.
    """
    device = torch.device(device)
    precision = _resolve_precision(precision, device)
    if model.startswith(OWN_WEIGHTS) and not pretrained.startswith(RANDOM_WEIGHTS):
        pretrained = ""
    network, config = build_network(model, pretrained, activation)
    preprocessing = preprocessing_of(network)
    tower = network.visual  # the image half; the text half would double the memory
    assert isinstance(tower, torch.nn.Module)
    weights_sha256 = _weights_sha256(tower)
    tower = tower.eval().requires_grad_(False).to(device=device, dtype=DTYPES[precision])
    tower = tower.to(memory_format=torch.channels_last)  # convolutions run twice as fast
    description = {
        "model": model,
        "pretrained": pretrained,
        "architecture": {"embed_dim": config.get("embed_dim"), **config["vision_cfg"]},
        "weights_sha256": weights_sha256,
        "activation": "quick_gelu" if config["quick_gelu"] else "gelu",
        "image_size": list(preprocessing.size),
        "resize": f"{preprocessing.resize_mode} {preprocessing.interpolation} antialias",
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "precision": precision,
        "projected": True,
        "normalised": False,
        "versions": {
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "open_clip": open_clip.__version__,
        },
    }
    encoder = Encoder(tower, preprocessing, device, DTYPES[precision], description)
    width = encoder.encode([np.zeros((*preprocessing.size, 3), dtype=np.uint8)]).shape[1]
    return replace(encoder, description={**description, "width": width})


def resolve_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:1`` into a device that is there.

    Raises:
        ConfigError: no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"Unknown --device {name!r}. Expected auto, cpu, cuda, or cuda:1 and so on.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {name} is not there: torch sees {torch.cuda.device_count()} CUDA devices. Use --device cpu or "
            "auto, or check the driver with nvidia-smi."
        )
    return device


def _resolve_precision(precision: str, device: torch.device) -> str:
    if precision != "auto":
        return precision
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


def _weights_sha256(tower: torch.nn.Module) -> str:
    """Hash the names, shapes and values of all weights, wherever they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
