"""The demo page in a real Chromium, where there is one."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

from deep_components.serving.features import open_features
from deep_components.serving.service import make_app
from tests.reporting.browser import LOW_CONTRAST, WIDE, Page, chromium, find_chromium
from tests.serving.fake import CASCADE, EVIL, ITEMS, FakeRecommender, expected, retrieved, served

PATH = find_chromium()
pytestmark = pytest.mark.skipif(PATH is None, reason="no Chromium here; name one with CHROMIUM=/path")

ROWS = (
    "[...document.querySelectorAll('#{table} tbody tr')].map((row) => [...row.cells].map((cell) => cell.textContent))"
)
SEEN = [41, 40]


@pytest.fixture(scope="module")
def model() -> FakeRecommender:
    return FakeRecommender()


@pytest.fixture(scope="module")
def url(model: FakeRecommender, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    store = open_features(tmp_path_factory.mktemp("features") / "features.sqlite", create=True)
    store.put({7: {"history": SEEN}, **{user: {} for user in range(70, 80)}, 8: {}})
    app = make_app(lambda: model, features=store)
    with served(app) as address:
        while app.state.live.version is None:
            pass
        yield address
    store.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    assert PATH is not None
    with chromium(PATH, tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(browser: Page, url: str) -> Page:
    browser.events.clear()
    browser.resize(1280)
    browser.open(f"{url}/")
    browser.wait("about !== null")
    return browser


def rows(page: Page, table: str) -> list[list[str]]:
    return page.run(ROWS.format(table=table))


def ask(page: Page, user: str) -> None:
    page.run(f"void (at('results').hidden = true, at('user').value = {user!r}, at('send').click())")
    page.wait("!at('send').disabled && (!at('results').hidden || !at('error').hidden)")


def reported(page: Page) -> list[dict[str, Any]]:
    page.run("1")  # what was under way has been reported
    methods = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Page.javascriptDialogOpening")
    return [event for event in page.events if event["method"] in methods]


def test_a_user_is_found_and_asked_for_by_the_keyboard(page: Page, model: FakeRecommender, url: str) -> None:
    page.run("at('user').focus()")
    page.press("7", 55, "7")
    page.wait("!at('found').hidden && at('found').children.length === 11")
    assert page.run("at('user').getAttribute('aria-expanded')") == "true"
    page.press("ArrowDown", 40)
    assert page.run("at(at('user').getAttribute('aria-activedescendant')).textContent") == "7"
    page.press("Enter", 13, "\r")
    assert page.run("at('found').hidden && at('user').value") == "7"
    page.press("Enter", 13, "\r")
    page.wait("!at('results').hidden")
    assert model.calls[-1] == [{"user_id": 7, "history": SEEN}]
    assert [row[:2] for row in rows(page, "list")] == [
        [str(rank), str(item)] for rank, item in enumerate(expected({"history": SEEN}, 10), 1)
    ]
    assert "10 of 40 candidates" in page.run("at('status').textContent")
    assert f"{ITEMS} items" in page.run("at('facts').textContent")
    assert reported(page) == []
    asked = [e["params"]["request"]["url"] for e in page.events if e["method"] == "Network.requestWillBeSent"]
    assert asked and all(address.startswith((url, "data:")) for address in asked)


def test_titles_are_text(page: Page) -> None:
    ask(page, "8")
    titles = {row[1]: row[2] for row in rows(page, "list")}
    assert titles["39"] == EVIL
    assert EVIL in [row[1] for row in rows(page, "candidates")]
    page.run("void (document.body.innerHTML += '<img src=x onerror=\"window.broken = 1\">')")  # the policy stops it
    page.run("new Promise((done) => setTimeout(done, 50))")
    assert page.run("window.broken === undefined")


def test_where_items_fell_out(page: Page) -> None:
    ask(page, "8")
    keeps = [ITEMS, *CASCADE.quotas.values(), 10]
    counts = page.run("[...document.querySelectorAll('#funnel .counts')].map((one) => one.textContent)")
    assert counts == [f"{reached} → {kept}" for reached, kept in pairwise(keeps)]
    widths = page.run("[...document.querySelectorAll('#funnel .kept')].map((one) => one.getBoundingClientRect().width)")
    assert sorted(widths, reverse=True) == widths and widths[-1] > 0
    assert len(rows(page, "candidates")) == 40
    page.run("document.querySelector('#funnel button').click()")  # the second stage
    assert page.run("document.querySelector('#funnel button').getAttribute('aria-pressed')") == "true"
    assert [row[0] for row in rows(page, "candidates")] == [str(item) for item in retrieved({})[20:]]
    assert {row[2] for row in rows(page, "candidates")} == {"left at prerank"}
    page.run("at('stage').value = 'served'; void at('stage').dispatchEvent(new Event('change'))")
    assert [row[0] for row in rows(page, "candidates")] == [str(item) for item in expected({}, 10)]
    assert page.run("document.querySelectorAll('#funnel [aria-pressed=true]').length") == 0
    page.run("at('stage').value = ''; at('text').value = 'title 03'; void at('text').dispatchEvent(new Event('input'))")
    assert {row[0] for row in rows(page, "candidates")} == {str(item) for item in range(30, 39)}  # 39 has another title
    assert page.run("at('count').textContent") == "9 of 40"


def test_candidates_are_sorted(page: Page) -> None:
    ask(page, "8")
    button = "document.querySelectorAll('#candidates thead button')[{}]"
    page.run(f"{button.format(3)}.click()")  # by retrieval, which ranks low numbers first
    found = sorted(retrieved({}))
    assert [row[0] for row in rows(page, "candidates")] == [str(item) for item in found]
    assert rows(page, "candidates")[0][3] == "#1" + page.run(f"digits({-found[0]})")
    assert page.run("document.activeElement.textContent") == "retrieval"
    page.press("Enter", 13, "\r")
    assert [row[0] for row in rows(page, "candidates")] == [str(item) for item in found[::-1]]
    assert page.run(f"{button.format(3)}.parentElement.getAttribute('aria-sort')") == "descending"
    page.run(f"{button.format(5)}.click()")  # by rank, which the lower half did not reach: they stand last
    assert [row[5] for row in rows(page, "candidates")][20:] == ["\u2013"] * 20


def test_columns_are_chosen(page: Page) -> None:
    heads = "[...document.querySelectorAll('#list thead th')].map((cell) => cell.textContent)"
    ask(page, "8")
    assert page.run(heads) == ["#", "video_id", "title", "score of rank"]  # a column of this name is likely wanted
    page.run("[...at('columns').querySelectorAll('input')].forEach((box) => box.click())")
    ask(page, "8")
    assert page.run(heads) == ["#", "video_id", "price", "score of rank"]
    assert rows(page, "list")[0][2] == str(expected({}, 1)[0] / 4)


def test_a_json_request(page: Page, model: FakeRecommender) -> None:
    page.run("document.querySelector('[value=json]').click()")
    assert page.run("at('by-user').hidden && !at('by-json').hidden")
    page.run("""at('json').value = '{"user_id": 9007199254740993, "history": [3]}'; void at('send').click()""")
    page.wait("!at('results').hidden")
    assert model.calls[-1] == [{"user_id": 9007199254740993, "history": [3]}]  # in all its digits
    page.run("at('json').value = '{'; void at('send').click()")
    page.wait("!at('error').hidden")
    assert "not JSON" in page.run("at('error').textContent") and page.run("at('results').hidden")


def test_ids_keep_all_digits(page: Page, model: FakeRecommender) -> None:
    ask(page, "9007199254740993")
    assert model.calls[-1] == [{"user_id": 9007199254740993}]
    assert page.run("JSON.parse('[9007199254740993, 7]', exact)") == ["9007199254740993", 7]


def test_refusals_are_told(page: Page) -> None:
    ask(page, "")
    assert page.run("at('error').textContent") == "Give a user_id."
    page.run("document.querySelector('[value=json]').click()")
    page.run("""at('json').value = '{"age": 999}'; void at('send').click()""")
    page.wait("at('error').textContent.includes('999')")
    assert page.run("at('error').textContent") == "requests[0]: age: 999 is too old"
    assert page.run("at('error').getAttribute('role')") == "alert"


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_but_tables_scrolls_sideways(width: int, page: Page) -> None:
    ask(page, "8")
    page.resize(width)
    assert page.run("document.documentElement.scrollWidth") == width
    assert page.run(WIDE) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(scheme: str, page: Page) -> None:
    page.prefer(color_scheme=scheme)
    ask(page, "8")
    page.run("document.querySelector('#funnel button').click()")
    assert page.run(LOW_CONTRAST) == []
    page.prefer(color_scheme="light")


def test_every_control_has_a_name(page: Page) -> None:
    ask(page, "8")
    nodes = page.send("Accessibility.getFullAXTree")["nodes"]
    controls = [
        (node["role"]["value"], node["name"]["value"])
        for node in nodes
        if node.get("role", {}).get("value") in ("button", "textbox", "combobox", "checkbox", "radio", "spinbutton")
    ]
    assert len(controls) > 10 and all(name for _, name in controls)


def test_the_interface_is_described(page: Page, url: str) -> None:
    page.events.clear()
    page.open(f"{url}/docs")
    page.wait("document.querySelectorAll('section').length === 10")  # seven paths, three answers
    assert "/recommend" in page.run("document.querySelector('h2 code').textContent")
    assert f"{url}/recommend" in page.run("document.querySelector('pre').textContent")
    page.resize(360)
    assert page.run("document.documentElement.scrollWidth") == 360
    assert page.run(LOW_CONTRAST) == [] and reported(page) == []


def test_it_waits_for_the_bundle(browser: Page) -> None:
    model = FakeRecommender()
    model.free.clear()
    with served(make_app(lambda: model)) as url:
        browser.open(f"{url}/")
        browser.wait("at('facts').textContent.includes('Trying again')")
        model.free.set()
        browser.wait("about !== null")
        assert "no feature store" in browser.run("at('user-hint').textContent")
