"""Building an open_clip network with its weights: the activation they need, and what to say when they can't be had."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch

from affcache.crops.images import Preprocessing
from affcache.encoders.encoder import Wanted, Weights, describe, require_size, weights_sha256
from affcache.errors import ConfigError, InputError, did_you_mean, first_line
from affcache.progress import quiet_libraries

RANDOM_WEIGHTS = "random:"  # --pretrained random:SEED
PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")  # what open_clip's table of weights says of images
LONGEST_LINE, MOST_LINES = 200, 5  # of torch's list of what in a checkpoint doesn't fit
OWN_WEIGHTS = ("hf-hub:", "local-dir:")  # models that bring their weights with them

LICENCES = {  # by the beginning of open_clip's tag, which says none: licence, and where it is said
    "openai": ("MIT", "https://github.com/openai/CLIP/blob/main/LICENSE, which is of the repository"),
    "laion2b": ("MIT", "the model cards of https://huggingface.co/laion"),
    "laion400m": ("MIT", "the model cards of https://huggingface.co/laion"),
}


def load_weights(wanted: Wanted) -> Weights:
    """Build the image tower of an open_clip model with its weights; as ``affcache.load_encoder``."""
    model, pretrained = wanted.model, wanted.pretrained
    if model.startswith(OWN_WEIGHTS) and not pretrained.startswith(RANDOM_WEIGHTS):
        pretrained = ""
    network, config = build_network(model, pretrained, wanted.activation, wanted.image_size)
    preprocessing = preprocessing_of(network)
    tower = network.visual  # the image half; the text half would double the memory
    assert isinstance(tower, torch.nn.Module)
    if wanted.image_size not in (None, own_size(config)):
        require_size(tower.eval(), preprocessing.size, model)
    description = describe(
        model,
        preprocessing,
        {"open_clip": open_clip.__version__},
        pretrained=pretrained,
        architecture={"embed_dim": config.get("embed_dim"), **config["vision_cfg"]},
        weights_sha256=weights_sha256(tower),
        activation="quick_gelu" if config["quick_gelu"] else "gelu",
        projected=True,
    )
    return Weights(tower.eval().requires_grad_(False), preprocessing, description)


def build_network(
    model: str, pretrained: str, activation: str, image_size: tuple[int, int] | None = None
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Build an open_clip network in float32 with its weights loaded; arguments and errors as ``affcache.load_encoder``.

    Returns:
        The network, and its model configuration with ``quick_gelu`` as it was built.

    Raises:
        ConfigError: unknown model or tag, or an activation or a preprocessing that has to be said.
        InputError: the weights can't be loaded.
    """
    options: dict[str, Any] = {}
    if model.startswith("local-dir:") and not (Path(model.partition(":")[2]) / "open_clip_config.json").is_file():
        raise InputError(
            f"There is no open_clip_config.json in the folder of --model {model}. Expected an open_clip model folder: "
            "that file and the weights. Check the path."
        )
    tag, file = checkpoint_of(pretrained)
    if not model.startswith(OWN_WEIGHTS):
        options["quick_gelu"] = _needs_quick_gelu(model, tag or pretrained, activation)
    elif activation != "auto":
        options["quick_gelu"] = activation == "quick_gelu"
    prepared: dict[str, Any] = {}
    if file:
        prepared["force_preprocess_cfg"] = _preprocessing_of_file(model, tag, file, **options)
    if image_size is not None:
        prepared["force_image_size"] = image_size
    network = _build(model, file or pretrained, {**options, **prepared})
    config = {"quick_gelu": False, **open_clip.get_model_config(model), **options}
    return network, config


def checkpoint_of(pretrained: str) -> tuple[str, str]:
    """Return the tag, or "", and the checkpoint file of FILE or TAG:FILE; no file where there is none of that name."""
    if Path(pretrained).is_file():
        return "", pretrained
    tag, _, file = pretrained.partition(":")
    return (tag, file) if Path(file).is_file() else ("", "")


def licence_of_tag(tag: str) -> tuple[str, str]:
    """Return the licence of a pretrained tag's weights, and where it is said; "" and "" where that isn't known."""
    known = [found for start, found in LICENCES.items() if tag == start or tag.startswith(f"{start}_")]
    return known[0] if known else ("", "")


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


def _meant(model: str) -> str:
    """Guess of which kind a name is that open_clip doesn't know; "" without a guess."""
    if model.endswith(".onnx") or ".onnx#" in model:
        return f" (did you mean 'onnx:{model}'?)"
    if ":" in model:
        return f" (did you mean 'python:{model}'?)"
    return f" (did you mean 'timm:{model}'?)" if timm.is_model(model.partition(".")[0]) else ""


