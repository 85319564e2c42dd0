"""Encoders of a user's own, as docs/encoders.md shows how to write one; and all that can be wrong with one."""

from typing import Any

import torch

PREPARED = {"size": 32, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.4, 0.3]}


def build() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 8, stride=8), torch.nn.ReLU(), torch.nn.Flatten())
    return network, PREPARED, {"name": "my own", "version": 1, "licence": "mit"}


class Odd(torch.nn.Module):
    """A module that goes wrong in one way."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.how, self.calls = how, 0

    def forward(self, images: torch.Tensor) -> Any:
        self.calls += 1
        pooled = images.mean((2, 3))
        if self.how == "width":
            return pooled.repeat(1, self.calls)
        if self.how == "fails later" and self.calls > 4:
            raise ValueError("no more")
        wrong: dict[str, Any] = {
            "tuple": (pooled, pooled),
            "tokens": images.flatten(2),
            "integers": pooled.long(),
            "rows": pooled[:0],
            "numpy": pooled.numpy(),
            "noise": pooled + torch.rand(pooled.shape),
        }
        return wrong.get(self.how, pooled)


class Exact(torch.nn.Module):
    """A module that works in float32 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)) @ torch.ones(3, 4)


def width() -> Any:
    return Odd("width"), PREPARED, {}


def noise() -> Any:
    return Odd("noise"), PREPARED, {}


def of_255() -> Any:
    return Odd(), {**PREPARED, "mean": [123.7, 116.3, 103.5]}, {}


def without_size() -> Any:
    return Odd(), {"image_size": 32, "mean": [0, 0, 0], "std": [1, 1, 1]}, {}


def fails_later() -> Any:
    return Odd("fails later"), PREPARED, {}


def tokens() -> Any:
    return Odd("tokens"), PREPARED, {}


def integers() -> Any:
    return Odd("integers"), PREPARED, {}


def rows() -> Any:
    return Odd("rows"), PREPARED, {}


def numpy() -> Any:
    return Odd("numpy"), PREPARED, {}


def exact() -> Any:
    return Exact(), PREPARED, {}


def raises() -> Any:
    raise RuntimeError("no weights here\nand more")


def alone() -> Any:
    return Odd()


def no_module() -> Any:
    return build, PREPARED, {}


def no_preprocessing() -> Any:
    return Odd(), {"size": 32}, {}


def odd_preprocessing() -> Any:
    return Odd(), {"size": 0, "mean": [1, 2], "std": [0, 1, 1], "crop": 1, "interpolation": "nearest"}, {}


def no_description() -> Any:
    return Odd(), PREPARED, "mine"


def odd_description() -> Any:
    return Odd(), PREPARED, {"weights": torch.zeros(3)}


def wants_more(size: int) -> Any:
    return Odd(), PREPARED, {}


nothing = 3
