"""The report's page in a real browser: nothing fetched, everything seen, in both colour schemes, wide and narrow.

Needs playwright and a Chromium on this machine (or where CHROME_PATH says); without either there is nothing to test.
With SCREENSHOTS=FOLDER the pages are kept as pictures.
"""

import itertools
import os
import shutil
from pathlib import Path

import pytest
from test_report import page_of, write_run, write_study

CHROMIUM = os.environ.get("CHROME_PATH") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
if CHROMIUM is None:
    pytest.skip(
        "no Chromium: install one (Debian: apt-get install chromium) or name it in CHROME_PATH", allow_module_level=True
    )
sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")

WIDE, PHONE, SMALL = {"width": 1280, "height": 900}, {"width": 400, "height": 800}, {"width": 320, "height": 640}
DRAWN = {"study": 9, "run": 9}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    page_of(write_study(folder / "polarity"), folder / "study")
    page_of(write_run(folder / "fine-tuned"), folder / "run")
    return {kind: folder / kind / "report.html" for kind in DRAWN}


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, pages):
    contexts = []

    def open_page(kind, scheme="light", size=WIDE):
        context = browser.new_context(viewport=size, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.seen = []
        page.on("request", lambda request: page.seen.append(request.url))
        page.on("console", lambda message: page.seen.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: page.seen.append(f"error: {error}"))
        page.goto(pages[kind].as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()


def keep(page, name):
    if "SCREENSHOTS" in os.environ:
        page.screenshot(path=Path(os.environ["SCREENSHOTS"]) / f"{name}.png", full_page=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", DRAWN)
def test_nothing_but_the_page_is_fetched_and_nothing_is_complained_of(kind, visit, pages):
    page = visit(kind)
    page.wait_for_load_state("networkidle")
    assert [url for url in page.seen if not url.startswith("data:")] == [pages[kind].as_uri()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", DRAWN)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_every_figure_is_seen_and_the_page_never_scrolls_sideways(kind, scheme, size, visit):
    page = visit(kind, scheme, size)
    figures = page.locator("figure svg")
    assert figures.count() == DRAWN[kind]
    for figure in figures.all():
        assert figure.is_visible()
        box = figure.bounding_box()
        assert box["width"] >= 340
        assert box["height"] >= 150
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= size["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    keep(page, f"{kind}-{scheme}-{size['width']}")


@pytest.mark.parametrize("kind", DRAWN)
@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_text_in_figures_is_large_enough_inside_and_apart(kind, size, visit):
    page = visit(kind, size=size)
    # [figure, text, font size in pixels, box] of every text that is drawn.
    texts = page.evaluate(
        """() => [...document.querySelectorAll("figure svg")].map(svg => {
          const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
          const frame = svg.getBoundingClientRect();
          return [...svg.querySelectorAll("text")].map(text => {
            const box = text.getBoundingClientRect();
            return {text: text.textContent, size: parseFloat(getComputedStyle(text).fontSize) * scale,
                    box: [box.left - frame.left, box.top - frame.top, box.right - frame.left, box.bottom - frame.top],
                    frame: [frame.width, frame.height]};
          });
        })"""
    )
    for figure in texts:
        assert figure
        for one in figure:
            left, top, right, bottom = one["box"]
            assert one["size"] >= 9.5, one
            assert left >= -1, one
            assert top >= -1, one
            assert right <= one["frame"][0] + 1, one
            assert bottom <= one["frame"][1] + 1, one
        for place, one in enumerate(figure):
            for other in figure[:place]:
                assert overlap(one["box"], other["box"]) < 4, (one["text"], other["text"])


def overlap(one, other):
    """The least of width and height of what two boxes share, in pixels."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return min(width, height)


@pytest.mark.parametrize("kind", DRAWN)
def test_tab_reaches_the_skip_link_first_and_then_everything_that_opens(kind, visit):
    page = visit(kind, size=PHONE)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.locator(".skip").bounding_box()["y"] >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "results"
    summaries = page.locator("summary").count()
    assert summaries > DRAWN[kind]
    for place in range(summaries):
        page.keyboard.press("Tab")
        index = "[...document.querySelectorAll('summary')].indexOf(document.activeElement)"
        assert page.evaluate(index) == place
    page.keyboard.press("Enter")
    assert page.locator("details").last.get_attribute("open") is not None


@pytest.mark.parametrize("kind", DRAWN)
@pytest.mark.parametrize("size", [WIDE, PHONE, SMALL], ids=["wide", "phone", "small"])
def test_nothing_scrolls_or_is_cut_off_with_everything_open(kind, size, visit):
    page = visit(kind, size=size)
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    # Elements that scroll or cut off by themselves; what only screen readers see is one pixel large.
    inner = page.evaluate(
        """() => [...document.querySelectorAll("body *")].filter(one => !one.closest("svg, .said, thead"))
          .filter(one => ["auto", "scroll", "hidden", "clip"].some(way => getComputedStyle(one).overflow.includes(way)))
          .map(one => one.outerHTML.slice(0, 80))"""
    )
    assert inner == []
    beyond = page.evaluate(
        """width => [...document.querySelectorAll("p, dd, dt, h1, h2, h3, th, td, pre, figcaption, caption")]
          .filter(one => !one.matches(".said, .said *") && !(one.closest("thead") && one.closest(".wide, .middle")))
          .filter(one => one.getBoundingClientRect().right > width || one.scrollWidth > one.clientWidth + 1)
          .map(one => one.outerHTML.slice(0, 80))""",
        size["width"],
    )
    assert beyond == []
    keep(page, f"{kind}-open-{size['width']}")


@pytest.mark.parametrize("kind", DRAWN)
def test_a_wide_table_is_a_list_on_a_phone_and_a_table_to_a_screen_reader(kind, visit):
    described = {}
    for size in (WIDE, PHONE):
        page = visit(kind, size=size)
        page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        table = page.locator(".wide table").last
        cells = [cell.bounding_box() for cell in table.locator("tbody tr").first.locator("th, td").all()]
        assert len(cells) > 4
        if size is PHONE:
            assert all(below["y"] >= above["y"] + above["height"] - 1 for above, below in itertools.pairwise(cells))
            labels = (
                table.locator("tbody tr")
                .first.locator("td")
                .evaluate_all("cells => cells.map(cell => getComputedStyle(cell, '::before').content.slice(1, -1))")
            )
            headings = table.locator("thead th").all_text_contents()
            assert labels == [heading.strip() for heading in headings[1:]]
        elif kind == "study":
            assert all(after["x"] > before["x"] for before, after in itertools.pairwise(cells))
        snapshot = table.aria_snapshot()
        described[size["width"]] = [
            snapshot.count(f"- {role} ") for role in ("columnheader", "rowheader", "cell") if f"- {role} " in snapshot
        ]
    assert len(described[400]) == 3
    assert described[400][:2] == described[1280][:2]


@pytest.mark.parametrize("kind", DRAWN)
def test_the_colour_scheme_changes_page_and_figures(kind, visit):
    def colours(scheme):
        page = visit(kind, scheme)
        return page.evaluate(
            """() => [getComputedStyle(document.body).backgroundColor,
                      getComputedStyle(document.querySelector("figure svg text")).fill,
                      getComputedStyle(document.querySelector("figure svg [style*='--series']")).stroke]"""
        )

    light, dark = colours("light"), colours("dark")
    assert light[:2] == ["rgb(255, 255, 255)", "rgb(31, 35, 41)"]
    assert dark[:2] == ["rgb(21, 24, 28)", "rgb(232, 234, 237)"]
    assert all(one != other for one, other in zip(light, dark, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", DRAWN)
def test_numbers_open_below_their_figure(kind, visit):
    page = visit(kind)
    for details in page.locator("details").all():
        details.locator("summary").click()
    assert page.locator("details table").count() == DRAWN[kind] + (kind == "run")  # its summary
    assert all(table.is_visible() for table in page.locator("details table").all())
    keep(page, f"{kind}-open")


@pytest.mark.slow
@pytest.mark.parametrize("kind", DRAWN)
def test_it_prints_light_from_a_dark_desktop(kind, visit):
    page = visit(kind, "dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    keep(page, f"{kind}-print")
