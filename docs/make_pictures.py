"""Make the pictures of the README and the docs from a fresh demo: python docs/make_pictures.py"""

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from rich.console import Console

import affcache
from affcache.cli.show import score_table
from affcache.crops.folders import find_crops
from affcache.files import shipped
from affcache.tasks.label_files import find_label_files, read_label_file

PICTURES = Path(__file__).parent / "pictures"
FACES_PER_ROW = 9
CROP = 112  # pixels


def score_picture() -> None:
    """Run the demo and draw its expression table as the terminal shows it."""
    with tempfile.TemporaryDirectory() as folder:
        result = affcache.demo(out=Path(folder) / "demo")
    scored = result.scores["expr"]
    console = Console(record=True, width=72, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    table = score_table(scored.scores, affcache.TASKS["expr"])
    console.print(f"expr: {scored.frames:,} validation frames of the sample", table)
    console.print(f"[yellow]{result.notice}[/yellow]")
    console.save_svg(str(PICTURES / "score.svg"), title="affcache demo")


def sample_picture() -> None:
    """Lay out faces of the shipped sample, a row per expression, each of another video."""
    task = affcache.TASKS["expr"]
    sheet = Image.new("RGB", (80 + FACES_PER_ROW * CROP, len(task.classes) * CROP), "white")
    draw = ImageDraw.Draw(sheet)
    with shipped("sample") as sample:
        crops = find_crops([sample / "cropped_aligned"])
        files = {
            **find_label_files(sample / "annotations", task, "train"),
            **find_label_files(sample / "annotations", task, "validation"),
        }
        for index, name in enumerate(task.classes):
            draw.text((6, index * CROP + CROP // 2 - 6), name, fill="black")
            column = 0
            for video, file in files.items():
                labels, valid = read_label_file(file, task)
                frames = 1 + np.flatnonzero(valid & (labels == index))
                if video not in crops.video_names or column == FACES_PER_ROW:
                    continue
                first, last = crops.video_start[crops.video_names.index(video) :][:2]
                rows = first + np.flatnonzero(np.isin(crops.frame_number[first:last], frames))
                if len(rows):
                    face = Image.open(crops.path(int(rows[len(rows) // 2])))
                    sheet.paste(face, (80 + column * CROP, index * CROP))
                    column += 1
    sheet.save(PICTURES / "sample.jpg", quality=88)


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    sample_picture()
    score_picture()
