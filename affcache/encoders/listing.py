"""affcache encoders: the names that --model and --pretrained take, without fetching anything."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import open_clip
import timm
import torch

from affcache.encoders.open_clip import licence_of_tag, own_size
from affcache.encoders.settings import EncodersSettings
from affcache.encoders.timm_models import licence_of
from affcache.errors import ConfigError
from affcache.progress import Listener, Result, quiet_libraries
from affcache.settings import command

MOST_BUILT = 80  # networks of timm that are built, without weights, to see their width; each takes a tenth of a second


@dataclass(frozen=True)
class ListedEncoder:
    """An encoder with published weights."""

    model: str  # for --model
    pretrained: str  # for --pretrained; "" where the model's name says it
    width: int | None  # D, values in an embedding; None where it wasn't looked for
    image_size: tuple[int, int]  # (height, width) in pixels
    licence: str  # of its weights; "" where it isn't known


@dataclass(frozen=True)
class EncodersResult(Result):
    """What there is."""

    encoders: tuple[ListedEncoder, ...]


@command(EncodersSettings)
def list_encoders(settings: EncodersSettings, listener: Listener) -> EncodersResult:
    """List the weights that open_clip and timm know by name, all or those whose names contain some words.

    Raises:
        ConfigError: no name contains them.
    """
    words = [word.lower() for word in settings.word]
    found = [one for one in (*_of_open_clip(), *_of_timm()) if all(word in _name(one) for word in words)]
    if not found:
        raise ConfigError(
            f"No encoder has {' and '.join(map(repr, settings.word))} in its name. Expected a part of a name of "
            "open_clip's or timm's weights, such as dinov2, siglip or openai. Others go by onnx:FILE or "
            "python:package.module:function."
        )
    return EncodersResult(tuple(_with_widths(found, listener)))


def _name(one: ListedEncoder) -> str:
    return f"{one.model} {one.pretrained}".lower()


def _of_open_clip() -> Iterator[ListedEncoder]:
    for model, tag in open_clip.list_pretrained():
        config = open_clip.get_model_config(model)
        yield ListedEncoder(model, tag, config["embed_dim"], own_size(config), licence_of_tag(tag)[0])


def _of_timm() -> Iterator[ListedEncoder]:
    for name in timm.list_pretrained():
        config: Any = timm.get_pretrained_cfg(name)
        yield ListedEncoder(f"timm:{name}", "", None, config.input_size[-2:], licence_of(config))


def _with_widths(found: Sequence[ListedEncoder], listener: Listener) -> Iterator[ListedEncoder]:
    """Fill in the widths of timm's networks, where they are not too many."""
    networks = sorted({one.model.partition(".")[0] for one in found if one.width is None})
    widths: dict[str, int | None] = {}
    if len(networks) > MOST_BUILT:
        listener.message(f"widths of timm's are looked up for at most {MOST_BUILT} networks: say a WORD")
        networks = []
    for done, network in enumerate(networks, start=1):
        widths[network] = _width(network.partition(":")[2])
        listener.progress(done, len(networks), "network")
    for one in found:
        yield replace(one, width=widths.get(one.model.partition(".")[0])) if one.width is None else one


def _width(architecture: str) -> int | None:
    """Return how wide the embeddings of a timm network are: built without weights, and without memory for them."""
    try:
        with torch.device("meta"), quiet_libraries():
            network = timm.create_model(architecture, pretrained=False, num_classes=0)
    except Exception:  # a network that can't be built so is listed without
        return None
    width: Any = getattr(network, "head_hidden_size", None) or network.num_features
    return int(width)
