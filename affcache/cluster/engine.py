"""An encoder in every worker of a cluster: the engine that ``affcache extract --engine ray`` uses."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from types import ModuleType
from typing import Any

import torch

from affcache.cluster.connection import Node, Travelling, WorkerSize, connected, living_nodes, require_ray, worker_size
from affcache.cluster.encoding import ClusterEncoding
from affcache.cluster.pool import WorkerPool
from affcache.cluster.worker import CropSample, EncodingWorker, Job, versions
from affcache.crops.crop_list import CropList
from affcache.encoders.encoder import Weights
from affcache.encoders.loading import load_weights
from affcache.errors import AffcacheError, ConfigError, InputError, first_line
from affcache.extraction.pipeline import Engine
from affcache.extraction.settings import ExtractSettings
from affcache.progress import Listener

ROOM_FOR_REPLIES = 2**30  # bytes of shared memory, of which the list of crops takes some too


def driver_device(settings: ExtractSettings) -> torch.device:
    """Return the device of the driver, which encodes nothing.

    Raises:
        ConfigError: Ray isn't installed, or nothing listens at the address.
    """
    require_ray(settings.ray_address)
    return torch.device("cpu")


@contextmanager
def opened_engine(
    settings: ExtractSettings, recorded: Mapping[str, Any], crops: CropList, listener: Listener
) -> Iterator[Engine]:
    """Be connected to a cluster whose workers have the encoder and see the crops; arguments as for the local engine.

    Raises:
        ConfigError: Ray isn't installed, there is no cluster, or none of its machines can take a worker.
        InputError: a machine doesn't see the crops, or the weights can't be loaded.
    """
    listener.message(f"loading the encoder {settings.model}; its weights are fetched if they are not here yet")
    weights = load_weights(settings.model, settings.pretrained, activation=settings.activation)
    crops = crops.absolute()
    with connected(settings.ray_address, 2 * bytes_of(weights) + ROOM_FOR_REPLIES, listener) as ray:
        nodes = living_nodes(ray)
        size = worker_size(nodes, settings.device, settings.actors, settings.workers)
        sample = CropSample.of(crops)
        require_everywhere(ray, nodes, size, sample, listener)
        settings = replace(settings, device=size.device)
        job = Job(settings, ray.put(share_weights(weights)), ray.put(crops), sample, size)
        del weights  # workers have theirs; the driver needs none
        pool = WorkerPool(ray, ray.remote(EncodingWorker), job, size, settings.actors, recorded, listener)
        try:
            yield Engine(pool.description, partial(ClusterEncoding, pool), pool.facts)
        finally:
            pool.close()


def bytes_of(weights: Weights) -> int:
    """Return how much memory an image tower takes."""
    return sum(tensor.nbytes for tensor in chain(weights.tower.parameters(), weights.tower.buffers()))


def share_weights(weights: Weights) -> Weights:
    """Prepare an image tower for the journey; it is of no other use any more."""
    for module in weights.tower.modules():
        for own in (module._parameters, module._buffers):
            travelling: dict[str, Any] = {name: Travelling(t) for name, t in own.items() if t is not None}
            own.update(travelling)
    return weights


def require_everywhere(
    ray: ModuleType, nodes: Sequence[Node], size: WorkerSize, sample: CropSample, listener: Listener
) -> None:
    """Ask every machine that can have a worker whether it runs this affcache, and sees the crops.

    Raises:
        ConfigError: one runs another affcache, or none.
        InputError: one doesn't see the crops.
    """
    affinity = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    remote = ray.remote(look_around)
    asked = [node for node in nodes if size.room([node])]
    references = [
        remote.options(num_cpus=0, scheduling_strategy=affinity(node.id, soft=False)).remote(sample, node.name)
        for node in asked
    ]
    ours = versions()
    for node, reference in zip(asked, references, strict=True):
        try:
            found = ray.get(reference)
        except ray.exceptions.RayError as error:
            raise ConfigError(
                f"Node {node.name} can't run affcache: {first_line(error)}. Expected the same Python with "
                "affcache[ray] installed on every machine of the cluster. Install it there, then run the same command "
                "again."
            ) from None
        if isinstance(found, AffcacheError):
            raise found
        if found["affcache"] != ours["affcache"]:
            raise ConfigError(
                f"Node {node.name} has affcache {found['affcache']}, and the driver {ours['affcache']}. Expected the "
                "same everywhere. Install it there, then run the same command again."
            )
        if found != ours:
            listener.warning(f"node {node.name} has {found}, the driver {ours}: embeddings can differ by rounding")


def look_around(sample: CropSample, node: str) -> dict[str, str] | AffcacheError:
    """Return what is installed here, or why the crops can't be seen."""
    try:
        sample.require_paths(node)
    except InputError as error:
        return error
    return versions()
