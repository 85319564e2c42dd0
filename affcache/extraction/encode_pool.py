"""Batches under way in the encoder: on a GPU handed over and fetched later, on a CPU one in each of several threads.

On a CPU every call computes with one thread, and there are as many calls at once as there would be threads in a single
one. The bits of an embedding depend on the number of threads of its call: like this they are the same on two cores and
on sixty-four, here and in a worker of a cluster. docs/performance.md says what that costs, or gains.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from threading import Event, Lock
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from affcache.encoders.encoder import Crops, DeviceBatch
from affcache.encoders.side_by_side import AnyEncoder, SideBySideBatch
from affcache.errors import ConfigError
from affcache.progress import Listener

# every network has them between its heavy parts, which makes them places to stop at
NORMS = (torch.nn.LayerNorm, torch.nn.modules.batchnorm._BatchNorm, torch.nn.GroupNorm)

Batch = DeviceBatch | SideBySideBatch
Embeddings = tuple[list[npt.NDArray[np.float32]], Counter[str]]  # parts (b, D) of a batch in order; seconds by stage


def calls_at_once(encoder: AnyEncoder, cores: int | None) -> int:
    """Return how many calls are under way at a time: on a CPU one per core, None standing for torch's own choice."""
    if encoder.device.type == "cuda":
        return 2  # one is handed over while the device works on another
    return (cores or torch.get_num_threads()) if _threaded(encoder) else 1


def _threaded(encoder: AnyEncoder) -> bool:
    return encoder.device.type == "cpu" and encoder.compiled is None  # a compiled one has its threads built in


@contextmanager
def one_thread_a_call(encoder: AnyEncoder) -> Iterator[None]:
    """Let torch compute with one thread on a CPU for a while, in this thread and in those begun meanwhile."""
    before = torch.get_num_threads()
    if _threaded(encoder):
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Stopped(Exception):
    """Ends a call whose result nobody waits for any more."""


class EncodePool:
    """Runs batches through an encoder, several at once. Use it as a context manager.

    Args:
        encoder: the encoder.
        largest_call: crops that it takes at a time; fewer from the first time that the device runs out of memory.
        cores: threads that compute on a CPU; None for as many as torch would use.
        listener: hears when the device runs out of memory.
    """

    def __init__(self, encoder: AnyEncoder, largest_call: int, listener: Listener, cores: int | None = None) -> None:
        self.encoder, self.largest_call, self.listener = encoder, largest_call, listener
        self.at_once = calls_at_once(encoder, cores)
        self._lowering = Lock()
        self._stop = Event()
        self._open = ExitStack()

    def __enter__(self) -> "EncodePool":
        self._open.enter_context(one_thread_a_call(self.encoder))
        for module in self.encoder.network.modules():
            if isinstance(module, NORMS) and _threaded(self.encoder):
                self._open.callback(module.register_forward_pre_hook(self._go_on_unless_stopped).remove)
        self._pool = self._open.enter_context(ThreadPoolExecutor(self.at_once, thread_name_prefix="encode"))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)
        self._open.close()

    def _go_on_unless_stopped(self, module: torch.nn.Module, inputs: Any) -> None:
        """Let nobody wait for a call of half a minute after Ctrl-C."""
        if self._stop.is_set():
            raise _Stopped

    def begin(self, crops: Crops) -> Callable[[], Embeddings]:
        """Start to encode B crops; what is returned waits for them."""
        if not _threaded(self.encoder):
            return partial(_fetch, self._submit(crops))
        return self._pool.submit(lambda: _fetch(self._submit(crops))).result

    def _submit(self, crops: Crops) -> list[Batch]:
        """Hand crops to the device in calls that fit its memory; smaller ones from the first that doesn't."""
        while True:
            size = self.largest_call
            try:
                return [self.encoder.submit(crops[i : i + size]) for i in range(0, len(crops), size)]
            except torch.OutOfMemoryError:
                if size == 1:
                    raise ConfigError(
                        f"{self.encoder.device} has not enough memory to encode one crop. Expected room for the model "
                        "and a batch. Free the device, or use --device cpu, --precision bf16 or a smaller --model."
                    ) from None
            with self._lowering:
                if self.largest_call < size:  # by another thread
                    continue
                self.largest_call = max(min(size, len(crops)) // 2, 1)
                torch.cuda.empty_cache()
                self.listener.warning(
                    f"{self.encoder.device} ran out of memory with {size} crops; going on with {self.largest_call} "
                    "a call"
                )


def _fetch(batches: Sequence[Batch]) -> Embeddings:
    """Wait for the device."""
    parts = [batch.wait() for batch in batches]
    seconds: Counter[str] = Counter()
    for batch in batches:
        seconds.update(batch.seconds())
    return parts, seconds
