"""What ``import affcache`` promises: its names, their docstrings, how light it is, and who may import whom."""

import ast
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import affcache

PACKAGE = Path(affcache.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
HEAVY = ("torch", "torchvision", "h5py", "sklearn", "open_clip", "PIL", "numpy")
DESIGNED = {
    "AffcacheError", "ConfigError", "InputError", "StoreError", "EmbeddingStore", "MLPHead", "SAM", "TASKS", "cvar",
    "ablate", "extract", "fit", "score",
}  # fmt: skip
FURTHER = {
    "AblateResult", "AblateSettings", "BenchAblateResult", "BenchAblateSettings", "BenchExtractResult",
    "BenchExtractSettings", "BenchFitResult", "BenchFitSettings", "BenchStoreResult", "BenchStoreSettings",
    "CVaRMLPClassifier", "CVaRMLPMultiLabelClassifier", "DemoResult", "DemoSettings", "DoctorResult",
    "DoctorSettings", "Encoder", "ExportResult", "ExportSettings", "ExtractResult", "ExtractSettings", "FitResult",
    "FitSettings", "ImportResult", "ImportSettings", "Listener", "ReportResult", "ReportSettings", "report",
    "ScoreResult", "ScoreSettings", "SubmitResult", "SubmitSettings", "submit", "Task", "bench_ablate",
    "bench_extract", "bench_fit", "bench_store", "demo", "doctor", "export_embeddings", "import_embeddings",
    "load_encoder", "write_sample",
}  # fmt: skip


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, at the top or anywhere inside; relative ones with their leading dots."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def test_all_is_exact() -> None:
    assert len(set(affcache.__all__)) == len(affcache.__all__)
    assert set(affcache.__all__) == DESIGNED | FURTHER
    assert set(affcache.__all__) == set(affcache._MODULE_OF)
    assert set(dir(affcache)) == {*affcache.__all__, "__version__"}
    assert all(getattr(affcache, name) is not None for name in affcache.__all__)


def test_names_for_type_checkers_are_the_same_names() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    declared = {
        alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert declared == {name: f"affcache.{module}" for name, module in affcache._MODULE_OF.items()}


@pytest.mark.parametrize("name", affcache.__all__)
def test_every_name_is_there_and_documented(name: str) -> None:
    value = getattr(affcache, name)
    assert value is getattr(importlib.import_module(f"affcache.{affcache._MODULE_OF[name]}"), name)
    assert inspect.getdoc(value)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert value.__module__ == f"affcache.{affcache._MODULE_OF[name]}"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'affcache' has no attribute 'extractor'"):
        _ = affcache.extractor


def test_errors_form_one_tree() -> None:
    children = (affcache.InputError, affcache.StoreError, affcache.ConfigError)
    assert all(issubclass(child, affcache.AffcacheError) for child in children)
    assert issubclass(affcache.AffcacheError, Exception)


def test_importing_the_package_and_the_command_line_loads_nothing_heavy() -> None:
    code = (
        "import sys, json, affcache\n"
        "first = sorted(sys.modules)\n"
        "import affcache.cli.app\n"
        "print(json.dumps([first, sorted(sys.modules)]))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    package, command_line = map(set, json.loads(answer.stdout))
    assert package.isdisjoint(HEAVY)
    assert command_line.isdisjoint(HEAVY)
    assert "affcache.cli.commands" in command_line


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_has_a_docstring(name: str) -> None:
    module = importlib.import_module(f"affcache.{name}")
    assert inspect.getdoc(module), f"module {name}"
    for member in own_members(module):
        assert member.__doc__, f"{name}.{member.__qualname__}"
        for method in vars(member).values() if inspect.isclass(member) else ():
            function = getattr(method, "fget", getattr(method, "__func__", method))
            if inspect.isfunction(function) and not function.__name__.startswith("_"):
                assert function.__doc__, f"{name}.{function.__qualname__}"


def own_members(module: ModuleType) -> list[type]:
    """The public functions and classes that a module defines itself."""
    return [
        value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    ]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_the_library_never_imports_the_command_line(path: Path) -> None:
    imported = imports_of(path)
    assert not [name for name in imported if name.startswith(("affcache.cli", "cli", ".cli", "typer", "rich"))]


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("store", {"torch", "torchvision", "open_clip"}),
        ("errors", {"torch", "numpy", "h5py"}),
        ("settings", {"torch", "numpy", "h5py"}),
        ("config", {"torch", "numpy", "h5py"}),
    ],
)
def test_light_modules_stay_light(module: str, forbidden: set[str]) -> None:
    imported = {name.split(".")[0] for name in imports_of(PACKAGE / f"{module}.py")}
    assert imported.isdisjoint(forbidden)


@pytest.mark.parametrize("module", ["losses", "risk", "sam", "heads"])
def test_the_mathematics_knows_nothing_of_files(module: str) -> None:
    path = PACKAGE / f"{module}.py"
    allowed = {"torch", "math", "collections", "contextlib", "typing"}
    assert {name.split(".")[0] for name in imports_of(path)} <= allowed
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    named = {call.id if isinstance(call, ast.Name) else getattr(call, "attr", "") for call in calls}
    assert named.isdisjoint({"open", "load", "save", "read_text", "write_text", "read_bytes", "write_bytes"})


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_no_library_file_is_too_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350
