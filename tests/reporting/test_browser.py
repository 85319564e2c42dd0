"""The report in a real browser: it loads from disk without an error or a request, and what can be used works."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from affcache.reporting.report import report
from affcache.training.fit import fit
from tests.conftest import MakeData, write_crops
from tests.reporting.test_multitask_report import made  # noqa: F401  # a fixture

CHROMIUM = next((path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None, reason="chromium and chromedriver are not installed (Debian has both)"
    ),
]
QUICK: dict[str, Any] = {"epochs": 2, "hidden_layers": 1, "hidden_width": 8, "batch_size": 16, "rho": 0.05}


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                 f"--user-data-dir={tmp_path / 'profile'}"):  # fmt: skip
        options.add_argument(flag)
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        driver.set_window_size(1200, 900)
        yield driver
    finally:
        driver.quit()


@pytest.fixture(params=["expr", "au"])
def page(request: pytest.FixtureRequest, learnable: MakeData, tmp_path: Path, browser: Any) -> Any:
    """The browser with a report of a run loaded."""
    task = request.param
    data = learnable(task)
    fit(task=task, store=data[0], annotations=data[1], run=tmp_path / "run", **QUICK)
    crops = write_crops(tmp_path / "crops", {"2-30-640x360": range(1, 41), "5-30-640x360": range(1, 41)})
    browser.get(f"file://{report(run=tmp_path / 'run', crops=(crops,)).out}")
    return browser


def test_values_are_drawn_too(learnable: MakeData, tmp_path: Path, browser: Any) -> None:
    data = learnable("va")
    fit(task="va", store=data[0], annotations=data[1], run=tmp_path / "run", **QUICK)
    browser.get(f"file://{report(run=tmp_path / 'run', crops=()).out}")
    find(browser, ".hardest button").click()
    assert re.fullmatch(r"frame \d+: label valence -?\d\.\d\d, arousal .*", find(browser, ".readout").text)
    assert browser.get_log("browser") == []


def test_a_figure_takes_the_colour_of_text_in_the_dark(page: Any) -> None:
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    colours = page.execute_script(
        "return [getComputedStyle(document.body).color, ...[...document.querySelectorAll('svg text')].map((one) =>"
        " getComputedStyle(one).fill), getComputedStyle(document.querySelector('svg [style*=currentColor]')).stroke]"
    )
    assert len(colours) > 20
    assert len(set(colours)) == 1


def requests(browser: Any) -> list[str]:
    """Every address that the page has asked for; the browser's own start page asks for its own."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    return [params["request"]["url"] for params in sent if params["documentURL"].startswith("file:")]


def drawn(browser: Any) -> str:
    """What the timeline shows, pixel for pixel."""
    return str(browser.execute_script("return document.querySelector('.timeline').toDataURL()"))


