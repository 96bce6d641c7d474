"""The system's Chromium, in which pages are tested as a person meets them."""

import contextlib
import shutil

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


def executable():
    """Where Chromium is; skips the test where there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("Chromium is not installed: make browser")
    return found


@contextlib.contextmanager
def chromium():
    """A headless browser that can reach nothing but files."""
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as driver:
        arguments = [
            "--no-sandbox",
            "--disable-dev-shm-usage",
        ]  # it may run as root, in a container
        browser = driver.chromium.launch(executable_path=executable(), args=arguments)
        try:
            yield browser
        finally:
            browser.close()


class Visit:
    """A page that was opened, with what it said and asked for."""

    def __init__(self, browser, path, width=1200, height=900, dark=False):
        scheme = "dark" if dark else "light"
        size = {"width": width, "height": height}
        self.page = browser.new_page(viewport=size, color_scheme=scheme)
        self.said, self.asked = [], []
        self.page.on("console", lambda message: self.said.append((message.type, message.text)))
        self.page.on("pageerror", lambda error: self.said.append(("error", str(error))))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.resolve().as_uri())

    def elsewhere(self):
        """Addresses that are neither the page's own nor data."""
        return [url for url in self.asked if not url.startswith(("data:", "blob:", "file:"))]

    def violations(self):
        """What axe finds wrong with the page for people who cannot see or point."""
        axe = pytest.importorskip("axe_playwright_python.sync_playwright")
        found = axe.Axe().run(self.page).response["violations"]
        return [(v["id"], [node["html"][:200] for node in v["nodes"][:3]]) for v in found]
