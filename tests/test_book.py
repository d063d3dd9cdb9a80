"""The book builds without a warning; a browser opens every page from the file system,
without a network.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
import yaml
from bs4 import BeautifulSoup
from filelock import FileLock
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

ROOT = Path(__file__).parents[1]


def documents(entry):
    """Names of the pages below an entry of the table of contents, without their
    ending
    """
    name = entry.get("root") or entry.get("file")
    below = (
        entry.get("parts", []) + entry.get("chapters", []) + entry.get("sections", [])
    )
    return ([name] if name else []) + [
        page for child in below for page in documents(child)
    ]


TOC = documents(yaml.safe_load((ROOT / "_toc.yml").read_text()))
PAGES = ["index", *TOC, "genindex", "py-modindex", "search"]
pages = pytest.mark.parametrize("page", PAGES)


@pytest.fixture(scope="session")
def build(tmp_path_factory, worker_id):
    """(folder of the rendered book, warnings). The first worker that needs it builds
    it, the others wait.
    """
    folder = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        folder = folder.parent  # what all workers of this run share
    log = folder / "book.log"
    with FileLock(folder / "book.lock"):
        if not log.exists():
            options = [
                "--all",
                "--warningiserror",
                "--nitpick",
                "--keep-going",
                "--path-output",
                folder / "book",
            ]
            command = [
                Path(sys.executable).with_name("jupyter-book"),
                "build",
                *options,
                ROOT,
            ]
            run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            log.write_text(
                run.stderr[-5000:] or "unknown error" if run.returncode else ""
            )
    return folder / "book" / "_build" / "html", log.read_text()


@pytest.fixture(scope="session")
def book(build):
    """Folder of the rendered book"""
    folder, warnings = build
    if warnings:
        pytest.fail(
            "the book does not build, see test_builds_without_warnings", pytrace=False
        )
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium that records its console and its requests"""
    driver = shutil.which("chromedriver")
    binary = next(
        filter(
            None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])
        ),
        None,
    )
    if not (driver and binary):
        message = (
            "the book is not tested in a browser: install chromium and chromedriver"
        )
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-dev-shm-usage",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "window-size=1400,1000",
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability(
        "goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"}
    )
    chromium = webdriver.Chrome(
        options=options, service=webdriver.ChromeService(driver)
    )
    chromium.set_script_timeout(60)
    chromium.get("about:blank")  # in place of a distribution's start page
    yield chromium
    chromium.quit()


def visit(browser, address):
    """Open a page, wait until its mathematics stands; (requested addresses, what went
    wrong)
    """
    (
        browser.get_log("browser"),
        browser.get_log("performance"),
    )  # what the page before left
    browser.get(address)
    WebDriverWait(browser, 30).until(
        lambda _: browser.execute_script("return document.readyState") == "complete"
    )
    browser.execute_async_script("""
        const done = arguments[0];
        const loaded = window.MathJax && MathJax.startup;
        const ready = loaded ? MathJax.startup.promise : Promise.resolve();
        ready.then(() => document.fonts.ready).then(() => setTimeout(done, 100));
    """)
    errors = [
        entry["message"]
        for entry in browser.get_log("browser")
        if entry["level"] == "SEVERE"
    ]
    requests = {}  # of this page: the browser's own start page may still be failing
    for entry in browser.get_log("performance"):
        event = json.loads(entry["message"])["message"]
        about = event["params"]
        if event["method"] == "Network.requestWillBeSent":
            requests[about["requestId"]] = about["request"]["url"]
        elif event["method"] == "Network.loadingFailed" and not about.get("canceled"):
            if address := requests.get(about["requestId"]):
                errors.append(f"failed request: {address}: {about['errorText']}")
    return list(requests.values()), errors


def test_every_notebook_is_in_the_book():
    notebooks = {
        f"notebooks/{path.stem}" for path in (ROOT / "notebooks").glob("*.ipynb")
    }
    assert notebooks == {page for page in TOC if page.startswith("notebooks/")}


def test_builds_without_warnings(build):
    folder, warnings = build
    assert not warnings, warnings


@cache
def anchors(path):
    """All places of a page that a link can lead to"""
    return set(re.findall(r'\bid="([^"]+)"', path.read_text(encoding="utf-8")))


@pages
def test_links_lead_somewhere(book, page):
    path = book / f"{page}.html"
    soup = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
    for link in soup.select("a[href]"):
        target, anchor = urldefrag(link["href"])
        if urlsplit(target).scheme:
            continue
        file = (
            (path.parent / unquote(target.split("?")[0])).resolve() if target else path
        )
        assert file.exists(), f"{link['href']} leads nowhere"
        if anchor and file.suffix == ".html":
            assert unquote(anchor) in anchors(file), f"{link['href']} has no such place"


def test_every_module_is_documented(book):
    """Each file of the package has its section in the reference."""
    files = (ROOT / "promptkit").rglob("*.py")
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in files
    }
    reference = [
        (book / "book" / f"{page}.html").read_text(encoding="utf-8")
        for page in ("package", "methods")
    ]
    missing = {
        name
        for name in names
        if not any(f'id="module-{name}"' in page for page in reference)
    }
    assert not {name for name in missing if "._" not in name}


@pytest.mark.browser
@pages
def test_page_in_the_browser(book, browser, page):
    requests, errors = visit(browser, (book / f"{page}.html").as_uri())
    assert not errors, errors
    remote = [
        address
        for address in requests
        if urlsplit(address).scheme in ("http", "https", "ws", "wss")
    ]
    assert not remote, f"{page} needs a network: {remote}"

    broken = browser.execute_script(
        "return [...document.images].filter(i => !i.naturalWidth).map(i => i.src)"
    )
    assert not broken, f"images that do not show: {broken}"

    formulas = browser.find_elements(By.CSS_SELECTOR, ".math")
    rendered = browser.find_elements(By.CSS_SELECTOR, ".math mjx-container")
    assert len(rendered) >= len(formulas)
    assert not browser.find_elements(By.CSS_SELECTOR, '[data-mml-node="merror"]'), (
        "a formula does not parse"
    )

    views = browser.find_elements(
        By.CSS_SELECTOR, 'script[type="application/vnd.jupyter.widget-view+json"]'
    )
    if views:
        shown = WebDriverWait(browser, 20).until(
            lambda _: browser.find_elements(
                By.CSS_SELECTOR, ".widget-subarea .jupyter-widgets"
            )
        )
        assert len(shown) >= len(views)


@pytest.mark.browser
def test_search_finds(book, browser):
    def results(words):
        visit(browser, (book / "search.html").as_uri() + f"?q={words}")
        WebDriverWait(browser, 20).until(
            lambda _: (
                browser.find_element(
                    By.CSS_SELECTOR, "#search-results .search-summary"
                ).text
            )
        )
        return [
            link.text
            for link in browser.find_elements(
                By.CSS_SELECTOR, "#search-results ul.search li a"
            )
        ]

    assert "Notation" in results("harmonic")
    assert not results("xyzzyplugh")


@pytest.mark.browser
def test_search_from_a_page(book, browser):
    """The search field of any page leads to the results."""
    visit(browser, (book / "book" / "setup.html").as_uri())
    browser.execute_script("document.querySelector('.search-button__button').click()")
    field = WebDriverWait(browser, 10).until(
        lambda _: next(
            (i for i in browser.find_elements(By.NAME, "q") if i.is_displayed()), None
        )
    )
    field.send_keys("harmonic")
    field.submit()
    WebDriverWait(browser, 20).until(
        lambda _: browser.find_elements(
            By.CSS_SELECTOR, "#search-results ul.search li a"
        )
    )
