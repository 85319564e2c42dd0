"""Write a table of docs/encoders.md anew: what one head makes of several encoders, with intervals.

python docs/make_encoders.py sample timm:test_vit=random:0 timm:convnext_atto=random:0
python docs/make_encoders.py real --crops crops --annotations labels local-dir:encoder local-dir:encoder@112
python docs/make_encoders.py mine --crops crops --annotations labels --task au ViT-L-14=openai ViT-B-32=openai

An encoder is what --model says, with =PRETRAINED and @PIXELS where those are not its own. The table goes between the
lines "<!-- begin NAME -->" and "<!-- end NAME -->", or where there are none to standard output alone. What is finished
in --out is kept, so that the script can be interrupted and called again, with more encoders too.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from make_results import DOCS, made_with, put

import affcache
from affcache.files import shipped, write_text
from affcache.tasks.tasks import find_task

COLUMNS = ("encoder", "pixels", "D", "crops/s", "{metric}", "95 %")


def main() -> None:
    """Encode, train and score what is missing, and put the table in its place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="which table: a name that docs/encoders.md has, or any other")
    parser.add_argument("encoders", nargs="+", metavar="MODEL[=PRETRAINED][@PIXELS]")
    parser.add_argument("--crops", type=Path, help="the shipped sample's unless said")
    parser.add_argument("--annotations", type=Path, help="likewise")
    parser.add_argument("--task", default="expr")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("encoders"))
    arguments = parser.parse_args()
    with shipped("sample") as sample:
        crops = arguments.crops or sample / "cropped_aligned"
        annotations = arguments.annotations or sample / "annotations"
        rows = [finished(text, crops, annotations, arguments) for text in arguments.encoders]
    headings = [column.format(metric=rows[0]["metric"].replace("_", " ").replace("f1", "F1")) for column in COLUMNS]
    lines = [headings, ["---"] * len(headings), *map(cells, rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    remark = (
        "" if all(row["interval"] for row in rows) else " Where there is no interval, a class is in too few videos."
    )
    text = f"{table}\n\n{rows[0]['frames']:,} validation frames of {rows[0]['videos']:,} videos.{remark} {made_with()}"
    if f"<!-- begin {arguments.name} -->" in (DOCS / "encoders.md").read_text(encoding="utf-8"):
        put(DOCS / "encoders.md", arguments.name, text)
    else:
        print(text)


def finished(text: str, crops: Path, annotations: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the row of an encoder: of an earlier call, or made now."""
    folder = arguments.out / arguments.name / re.sub(r"[^\w.@=-]+", "-", text)
    path = folder / "row.json"
    if path.exists():
        return dict(json.loads(path.read_text(encoding="utf-8")))
    words, _, pixels = text.partition("@")
    model, _, pretrained = words.partition("=")
    common = {"device": arguments.device}
    encoded = affcache.extract(
        crops=(crops,), store=folder / "store.h5", model=model, pretrained=pretrained,
        image_size=int(pixels) if pixels else None, **common,
    )  # fmt: skip
    store = affcache.EmbeddingStore.open(folder / "store.h5")
    affcache.fit(
        task=arguments.task, store=store.path, annotations=annotations, run=folder / "run", head="ridge",
        class_weights="balanced" if find_task(arguments.task).exclusive else "none", **common,
    )  # fmt: skip
    scored = affcache.score(run=folder / "run", annotations=annotations, **common)
    row = {
        "encoder": " ".join([re.sub(r"(local-dir|onnx):.*/", r"\1:", model), pretrained]).strip(),
        "pixels": store.encoder["image_size"],
        "width": store.width,
        "rate": encoded.rate,
        "metric": scored.scores.metric,
        "value": scored.scores.value,
        "interval": scored.scores.interval,
        "frames": scored.frames,
        "videos": scored.videos,
    }
    write_text(path, json.dumps(row))
    return row


def cells(row: dict[str, Any]) -> list[str]:
    """Return a row as text."""
    interval = "{:.3f} to {:.3f}".format(*row["interval"]) if row["interval"] else ""
    size = " x ".join(map(str, dict.fromkeys(row["pixels"])))
    return [
        row["encoder"],
        size,
        str(row["width"]),
        f"{row['rate']:.0f}",
        f"{row['value']:.3f}",
        interval,
    ]


if __name__ == "__main__":
    main()
