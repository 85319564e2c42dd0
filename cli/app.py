"""The command ``affcache``: what its subcommands are called, what they take, and their examples."""

import os
import sys

# Threads that wait should sleep: on a shared machine, spinning ones slow small training steps tenfold.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if {"fit", "ablate"}.intersection(sys.argv[1:2]):  # but waking them costs more than a small product takes
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # well under a millisecond

import typer

import affcache
from affcache.ablation.settings import AblateSettings
from affcache.demonstration import DemoSettings
from affcache.exchange.settings import ExportSettings, ImportSettings
from affcache.extraction.settings import DoctorSettings, ExtractSettings
from affcache.reporting.settings import ReportSettings
from affcache.scoring.settings import ScoreSettings
from affcache.submission.settings import SubmitSettings
from affcache.training.settings import FitSettings

from . import commands, measuring, storing
from .commands import start
from .options import add, add_command, argument

app = typer.Typer(
    name="affcache",
    help="Cache CLIP embeddings of face crops once, then train and score facial affect heads in minutes.",
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


add_command(
    app,
    "extract",
    ExtractSettings,
    commands.extract,
    """
    affcache extract --crops data/Aff-Wild2/cropped_aligned
    affcache extract --crops my/faces --store my/faces.h5 --model ViT-B-32 --pretrained laion2b_s34b_b79k
    """,
    first=("crops", "crop_list", "store", "model", "pretrained"),
)
add_command(
    app,
    "fit",
    FitSettings,
    commands.fit,
    """
    affcache fit --task expr
    affcache fit --task au --store my/faces.h5 --annotations my/labels --run runs/au-rho01 --rho 0.1
    """,
    first=("task", "store", "annotations", "run", "resume"),
)
add_command(
    app,
    "score",
    ScoreSettings,
    commands.score,
    """
    affcache score
    affcache score runs/au-rho01 --split train --json
    """,
    positional=("run",),
    first=("split", "store", "annotations", "against", "figures"),
)
add_command(
    app,
    "ablate",
    AblateSettings,
    commands.ablate,
    """
    affcache ablate --task expr --preset paper --seeds 5
    affcache ablate --task au --vary alpha=0.3,0.5,1 --vary rho=0,0.05,0.5 --out ablations/au-grid
    """,
    first=("task", "vary", "list", "preset", "seeds", "base", "store", "annotations", "out", "select", "keep", "yes"),
)
add_command(
    app,
    "report",
    ReportSettings,
    commands.report,
    """
    affcache report
    affcache report runs/au-rho01 --crops my/faces --out au.html
    """,
    positional=("run",),
    first=("split", "store", "annotations", "crops", "out"),
)
add_command(
    app,
    "submit",
    SubmitSettings,
    commands.submit,
    """
    affcache submit runs/best --template test_set_example.txt --store test.h5
    affcache submit runs/a runs/b --frames videos.csv --store test.h5 --smooth mean --smooth-width 51
    """,
    positional=("run",),
    first=("template", "frames", "store", "out"),
)
store_argument = argument("store", "The embedding store.")
add(
    app,
    "info",
    "Say what an embedding store holds and how it was made.",
    storing.info,
    "affcache info data/features/ViT-L-14-openai.h5\naffcache info my/faces.h5 --json",
    [store_argument],
)
add(
    app,
    "verify",
    "Read a whole embedding store and check every block against its checksum.",
    storing.verify,
    "affcache verify data/features/ViT-L-14-openai.h5\naffcache verify my/faces.h5 --json",
    [store_argument],
)
add_command(
    app,
    "demo",
    DemoSettings,
    commands.demo,
    """
    affcache demo
    affcache demo --out demo-clip --model ViT-B-32 --pretrained openai
    """,
)
add_command(
    app,
    "import",
    ImportSettings,
    storing.import_,
    """
    affcache import train.h5 val.h5 --list train.txt --list val.txt --model ViT-L-14 --pretrained openai
    affcache import embeddings --store my/faces.h5 --model ViT-B-32 --pretrained openai
    """,
    positional=("sources",),
)
add_command(
    app,
    "export",
    ExportSettings,
    storing.export,
    """
    affcache export data/features/ViT-L-14-openai.h5 --format npy --out embeddings
    affcache export my/faces.h5 --format parquet --out my/faces.parquet
    """,
    positional=("store",),
)
add_command(
    app,
    "doctor",
    DoctorSettings,
    measuring.doctor,
    """
    affcache doctor
    affcache doctor --crops my/faces --store my/faces.h5 --model ViT-B-32 --pretrained laion2b_s34b_b79k
    """,
)
