"""The README and the docs say what the code does."""

import dataclasses
import re
from pathlib import Path

import pytest

from affcache.commands import SETTINGS
from affcache.settings import flag

ROOT = Path(__file__).parents[1]


def command_blocks(text: str) -> list[str]:
    """Return the lines of all shell blocks of a page."""
    return [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]


def test_ci_runs_the_test_command_of_the_readme() -> None:
    first, second, *_ = command_blocks((ROOT / "README.md").read_text())
    assert first.endswith("affcache demo")
    assert second.endswith("-m pytest")
    assert second in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize("command", SETTINGS)
def test_each_command_page_names_every_setting(command: str) -> None:
    page = (ROOT / "docs" / "commands" / f"{command.split()[0]}.md").read_text()
    fields = [declared.name for declared in dataclasses.fields(SETTINGS[command])]  # type: ignore[arg-type]
    assert [name for name in fields if flag(name) not in page] == []
    of_page = [settings for name, settings in SETTINGS.items() if name.split()[0] == command.split()[0]]
    known = {flag(declared.name) for settings in of_page for declared in dataclasses.fields(settings)}  # type: ignore[arg-type]
    named = set(re.findall(r"`(--[a-z-]+)", page)) - {"--json", "--help"}
    assert named - known <= {flag("run"), flag("store"), flag("crops")}


def test_links_between_pages_lead_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "data" / "README.md", *(ROOT / "docs").rglob("*.md")]
    targets = [
        (page, target.partition("#")[0])
        for page in pages
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text())
        if not target.startswith(("http", "#"))
    ]
    assert len(targets) > 10
    assert [f"{page}: {target}" for page, target in targets if not (page.parent / target).exists()] == []


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = [str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if page not in navigation] == []
