"""Building a timm network with its weights and without its classifier: what it was trained on is seen whole.

timm's own evaluation resizes to more than the input and cuts the centre out (crop_pct): good for photos of things, but
of an aligned face it takes chin and forehead. Here the whole crop is squashed to the input, as timm does at crop_pct 1
and crop_mode squash.
"""

from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg

from affcache.crops.images import Preprocessing
from affcache.encoders.encoder import Wanted, Weights, describe, require_size, weights_sha256
from affcache.encoders.open_clip import RANDOM_WEIGHTS, misfits, seeded
from affcache.errors import ConfigError, InputError, did_you_mean, first_line
from affcache.progress import counted, quiet_libraries

PREPARED = ("mean", "std", "interpolation", "input_size")  # what timm's table of weights says of images
INTERPOLATIONS = ("bicubic", "bilinear")


def load_weights(wanted: Wanted) -> Weights:
    """Build a timm network, named ``NAME.TAG``, with its weights and without its classifier.

    Raises:
        ConfigError: unknown name; weights, or an image size, that have to be said or can't be had.
        InputError: the weights can't be loaded.
    """
    architecture, tag, config = _known(wanted.model, wanted.pretrained)
    size = wanted.image_size or config.input_size[-2:]
    name = f"{architecture}.{tag}" if tag else architecture
    options = {"img_size": size} if config.fixed_input_size and size != config.input_size[-2:] else {}
    network = _build(name, wanted.pretrained, config, options)
    if size != config.input_size[-2:]:
        require_size(network.eval(), size, f"timm:{name}")
    preprocessing = Preprocessing(size, "squash", config.interpolation, tuple(config.mean), tuple(config.std))
    description = describe(
        f"timm:{name}",
        preprocessing,
        {"timm": timm.__version__},
        licence="" if wanted.pretrained else licence_of(config),  # a file's is its own
        pretrained=wanted.pretrained,
        architecture={"name": architecture, "pooling": pooling_of(network), "output": "before the classifier"},
        weights_sha256=weights_sha256(network),
    )
    return Weights(network.eval().requires_grad_(False), preprocessing, description)


def _known(model: str, pretrained: str) -> tuple[str, str, PretrainedCfg]:
    """Return the architecture, the tag of its weights, and what timm says of them."""
    architecture, _, tag = model.partition(".")
    if not timm.is_model(architecture):
        raise ConfigError(
            f"timm has no network {architecture!r}{did_you_mean(architecture, timm.list_models())}. Expected one that "
            "'affcache encoders WORD' lists, such as timm:vit_small_patch14_dinov2.lvd142m."
        )
    every: dict[str, Any] = {
        name.partition(".")[2]: timm.get_pretrained_cfg(name) for name in timm.list_pretrained(f"{architecture}.*")
    }
    if tag and tag not in every:
        raise ConfigError(
            f"timm has no weights {tag!r} of {architecture}{did_you_mean(tag, every)}. Expected one of "
            f"{', '.join(every) or '(it has none)'}: timm:{architecture}.TAG."
        )
    if pretrained and not (pretrained.startswith(RANDOM_WEIGHTS) or Path(pretrained).is_file()):
        raise ConfigError(
            f"--pretrained {pretrained} is no file. Expected none, a checkpoint FILE, or random:SEED: of timm's "
            f"weights the name tells which, timm:{architecture}.TAG, with {', '.join(every) or '(it has none)'}."
        )
    if not tag and not pretrained and len(every) != 1:
        tags = f"timm:{architecture}.TAG, with {', '.join(every)}; or " if every else ""
        raise ConfigError(
            f"timm has {counted(len(every), 'set')} of weights of {architecture}. Expected one to be said: {tags}"
            "--pretrained FILE or random:SEED."
        )
    tag = tag or ("" if pretrained else next(iter(every)))
    if pretrained and not tag and not pretrained.startswith(RANDOM_WEIGHTS):
        _require_alike(architecture, pretrained, list(every.values()))
    config = every.get(tag) or timm.get_pretrained_cfg(architecture, allow_unregistered=False)
    return architecture, tag, _usable(architecture, config)


