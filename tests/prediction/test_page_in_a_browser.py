"""The page of predictions in a real browser: no error, no request, and several tasks to choose from."""

import re
from pathlib import Path
from typing import Any

import pytest

import affcache
from tests.conftest import MakeData
from tests.prediction.conftest import QUICK
from tests.reporting.test_browser import browser, drawn, find, pytestmark, requests  # noqa: F401  # a fixture, marks


@pytest.fixture
def page(learnable: MakeData, tmp_path: Path, browser: Any) -> Any:  # noqa: F811
    """The browser with a page of three tasks loaded."""
    runs = []
    for task in ("expr", "au", "va"):
        store, annotations = learnable(task)
        runs.append(tmp_path / task)
        affcache.fit(task=task, store=store, annotations=annotations, run=runs[-1], **QUICK)
    affcache.predict(
        inputs=tmp_path / "expr.h5", run=tuple(runs), out=tmp_path / "p.csv", page=tmp_path / "p.html", device="cpu"
    )
    browser.get(f"file://{tmp_path / 'p.html'}")
    return browser


def test_it_loads_without_an_error_or_a_request(page: Any) -> None:
    assert page.get_log("browser") == []
    assert len(requests(page)) == 1


def test_a_frame_shows_the_timeline_and_tasks_can_be_chosen(page: Any) -> None:
    from selenium.webdriver.support.ui import Select

    before = drawn(page)
    find(page, ".hardest button").click()
    assert drawn(page) != before
    assert re.fullmatch(r"frame \d+: decided \w+; \w+ \d\.\d\d, .*", find(page, ".readout").text)
    seen = {drawn(page)}
    for index, words in ((1, r"frame \d+: decided (none|AU.*); AU\d+ \d\.\d\d, .*"), (2, r".*valence -?\d\.\d\d, .*")):
        Select(find(page, ".task")).select_by_index(index)
        find(page, ".hardest button").click()
        assert re.fullmatch(words, find(page, ".readout").text)
        seen.add(drawn(page))
    assert len(seen) == 3
    choice = Select(find(page, ".filter"))
    choice.select_by_value("va: valence high")
    shown = [one for one in page.find_elements("css selector", ".hardest button") if one.is_displayed()]
    assert 0 < len(shown) <= 6
    assert find(page, ".shown").text.startswith(f"{len(shown)} frame")
    assert page.get_log("browser") == []
