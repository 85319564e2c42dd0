"""Write the tables of docs/results.md anew: ablations of a store and its labels, or of the sample that ships.

python docs/make_results.py sample
python docs/make_results.py real --store faces.h5 --annotations labels

The tables go between the lines "<!-- begin NAME -->" and "<!-- end NAME -->". What is finished in --out is kept, so
that the script can be interrupted and called again.
"""

import argparse
import datetime
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does: waiting threads sleep,
os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # but not at once

import torch

import affcache
from affcache.ablation.tables import markdown
from affcache.devices import describe_machine
from affcache.files import shipped

DOCS = Path(__file__).parent
VARIANTS = DOCS / "variants.toml"


def main() -> None:
    """Train what is missing and put the tables in their place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="which tables: a name that docs/results.md has")
    parser.add_argument("--store", type=Path, help="the embedding store; for the sample it is made")
    parser.add_argument("--annotations", type=Path)
    parser.add_argument("--task", default="expr")
    parser.add_argument("--seeds", type=int, default=5, help="of erm, cvar, sam; the variants have 3")
    parser.add_argument("--out", type=Path, default=Path("ablations"))
    arguments = parser.parse_args()
    with shipped("sample") as sample:
        store, annotations = arguments.store, arguments.annotations
        if store is None:
            annotations = sample / "annotations"
            store = sample_store(sample, arguments.out / "sample.h5")
        text = tables(arguments, store, annotations)
    put(DOCS / "results.md", arguments.name, text)


def sample_store(sample: Path, store: Path) -> Path:
    """Encode the shipped sample as the demo does."""
    store.parent.mkdir(parents=True, exist_ok=True)
    with shipped("practice_encoder") as encoder:
        model = f"local-dir:{encoder}"
        affcache.extract(crops=(sample / "cropped_aligned",), store=store, model=model, pretrained="random:0")
    return store


def tables(arguments: argparse.Namespace, store: Path, annotations: Path) -> str:
    """Return the Markdown of both ablations."""
    common = {"task": arguments.task, "store": store, "annotations": annotations, "keep": "none"}
    folder = arguments.out / arguments.name
    paper = affcache.ablate(preset="paper", seeds=arguments.seeds, out=folder / "paper", **common)
    parts = [f"CVaR and SAM, {arguments.seeds} seeds:\n", markdown(paper.rows, heldout=False)]
    if arguments.task == "expr":  # variants.toml has settings that only classes have
        variants = affcache.ablate(list=VARIANTS, seeds=3, out=folder / "variants", **common)
        parts += ['Variants of the recipe "paper", 3 seeds:\n', markdown(variants.rows, heldout=False)]
    return "\n".join([*parts, made_with()])


def made_with() -> str:
    """Say when and on what machine a table was made."""
    machine = describe_machine(torch.device("cpu"))
    where = f"torch {machine['torch']}, {machine['cores']} cores of {machine['processor']}"
    return f"Made on {datetime.date.today()} with {where}.\n"


def put(page: Path, name: str, text: str) -> None:
    """Put a text between the lines of a name in a page, and print it."""
    content, begin, end = page.read_text(encoding="utf-8"), f"<!-- begin {name} -->\n", f"<!-- end {name} -->\n"
    if begin not in content or end not in content:
        raise SystemExit(f"docs/{page.name} has no lines {begin.strip()} and {end.strip()}. Expected both. Add them.")
    before, _, rest = content.partition(begin)
    page.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
