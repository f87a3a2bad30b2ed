"""The report's page in a browser: all of it is drawn, nothing is fetched, and nothing but our script runs."""

import re

import pytest

from tests.report.page.reports import HOSTILE

pytestmark = pytest.mark.slow

NAMES = ["bundled", "whole", "early", "deep", "compared", "empty"]
WINDOWS = {
    "wide": {"width": 1280},
    "narrow": {"width": 390},
    "dark": {"width": 1280, "scheme": "dark"},
    "dark-narrow": {"width": 390, "scheme": "dark"},
}

DRAWN = """() => [...document.querySelectorAll("svg.chart")].map(chart => {
    const box = chart.getBoundingClientRect();
    const marks = [...chart.querySelectorAll(".mark")].filter(mark => {
        const inside = mark.getBoundingClientRect();
        return inside.width > 0 && inside.height > 0;
    });
    return [chart.getAttribute("aria-label"), box.width, box.height, marks.length];
})"""
CONTRAST = """() => {
    const number = text => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
    const light = colour => number(colour).map(c => c / 255)
        .map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, n) => sum + c * [0.2126, 0.7152, 0.0722][n], 0);
    const ground = light(getComputedStyle(document.body).backgroundColor);
    const worst = {};
    for (const element of document.querySelectorAll("h1, h2, p, td, th, svg text, summary, nav a")) {
        const style = getComputedStyle(element);
        const ink = light(element instanceof SVGElement ? style.fill : style.color);
        const ratio = (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05);
        worst[element.tagName] = Math.min(worst[element.tagName] ?? 99, ratio);
    }
    return worst;
}"""


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", NAMES)
def test_everything_is_drawn_and_nothing_is_fetched(open_page, request, name, window):
    """With `--shots`, for people to look at."""
    page = open_page(f"{name}.html", **WINDOWS[window])

    assert page.said == []
    assert [url for url in page.asked if not url.startswith("data:image/")] == [page.tab.url]
    for title, width, height, marks in page.tab.evaluate(DRAWN):
        assert width > 30 and height > 10 and marks > 0, title
    assert page.tab.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert all(
        image.evaluate("image => image.complete && image.naturalWidth > 0")
        for image in page.tab.query_selector_all("img")
    )
    assert min(page.tab.evaluate(CONTRAST).values()) >= 4.5, "words can be read, as WCAG asks"
    shots = request.config.getoption("--shots")
    if shots is not None:
        shots.mkdir(parents=True, exist_ok=True)
        page.tab.screenshot(path=shots / f"{name}-{window}.png", full_page=True)


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_a_hostile_report_runs_nothing(open_page, number):
    page = open_page(f"hostile-{number}.html")

    assert page.tab.evaluate("window.hacked") is None
    assert page.said == []
    assert [url for url in page.asked if not url.startswith("data:image/")] == [page.tab.url]
    assert page.tab.evaluate("document.scripts.length") == 1


def test_a_script_that_got_in_all_the_same_would_not_run(open_page, pages):
    """The policy is the second wall."""
    content = (pages / "whole.html").read_text()
    broken = content.replace(
        "<main>", "<main><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
    )
    (pages / "broken.html").write_text(broken)

    page = open_page("broken.html")

    assert page.tab.evaluate("window.hacked") is None
    assert any("policy: inline" in line for line in page.said)


@pytest.mark.parametrize("how", ["hover", "tap"])
def test_a_mark_says_its_number(open_page, how):
    """With a pointer and on a touch screen."""
    page = open_page("whole.html")
    mark = page.tab.locator("#dependency .mark").first

    getattr(mark, how)()

    hint = page.tab.locator(".hint")
    assert hint.is_visible()
    assert hint.inner_text() == mark.get_attribute("aria-label")
    assert re.search(r"layers 0 and 1: 2 nats", hint.inner_text())


def test_tables_fold_out_and_say_the_same(open_page):
    page = open_page("whole.html")
    table = page.tab.locator("#sites table")
    assert not table.is_visible()

    page.tab.locator("#sites summary").click()

    assert table.is_visible() and "tower.layers.0.site" in table.inner_text()


def test_the_button_turns_light_to_dark_and_back(open_page):
    page = open_page("whole.html")
    ground = "getComputedStyle(document.body).backgroundColor"
    before = page.tab.evaluate(ground)

    page.tab.get_by_role("button").click()
    assert page.tab.evaluate(ground) != before
    page.tab.get_by_role("button").click()

    assert page.tab.evaluate(ground) == before


def test_printed_it_is_light_and_whole(open_page, tmp_path):
    """Tables are folded out."""
    page = open_page("whole.html", scheme="dark")

    page.tab.emulate_media(media="print")
    page.tab.evaluate("window.dispatchEvent(new Event('beforeprint'))")

    assert page.tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.tab.locator("#sites table").is_visible()
    assert not page.tab.locator("nav").is_visible()
    assert len(page.tab.pdf(path=tmp_path / "page.pdf")) > 10_000


def test_without_scripts_it_shows_the_same(browser, pages):
    """Some readers allow none: marks still have their numbers."""
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto((pages / "whole.html").as_uri())

    assert tab.locator("#dependency .mark title").count() > 0
    tab.locator("#sites summary").click()
    assert tab.locator("#sites table").is_visible()
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_cards_picture_is_drawn(open_page, pages, request, scheme):
    """As an image of another page, as a model card has it."""
    (pages / "card.html").write_text('<body style="margin:0"><img src="picture.svg" width="840">')

    page = open_page("card.html", width=860, scheme=scheme)

    image = page.tab.query_selector("img")
    assert image.evaluate("image => image.complete && image.naturalWidth") == 840
    assert page.said == []
    shots = request.config.getoption("--shots")
    if shots is not None:
        image.screenshot(path=shots / f"picture-{scheme}.png")
