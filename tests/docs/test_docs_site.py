"""The built site: strict, whole, without a request to any other host, and no page wider than a phone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import tracer

pytestmark = [pytest.mark.slow]
pytest.importorskip("mkdocs", reason="the extra docs is not installed")
ROOT = Path(__file__).resolve().parents[2]
PHONE = 390
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    # Not --quiet: mkdocs then counts no warning, and --strict refuses nothing.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    variables = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=variables, check=False, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Fetched(HTMLParser):
    """What a browser fetches of a page without being asked."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        wanted = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "link": "href"}
        if tag in wanted and given.get("rel") not in ("canonical", "prev", "next", "edit"):
            self.addresses += [value] if (value := given.get(wanted[tag])) else []


def test_no_page_fetches_from_another_host(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 60
    for page in pages:
        found = Fetched()
        found.feed(page.read_text(encoding="utf-8"))
        assert found.addresses
        assert [one for one in found.addresses if re.match(r"(https?:)?//", one)] == [], page
    for sheet in site.rglob("*.css"):
        assert re.findall(r"(?:url\(|@import )['\"]?https?:", sheet.read_text(encoding="utf-8")) == [], sheet


def test_every_public_name_has_its_place(site: Path) -> None:
    shown = "".join(page.read_text(encoding="utf-8") for page in (site / "reference" / "python").glob("*.html"))
    assert [name for name in tracer.__all__ if f'id="tracer.{name}"' not in shown] == []
    assert "Circuit.paths" in shown, "methods are there too"


def test_job_files_are_shown_as_they_are(site: Path) -> None:
    text = re.sub(r"<[^>]+>", "", (site / "reference" / "job-files.html").read_text(encoding="utf-8"))
    assert "which attribution finds small circuits that hold" in text
    assert "shard_size: 16" in text


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if not (BROWSER and DRIVER):
        pytest.skip("no chromium and chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=str(DRIVER)))
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


def test_no_page_is_wider_than_a_phone_and_it_opens_from_disk(site: Path, browser: Any) -> None:
    phone = {"width": PHONE, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    wide, asked = {}, set()
    for page in sorted(site.rglob("*.html")):
        browser.get(page.as_uri())
        width = browser.execute_script("return document.scrollingElement.scrollWidth")
        if width > PHONE:
            wide[page.name] = width
        fetched = browser.execute_script("return performance.getEntriesByType('resource').map(one => one.name)")
        asked |= {address for address in fetched if not address.startswith(("file:", "data:", "blob:"))}
    assert wide == {}
    assert asked == set()


def test_search_finds_from_disk(site: Path, browser: Any) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.set_window_size(1280, 900)
    browser.get((site / "index.html").as_uri())
    browser.execute_script("document.querySelector('input.md-search__input').focus()")
    browser.switch_to.active_element.send_keys("faithfulness")
    WebDriverWait(browser, 30).until(lambda seen: seen.find_elements(By.CSS_SELECTOR, ".md-search-result__item"))