def _needs_quick_gelu(model: str, pretrained: str, activation: str) -> bool:
    """Decide between QuickGELU (True) and GELU for a built-in model name."""
    config = open_clip.get_model_config(model)
    if config is None:
        raise ConfigError(
            f"open_clip has no model {model!r}{_meant(model) or did_you_mean(model, open_clip.list_models())}. "
            "Expected one that 'affcache encoders WORD' lists, hf-hub:owner/name, local-dir:path, timm:NAME, onnx:FILE "
            "or python:module:function."
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
    try:
        options = _without_own_size(model, options)
        with seeded(pretrained), quiet_libraries():
            if pretrained.startswith(RANDOM_WEIGHTS):
                return open_clip.create_model(model, load_weights=False, pretrained_text=False, **options)
            return open_clip.create_model(
                model, pretrained or None, pretrained_text=False, require_pretrained=True, **options
            )
    except ConfigError:
        raise
    except Exception as error:  # a download, a file format or a shape: open_clip raises nearly anything here
        if "force_image_size" in options:
            raise ConfigError(
                f"{model} can't be had at --image-size {options['force_image_size']} ({type(error).__name__}: "
                f"{first_line(error)}). Expected a size that it takes, and weights within reach. Leave out "
                "--image-size."
            ) from error
        raise InputError(_why_not_built(model, pretrained, error)) from error


@contextmanager
def seeded(pretrained: str) -> Iterator[None]:
    """Draw what is drawn meanwhile as random:SEED says, if that is what it says.

    Raises:
        ConfigError: SEED is no seed.
    """
    if not pretrained.startswith(RANDOM_WEIGHTS):
        yield
        return
    seed = pretrained.removeprefix(RANDOM_WEIGHTS)
    if not seed.isdecimal() or int(seed) >= 2**63:
        raise ConfigError(
            f"--pretrained {pretrained}: expected random:SEED with a whole number below 2**63, for example random:0."
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(seed))  # the CPU's alone
        yield


def _without_own_size(model: str, options: dict[str, Any]) -> dict[str, Any]:
    """Leave out an image size that is the model's own; a square is a number, since ResNets take no other."""
    if "force_image_size" not in options:
        return options
    others = dict(options)
    height, width = others.pop("force_image_size")
    if (height, width) == own_size(open_clip.get_model_config(model)):
        return others
    return {**others, "force_image_size": height if height == width else (height, width)}


def own_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the (height, width) of a model's images, of its configuration."""
    size = config["vision_cfg"].get("image_size", 224)  # open_clip's default
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _why_not_built(model: str, pretrained: str, error: Exception) -> str:
    """Say why there is no network, what was expected, and what to do."""
    what, reason = f"{model} / {pretrained}" if pretrained else model, f"{type(error).__name__}: {first_line(error)}"
    if "transformers" in str(error):
        return (
            f"{model} can't be built: its text half is of the package transformers, and open_clip builds both halves "
            "or none. Expected that package here. Install it with 'pip install transformers', or take another --model."
        )
    if pretrained.startswith(RANDOM_WEIGHTS):
        return f"{what} can't be built ({reason}). Expected a model that open_clip builds. Take another --model."
    if Path(pretrained).is_file():
        return (
            f"The checkpoint {pretrained} doesn't fit {model} ({misfits(error)}). Expected a "
            "file of open_clip weights of that very model. Check --model and --pretrained."
        )
    return (
        f"The weights of {what} could not be loaded ({reason}). Expected a "
        "connection to the model hub, or weights on disk. Without a network, fetch the weights elsewhere and say "
        "--pretrained FILE with an open_clip checkpoint, or --model local-dir:FOLDER with open_clip_config.json "
        "and the weights in it."
    )


def misfits(error: Exception) -> str:
    """Say what of a checkpoint doesn't fit, as torch lists it, in a few lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    details = "; ".join(line[:LONGEST_LINE] + " ..." * (len(line) > LONGEST_LINE) for line in lines[:MOST_LINES])
    more = f"; and {len(lines) - MOST_LINES:,} lines more" if len(lines) > MOST_LINES else ""
    if "weights_only" in details:  # torch would have it unpickled
        details, more = "it is a pickled object, which could run any code, and no state of weights", ""
    return f"{type(error).__name__}: {details}{more}"


def _preprocessing_of_file(model: str, tag: str, file: str, quick_gelu: bool = False) -> dict[str, Any] | None:
    """Return how images are prepared for a checkpoint file, which doesn't say: as for the published weights like it.

    Args:
        model: open_clip's name.
        tag: of the published weights that the file is like; "" where it wasn't said.
        file: the checkpoint.
        quick_gelu: its activation. Published weights with the other one don't count, if there are some with this.

    Returns:
        A part of open_clip's preprocessing configuration; None where the model has no published weights.

    Raises:
        ConfigError: the published weights differ in it.
    """
    every = {name: open_clip.get_pretrained_cfg(model, name) for name in open_clip.list_pretrained_tags_by_model(model)}
    if tag and tag not in every:
        raise ConfigError(
            f"--pretrained {tag}:{file}: {model} has no pretrained tag {tag!r}{did_you_mean(tag, every)}. Expected "
            "FILE, or TAG:FILE with a tag of that model."
        )
    alike = {name: config for name, config in every.items() if bool(config.get("quick_gelu", False)) == quick_gelu}
    chosen = {tag: every[tag]} if tag else alike or every
    ways: dict[str, dict[str, Any]] = {}  # by the first tag of each
    for name, config in chosen.items():
        way = {key: config.get(key) for key in PREPROCESSING}
        if way not in ways.values():
            ways[name] = way
    if len(ways) > 1:
        keys = [key for key in PREPROCESSING if len({str(way[key]) for way in ways.values()}) > 1]
        words = "; ".join(f"{name} has {', '.join(f'{k} {way[k]}' for k in keys)}" for name, way in ways.items())
        raise ConfigError(
            f"The checkpoint {file} doesn't say how images are prepared for it, and published weights of {model} "
            f"differ there: {words}. The wrong one gives wrong embeddings without an error. Say the published tag that "
            f"it is, or was trained from, with --pretrained TAG:{file}."
        )
    return next(iter(ways.values()), None)
