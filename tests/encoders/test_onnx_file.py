"""Networks in ONNX files: torch's embeddings, whatever the batch, type and outputs; and words for what is none."""

import copy
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

import affcache
from affcache.encoders.encoder import Encoder
from affcache.encoders.loading import choose_precision, load_described, load_encoder, load_weights
from affcache.errors import ConfigError, InputError
from affcache.extraction.tuning import compile_encoder
from affcache.store.description import fingerprint
from affcache.store.reading import EmbeddingStore
from tests.conftest import Heard, write_crops

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.4, 0.3)}
FLAGS = ["--mean", "0.5,0.5,0.5", "--std", "0.5,0.4,0.3"]


class Small(torch.nn.Module):
    """A network that takes any size."""

    def __init__(self, outputs: str = "one") -> None:
        super().__init__()
        self.conv, self.last = torch.nn.Conv2d(3, 8, 4, stride=4), torch.nn.Linear(8, 5)
        self.outputs = outputs

    def forward(self, images: torch.Tensor) -> Any:
        tokens = self.conv(images.float()).flatten(2).transpose(1, 2).relu()
        pooled = self.last(tokens.mean(1))
        every = {"one": pooled, "two": (tokens, pooled), "tokens": tokens, "spread": pooled[:, :, None, None]}
        return every[self.outputs]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that returns a network as an ONNX file, with what the file is to say; each is exported once."""
    folder = tmp_path_factory.mktemp("graphs")
    made: dict[Any, Path] = {}

    def export(
        outputs: str = "one",
        batch: int = 0,
        free: bool = False,
        said: dict[str, str] | None = None,
        dtype: torch.dtype = torch.float32,
        names: tuple[str, ...] = ("out",),
    ) -> Path:
        key = (outputs, batch, free, dtype, names)
        if key not in made:
            path = folder / f"{len(made)}.onnx"
            network = network_of(outputs)
            made[key] = path
            torch.onnx.export(
                network.eval(), (torch.zeros(batch or 2, 3, 32, 32, dtype=dtype),), path, input_names=["images"],
                output_names=list(names), dynamic_shapes=({**axes_of(batch, free)},), dynamo=True, verbose=False,
                external_data=False,
            )  # fmt: skip
        if said:
            model = onnx.load(made[key])
            onnx.helper.set_model_props(model, said)
            path = folder / f"said-{len(list(folder.iterdir()))}.onnx"
            onnx.save(model, path)
            return path
        return made[key]

    return export


def network_of(name: str) -> torch.nn.Module:
    """A network of timm or a small one, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model(name, num_classes=0).eval() if "_" in name else Small(name).eval()


def axes_of(batch: int, free: bool) -> dict[int, Any]:
    axes: dict[int, Any] = {} if batch else {0: torch.export.Dim("n", min=1)}
    if free:
        axes |= {2: 4 * torch.export.Dim("h", min=2, max=64), 3: 4 * torch.export.Dim("w", min=2, max=64)}
    return axes


def crops(count: int = 7) -> list[np.ndarray[Any, Any]]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (40, 40, 3), dtype=np.uint8) for _ in range(count)]


def torchs(name: str, encoder: Encoder, count: int = 7) -> Any:
    """Embed the same crops with torch."""
    with torch.inference_mode():
        return network_of(name)(encoder.network.normalise(encoder.prepare(crops(count))))


@pytest.mark.parametrize(("name", "batch", "width"), [("convnext_atto", 0, 320), ("one", 1, 5), ("one", 4, 5)])
def test_embeddings_are_torchs(exported: Callable[..., Path], name: str, batch: int, width: int) -> None:
    encoder = load_encoder(f"onnx:{exported(name, batch=batch)}", **HALF)
    assert (encoder.width, encoder.precision) == (width, "fp32")
    found, expected = encoder.encode(crops()), torchs(name, encoder)
    assert (found - expected).abs().max() <= 1e-5 * max(1, expected.abs().max().item())
    assert encoder.encode(crops(1)).shape == (1, width)


