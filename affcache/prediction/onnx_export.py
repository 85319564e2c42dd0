"""A head as ONNX, alone and behind its encoder, held against torch before it is kept."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from affcache.encoders.encoder import Encoder
from affcache.encoders.loading import check_faces, kind_of, smallest_cosine
from affcache.errors import ConfigError, first_line
from affcache.prediction.model import Model
from affcache.progress import quiet_libraries
from affcache.scoring.trained import TrainedHead

EMBEDDINGS, PIXELS = "embeddings.onnx", "pixels.onnx"
CLOSE = 1e-5  # the largest difference of a probability to torch's
ALIKE = 0.9999  # the smallest cosine of an embedding to torch's
LARGEST_FILE = 1_800_000_000  # bytes of weights; of more than 2 GB, ONNX wants a file beside the graph
OPSET = 20
CHECKED = (1, 2, 16)  # frames of one call, so that n is seen to be free
Arrays = Sequence[npt.NDArray[Any]]


class HeadGraph(nn.Module):
    """Embeddings to probabilities."""

    def __init__(self, trained: TrainedHead) -> None:
        super().__init__()
        self.head, self.task = trained.head, trained.task
        self.scaler = trained.scaler

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return probabilities (n, C) of float32 embeddings (n, D)."""
        return self.task.probabilities(self.head(self.scaler(embeddings)))


class PixelGraph(nn.Module):
    """Pixels to probabilities, by way of embeddings that are rounded as a store's: on those the head was trained."""

    def __init__(self, encoder: Encoder, trained: TrainedHead) -> None:
        super().__init__()
        self.network, self.head = encoder.network, HeadGraph(trained)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return probabilities (n, C), and the embeddings (n, D) float32, of uint8 pixels (n, 3, H, W)."""
        embeddings = self.network(pixels).half().float()
        return self.head(embeddings), embeddings


def require_onnx() -> None:
    """Refuse to go on without what writes and checks ONNX; raises ConfigError."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"--onnx asks for packages that are not here ({first_line(error)}). Expected onnx, onnxscript and "
            "onnxruntime. Install them with pip install 'affcache[onnx]', or publish without --onnx."
        ) from None


def why_no_pixels(model: Model) -> str:
    """Say why there can be no graph from pixels; "" where there can."""
    if not model.encoder_is_known:
        return "what made the embeddings isn't known, as they were imported"
    if (count := len(model.trained.encoders)) > 1:
        return f"the head is on {count} encoders, and a graph holds one"
    kind, _ = kind_of(str(model.trained.encoder["model"]))
    return {
        "onnx": "its encoder is an ONNX file already",
        "python": "its encoder is a function of your own, which is called only where you name it",
    }.get(kind, "")


def export_graphs(model: Model, folder: Path) -> dict[str, dict[str, Any]]:
    """Write embeddings.onnx, and pixels.onnx unless ``why_no_pixels`` says otherwise, into a folder.

    Args:
        model: on the CPU.
        folder: that is there.

    Returns:
        For each graph what it takes and gives, and how far it was from torch.

    Raises:
        ConfigError: a graph can't be written, or differs from torch.
        InputError, StoreError: the encoder can't be loaded, or is another one.
    """
    trained, random = model.trained, np.random.default_rng(0)
    graph = HeadGraph(trained).eval()
    given = [_scaled(random, (count, trained.width)) for count in CHECKED]
    _export(graph, folder / EMBEDDINGS, given[-1], "embeddings", ("probabilities",))
    differences = [_largest(theirs[0], ours[0]) for theirs, ours in _both(graph, folder / EMBEDDINGS, given)]
    facts = {EMBEDDINGS: _facts(["n", trained.width], "float32", _close(EMBEDDINGS, max(differences)))}
    if not why_no_pixels(model):
        facts[PIXELS] = _export_pixels(model, folder / PIXELS, random)
    return facts