def find(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def test_it_loads_without_an_error_or_a_request(page: Any) -> None:
    assert page.get_log("browser") == []
    urls = requests(page)
    assert len([url for url in urls if url.startswith("file:")]) == 1
    assert all(url.startswith(("file:", "data:")) for url in urls), urls
    decoded = page.execute_async_script(
        "const done = arguments[0], images = [...document.images];"
        "for (const image of images) image.loading = 'eager';"
        "Promise.all(images.map((image) => image.decode()))"
        ".then(() => done(images.length), (error) => done(`${error}`))"
    )
    assert decoded == len(page.find_elements("css selector", ".crops img")) > 0


def test_filter_click_keys_and_scrolling_work(page: Any) -> None:
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select

    buttons = page.find_elements("css selector", ".hardest button")
    choice = Select(find(page, ".filter"))
    chosen = buttons[0].get_attribute("data-classes").split("|")[0]
    choice.select_by_value(chosen)
    shown = [button for button in buttons if button.is_displayed()]
    assert 0 < len(shown) < len(buttons)
    assert all(chosen in button.get_attribute("data-classes").split("|") for button in shown)
    assert find(page, ".shown").text == f"{len(shown)} frames"
    choice.select_by_value("")
    before = drawn(page)
    button = next(button for button in buttons if "5-30-640x360" in button.text)
    button.click()
    number = button.text.rpartition(",")[2].strip()
    assert find(page, ".readout").text.startswith(f"frame {number}: label ")
    assert "5-30-640x360" in Select(find(page, ".video")).first_selected_option.text
    assert drawn(page) != before
    timeline = find(page, ".timeline")
    timeline.send_keys(Keys.ARROW_RIGHT if number != "40" else Keys.ARROW_LEFT)
    step = 1 if number != "40" else -1
    assert find(page, ".readout").text.startswith(f"frame {int(number) + step}:")
    whole = drawn(page)
    find(page, ".in").click()
    zoomed = drawn(page)
    assert zoomed != whole
    find(page, ".on" if int(number) < 20 else ".back").click()
    assert drawn(page) != zoomed
    Select(find(page, ".video")).select_by_index(0)
    assert page.get_log("browser") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_either_scheme(page: Any, scheme: str) -> None:
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    width, colour, back = page.execute_script(
        "const style = getComputedStyle(document.body);"
        "return [document.documentElement.scrollWidth, style.color, style.backgroundColor]"
    )
    assert width <= 390, "nothing sticks out"
    light = sum(map(int, back.removeprefix("rgb(").rstrip(")").split(",")))
    assert (light > 600) == (scheme == "light"), (colour, back)


def test_everything_that_can_be_used_has_a_name_and_the_keyboard_reaches_it(page: Any) -> None:
    nameless = page.execute_script(
        "return [...document.querySelectorAll('button, select, input, canvas, svg')].filter((one) =>"
        " !(one.getAttribute('aria-label') || one.textContent.trim() || (one.labels && one.labels.length)))"
        ".map((one) => one.outerHTML)"
    )
    assert nameless == []
    assert page.execute_script("return document.querySelector('.timeline').tabIndex") == 0
    assert page.execute_script("return document.documentElement.lang") == "en"


def drawn_in(browser: Any, parts: list[Any]) -> list[str]:
    script = "return arguments[0].querySelector('.timeline').toDataURL()"
    return [str(browser.execute_script(script, part)) for part in parts]


def test_each_part_shows_its_own_timeline(made: Path, tmp_path: Path, browser: Any) -> None:  # noqa: F811
    from selenium.webdriver.support.ui import Select

    report(run=made / "run", annotations=made / "gaps", crops=(), out=tmp_path / "r.html")
    browser.get(f"file://{tmp_path / 'r.html'}")
    parts = browser.find_elements("css selector", "article")[:3]
    said = []
    for part in parts:
        before = drawn_in(browser, parts)
        part.find_element("css selector", ".hardest button").click()
        changed = [one != other for one, other in zip(drawn_in(browser, parts), before, strict=True)]
        assert changed == [one is part for one in parts], "its own, and no other"
        said.append(part.find_element("css selector", ".readout").text)
    assert re.fullmatch(r"frame \d+: label valence \S+, arousal \S+; decided valence .*", said[0])
    assert re.fullmatch(r"frame \d+: label \w+; decided \w+", said[1])
    gap = next(b for b in parts[0].find_elements("css selector", ".hardest button") if b.text.startswith("-,"))
    gap.click()
    assert "label valence -, arousal" in parts[0].find_element("css selector", ".readout").text
    gap = next(b for b in parts[2].find_elements("css selector", ".hardest button") if "2 not labelled" in b.text)
    gap.click()
    assert "(not labelled: AU1, AU10); decided" in parts[2].find_element("css selector", ".readout").text
    chosen = Select(parts[1].find_element("css selector", ".filter"))
    name = parts[1].find_element("css selector", ".hardest button").get_attribute("data-classes")
    chosen.select_by_value(name)
    shown = [[b.is_displayed() for b in part.find_elements("css selector", ".hardest button")] for part in parts]
    assert all(shown[0])
    assert all(shown[2])
    assert 0 < sum(shown[1]) < len(shown[1])
    assert parts[1].find_element("css selector", ".shown").text.startswith(f"{sum(shown[1])} frame")
    assert browser.get_log("browser") == []
