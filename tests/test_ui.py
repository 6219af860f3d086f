"""The Web UI in a real browser: a person finds the run that a script has made, and its timeline.

With PICTURES=1 in the environment the pictures of README and reports are made anew.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT, environment
from playwright.sync_api import Page, expect, sync_playwright
from test_processes import TAG, tagged

pytestmark = pytest.mark.all

SCRIPT = ROOT / "09_ob_observability.py"
PICTURES = os.environ.get("PICTURES") == "1"


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """The Web UI of a run that is kept open: OB-03, with a workflow worth a picture, and OB-06, with a failure."""
    tag = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "OB-03", "OB-06", "--keep-open"],
        env=environment(**{TAG: tag} if PICTURES else {TAG: tag, "TMPDIR": str(tmp_path)}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    try:
        assert process.stdout
        line = next((line for line in process.stdout if "Web UI at" in line), "")
        assert line, "the script ended without serving the Web UI"
        yield line.split("Web UI at ")[1].split(",")[0]
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "")
        assert tagged(tag) == []
    finally:
        process.kill()  # its guard ends the rest


@pytest.fixture
def page() -> Iterator[Page]:
    """A page of a browser without a screen. It may ask nobody but this machine."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("chromium is not installed (Debian: apt install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        expect.set_options(timeout=120_000)  # a busy machine takes its time
        page = browser.new_page(viewport={"width": 1400, "height": 900}, locale="en-US", timezone_id="UTC")
        page.set_default_timeout(120_000)
        page.route("**/*", lambda route: route.continue_() if "//127.0.0.1:" in route.request.url else route.abort())
        yield page
        browser.close()


def picture(page: Page, name: str, tmp_path: Path) -> None:
    path = (ROOT / "docs" if PICTURES else tmp_path) / f"{name}.png"
    page.screenshot(path=path)
    assert path.stat().st_size > 10_000


def test_a_run_and_its_timeline_are_found(page: Page, url: str, tmp_path: Path) -> None:
    page.goto(f"{url}/namespaces/default/workflows")
    run = page.get_by_role("link", name="-fulfil").first
    expect(run).to_be_visible()
    expect(page.get_by_text("Terminated").first).to_be_visible()
    picture(page, "ui_workflows", tmp_path)
    run.click()
    expect(page).to_have_url(re.compile("-fulfil/.*/timeline"))
    # Two steps side by side, one that took two attempts, a timer and a child, by their summaries.
    for bar in ("do_step • reserve", "do_step • quote", "2 • do_step • charge", "cooling off", "by bicycle"):
        expect(page.get_by_text(bar, exact=True).first).to_be_visible()
    page.get_by_text("by bicycle", exact=True).first.scroll_into_view_if_needed()
    picture(page, "ui_timeline", tmp_path)
    page.goto(page.url.replace("/timeline", "/history"))
    for event in ("Workflow Execution Completed", "Child Workflow Execution Completed", "Timer Fired"):
        expect(page.get_by_text(event).first).to_be_visible()
