"""A network in an ONNX file as an encoder: onnxruntime computes, behind a torch module that all else takes for one.

Input and output are the file's: one image input (n, 3, H, W), one embedding (n, D). What it doesn't say of its images
has to be said: a wrong mean or size gives wrong embeddings without an error.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from affcache.crops.images import Preprocessing
from affcache.encoders.encoder import Wanted, Weights, describe
from affcache.errors import ConfigError, InputError, first_line

INPUTS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
PIXELS = "tensor(uint8)"  # of a graph that normalises by itself, as pixels.onnx of a published head does
EMBEDDINGS = "embeddings"  # the output that is taken where there are several
EXTRA = "pip install 'affcache[onnx]'"
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
PIECE = 1 << 24  # bytes hashed at a time


@dataclass(frozen=True)
class Graph:
    """What an ONNX file says of itself."""

    path: Path
    input: str
    type: str  # onnxruntime's: tensor(float), tensor(uint8), ...
    batch: int  # images of every call; 0 where that is free
    size: tuple[int, int] | None  # (height, width); None where that is free
    output: str
    said: Mapping[str, str]  # metadata


class OnnxTower(torch.nn.Module):
    """A graph as a torch module without parameters. A copy makes a session of its own: sessions can't be copied.

    Every call has one thread, as all of affcache's on a CPU: the bits of an embedding don't hang on the machine.
    """

    def __init__(self, graph: Graph, session: Any) -> None:
        super().__init__()
        self.graph, self.session, self.device = graph, session, torch.device("cpu")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "session": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.session = open_session(self.graph.path, self.device)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "OnnxTower":
        """Do what ``to`` asks for; it calls this for every module, with what becomes of a tensor.

        Raises:
            ConfigError: another number format than fp32, or a GPU that onnxruntime can't use.
        """
        like = fn(torch.zeros(1))
        if like.dtype != torch.float32:
            raise ConfigError(
                f"{self.graph.path} computes in the number format that it was exported in. Expected --precision "
                "auto or fp32. For another format, export it in that."
            )
        if like.device != self.device:
            self.session, self.device = open_session(self.graph.path, like.device), like.device
        return self

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return embeddings float32 (B, D) of normalised inputs (B, 3, H, W), or of pixels / 255 where it takes pixels.

        Raises:
            InputError: onnxruntime fails.
        """
        array = (inputs * 255).round().byte() if self.graph.type == PIXELS else inputs
        images = np.ascontiguousarray(array.cpu().numpy().astype(INPUTS.get(self.graph.type, np.uint8), copy=False))
        size = self.graph.batch or len(images)
        parts = [self._run(images[first : first + size]) for first in range(0, len(images), size)]
        return torch.from_numpy(np.concatenate(parts)).to(inputs.device)

    def _run(self, images: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Encode at most a batch of the file's size, filled up to it."""
        missing = max(self.graph.batch - len(images), 0)
        filled = np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0))) if missing else images
        try:
            (found,) = self.session.run([self.graph.output], {self.graph.input: filled})
        except Exception as error:  # onnxruntime has errors of its own for each thing
            raise InputError(
                f"{self.graph.path} can't encode {filled.shape[2]} x {filled.shape[3]} pixels, {len(filled)} at a time "
                f"({first_line(error)}). Expected a graph from images (n, 3, H, W) to embeddings (n, D). Export it "
                "anew."
            ) from error
        pooled = found.reshape(len(found), -1) if found.ndim == 4 and found.shape[2:] == (1, 1) else found
        return np.asarray(pooled[: len(images)], dtype=np.float32)


def load_weights(wanted: Wanted) -> Weights:
    """Open an ONNX file, named ``FILE`` or ``FILE#OUTPUT``.

    Raises:
        ConfigError: onnxruntime isn't installed; or its images' size, mean or std aren't known or can't be had.
        InputError: it is no such file, or has no image input or no embedding.
    """
    (graph, session), onnxruntime = open_graph(wanted.model), _onnxruntime()
    preprocessing = _preprocessing(graph, wanted)
    described = {"input": graph.input, "type": graph.type, "batch": graph.batch, "output": graph.output}
    description = describe(
        f"onnx:{wanted.model}",
        preprocessing,
        {"onnxruntime": onnxruntime.__version__},
        licence=graph.said.get("licence") or graph.said.get("license", ""),
        pretrained="",
        architecture=described,
        weights_sha256=_sha256(graph.path),
    )
    return Weights(OnnxTower(graph, session).eval(), preprocessing, description)


def _onnxruntime() -> Any:
    try:
        import onnx  # noqa: F401  # for the files beside a file
        import onnxruntime
    except ImportError as error:
        raise ConfigError(
            f"--model onnx: takes packages that are not here ({first_line(error)}). Expected onnxruntime and onnx. "
            f"Install them with {EXTRA}."
        ) from None
    return onnxruntime


def open_session(path: Path, device: torch.device | None = None) -> Any:
    """Return an onnxruntime session with one thread.

    Raises:
        ConfigError: onnxruntime isn't installed, or has nothing for that device.
        InputError: the file isn't there, or none of ONNX.
    """
    onnxruntime, kind = _onnxruntime(), device.type if device else "cpu"
    provider: Any = PROVIDERS.get(kind, "")
    if provider not in onnxruntime.get_available_providers():
        raise ConfigError(
            f"onnxruntime can't compute on {device} here: it has {', '.join(onnxruntime.get_available_providers())}. "
            "Expected --device cpu, or for an NVIDIA GPU the package onnxruntime-gpu instead of onnxruntime."
        )
    if device is not None and device.index:
        provider = (provider, {"device_id": device.index})
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what goes wrong is an exception
    if not path.is_file():
        raise InputError(f"There is no ONNX file {path}. Expected one: --model onnx:FILE. Check the path.")
    try:
        return onnxruntime.InferenceSession(path, options, providers=[provider])
    except Exception as error:
        raise InputError(
            f"{path} can't be opened as an ONNX file ({first_line(error)}). Expected a whole one, with the files "
            "beside it that it names, of operators that this onnxruntime has. Check the path, or export it anew."
        ) from error


