"""What tests share: a tiny real encoder, small folders of crops, stores and labels with known contents."""

import json
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # processes share the cores: each one's threads would wait for the others'
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does: waiting threads sleep,
os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # but not at once
os.environ.setdefault("MKL_ENABLE_INSTRUCTIONS", "AVX2")  # products round alike on all x86: bounds rest on it

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from affcache.crops.crop_list import CropList
from affcache.progress import Listener
from affcache.store.description import fingerprint
from affcache.store.frames import ENCODED
from affcache.store.reading import EmbeddingStore
from affcache.store.writing import StoreWriter, create_store
from affcache.tasks.annotations import join_labels
from affcache.tasks.tasks import TASKS
from affcache.training.data import Frames
from affcache.training.learner import Learner

REAL = Path(__file__).parents[2] / "shared" / "real"
NAMED_ONLY = fingerprint({})  # of an encoder of which nothing but names is said
SET_ASIDE = "slow or browser or cluster or kill or real"
MOST_PROCESSES = 8  # each imports torch: 0.4 GB
TINY_CONFIG = {
    "model_cfg": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32},
        "text_cfg": {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 1, "layers": 1},
    },
    "preprocess_cfg": {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], "interpolation": "bicubic"},
}


def asked_for(config: pytest.Config) -> bool:
    """Whether the command line names marks, files of tests or single tests; folders and -k are no such wish."""
    named = config.args_source is config.ArgsSource.ARGS and all(".py" in word for word in config.args)
    return bool(config.option.markexpr) or named


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Share the suite among the cores. What is asked for by name runs in one process: it may measure, kill or wait."""
    return 0 if asked_for(config) else min(os.cpu_count() or 1, MOST_PROCESSES)


def pytest_configure(config: pytest.Config) -> None:
    """Leave out what is set aside, unless it was asked for."""
    if not asked_for(config):
        config.option.markexpr = f"not ({SET_ASIDE})"


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model name, local-dir:..., of a tiny open_clip vision transformer with seeded weights (D = 24)."""
    folder = tmp_path_factory.mktemp("tiny-encoder")
    return write_tiny_encoder(folder, seed=0)


