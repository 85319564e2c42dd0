"""The command ``affcache``: its subcommands as the help presents them, made from the table ``affcache.commands``."""

import inspect
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# Threads that wait should sleep: on a shared machine, spinning ones slow small training steps tenfold.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if {"fit", "ablate"}.intersection(sys.argv[1:2]):  # but waking them costs more than a small product takes
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # well under a millisecond

import typer

import affcache
from affcache.commands import COMMANDS, SETTINGS, call, store_of
from affcache.config import find_config
from affcache.errors import ConfigError
from affcache.progress import Listener

from .console import INPUT_ERROR, run, start
from .options import Handler, add, argument, parameters_of
from .show import SHOW

app = typer.Typer(
    name="affcache",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Run the command line."""
    start(app, "affcache")


@app.callback(invoke_without_command=True)
def root(version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
    """Cache CLIP embeddings of face crops once, then train and score facial affect heads in minutes."""
    if version:
        print(f"affcache {affcache.__version__}")
        raise typer.Exit


def working_folder() -> Path:
    """Return the working folder; raises ConfigError where it was deleted."""
    try:
        return Path.cwd()
    except OSError:
        raise ConfigError(
            "The working folder doesn't exist any more. Expected one that does: change to another with 'cd DIR', then "
            "run the command again."
        ) from None


@dataclass(frozen=True)
class Page:
    """How the help presents a command."""

    example: str  # words after the command's name
    another: str
    first: tuple[str, ...] = ()  # settings that the help lists first
    positional: tuple[str, ...] = ()  # settings that are arguments instead of flags


PAGES = {
    "faces": Page(
        "clip.mp4 --out my/faces",
        "holiday photos/ --out my/faces --every 5 --faces largest",
        first=("out", "faces", "every", "from_", "to", "align", "margin", "size"),
        positional=("inputs",),
    ),
    "extract": Page(
        "--crops data/Aff-Wild2/cropped_aligned",
        "--crops my/faces --store my/faces.h5 --model ViT-B-32 --pretrained laion2b_s34b_b79k",
        first=("crops", "crop_list", "every", "store", "model", "pretrained", "image_size", "mean", "std"),
    ),
    "fit": Page(
        "--task au --store my/faces.h5 --annotations my/labels --run runs/au-rho01 --rho 0.1",
        "--train-on all --as runs/au-rho01 --run runs/au-last",
        first=("task", "store", "annotations", "run", "resume", "train_on", "as_", "keep_epoch", "strength"),
    ),
    "score": Page(
        "",
        "runs/au-rho01 --split train --json",
        first=("split", "store", "annotations", "against", "figures"),
        positional=("run",),
    ),
    "predict": Page(
        "clip.mp4 --run runs/au-rho01 --out clip.csv",
        "my/faces --run runs/expr --run runs/au-rho01 --out all.parquet --smooth mean --smooth-width 15",
        first=("run", "out", "columns", "smooth", "smooth_width", "decide", "overlay", "page"),
        positional=("inputs",),
    ),
    "ablate": Page(
        "--task expr --preset paper --seeds 5",
        "--task au --vary alpha=0.3,0.5,1 --vary rho=0,0.05,0.5 --folds 5 --out ablations/au-grid",
        first=(
            "task", "vary", "list", "preset", "seeds", "base", "store", "annotations", "out", "folds", "fold_by",
            "select", "held_out", "keep", "yes",
        ),
    ),
    "report": Page(
        "",
        "runs/au-rho01 --crops my/faces --out au.html",
        first=("split", "store", "annotations", "crops", "out"),
        positional=("run",),
    ),
    "submit": Page(
        "runs/best --template test_set_example.txt --store test.h5",
        "runs/a runs/b --frames videos.csv --store test.h5 --smooth mean --smooth-width 51",
        first=("template", "frames", "store", "out"),
        positional=("run",),
    ),
    "publish": Page(
        "runs/best --out my-head --data Aff-Wild2 --license cc-by-nc-4.0",
        "runs/best --out my-head --onnx --card about.md",
        first=("out", "data", "license", "card", "onnx"),
        positional=("run",),
    ),
    "info": Page("", "my/faces.h5 --json"),
    "verify": Page("", "my/faces.h5 --json"),
    "demo": Page("", "--out demo-clip --model ViT-B-32 --pretrained openai"),
    "import": Page(
        "train.h5 val.h5 --list train.txt --list val.txt --model ViT-L-14 --pretrained openai",
        "clip1.csv clip2.csv --name units --columns 'AU*_r' --store my/units.h5",
        first=("list", "model", "pretrained", "name", "columns", "missing", "store"),
        positional=("sources",),
    ),
    "export": Page(
        "data/features/ViT-L-14-openai.h5 --format npy --out embeddings",
        "my/faces.h5 --format parquet --out my/faces.parquet",
        positional=("store",),
    ),
    "encoders": Page("dinov2", "siglip base --json", positional=("word",)),
    "doctor": Page("", "--crops my/faces --store my/faces.h5 --model ViT-B-32 --pretrained laion2b_s34b_b79k"),
}  # fmt: skip


def info(store: Path, listener: Listener) -> dict[str, Any]:
    """Say what an embedding store holds and how it was made."""
    return affcache.EmbeddingStore.open(store).summary()


def verify(store: Path, listener: Listener) -> dict[str, Any]:
    """Read a whole embedding store and check every block against its checksum."""
    opened = affcache.EmbeddingStore.open(store)
    for checked in (opened, *(opened.view(name) for name in opened.views)):
        checked.verify(lambda done, total: listener.progress(done, total, "block"))
    return {"store": str(opened.path), "rows": len(opened), "sound": True, "views": opened.views, **opened.counts}


OF_STORES = {"info": info, "verify": verify}  # they take a store, and have no settings


def handler_of(name: str) -> Handler:
    """Return what a command does with the flags that were given."""

    def work(given: dict[str, Any], listener: Listener) -> Any:
        folder = working_folder()
        config = find_config(folder, SETTINGS)
        for path in config.foreign:
            listener.warning(f"{path} is not read: another user could have written it")
        if config.path and config.path.parent != folder:
            listener.message(f"settings from {config.path}")
        if name in OF_STORES:
            return OF_STORES[name](given.get("store") or store_of(config, listener), listener)
        return call(name, given, config, listener)

    def handle(given: dict[str, Any], as_json: bool) -> None:
        result = run(name, as_json, partial(work, given), SHOW[name])
        if not getattr(result, "healthy", True):  # the doctor's
            raise typer.Exit(INPUT_ERROR)

    return handle


for name, page in PAGES.items():
    help_of = COMMANDS[name].settings if name in COMMANDS else OF_STORES[name]
    parameters = [argument("store", "The embedding store. [default: the one that fit reads]")]
    if name in COMMANDS:
        parameters = parameters_of(COMMANDS[name].settings, page.positional, page.first)
    examples = [f"affcache {name} {words}".rstrip() for words in (page.example, page.another)]
    add(app, name, f"{inspect.getdoc(help_of)}", handler_of(name), examples, parameters)