def test_what_a_store_keeps_of_it(exported: Callable[..., Path]) -> None:
    said = {"mean": "[0.1, 0.2, 0.3]", "std": "0.4,0.5,0.6", "license": "mit", "resize": "shortest bilinear antialias"}
    path = exported(said=said)
    description = load_encoder(f"onnx:{path}").description
    assert (description["mean"], description["std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert (description["licence"], description["resize"]) == ("mit", "shortest bilinear antialias")
    assert "onnxruntime" in description["versions"]
    assert "activation" not in description
    assert len(description["weights_sha256"]) == 64
    assert description["architecture"] == {"input": "images", "type": "tensor(float)", "batch": 0, "output": "out"}
    other = load_encoder(f"onnx:{exported(said={**said, 'mean': '0,0,0'})}").description
    assert fingerprint(other) != fingerprint(description)
    copied = path.with_name("copy.onnx")
    copied.write_bytes(path.read_bytes())
    again = load_described(description, model=f"onnx:{copied}")
    assert fingerprint(again.description) == fingerprint(description)
    assert fingerprint(load_described(description).description) == fingerprint(description)


def test_a_free_size_is_asked_for(exported: Callable[..., Path]) -> None:
    path = exported(free=True)
    with pytest.raises(ConfigError, match=r"Expected --image-size S, as its network was trained"):
        load_encoder(f"onnx:{path}", **HALF)
    for size in (32, 64):
        encoder = load_encoder(f"onnx:{path}", image_size=size, **HALF)
        assert encoder.description["image_size"] == [size, size]
        assert torch.allclose(encoder.encode(crops()), torchs("one", encoder), atol=1e-5)
    assert load_encoder(f"onnx:{exported(free=True, said={'image_size': '48'})}", **HALF).preprocessing.size == (
        48,
        48,
    )


def test_outputs(exported: Callable[..., Path]) -> None:
    named = exported("two", names=("tokens", "embeddings"))
    encoder = load_encoder(f"onnx:{named}", **HALF)
    assert torch.allclose(encoder.encode(crops()), torchs("two", encoder)[1], atol=1e-5)
    other = exported("two", names=("tokens", "pooled"))
    with pytest.raises(InputError, match=r"has the outputs tokens, pooled. Expected one, or the embeddings' name"):
        load_encoder(f"onnx:{other}", **HALF)
    assert load_encoder(f"onnx:{other}#pooled", **HALF).encode(crops()).equal(encoder.encode(crops()))
    with pytest.raises(InputError, match=r"The output tokens of .* is \[.*64, 8\]. Expected embeddings \(n, D\)"):
        load_encoder(f"onnx:{other}#tokens", **HALF)
    spread = load_encoder(f"onnx:{exported('spread')}", **HALF)
    assert torch.allclose(spread.encode(crops()), encoder.encode(crops()), atol=1e-6)


def test_pixels_as_bytes_need_no_normalisation(exported: Callable[..., Path]) -> None:
    path = exported(dtype=torch.uint8)
    encoder = load_encoder(f"onnx:{path}")
    with torch.inference_mode():
        expected = network_of("one")(encoder.prepare(crops()))
    assert torch.allclose(encoder.encode(crops()), expected, atol=1e-3, rtol=1e-5)
    assert encoder.description["std"] == [1.0, 1.0, 1.0]
    assert fingerprint(load_described(encoder.description).description) == fingerprint(encoder.description)
    with pytest.raises(ConfigError, match="takes pixels and normalises them itself"):
        load_encoder(f"onnx:{path}", **HALF)


def test_files_beside_a_file_count(tmp_path: Path, exported: Callable[..., Path]) -> None:
    model = onnx.load(exported())
    onnx.save(model, tmp_path / "a.onnx", save_as_external_data=True, location="a.data", size_threshold=100)
    before = load_encoder(f"onnx:{tmp_path / 'a.onnx'}", **HALF)
    weights = bytearray((tmp_path / "a.data").read_bytes())
    weights[2] ^= 1
    (tmp_path / "a.data").write_bytes(weights)
    after = load_encoder(f"onnx:{tmp_path / 'a.onnx'}", **HALF)
    assert before.description["weights_sha256"] != after.description["weights_sha256"]
    (tmp_path / "a.data").unlink()
    with pytest.raises(InputError, match=r"a.onnx can't be opened as an ONNX file \(.*with the files beside it"):
        load_encoder(f"onnx:{tmp_path / 'a.onnx'}", **HALF)


def test_it_is_copied_and_sent(exported: Callable[..., Path]) -> None:
    encoder = load_encoder(f"onnx:{exported()}", **HALF)
    for other in (copy.deepcopy(encoder.network), pickle.loads(pickle.dumps(encoder.network))):
        pixels = encoder.prepare(crops())
        assert other(pixels).equal(encoder.network(pixels))


def test_its_number_format_is_its_own(exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"onnx:{exported()}"
    with pytest.raises(ConfigError, match=r"computes in the number format.*Expected --precision auto or fp32"):
        load_encoder(name, precision="bf16", **HALF)
    monkeypatch.setattr("affcache.encoders.loading.fast_precisions", lambda device: ("bf16", "fp16"))
    encoder = load_encoder(name, **HALF)
    assert choose_precision(encoder).precision == "fp32"


def test_a_gpu_that_onnxruntime_lacks(exported: Callable[..., Path]) -> None:
    weights = load_weights(f"onnx:{exported()}", **HALF)
    with pytest.raises(ConfigError, match=r"can't compute on meta here: it has .*CPUExecutionProvider"):
        weights.tower.to("meta")


def test_compiling_it_changes_nothing(exported: Callable[..., Path]) -> None:
    encoder = load_encoder(f"onnx:{exported()}", **HALF)
    heard = Heard()
    compiled = compile_encoder(encoder, 4, heard)
    assert compiled.encode(crops(4)).equal(encoder.encode(crops(4)))


def test_extracted_from_the_command_line(
    exported: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from affcache.cli.app import app

    path = exported(batch=4)
    write_crops(tmp_path / "crops", {"a": range(1, 12), "b": range(1, 3)})
    monkeypatch.chdir(tmp_path)
    words = ["extract", "--crops", "crops", "--model", f"onnx:{path}", "--device", "cpu"]
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2
    assert "Expected --mean R,G,B and --std R,G,B, as its network was trained" in refused.stderr
    done = CliRunner().invoke(app, [*words, *FLAGS, "--view", "flip"])
    assert done.exit_code == 0, done.stderr
    store = EmbeddingStore.open(tmp_path / "data" / "features" / f"onnx-{path.stem}.h5")
    assert (len(store), store.width, store.views) == (13, 5, ["flip"])
    again = CliRunner().invoke(app, [*words, "--mean", "0,0,0", "--std", "1,1,1"])
    assert again.exit_code == 2
    assert "mean: [0.5, 0.5, 0.5] against [0.0, 0.0, 0.0]" in again.stderr


def graph_of(path: Path, inputs: dict[str, Any], kind: int | None = None) -> Path:
    """Write a graph that sums up its inputs, of the given shapes."""
    made = [onnx.helper.make_tensor_value_info(name, kind or 1, shape) for name, shape in inputs.items()]
    out = onnx.helper.make_tensor_value_info("out", kind or 1, None)
    nodes = [onnx.helper.make_node("Sum" if len(inputs) > 1 else "Identity", list(inputs), ["out"])]
    opset = [onnx.helper.make_opsetid("", 20)]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", made, [out]), opset_imports=opset, ir_version=9)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("inputs", "kind", "message"),
    [
        ({"a": ["n", 3, 8, 8], "b": ["n", 3, 8, 8]}, None, r"has 2 inputs \(a, b\). Expected one, of images"),
        ({"a": ["n", 8]}, None, r"takes \['n', 8\]. Expected images \(n, 3, height, width\)"),
        ({"a": ["n", 8, 8, 3]}, None, r"takes \['n', 8, 8, 3\]. Expected images"),
        ({"a": ["n", 3, 8, 8]}, 7, r"takes tensor\(int64\). Expected floating-point or uint8 images"),
    ],
)
def test_graphs_that_are_no_encoders(tmp_path: Path, inputs: dict[str, Any], kind: int | None, message: str) -> None:
    path = graph_of(tmp_path / "g.onnx", inputs, kind)
    with pytest.raises(InputError, match=message):
        load_encoder(f"onnx:{path}", **HALF)


def test_a_graph_that_fails_when_it_runs(exported: Callable[..., Path]) -> None:
    path = exported(free=True)
    with pytest.raises(InputError, match=r"can't encode 2 x 2 pixels, 1 at a time"):
        load_encoder(f"onnx:{path}", image_size=2, **HALF)


@pytest.mark.parametrize("content", [None, b"", b"no graph", b"\x08\x07"])
def test_files_that_are_none_of_onnx(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "g.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(
        InputError, match="can't be opened as an ONNX file" if content is not None else "There is no ONNX"
    ):
        load_encoder(f"onnx:{path}", **HALF)


@pytest.mark.parametrize(
    ("options", "said", "error", "message"),
    [
        ({}, {}, ConfigError, r"Expected --mean R,G,B and --std R,G,B, as its network"),
        ({"mean": (0, 0, 0)}, {}, ConfigError, r"Expected --std R,G,B, as its network"),
        ({"image_size": 64}, {}, ConfigError, r"takes images of 32 x 32 pixels and no others"),
        ({"pretrained": "random:0"}, {}, ConfigError, r"--pretrained is random:0, but onnx:.*brings its weights"),
        ({"std": (1, 1, 1)}, {"mean": "0,0"}, InputError, r"says in its metadata that mean is '0,0'"),
        ({"mean": (1, 1, 1)}, {"std": "0,1,1"}, InputError, r"says in its metadata that std is '0,1,1'"),
        ({"mean": (1, 1, 1)}, {"std": "a"}, InputError, r"says in its metadata that std is 'a'"),
    ],
)
def test_what_has_to_be_said(
    exported: Callable[..., Path], options: dict[str, Any], said: dict[str, str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_encoder(f"onnx:{exported(said=said)}", **options)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "g.onnx").touch()
    with pytest.raises(ConfigError, match=rf"{package}.*Install them with pip install 'affcache\[onnx\]'"):
        affcache.load_encoder(f"onnx:{tmp_path / 'g.onnx'}")