def write_tiny_encoder(folder: Path, seed: int) -> str:
    """Write a tiny open_clip model folder and return its model name."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.CLIP(**TINY_CONFIG["model_cfg"])
    (folder / "open_clip_config.json").write_text(json.dumps(TINY_CONFIG))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def write_crops(root: Path, videos: dict[str, Sequence[int]], size: tuple[int, int] = (40, 40), seed: int = 0) -> Path:
    """Write crops of noise, <root>/<video>/NNNNN.jpg, for the given frame numbers; return the root."""
    random = np.random.default_rng(seed)
    for video, frames in videos.items():
        (root / video).mkdir(parents=True, exist_ok=True)
        for frame in frames:
            pixels = random.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / video / f"{frame:05d}.jpg", quality=90)
    return root


def crop_list(videos: dict[str, Sequence[int]]) -> CropList:
    """Return the list of crops that a folder with these videos and frames would give; no files are made."""
    names = sorted(videos)
    return CropList(
        folders=tuple(Path("crops") / name for name in names),
        video_names=tuple(names),
        video_start=np.cumsum([0, *(len(videos[name]) for name in names)], dtype=np.int64),
        frame_number=np.concatenate([np.asarray(videos[name], dtype=np.int32) for name in names]),
    )


def write_store(
    path: Path,
    videos: dict[str, Sequence[int]],
    features: npt.NDArray[np.float16],
    unreadable: Sequence[int] = (),
    **described: Any,
) -> EmbeddingStore:
    """Write a complete store with the given features (N, D), without an encoder; some rows may be unreadable."""
    encoder = {"model": "made-up", "pretrained": "", "weights_sha256": "0" * 64, "precision": "fp32", **described}
    create_store(path, crop_list(videos), features.shape[1], encoder, fingerprint(encoder))
    status = np.full(len(features), ENCODED, dtype=np.uint8)
    status[list(unreadable)] = 2
    with StoreWriter(path) as writer:
        writer.commit(0, np.where(status[:, None] == ENCODED, features, 0).astype(np.float16), status)
    return EmbeddingStore.open(path)


def spoil_features(path: Path) -> None:
    """Overwrite the middle of a store's features with zeros, as a disk may."""
    features = EmbeddingStore.open(path).features
    with path.open("r+b") as file:
        file.seek(features.offset + features.nbytes // 2)  # type: ignore[attr-defined]
        file.write(bytes(64))


def write_labels(annotations: Path, task: str, split: str, videos: dict[str, Sequence[object]]) -> Path:
    """Write one label file a video; each entry is a line's text or its single value. Returns the annotations folder."""
    folder = annotations / TASKS[task].folders[0] / {"train": "Train_Set", "validation": "Validation_Set"}[split]
    folder.mkdir(parents=True, exist_ok=True)
    for video, lines in videos.items():
        (folder / f"{video}.txt").write_text("\n".join([TASKS[task].header, *map(str, lines)]) + "\n")
    return annotations


MakeData = Callable[..., tuple[Path, Path]]


@pytest.fixture
def learnable(tmp_path: Path) -> MakeData:
    """Make a store and labels that a head can learn: returns (store path, annotations folder)."""
    return partial(make_learnable, tmp_path)


def make_learnable(
    folder: Path, task: str = "expr", videos: int = 6, frames: int = 40, width: int = 16, seed: int = 0
) -> tuple[Path, Path]:
    """Make a store and labels that a head can learn in a folder: returns (store path, annotations folder)."""
    random = np.random.default_rng(seed)
    names = sorted(f"{index}-30-640x360" for index in range(videos))  # as they are stored
    listing = {name: range(1, frames + 1) for name in names}
    classes = random.integers(0, 8, videos * frames)
    patterns = random.normal(size=(8, width))
    features = (patterns[classes] + random.normal(scale=0.5, size=(videos * frames, width))).astype(np.float16)
    store = folder / f"{task}.h5"
    write_store(store, listing, features)
    units = (np.arange(12)[None, :] + classes[:, None]) % 3 == 0
    lines = [",".join(map(str, row.astype(int))) for row in units] if task == "au" else list(classes)
    if task == "va":
        lines = [f"{valence:.2f},{arousal:.2f}" for valence, arousal in np.tanh(features[:, :2])]
    for index, name in enumerate(names):
        split = "validation" if index % 3 == 2 else "train"
        write_labels(folder / "labels", task, split, {name: lines[index * frames : (index + 1) * frames]})
    return store, folder / "labels"


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small products on a busy machine: threads would wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Heard(Listener):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.warnings: list[str] = []
        self.steps: list[tuple[int, int]] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
        self.steps.append((done, total))


def frames_of(data: tuple[Path, Path], task: str) -> tuple[Frames, Frames]:
    """Load the training and validation frames of what ``learnable`` made; for va with values that embeddings decide."""
    store = EmbeddingStore.open(data[0])
    labelled = TASKS["au" if task == "au" else "expr"]
    joined = (join_labels(store, data[1], labelled, split) for split in ("train", "validation"))
    train, validation = (Frames.load(store, labels, torch.device("cpu")) for labels in joined)
    if task == "va":
        train, validation = (replace(f, labels=f.embeddings[:, :2].float().tanh()) for f in (train, validation))
    return train, validation


def record_losses(learner: Learner) -> list[torch.Tensor]:
    """Return a list that takes up the losses (H,) of all passes to come: first, second, first, second."""
    losses, compute = [], learner.objective.with_gradient

    def recorded(*args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        loss, gradient = compute(*args, **options)
        losses.append(loss)
        return loss, gradient

    learner.objective.with_gradient = recorded  # type: ignore[method-assign]
    return losses