def open_graph(name: str) -> tuple[Graph, Any]:
    """Open a file; return what it says of its images and embeddings, and its session on the CPU.

    Raises:
        InputError: it is no encoder.
    """
    file, _, chosen = (name, "", "") if Path(name).is_file() else name.partition("#")
    session = open_session(Path(file))
    inputs, outputs = session.get_inputs(), {one.name: one for one in session.get_outputs()}
    if len(inputs) != 1:
        raise InputError(
            f"{file} has {len(inputs)} inputs ({', '.join(one.name for one in inputs)}). Expected one, of images. "
            "Export the image half of the network alone."
        )
    (image,) = inputs
    shape = image.shape
    if len(shape) != 4 or not (shape[1] == 3 or _is_free(shape[1])):
        raise InputError(f"{file} takes {shape}. Expected images (n, 3, height, width). Export it so.")
    if image.type not in (*INPUTS, PIXELS):
        raise InputError(f"{file} takes {image.type}. Expected floating-point or uint8 images. Export it so.")
    output = chosen or (next(iter(outputs)) if len(outputs) == 1 else EMBEDDINGS)
    if output not in outputs:
        raise InputError(
            f"{file} has the outputs {', '.join(outputs)}. Expected one, or the embeddings' name: --model "
            f"onnx:{file}#NAME."
        )
    found = outputs[output].shape
    if found and len(found) != 2 and found[2:] != [1, 1]:
        raise InputError(
            f"The output {output} of {file} is {found}. Expected embeddings (n, D), a row for each image: pool them in "
            "the graph, or name another output with #NAME."
        )
    batch, height, width = (0 if _is_free(shape[axis]) else shape[axis] for axis in (0, 2, 3))
    size = (height, width) if height and width else None
    said = dict(session.get_modelmeta().custom_metadata_map)
    return Graph(Path(file), image.name, image.type, batch, size, output, said), session


def _is_free(length: Any) -> bool:
    return not isinstance(length, int)


def _preprocessing(graph: Graph, wanted: Wanted) -> Preprocessing:
    """Return what is done to images, as the file or the flags say it; raises ConfigError where neither does."""
    if graph.size and wanted.image_size not in (None, graph.size):
        raise ConfigError(
            f"{graph.path} takes images of {graph.size[0]} x {graph.size[1]} pixels and no others. Expected no "
            "--image-size. For another size, export it so, or with height and width left free."
        )
    size = graph.size or wanted.image_size or _said(graph, "image_size", 2)
    mean, std = wanted.mean or _said(graph, "mean", 3), wanted.std or _said(graph, "std", 3)
    if graph.type == PIXELS:
        mean, std = (0.0,) * 3, (1.0,) * 3
        if wanted.mean not in (None, mean) or wanted.std not in (None, std):
            raise ConfigError(
                f"{graph.path} takes pixels and normalises them itself. Expected no --mean and no --std. Leave "
                "them out."
            )
    if not (size and mean and std):
        flags = {"--mean R,G,B": mean, "--std R,G,B": std, "--image-size S": size}
        missing = " and ".join(name for name, said in flags.items() if not said)
        raise ConfigError(
            f"{graph.path} doesn't say how its images are prepared; the wrong way gives wrong embeddings without an "
            f"error. Expected {missing}, as its network was trained: ImageNet's are --mean "
            "0.485,0.456,0.406 --std 0.229,0.224,0.225; for values from 0 to 1 say --mean 0,0,0 --std 1,1,1."
        )
    height, width = map(int, size)
    resize = graph.said.get("resize", "").split()  # as a store's description has it: shortest bicubic antialias
    mode = "shortest" if "shortest" in resize and height == width else "squash"
    interpolation = "bilinear" if "bilinear" in resize else "bicubic"
    return Preprocessing((height, width), mode, interpolation, mean, std)


def _said(graph: Graph, name: str, count: int) -> tuple[float, ...] | None:
    """Return numbers of a file's metadata, such as "0.485,0.456,0.406"; None without."""
    text = graph.said.get(name, "")
    if not text:
        return None
    try:
        numbers = tuple(map(float, text.strip("[]() ").split(",")))
    except ValueError:
        numbers = ()
    if len(numbers) == 1 and name == "image_size":
        numbers *= 2
    if len(numbers) != count or not all(map(isfinite, numbers)) or (name != "mean" and min(numbers) <= 0):
        raise InputError(
            f"{graph.path} says in its metadata that {name} is {text[:80]!r}. Expected {count} numbers between commas. "
            "Export it anew, or take them out there and say them with flags."
        )
    return numbers


def _sha256(path: Path) -> str:
    """Hash an ONNX file, and the files beside it that hold its weights."""
    import onnx

    digest = hashlib.sha256()
    graph = onnx.load(path, load_external_data=False)
    beside = {
        entry.value
        for tensor in onnx.external_data_helper._get_all_tensors(graph)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    for file in (path, *(path.parent / name for name in sorted(beside))):
        with file.open("rb") as opened:
            while piece := opened.read(PIECE):
                digest.update(piece)
    return digest.hexdigest()
