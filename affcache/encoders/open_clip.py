"""Building an open_clip network with its weights: the activation they need, and what to say when they can't be had."""

import contextlib
import hashlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch
import torchvision

from affcache.crops.images import Preprocessing
from affcache.encoders.encoder import Weights
from affcache.errors import ConfigError, InputError, did_you_mean, first_line

RANDOM_WEIGHTS = "random:"  # --pretrained random:SEED
OWN_WEIGHTS = ("hf-hub:", "local-dir:")  # models that bring their weights with them


def load_weights(model: str, pretrained: str, activation: str) -> Weights:
    """Build the image tower of an open_clip model with its weights; as ``affcache.load_encoder``."""
    if model.startswith(OWN_WEIGHTS) and not pretrained.startswith(RANDOM_WEIGHTS):
        pretrained = ""
    network, config = build_network(model, pretrained, activation)
    preprocessing = preprocessing_of(network)
    tower = network.visual  # the image half; the text half would double the memory
    assert isinstance(tower, torch.nn.Module)
    description = {
        "model": model,
        "pretrained": pretrained,
        "architecture": {"embed_dim": config.get("embed_dim"), **config["vision_cfg"]},
        "weights_sha256": _weights_sha256(tower),
        "activation": "quick_gelu" if config["quick_gelu"] else "gelu",
        "image_size": list(preprocessing.size),
        "resize": f"{preprocessing.resize_mode} {preprocessing.interpolation} antialias",
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "precision": "fp32",
        "projected": True,
        "normalised": False,
        "versions": {package.__name__: package.__version__ for package in (torch, torchvision, open_clip)},
    }
    return Weights(tower.eval().requires_grad_(False), preprocessing, description)


def build_network(model: str, pretrained: str, activation: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Build an open_clip network in float32 with its weights loaded; arguments and errors as ``affcache.load_encoder``.

    Returns:
        The network, and its model configuration with ``quick_gelu`` as it was built.
    """
    options: dict[str, Any] = {}
    if model.startswith("local-dir:") and not (Path(model.partition(":")[2]) / "open_clip_config.json").is_file():
        raise InputError(
            f"There is no open_clip_config.json in the folder of --model {model}. Expected an open_clip model folder: "
            "that file and the weights. Check the path."
        )
    if not model.startswith(OWN_WEIGHTS):
        options["quick_gelu"] = _needs_quick_gelu(model, pretrained, activation)
    elif activation != "auto":
        options["quick_gelu"] = activation == "quick_gelu"
    network = _build(model, pretrained, options)
    config = {"quick_gelu": False, **open_clip.get_model_config(model), **options}
    return network, config


def preprocessing_of(network: torch.nn.Module) -> Preprocessing:
    """Read from a built network what has to be done to its images.

    Raises:
        ConfigError: the model resizes in a way that affcache doesn't do.
    """
    config = open_clip.get_model_preprocess_cfg(network)
    size = config["size"]
    height, width = (size, size) if isinstance(size, int) else size[-2:]
    mode, interpolation = config.get("resize_mode", "shortest"), config.get("interpolation", "bicubic")
    if mode == "longest" or (mode == "shortest" and height != width):
        raise ConfigError(
            f"This model resizes by {mode!r} to {height}x{width}, which affcache doesn't do: expected 'shortest' with "
            "a square size, or 'squash'. Choose another model."
        )
    return Preprocessing(
        size=(height, width),
        resize_mode=mode,
        interpolation="bilinear" if interpolation == "bilinear" else "bicubic",  # open_clip's reading of "random"
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


def _needs_quick_gelu(model: str, pretrained: str, activation: str) -> bool:
    """Decide between QuickGELU (True) and GELU for a built-in model name."""
    config = open_clip.get_model_config(model)
    if config is None:
        raise ConfigError(
            f"open_clip has no model {model!r}{did_you_mean(model, open_clip.list_models())}. Expected one of "
            "open_clip.list_models(), hf-hub:owner/name, or local-dir:path."
        )
    configured = bool(config.get("quick_gelu", False))
    if activation != "auto":
        return activation == "quick_gelu"
    if pretrained.startswith(RANDOM_WEIGHTS):
        return configured
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained in tags:
        return bool(open_clip.get_pretrained_cfg(model, pretrained).get("quick_gelu", False))
    if not Path(pretrained).is_file():
        raise ConfigError(
            f"{pretrained!r} is neither a pretrained tag of {model}{did_you_mean(pretrained, tags)} nor a file. "
            f"Expected one of {', '.join(tags) or '(this model has none)'}, the path of a checkpoint, or random:SEED."
        )
    needs = {bool(open_clip.get_pretrained_cfg(model, tag).get("quick_gelu", False)) for tag in tags}
    if configured or not needs - {configured}:
        return configured
    raise ConfigError(
        f"The checkpoint {pretrained} doesn't say whether it needs QuickGELU, and published weights of {model} exist "
        "with either; the wrong one gives wrong embeddings without an error. Say --activation quick_gelu (weights of "
        "OpenAI, DFN, MetaCLIP) or --activation gelu (LAION-2B, DataComp)."
    )


def _build(model: str, pretrained: str, options: dict[str, Any]) -> torch.nn.Module:
    """Build the network and load its weights, or explain why that failed."""
    if pretrained.startswith(RANDOM_WEIGHTS):
        seed = pretrained.removeprefix(RANDOM_WEIGHTS)
        if not seed.isdecimal() or int(seed) >= 2**63:
            raise ConfigError(
                f"--pretrained {pretrained}: expected random:SEED with a whole number below 2**63, for example "
                "random:0."
            )
        with torch.random.fork_rng(devices=[]), _quiet():
            torch.default_generator.manual_seed(int(seed))  # the CPU's alone
            return open_clip.create_model(model, load_weights=False, pretrained_text=False, **options)
    if pretrained and Path(pretrained).is_file():
        options = {**options, "force_preprocess_cfg": _common_preprocessing(model)}
    try:
        with _quiet():
            return open_clip.create_model(
                model, pretrained or None, pretrained_text=False, require_pretrained=True, **options
            )
    except Exception as error:  # a download, a file format or a shape: open_clip raises nearly anything here
        what = f"{model} / {pretrained}" if pretrained else model
        raise InputError(
            f"The weights of {what} could not be loaded ({type(error).__name__}: {first_line(error)}). Expected a "
            "connection to the model hub, or weights on disk. Without a network, fetch the weights elsewhere and say "
            "--pretrained FILE with an open_clip checkpoint, or --model local-dir:FOLDER with open_clip_config.json "
            "and the weights in it."
        ) from error


def _common_preprocessing(model: str) -> dict[str, Any] | None:
    """Return the preprocessing that all published weights of a model share; a checkpoint file doesn't carry it."""
    keys = ("mean", "std", "interpolation", "resize_mode")
    tags = open_clip.list_pretrained_tags_by_model(model)
    configs = [{k: open_clip.get_pretrained_cfg(model, tag).get(k) for k in keys} for tag in tags]
    return configs[0] if configs and all(config == configs[0] for config in configs) else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence open_clip's remarks on choices that are made on purpose here, and the hub client's on each retry."""
    previous = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def _weights_sha256(tower: torch.nn.Module) -> str:
    """Hash the names, shapes and values of all weights, wherever they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
