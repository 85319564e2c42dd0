"""An encoder of the user's own: a function of Python that returns the network, its preprocessing and a description."""

import json
import traceback
from collections.abc import Callable, Mapping
from dataclasses import fields
from importlib import import_module
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from affcache.crops.images import Preprocessing
from affcache.encoders.encoder import Wanted, Weights, describe, weights_sha256
from affcache.errors import AffcacheError, ConfigError, InputError, did_you_mean, first_line

EXPECTED = (
    "Expected a function without arguments that returns three things: a torch.nn.Module from normalised images float32 "
    "(B, 3, height, width) to embeddings (B, D); its preprocessing, a dict with size, mean and std; and a description, "
    "a dict of what changes the numbers, and licence"
)
RESIZE_MODES, INTERPOLATIONS = ("squash", "shortest"), ("bicubic", "bilinear")


class OwnTower(torch.nn.Module):
    """A user's module, whose errors are said in words: it is input here, not a part of affcache."""

    def __init__(self, module: torch.nn.Module, name: str) -> None:
        super().__init__()
        self.module, self.name = module, name

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return embeddings (B, D) of normalised inputs (B, 3, H, W)."""
        try:
            embeddings = self.module(inputs)
        except (torch.OutOfMemoryError, AffcacheError):
            raise
        except Exception as error:
            raise InputError(_failed(f"The module of {self.name}", f"of {_shape(inputs)}", error)) from error
        if not isinstance(embeddings, torch.Tensor) or not embeddings.is_floating_point():
            raise InputError(
                f"The module of {self.name} made {_shape(embeddings)} of {_shape(inputs)}. Expected a tensor of "
                "floating-point numbers (B, D). Let it return the pooled embeddings alone."
            )
        return embeddings


def load_weights(wanted: Wanted) -> Weights:
    """Call a function, named ``package.module:function``, and check what it returns.

    Raises:
        ConfigError: there is no such module or function, or an image size was asked for that isn't its own.
        InputError: it fails, or returns something else.
    """
    name = f"python:{wanted.model}"
    function = _function(wanted.model)
    try:
        returned = function()
    except AffcacheError:
        raise
    except Exception as error:
        raise InputError(_failed(name, "", error)) from error
    if not isinstance(returned, (tuple, list)) or len(returned) != 3:
        raise InputError(f"{name} returned {_shape(returned)}. {EXPECTED}.")
    module, prepared, said = returned
    if not isinstance(module, torch.nn.Module):
        raise InputError(f"The first thing that {name} returned is {_shape(module)}. {EXPECTED}.")
    preprocessing, description = _preprocessing(name, prepared), _description(name, said)
    if wanted.image_size not in (None, preprocessing.size):
        raise ConfigError(
            f"{name} encodes images of {preprocessing.size[0]} x {preprocessing.size[1]} pixels, as it says itself. "
            "Expected no --image-size: change it there, in its preprocessing."
        )
    tower = OwnTower(module.float().cpu(), name).eval().requires_grad_(False)
    _require_steady(tower, preprocessing, name)
    licence = str(description.pop("licence", ""))
    return Weights(
        tower,
        preprocessing,
        describe(
            name,
            preprocessing,
            {},
            licence=licence,
            pretrained="",
            architecture=description,
            weights_sha256=weights_sha256(tower),
        ),
    )


@torch.inference_mode()
def _require_steady(tower: OwnTower, preprocessing: Preprocessing, name: str) -> None:
    """Refuse a module that says something else of the same images the second time."""
    images = torch.rand(2, 3, *preprocessing.size, generator=torch.Generator().manual_seed(0))
    first, second = tower(images), tower(images)
    if first.shape == second.shape and not torch.allclose(first, second, rtol=1e-3, atol=1e-5, equal_nan=True):
        raise InputError(
            f"The module of {name} makes other embeddings of the same images the second time. Expected the same: no "
            "dropout, no noise, no state that it changes. Mend it there."
        )


def _function(path: str) -> Callable[[], Any]:
    module_name, _, function_name = path.partition(":")
    if not module_name or not function_name:
        raise ConfigError(f"--model python:{path} names no function. Expected python:package.module:function.")
    try:
        module = import_module(module_name)
    except Exception as error:  # it runs the user's code
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"--model python:{path}: Python finds no module {error.name!r}. Expected one that can be imported "
                "here: install its package, or say PYTHONPATH=FOLDER before the command, with the folder that it is in."
            ) from None
        raise InputError(_failed(f"Importing {module_name}", "", error)) from error
    function: Any = getattr(module, function_name, None)
    if not callable(function):
        names = [name for name, value in vars(module).items() if callable(value)]
        raise ConfigError(
            f"--model python:{path}: {module_name} has no function {function_name!r}"
            f"{did_you_mean(function_name, names)}. {EXPECTED}."
        )
    return function


def _preprocessing(name: str, said: Any) -> Preprocessing:
    """Return what is to be done to images, of a ``Preprocessing`` or a dict of its fields."""
    given = vars(said) if isinstance(said, Preprocessing) else said
    if not isinstance(given, Mapping) or not {"size", "mean", "std"} <= given.keys():
        missing = sorted({"size", "mean", "std"} - given.keys()) if isinstance(given, Mapping) else []
        without = f" without {', '.join(missing)}" if missing else ""
        raise InputError(f"The preprocessing that {name} returned is {_shape(said)}{without}. {EXPECTED}.")
    found = {"resize_mode": "squash", "interpolation": "bicubic", **given}
    names = [field.name for field in fields(Preprocessing)]
    problems = [f"{key!r} is none of {', '.join(names)}" for key in found if key not in names]
    size = found["size"]
    size = [size, size] if isinstance(size, int) else size
    if not _numbers(size, 2) or not all(isinstance(side, int) and side > 0 for side in size):
        problems.append(f"size is {found['size']!r}, expected pixels on a side, or (height, width)")
    for colour in ("mean", "std"):
        if not _numbers(found[colour], 3) or (colour == "std" and min(found[colour]) <= 0):
            problems.append(f"{colour} is {found[colour]!r}, expected three numbers for values in [0, 1]")
    for key, choices in (("resize_mode", RESIZE_MODES), ("interpolation", INTERPOLATIONS)):
        if found[key] not in choices:
            problems.append(f"{key} is {found[key]!r}, expected {' or '.join(choices)}")
    if not problems and found["resize_mode"] == "shortest" and size[0] != size[1]:
        problems.append("resize_mode shortest goes with a square size")
    if problems:
        raise InputError(f"The preprocessing that {name} returned can't be used: {'; '.join(problems)}. Mend it there.")
    mean, std = (tuple(map(float, found[colour])) for colour in ("mean", "std"))
    return Preprocessing((size[0], size[1]), found["resize_mode"], found["interpolation"], mean, std)


def _numbers(values: Any, count: int) -> bool:
    try:
        return len(values) == count and all(isfinite(value) for value in values)
    except TypeError:
        return False


def _description(name: str, said: Any) -> dict[str, Any]:
    """Return a description as a store gives it back: in JSON's types."""
    try:
        if not isinstance(said, Mapping):
            raise TypeError("no dict")
        found: dict[str, Any] = json.loads(json.dumps(dict(said), allow_nan=False))
        return found
    except (TypeError, ValueError) as error:
        raise InputError(
            f"The description that {name} returned is {_shape(said)}, which JSON can't hold ({first_line(error)}). "
            f"{EXPECTED}."
        ) from None


def _shape(found: Any) -> str:
    """Say what something is, and how large."""
    if isinstance(found, torch.Tensor):
        return f"a tensor {str(found.dtype).removeprefix('torch.')} {tuple(found.shape)}"
    size = f" of {len(found)}" if isinstance(found, (tuple, list)) else ""
    return f"{type(found).__name__}{size}"


def _failed(what: str, where: str, error: Exception) -> str:
    """Say what the user's code raised, and in which of its lines."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not {"site-packages", "affcache"}.intersection(Path(frame.filename).parts)]
    last = (own or frames)[-1]  # not the line of torch that it led to
    return (
        f"{what} failed {where}".rstrip() + f": {type(error).__name__}: {first_line(error)} "
        f"({Path(last.filename).name}, line {last.lineno}). Expected it to run through. Try it in Python by itself, "
        "and mend it."
    )
