"""The frozen image encoder: pixels to embeddings, whatever network that is, and the description that a store keeps.

Inputs are cast with the weights. Resizing is batched but equals the transform that the weights were trained with.
"""

import copy
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torchvision
from PIL import Image

from affcache.crops.images import Normalise, Preprocessing, as_pixels
from affcache.errors import ConfigError, InputError, first_line

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Crop = npt.NDArray[np.uint8] | Image.Image | Path | str
Crops = Sequence[npt.NDArray[np.uint8]]  # B arrays (height, width, 3), RGB; sizes may differ


def copy_to_device(crops: Crops, device: torch.device) -> list[tuple[list[int], torch.Tensor]]:
    """Stack crops (height, width, 3) of equal size and start their copy to the device.

    Returns:
        For each size, the indices of its crops and a uint8 tensor (b, height, width, 3) on the device.
    """
    of_shape: dict[tuple[int, ...], list[int]] = {}
    for index, crop in enumerate(crops):
        of_shape.setdefault(crop.shape, []).append(index)
    groups = []
    for shape, indices in of_shape.items():
        batch = torch.empty((len(indices), *shape), dtype=torch.uint8, pin_memory=device.type == "cuda")
        np.stack([crops[i] for i in indices], out=batch.numpy())
        groups.append((indices, batch.to(device, non_blocking=True)))
    return groups


class DeviceBatch:
    """A batch that was handed to the device. ``wait`` gives its embeddings, ``seconds`` where its time went."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, Any]] = []  # stage, and a float or a torch.cuda.Event
        self._embeddings: torch.Tensor | None = None
        self.mark("")

    def mark(self, stage: str) -> None:
        """Say that the work handed over since the last mark belonged to a stage."""
        now: Any = time.perf_counter()
        if self._device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record(torch.cuda.current_stream(self._device))
        self._marks.append((stage, now))

    def fetch(self, embeddings: torch.Tensor) -> None:
        """Start the copy of embeddings (B, D) back to the host."""
        if embeddings.device.type == "cuda":
            host = torch.empty(embeddings.shape, dtype=embeddings.dtype, pin_memory=True)
            self._embeddings = host.copy_(embeddings, non_blocking=True)
        else:
            self._embeddings = embeddings

    def wait(self) -> npt.NDArray[np.float32]:
        """Wait for the device, and return the embeddings, float32 (B, D)."""
        assert self._embeddings is not None
        if self._device.type == "cuda":
            self._marks[-1][1].synchronize()
        return self._embeddings.numpy()

    def seconds(self) -> dict[str, float]:
        """Return the device's own seconds per stage, "copy" and "encode", once ``wait`` has returned."""
        spent = {"copy": 0.0, "encode": 0.0}
        for (_, before), (stage, after) in pairwise(self._marks):
            spent[stage] += before.elapsed_time(after) / 1000 if self._device.type == "cuda" else after - before
        return spent


class ImageTower(torch.nn.Module):
    """Resized pixels to embeddings: normalise in float32, cast, and run the network."""

    def __init__(self, tower: torch.nn.Module, preprocessing: Preprocessing, dtype: torch.dtype) -> None:
        super().__init__()
        self.normalise = Normalise(preprocessing.mean, preprocessing.std, dtype)
        self.tower = tower.to(dtype).to(memory_format=torch.channels_last)  # convolutions run twice as fast
        self.eval()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode uint8 pixels (B, 3, H, W) to float32 embeddings (B, D)."""
        return self.encode_inputs(self.normalise(pixels))

    def encode_inputs(self, inputs: torch.Tensor) -> torch.Tensor:
        """Encode normalised inputs (B, 3, H, W), in the tower's dtype, to float32 embeddings (B, D)."""
        embeddings = self.tower(inputs)
        if isinstance(embeddings, (tuple, list)):  # CoCa returns (pooled, tokens)
            embeddings = embeddings[0]
        return embeddings.float()


@dataclass(frozen=True)
class Wanted:
    """Which encoder is asked for. None, "" and "auto" stand for what goes with the weights."""

    model: str  # what --model says, without the word for its kind
    pretrained: str = ""
    activation: str = "auto"
    image_size: tuple[int, int] | None = None  # (height, width) in pixels
    mean: tuple[float, ...] | None = None  # (3,) of values in [0, 1]
    std: tuple[float, ...] | None = None  # (3,)


@dataclass(frozen=True)
class Weights:
    """An image tower in fp32 on the CPU, before it goes to a device."""

    tower: torch.nn.Module  # normalised inputs (B, 3, H, W) to embeddings (B, D)
    preprocessing: Preprocessing
    description: Mapping[str, Any]  # what a store keeps, but for the width, which shows when it runs


@torch.inference_mode()
def require_size(tower: torch.nn.Module, size: tuple[int, int], model: str) -> None:
    """Refuse images of another size than its own that a network can't take, or of which it would leave out the border.

    Raises:
        ConfigError: says which of it.
    """
    height, width = size
    first = next((module for module in tower.modules() if isinstance(module, torch.nn.Conv2d)), None)
    down, across = first.stride if first is not None and first.stride == first.kernel_size else (1, 1)
    if height % int(down) or width % int(across):
        raise ConfigError(
            f"--image-size {height} x {width}: {model} cuts images into pieces of {down} x {across} pixels, and would "
            "leave out what is over. Expected a multiple of that."
        )
    try:
        tower(torch.zeros(1, 3, height, width))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"{model} takes no images of {height} x {width} pixels ({type(error).__name__}: {first_line(error)}). "
            "Expected a size that it takes. Leave out --image-size, or try another."
        ) from error


