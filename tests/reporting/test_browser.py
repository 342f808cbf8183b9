"""The page in a real Chromium, where there is one: it renders, sorts by mouse and keyboard, fits a phone, reports no
error and asks for nothing from the network."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deep_components.commands import report
from tests.reporting.browser import LOW_CONTRAST, WIDE, Page, chromium, find_chromium
from tests.reporting.report_runs import SCRIPT, write_all

PATH = find_chromium()
pytestmark = pytest.mark.skipif(PATH is None, reason="no Chromium here; name one with CHROMIUM=/path")

NAMES = "[...document.querySelectorAll('#results tbody th')].map((cell) => cell.textContent)"
SORT = "document.querySelectorAll('#results thead th')[{column}].getAttribute('aria-sort')"
BUTTON = "document.querySelectorAll('#results thead button')[{column}]"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    output = folder / "report.html"
    report.main([str(write_all(folder / "runs")), f"--output={output}"])
    return output


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    assert PATH is not None
    with chromium(PATH, tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(browser: Page, file: Path) -> Page:
    browser.events.clear()
    browser.resize(1280)
    browser.open(file)
    return browser


def seen(page: Page, *methods: str) -> list[dict[str, Any]]:
    page.run("1")  # what was under way has been reported
    return [event for event in page.events if event["method"] in methods]


def test_it_renders_without_errors_and_without_the_network(page: Page, file: Path) -> None:
    assert page.run("document.querySelector('h1').textContent") == "Two-stage cascade: 4 methods"
    assert page.run("document.querySelectorAll('svg.chart').length") == 4 + 4 + 4  # single ones, losses, weights
    sizes = page.run("[...document.querySelectorAll('svg.chart')].map((svg) => svg.getBoundingClientRect().height)")
    assert all(100 < height < 700 for height in sizes)
    for button in range(7):
        page.run(f"document.querySelectorAll('thead button')[{button}].click()")
    assert not seen(page, "Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    assert not seen(page, "Page.javascriptDialogOpening")  # no alert from a name
    requests = [event["params"]["request"]["url"] for event in seen(page, "Network.requestWillBeSent")]
    assert {url for url in requests if not url.startswith("data:")} == {file.as_uri()}


def test_scripts_from_names_do_not_run(page: Page) -> None:
    """Even where one got into the page, its policy would stop it."""
    page.run("void (document.body.innerHTML += '<img src=x onerror=\"window.broken = 1\">')")
    page.run("void document.body.append(Object.assign(document.createElement('script'), {text: 'window.broken = 2'}))")
    page.run("new Promise((done) => setTimeout(done, 50))")
    assert page.run("window.broken === undefined")


def test_a_click_sorts(page: Page) -> None:
    by_recall = ["LCRON", "ARF", "BCE", SCRIPT]
    assert page.run(NAMES) == [*by_recall, "untrained"]  # before any click too
    page.run(f"{BUTTON.format(column=1)}.click()")
    assert page.run(NAMES) == [*by_recall, "untrained"]  # the best first
    assert page.run(SORT.format(column=1)) == "descending"
    page.run(f"{BUTTON.format(column=1)}.click()")
    assert page.run(NAMES) == ["untrained", *reversed(by_recall)]
    assert page.run(SORT.format(column=1)) == "ascending"
    page.run(f"{BUTTON.format(column=0)}.click()")
    assert page.run(NAMES) == [SCRIPT, "ARF", "BCE", "LCRON", "untrained"]
    assert [page.run(SORT.format(column=column)) for column in (0, 1)] == ["ascending", "none"]


def test_the_keyboard_sorts(page: Page) -> None:
    """Tab reaches the header, Enter and Space press it, and the focus can be seen."""
    page.run("document.querySelector('#results .scroll').focus()")
    page.press("Tab", 9)
    page.press("Tab", 9)
    assert page.run(f"document.activeElement === {BUTTON.format(column=1)}")
    assert page.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.press("Enter", 13, "\r")
    assert page.run(SORT.format(column=1)) == "descending"
    page.press(" ", 32, " ")
    assert page.run(SORT.format(column=1)) == "ascending"


def test_rows_without_a_number_stand_last(page: Page) -> None:
    page.run("document.querySelectorAll('#results tbody td')[0].textContent = '-'")
    first = page.run(NAMES)[0]
    for _ in range(2):
        page.run(f"{BUTTON.format(column=1)}.click()")
        assert page.run(NAMES)[-1] == first


@pytest.mark.parametrize("width", [360, 390, 768, 1280])
def test_nothing_but_tables_scrolls_sideways(width: int, page: Page) -> None:
    page.resize(width)
    page.run("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert page.run("document.documentElement.scrollWidth") == width
    assert page.run("window.innerWidth") == width
    assert page.run(WIDE) == []


def test_text_in_charts_is_readable_on_a_phone(page: Page) -> None:
    page.resize(360)
    texts = "[...document.querySelectorAll('svg.chart text')]"
    heights = page.run(f"{texts}.map((text) => text.getBoundingClientRect().height)")
    assert min(heights) >= 8


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(scheme: str, page: Page) -> None:
    """WCAG AA: 4.5 to 1 for all text, in both schemes."""
    page.prefer(color_scheme=scheme)
    dark = page.run("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")
    assert page.run(LOW_CONTRAST) == []
    page.prefer(color_scheme="light")


def test_it_prints(page: Page) -> None:
    """Closed parts are open on paper."""
    pdf = page.print()
    assert pdf.startswith(b"%PDF") and len(pdf) > 20_000
    assert page.run("document.querySelectorAll('details:not([open])').length") == 0


def test_captions_are_read_without_scrolling(page: Page) -> None:
    page.resize(360)
    captions = "[...document.querySelectorAll('caption span')].filter((one) => one.offsetParent)"
    rights = page.run(f"{captions}.map((one) => one.getBoundingClientRect().right)")
    assert rights and max(rights) <= 360
