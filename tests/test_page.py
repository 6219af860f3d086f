"""The page of a run in a real browser: it opens from a file, holds every item, filters, and asks for nothing."""

from harness.page import html_of
from harness.record import Run, load_run
from run_all import ASSUMPTIONS, rated

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.all,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: the page's looks and filters are not tested"),
]


@pytest.fixture(scope="module")
def recorded() -> Run:
    return load_run(ROOT / "results")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def opened(browser: Browser, file: Path, **context: object) -> tuple[Page, list[str]]:
    """The page in a new tab, and what it asked for beside itself."""
    page = browser.new_context(**context).new_page()  # type: ignore[arg-type]
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    return page, [url for url in asked if url != file.as_uri() and not url.startswith("data:")]


@pytest.fixture(scope="module")
def one(recorded: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "run.html"
    plots = [ROOT / "docs" / "pf_latency.svg"]
    file.write_text(html_of([rated(recorded, ASSUMPTIONS)], plots), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def two(recorded: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded run beside one in which an item has lost a star and evidence."""
    first = recorded.categories[0]
    item = first.items[0]
    lost = item.evidence[0].model_copy(update={"held": False})
    worse = item.model_copy(update={"stars": 2, "evidence": [lost, *item.evidence[1:]]})
    category = first.model_copy(update={"items": [worse, *first.items[1:]]})
    newer = Run("newer", [category, *recorded.categories[1:]])
    file = tmp_path_factory.mktemp("page") / "two.html"
    file.write_text(html_of([rated(recorded, ASSUMPTIONS), rated(newer, ASSUMPTIONS)]), encoding="utf-8")
    return file


def test_every_item_is_there_and_no_request_leaves_the_page(browser: Browser, one: Path, recorded: Run) -> None:
    page, asked = opened(browser, one)
    assert asked == []
    assert page.locator("details.item").count() == len(recorded.items) == 58
    for id, item in recorded.items.items():
        text = page.locator(f"#{id}").text_content() or ""
        assert item.title in text
        for evidence in item.evidence:
            assert " ".join(evidence.claim.split()) in " ".join(text.split())


def shown(page: Page) -> list[str]:
    return list(page.locator("details.item:visible").evaluate_all("all => all.map(one => one.id)"))


def test_filters_show_what_they_say(browser: Browser, one: Path, recorded: Run) -> None:
    page, _ = opened(browser, one)
    expected = {
        "fail-closed": [id for id, item in recorded.items.items() if item.fail_closed],
        "limits": [
            id for id, item in recorded.items.items() if any(e.kind == "limit" and e.held for e in item.evidence)
        ],
        "all": list(recorded.items),
    }
    for name, ids in expected.items():
        page.locator(f"button[data-filter={name}]").click()
        assert shown(page) == ids
        assert page.locator(f"button[data-filter={name}]").get_attribute("aria-pressed") == "true"
        count = re.search(r"\d+$", page.locator(f"button[data-filter={name}]").inner_text())
        assert count
        assert int(count[0]) == len(ids)


def test_it_works_by_keyboard(browser: Browser, one: Path) -> None:
    page, _ = opened(browser, one)
    page.locator("#EX-02 summary").focus()
    page.keyboard.press("Enter")
    assert page.locator("#EX-02").get_attribute("open") is not None
    page.locator("button[data-filter=fail-closed]").focus()
    page.keyboard.press("Space")
    assert shown(page) == ["EX-01", "EX-03", "RT-01", "VR-01", "OP-02"]


@pytest.mark.parametrize("width", [320, 390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_sticks_out_on_a_phone_or_in_the_dark(browser: Browser, two: Path, width: int, scheme: str) -> None:
    page, _ = opened(browser, two, viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.locator("#open").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ink, paper = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    assert contrast(ink, paper) > 7


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two CSS colours, as WCAG 2.2 defines it."""

    def luminance(colour: str) -> float:
        channels = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_printed_it_holds_everything(browser: Browser, one: Path, tmp_path: Path) -> None:
    page, _ = opened(browser, one)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details.item[open]").count() == 58
    page.emulate_media(media="print")
    assert not page.locator("nav").is_visible()
    assert len(page.pdf(path=str(tmp_path / "run.pdf"))) > 10_000


def test_two_runs_stand_side_by_side_and_the_changed_are_found(browser: Browser, two: Path) -> None:
    page, _ = opened(browser, two)
    page.locator("button[data-filter=changed]").click()
    assert shown(page) == ["EX-01"]
    text = page.locator("#EX-01").text_content() or ""
    assert "lost: " in text
    assert page.locator("#EX-01 .runs > div").count() == 2


def test_a_text_cannot_break_out_of_the_page(recorded: Run, browser: Browser, tmp_path: Path) -> None:
    evil = "<script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">"
    first = recorded.categories[0]
    item = first.items[0].model_copy(update={"reason": evil, "title": evil})
    run = Run(evil, [first.model_copy(update={"items": [item]})])
    file = tmp_path / "evil.html"
    file.write_text(html_of([rated(run, ASSUMPTIONS)]), encoding="utf-8")
    page, asked = opened(browser, file)
    assert asked == []
    assert page.title() != "broken"