def _export_pixels(model: Model, path: Path, random: np.random.Generator) -> dict[str, Any]:
    """Write the graph from pixels. Its head is held against torch on the graph's own embeddings.

    Two encoders that agree to the last bits but one still round some values to different float16 numbers: so
    embeddings are compared by their cosine, and probabilities as a whole are reported.
    """
    encoder = model.encoder_of(0, "fp32")
    graph, (height, width) = PixelGraph(encoder, model.trained).eval(), encoder.preprocessing.size
    faces = encoder.prepare(check_faces()).contiguous().numpy()
    noise = random.integers(0, 256, (max(CHECKED), 3, height, width), dtype=np.uint8)
    given = [faces, *(noise[:count] for count in CHECKED)]
    resize = str(encoder.description["resize"])  # so that the file is an encoder by itself: --model onnx:pixels.onnx
    _export(graph, path, given[0], "pixels", ("probabilities", "embeddings"), {"resize": resize})
    heads, cosines, whole = [], [], []
    for (theirs, embeddings), (ours, expected) in _both(graph, path, given):
        with torch.no_grad():
            heads.append(_largest(theirs, graph.head(torch.from_numpy(embeddings)).numpy()))
        cosines.append(smallest_cosine(torch.from_numpy(embeddings), torch.from_numpy(expected)))
        whole.append(_largest(theirs, ours))
    if not min(cosines) >= ALIKE:
        raise _differs(PIXELS, f"an embedding has a cosine of {min(cosines):.6f} to torch's", f"at least {ALIKE}")
    checked = {"smallest_cosine_of_embeddings": min(cosines), "largest_difference_from_pixels": max(whole)}
    facts = _facts(["n", 3, height, width], "uint8", _close(PIXELS, max(heads)))
    return {**facts, **checked, "precision": "fp32", "precision_of_store": model.trained.encoder["precision"]}


def _scaled(random: np.random.Generator, shape: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Draw embeddings of several lengths, as encoders differ in it."""
    scales = 10.0 ** random.uniform(-2, 1, (shape[0], 1))
    return (random.normal(size=shape) * scales).astype(np.float16).astype(np.float32)


def _facts(shape: Sequence[Any], kind: str, difference: float) -> dict[str, Any]:
    return {"input": {"shape": list(shape), "type": kind}, "opset": OPSET, "largest_difference": difference}


def _export(
    graph: nn.Module,
    path: Path,
    example: npt.NDArray[Any],
    name: str,
    outputs: Sequence[str],
    said: Mapping[str, str] | None = None,
) -> None:
    """Write a graph whose first axis is free, with what is ``said``, and without what the exporter notes of files."""
    dynamic = {name: {0: torch.export.Dim("n", min=1)}}
    try:
        with quiet_libraries():
            program: Any = torch.onnx.export(
                graph,
                (torch.from_numpy(example),),
                input_names=[name],
                output_names=list(outputs),
                opset_version=OPSET,
                dynamic_shapes=dynamic,
                dynamo=True,
                verbose=False,
            )
            _forget(program.model)
            program.model.metadata_props.update(said or {})
            weights = sum(tensor.nbytes for tensor in graph.state_dict().values())
            program.save(path, external_data=weights > LARGEST_FILE)
    except OSError:  # the disk
        raise
    except Exception as error:  # an operator, a shape that follows from data: the exporter raises nearly anything
        raise ConfigError(
            f"{path.name} can't be made: torch's exporter doesn't take this head or its encoder "
            f"({type(error).__name__}: {first_line(error)}). Expected modules that torch.onnx exports. Publish "
            "without --onnx."
        ) from error


def _forget(model: Any) -> None:
    """Remove the exporter's notes: they hold the paths of source files."""
    model.metadata_props.clear()
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        graph.metadata_props.clear()
        values = [*graph.inputs, *graph.initializers.values()]
        for node in graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
            values += node.outputs
        for value in values:
            value.metadata_props.clear()


def _both(graph: nn.Module, path: Path, given: Sequence[npt.NDArray[Any]]) -> Iterator[tuple[Arrays, Arrays]]:
    """Yield what onnxruntime and torch make of the same arrays."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    for array in given:
        with torch.no_grad():
            ours = graph(torch.from_numpy(array))
        yield session.run(None, {name: array}), [one.numpy() for one in (ours if isinstance(ours, tuple) else (ours,))]


def _largest(ours: npt.NDArray[Any], theirs: npt.NDArray[Any]) -> float:
    return float(np.abs(ours.astype(np.float64) - theirs).max())


def _close(name: str, difference: float) -> float:
    """Return a difference to torch that is small; raises ConfigError for another."""
    if not difference <= CLOSE:
        raise _differs(name, f"a probability is {difference:.2g} away from torch's", f"at most {CLOSE:g}")
    return difference


def _differs(name: str, found: str, expected: str) -> ConfigError:
    return ConfigError(
        f"{name} computes something else than torch: {found}. Expected {expected}. Publish without --onnx, or with "
        "other versions of torch, onnxscript and onnxruntime."
    )


def sentences(facts: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Say what each graph takes and gives, for the card."""
    found = {}
    for name, of in facts.items():
        shape, kind = ", ".join(map(str, of["input"]["shape"])), of["input"]["type"]
        found[name] = (
            f"{kind} ({shape}) to probabilities (n, C); at most {of['largest_difference']:.1g} away from torch "
            "where it was checked."
        )
        if name == PIXELS:
            found[name] += (
                " Pixels are resized as config.json says. The second output is the embeddings, rounded to float16 as a "
                f"store's. The encoder computes in {of['precision']}; the head's store was made in "
                f"{of['precision_of_store']}."
            )
    return found