def describe(
    model: str, preprocessing: Preprocessing, versions: Mapping[str, str], *, licence: str = "", **more: Any
) -> dict[str, Any]:
    """Return the description of an encoder in fp32, in JSON's types.

    Args:
        model: what --model says.
        preprocessing: of its images.
        versions: of the packages that compute it.
        licence: of its weights, where it is known.
        more: pretrained, weights_sha256, architecture, and what else changes its numbers.
    """
    known = {"licence": licence} if licence else {}
    return {
        "model": model,
        **more,
        **prepared(preprocessing),
        "precision": "fp32",
        "normalised": False,
        "versions": {"torch": torch.__version__, "torchvision": torchvision.__version__, **versions},
        **known,
    }


def prepared(preprocessing: Preprocessing) -> dict[str, Any]:
    """Return the part of a description that says what is done to images."""
    return {
        "image_size": list(preprocessing.size),
        "resize": f"{preprocessing.resize_mode} {preprocessing.interpolation} antialias",
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
    }


def weights_sha256(tower: torch.nn.Module) -> str:
    """Hash the names, shapes and values of all weights, wherever they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Encoder:
    """A frozen image tower ready to encode batches of crops. Build one with ``load_encoder``."""

    network: ImageTower
    preprocessing: Preprocessing
    device: torch.device
    description: Mapping[str, Any]  # the store's ``encoder`` attribute
    compiled: Any = None  # what torch.compile made of the network, where it did
    fixed_batch: int = 0  # crops per call of the compiled network; fewer are filled up, so that shapes stay

    @property
    def width(self) -> int:
        """D, the number of values in one embedding."""
        return int(self.description["width"])

    @property
    def precision(self) -> str:
        """fp32, bf16 or fp16."""
        return str(self.description["precision"])

    def resize_large(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Resize an image (height, width, 3) that is far larger than the input; as ``Preprocessing.resize_large``."""
        return self.preprocessing.resize_large(pixels)

    def __repr__(self) -> str:
        name = f"{self.description['model']} {self.description['pretrained']}".strip()
        return f"<Encoder {name}: D = {self.width}, {self.precision} on {self.device}>"

    def encode(self, crops: Crop | Sequence[Crop]) -> torch.Tensor:
        """Encode a batch of RGB crops, and wait for it.

        Args:
            crops: B of them, of any sizes: uint8 arrays (height, width, 3), PIL images, or paths of files.

        Returns:
            float32 tensor (B, D) on the CPU: raw ``encode_image`` output, not normalised.

        Raises:
            InputError: one is none of these, or a file that can't be read.
        """
        if isinstance(crops, (str, Path, Image.Image)) or (isinstance(crops, np.ndarray) and crops.ndim == 3):
            crops = [crops]
        return torch.from_numpy(self.submit([as_pixels(crop) for crop in crops]).wait())

    @torch.inference_mode()
    def submit(self, crops: Crops) -> DeviceBatch:
        """Hand a batch of RGB crops, as for ``encode``, to the device; on a GPU this returns while the device works.

        Raises:
            torch.OutOfMemoryError: the batch doesn't fit the device.
        """
        batch = DeviceBatch(self.device)
        groups = copy_to_device(crops, self.device)
        batch.mark("copy")
        pixels = self._resize(groups, len(crops))  # (B, 3, H, W) uint8
        if self.compiled is not None:
            missing = max(self.fixed_batch - len(pixels), 0)
            filled = torch.nn.functional.pad(pixels, (0, 0, 0, 0, 0, 0, 0, missing))
            embeddings = self.compiled(filled.contiguous(memory_format=torch.channels_last))[: len(pixels)]
        else:
            embeddings = self.network(pixels)
        self._require_rows(embeddings, len(pixels))
        batch.mark("encode")
        batch.fetch(embeddings)  # (B, D)
        batch.mark("copy")
        return batch

    def _require_rows(self, embeddings: torch.Tensor, crops: int) -> None:
        """Refuse embeddings that are not (B, D), of the width that earlier ones had."""
        width = self.description.get("width", "D")
        if embeddings.ndim != 2 or len(embeddings) != crops or width not in ("D", embeddings.shape[1]):
            raise InputError(
                f"{self.description['model']} made embeddings of shape {tuple(embeddings.shape)} of {crops} crops. "
                f"Expected ({crops}, {width}): a pooled embedding for each crop, always as wide. Mend the encoder, or "
                "take another --model."
            )

    @torch.inference_mode()
    def prepare(self, crops: Crops) -> torch.Tensor:
        """Return a batch resized and on the device, uint8 (B, 3, H, W): what the network takes."""
        return self._resize(copy_to_device(crops, self.device), len(crops))

    def _resize(self, groups: list[tuple[list[int], torch.Tensor]], count: int) -> torch.Tensor:
        """Resize each group of equally large crops (b, height, width, 3) in one go, and put them in order."""
        resized = [(indices, self.preprocessing.resize(crops.permute(0, 3, 1, 2))) for indices, crops in groups]
        if len(resized) == 1:
            return resized[0][1].contiguous(memory_format=torch.channels_last)
        size = (count, 3, *self.preprocessing.size)
        pixels = torch.empty(size, dtype=torch.uint8, device=self.device, memory_format=torch.channels_last)
        for indices, images in resized:
            pixels[indices] = images
        return pixels

    def in_precision(self, precision: str) -> "Encoder":
        """Return the same encoder, which is in fp32, with its weights rounded to another number format."""
        if precision == self.precision:
            return self
        tower = copy.deepcopy(self.network.tower)
        network = ImageTower(tower, self.preprocessing, DTYPES[precision]).to(self.device)
        return replace(self, network=network, description={**self.description, "precision": precision})
