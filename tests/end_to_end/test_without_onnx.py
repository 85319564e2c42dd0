"""All but ONNX works where its packages can't be imported: the extra is one."""

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import write_crops, write_labels

REPOSITORY = Path(__file__).parents[2]
COMMANDS = """
import sys
for name in ("onnx", "onnxruntime", "onnxscript"):
    sys.modules[name] = None
import affcache

model, labels = sys.argv[1:]
for name, given in {"clip": {"model": model}, "timm": {"model": "timm:test_vit", "pretrained": "random:0"}}.items():
    affcache.extract(crops=("crops",), store=f"{name}.h5", device="cpu", **given)
    words = {"epochs": 1, "hidden_layers": 0, "batch_size": 4, "device": "cpu"}
    affcache.fit(store=f"{name}.h5", annotations=labels, run=name, **words)
    affcache.score(run=name, annotations=labels)
    affcache.publish(run=name, out=f"{name}-head")
    affcache.load(f"{name}-head", device="cpu", model=given["model"]).predict_proba("crops/a/00001.jpg")
affcache.list_encoders(word=("dinov2",))
try:
    affcache.load_encoder("onnx:some.onnx")
except affcache.ConfigError as error:
    print(error)
"""


def test_all_else_works_without_onnx(tmp_path: Path, tiny_encoder: str) -> None:
    write_crops(tmp_path / "crops", {"a": range(1, 9), "b": range(1, 9)})
    for split, video in (("train", "a"), ("validation", "b")):
        write_labels(tmp_path / "labels", "expr", split, {video: [0, 1, 2, 3, 4, 5, 6, 7]})
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, tiny_encoder, str(tmp_path / "labels")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Install them with pip install 'affcache[onnx]'" in done.stdout
