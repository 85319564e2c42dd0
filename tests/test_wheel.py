"""What a wheel installs: affcache alone, with its sample, and nothing of the data that lies beside it."""

import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import lazy_loader
import pytest

ROOT = Path(__file__).parents[1]


def run(*command: object) -> str:
    """Run a command and return its output, or fail with it."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built in a copy of the project whose data/ is as full as a user's."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("affcache", "cli", "data"):
        shutil.copytree(
            ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "Aff-Wild2", "features")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("Aff-Wild2/cropped_aligned/1/00001.jpg", "features/ViT-L-14-openai.h5"):
        (source / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (source / "data" / name).write_bytes(b"licensed")
    run(sys.executable, "-m", "pip", "wheel", source, "--no-deps", "--wheel-dir", folder)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_whole_sample_and_no_other_data(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    data = {name.removeprefix("affcache/data/") for name in names if name.startswith("affcache/data/")}
    tracked = run("git", "-C", ROOT, "ls-files", "data/sample") if (ROOT / ".git").exists() else ""
    expected = {name.removeprefix("data/") for name in tracked.splitlines()}
    assert {name for name in data if name.startswith("sample/")} == expected or not expected
    assert {name for name in data if not name.startswith("sample/")} == {
        "__init__.py",
        "practice_encoder/open_clip_config.json",
        "published.toml",
    }
    assert sum(name.endswith(".jpg") for name in data) > 1000


def test_only_affcache_lands_in_site_packages(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    where = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    before = {path.name for path in Path(where).iterdir()}
    run(python, "-m", "pip", "install", "--no-deps", wheel)
    landed = {path.name for path in Path(where).iterdir()} - before
    assert {name for name in landed if not name.endswith(".dist-info")} == {"affcache"}
    (Path(where) / "lazy_loader").symlink_to(Path(lazy_loader.__file__).parent)  # as installing dependencies would
    modules = "affcache, affcache.settings, affcache.errors, affcache.data"
    version = run(python, "-I", "-c", f"import {modules}; print(affcache.__version__)").strip()
    assert version in wheel.name
    assert (tmp_path / "env" / "bin" / "affcache").is_file()
