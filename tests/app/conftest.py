"""A served page, and a browser where there is one."""

import shutil

import pytest

from app_pages import serving

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    pytest.importorskip("gradio", reason="the app needs Gradio: pip install 'rcgrpo[app]'")
    with serving(tmp_path_factory.mktemp("app")) as served:
        yield served


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="the test drives a browser through Playwright")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next(filter(None, map(shutil.which, names)), None)
    with playwright.sync_playwright() as drivers:
        try:
            browser = drivers.chromium.launch(executable_path=found, args=ARGUMENTS)
        except playwright.Error as error:
            pytest.skip(f"no Chromium that Playwright can start ({str(error).splitlines()[0]})")
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens an address in a window of this width; at the end no script on it may have failed."""
    opened, broken = [], []

    def open_page(url, width=1280):
        page = browser.new_page(viewport={"width": width, "height": 1000})
        page.set_default_timeout(120_000)
        page.on("pageerror", lambda error: broken.append(str(error)))
        page.goto(url)
        page.locator("#edit").wait_for()
        opened.append(page)
        return page

    yield open_page
    for page in opened:
        page.close()
    assert not broken
