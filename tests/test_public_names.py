"""What ``import affcache`` promises: its names, their docstrings, and how light it is."""

import ast
import importlib
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import affcache

PACKAGE = Path(affcache.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.stem != "__init__"
)
HEAVY = ("torch", "torchvision", "h5py", "sklearn", "open_clip", "PIL", "numpy", "matplotlib")
NAMES = {
    "AblateResult", "AblateSettings", "AffcacheError", "CVaRMLPClassifier", "CVaRMLPMultiLabelClassifier",
    "CVaRMLPRegressor", "ConfigError", "DemoResult", "DemoSettings", "DoctorResult", "DoctorSettings", "EmbeddingStore",
    "Encoder", "EncodersResult", "EncodersSettings", "list_encoders",
    "ExportResult", "ExportSettings", "ExtractResult", "ExtractSettings", "FacesResult", "FacesSettings", "FitResult",
    "FitSettings", "ImportResult", "ImportSettings", "InputError", "JoinedLabels", "Listener", "MLPHead", "Model",
    "PredictResult", "PredictSettings", "PublishResult", "PublishSettings", "ReportResult", "ReportSettings", "SAM",
    "ScoreResult", "ScoreSettings", "StoreError", "SubmitResult", "SubmitSettings", "TASKS", "Task", "ablate", "cvar",
    "demo", "doctor", "export_embeddings", "extract", "find_faces", "fit", "import_embeddings", "join_labels", "load",
    "load_encoder", "predict", "publish",
    "report", "score", "submit",
}  # fmt: skip


def places() -> Iterator[tuple[str, str]]:
    """Every public name with its module, as the stub lists them."""
    for node in ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            yield from ((alias.name, f"affcache.{node.module}") for alias in node.names)


def test_names_are_the_promised_ones() -> None:
    assert set(affcache.__all__) == NAMES
    assert len(set(affcache.__all__)) == len(affcache.__all__)
    assert set(dir(affcache)) == {*affcache.__all__, "__version__"}


@pytest.mark.parametrize(("name", "module"), sorted(places()))
def test_every_name_is_there_and_documented(name: str, module: str) -> None:
    value = getattr(affcache, name)
    assert value is getattr(importlib.import_module(module), name)
    assert inspect.getdoc(value)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert value.__module__ == module


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"affcache.*extractor"):
        _ = affcache.extractor


def test_errors_form_one_tree() -> None:
    children = (affcache.InputError, affcache.StoreError, affcache.ConfigError)
    assert all(issubclass(child, affcache.AffcacheError) for child in children)
    assert issubclass(affcache.AffcacheError, Exception)


def loaded_by(code: str) -> set[str]:
    """Return the modules that are loaded after some code."""
    code = f"import json, sys\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(answer.stdout.splitlines()[-1]))


@pytest.mark.parametrize("module", ["affcache", "affcache.cli.app", "affcache.commands", "affcache.settings"])
def test_importing_loads_nothing_heavy(module: str) -> None:
    assert loaded_by(f"import {module}").isdisjoint(HEAVY)


@pytest.mark.parametrize("module", ["extraction.doctor", "reporting.report", "ablation.ablate", "training.fit"])
def test_nothing_that_draws_is_loaded_unasked(module: str) -> None:
    assert "matplotlib" not in loaded_by(f"import affcache.{module}")


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_has_a_docstring(name: str) -> None:
    module = importlib.import_module(f"affcache.{name}")
    assert inspect.getdoc(module), f"module {name}"
    for member in own_members(module):
        assert member.__doc__, f"{name}.{member.__qualname__}"
        for method, value in vars(member).items() if inspect.isclass(member) else ():
            function = getattr(value, "fget", getattr(value, "__func__", value))
            if inspect.isfunction(function) and not method.startswith("_"):
                assert inspect.getdoc(getattr(member, method)), f"{name}.{function.__qualname__}"  # or its parent's


def own_members(module: ModuleType) -> list[type]:
    """The public functions and classes that a module defines itself."""
    return [
        value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    ]
