"""The house: how many modules lie where, how long they and their functions are, and that arrows point down."""

import ast
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "affcache"
SOURCES = sorted([*LIBRARY.rglob("*.py"), *(ROOT / "cli").rglob("*.py")])


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    """Check the contracts of pyproject.toml in a checkout."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    return subprocess.run([*command, "--no-cache"], cwd=root, capture_output=True, text=True, check=False)


def test_few_modules_lie_flat_and_none_is_crowded() -> None:
    assert len(list(LIBRARY.glob("*.py"))) <= 12
    crowded = {path: len(list(path.glob("*.py"))) for path in LIBRARY.iterdir() if path.is_dir()}
    assert all(count <= 16 for count in crowded.values()), crowded


def test_the_library_does_not_grow_unnoticed() -> None:
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES) <= 14_500


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: "/".join(path.parts[-2:]))
def test_no_file_is_too_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350


def test_functions_are_short() -> None:
    lengths = [
        (node.end_lineno or 0) - node.lineno + 1
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    assert statistics.median(lengths) <= 8
    assert max(lengths) <= 70


def test_arrows_point_down_and_a_wrong_one_is_noticed(tmp_path: Path) -> None:
    for name in ("affcache", "cli"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    right = lint(tmp_path)
    assert right.returncode == 0, right.stdout
    with (tmp_path / "affcache" / "store" / "reading.py").open("a", encoding="utf-8") as file:
        file.write("\nimport affcache.training.fit\n")
    wrong = lint(tmp_path)
    assert wrong.returncode == 1
    assert "affcache.store is not allowed to import affcache.training" in wrong.stdout