def _require_alike(architecture: str, file: str, every: list[PretrainedCfg]) -> None:
    """Refuse a checkpoint file that doesn't say how images are prepared, where timm's weights differ in that."""
    ways = {tuple(f"{name} {getattr(config, name)}" for name in PREPARED): config.tag for config in every}
    if len(ways) > 1:
        words = "; ".join(f"{tag} has {', '.join(way)}" for way, tag in ways.items())
        raise ConfigError(
            f"The checkpoint {file} doesn't say how images are prepared for it, and timm's weights of "
            f"{architecture} differ there: {words}. The wrong one gives wrong embeddings without an error. Say the "
            f"weights that it is, or was trained from: timm:{architecture}.TAG."
        )


def _usable(architecture: str, config: PretrainedCfg | None) -> PretrainedCfg:
    if config is None or config.input_size[0] != 3 or config.interpolation not in INTERPOLATIONS:
        found = "nothing" if config is None else f"{config.input_size[0]} channels, {config.interpolation}"
        raise ConfigError(
            f"timm says of the images of {architecture}: {found}. Expected 3 channels, resized bicubically or "
            "bilinearly. Take another --model, or write it as a function: python:package.module:function."
        )
    return config


def _build(name: str, pretrained: str, config: PretrainedCfg, options: dict[str, Any]) -> torch.nn.Module:
    """Build the network and load its weights, or explain why that failed."""
    random = pretrained.startswith(RANDOM_WEIGHTS)
    try:
        with seeded(pretrained), quiet_libraries():
            if pretrained and not random:
                options = {**options, "pretrained_cfg_overlay": _overlay(pretrained, config)}
            network: torch.nn.Module = timm.create_model(name, pretrained=not random, num_classes=0, **options)
            return network
    except ConfigError:
        raise
    except Exception as error:  # a download, a file format, a shape or a size: timm raises nearly anything
        reason = f"{type(error).__name__}: {first_line(error)}"
        if "img_size" in options:
            raise ConfigError(
                f"timm:{name} can't be had at --image-size {options['img_size']} ({reason}). Expected a size that it "
                "takes, and weights within reach. Leave out --image-size."
            ) from error
        if pretrained and not random:
            raise InputError(
                f"The checkpoint {pretrained} doesn't fit timm:{name} ({misfits(error)}). Expected a file of timm's "
                "weights of that very network; a classifier may be in it. Check --model and --pretrained."
            ) from error
        raise InputError(
            f"The weights of timm:{name} could not be loaded ({reason}). Expected a connection to the model hub, or "
            "weights on disk. Without a network, fetch them elsewhere and say --pretrained FILE."
        ) from error


def _overlay(file: str, config: PretrainedCfg) -> dict[str, Any]:
    """Return what makes timm load a checkpoint instead of its own: all of it, and nothing but its classifier left out.

    Where timm leaves out a classifier itself, it also accepts a file in which other weights are missing.
    """
    state = timm.models.load_state_dict(file, weights_only=True)
    classifiers = (config.classifier,) if isinstance(config.classifier, str) else config.classifier or ()
    for name in classifiers:
        state = {key: value for key, value in state.items() if key not in (f"{name}.weight", f"{name}.bias")}
    return {"state_dict": state, "num_classes": 0, "label_offset": 0, "custom_load": False}


def licence_of(config: PretrainedCfg) -> str:
    """Return the licence of weights as timm says it; "" where it doesn't know."""
    return "" if config.license in (None, "unknown") else str(config.license)


def pooling_of(network: torch.nn.Module) -> str:
    """Say how a network makes one embedding of what it sees: avg, token, map (attention), ..."""
    for owner in (network, getattr(network, "head", None)):
        pool = getattr(owner, "global_pool", None)
        if pool is not None:
            return str(getattr(pool, "pool_type", pool if isinstance(pool, str) else type(pool).__name__))
    return "of its own"
