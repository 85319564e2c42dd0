"""Which pictures a grid gives, and that they show the numbers."""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from affcache.ablation.figures import write_figures
from affcache.ablation.grid import build_grid
from affcache.ablation.settings import AblateSettings
from affcache.ablation.summary import Summary


def rows_of(values: dict[str, Any], missing: int | None = None) -> tuple[Any, list[Summary]]:
    grid = build_grid(AblateSettings(**values))
    rows = [
        Summary(
            variant=variant,
            task=str(variant.values.get("task", "expr")),
            metric="macro_f1",
            finished=3,
            diverged=3 if index == missing else 0,
            mean=None if index == missing else 0.2 + 0.01 * index,
            deviation=0.01,
            selected=0.3,
            difference=None,
            is_base=index == 0,
        )
        for index, variant in enumerate(grid)
    ]
    return grid, rows


def words(path: Path) -> str:
    """The text in an SVG, which matplotlib writes as comments beside its outlines."""
    return path.read_text()


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"vary": ("alpha=0.3,0.5,1",)}, {"alpha"}),
        ({"vary": ("alpha=0.3,0.5,1", "rho=0,0.05")}, {"alpha", "rho", "heatmap"}),
        ({"vary": ("alpha=0.3,1", "rho=0,0.05", "dropout=0,0.5")}, {"alpha", "rho", "dropout"}),
        ({"vary": ("head=mlp,linear", "store=a.h5,b.h5+a.h5")}, {"head", "store", "heatmap"}),
        ({"vary": ("task=expr,au", "rho=0,1")}, {"expr-rho", "au-rho"}),
        ({"preset": "paper"}, {"settings"}),
        ({"preset": "alpha"}, {"alpha"}),
        ({"preset": "rho", "vary": ("alpha=0.5,1",)}, {"rho", "alpha", "heatmap"}),
        ({"preset": "paper", "vary": ("lr=0.1,0.01",)}, {"settings"}),
    ],
)
def test_each_kind_of_grid_has_its_pictures(tmp_path: Path, values: dict[str, Any], names: set[str]) -> None:
    grid, rows = rows_of(values)
    paths = write_figures(tmp_path, grid, rows)
    assert {path.name for path in paths} == {f"{name}.{form}" for name in names for form in ("png", "svg")}
    for path in paths:
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert min(image.size) > 300
                assert len(set(image.convert("L").resize((64, 64)).tobytes())) > 5, "something is drawn"
        else:
            assert ElementTree.parse(path).getroot().tag.endswith("svg")


def test_names_and_values_stand_in_the_picture(tmp_path: Path) -> None:
    grid, rows = rows_of({"vary": ("alpha=0.3,0.5,1", "rho=0,0.05")})
    write_figures(tmp_path, grid, rows)
    heatmap = words(tmp_path / "heatmap.svg")
    assert all(f"<!-- {row.mean:.3f} -->" in heatmap for row in rows)
    curve = words(tmp_path / "alpha.svg")
    assert "<!-- rho 0.05 -->" in curve
    assert "<!-- macro F1 on validation, 3 seeds -->" in curve


def test_what_diverged_is_left_out_and_nothing_at_all_is_no_picture(tmp_path: Path) -> None:
    grid, rows = rows_of({"vary": ("alpha=0.3,0.5,1", "rho=0,0.05")}, missing=3)
    write_figures(tmp_path, grid, rows)
    assert "<!-- 0.230 -->" not in words(tmp_path / "heatmap.svg")
    assert "<!-- 0.240 -->" in words(tmp_path / "heatmap.svg")
    grid, rows = rows_of({"vary": ("alpha=0.3",)}, missing=0)
    assert write_figures(tmp_path / "none", grid, rows) == []


def test_the_same_results_give_the_same_files(tmp_path: Path) -> None:
    grid, rows = rows_of({"vary": ("alpha=0.3,0.5,1", "rho=0,0.05")})
    first, second = (write_figures(tmp_path / name, grid, rows) for name in ("one", "two"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
