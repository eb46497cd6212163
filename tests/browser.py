"""A real browser for tests of pages, and pictures of them: Chromium without a window, from whatever is installed.

    python tests/browser.py runs/demo/report.html docs/report.png

writes a picture of the page's upper part.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
QUIET = (
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PICTURE = {"width": 1160, "height": 1500}


def find_chromium() -> str | None:
    """The path of an installed Chromium or Chrome."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A running browser with nothing in its profile. Closed at once when done: while it runs, so does an event loop."""
    executable = find_chromium()
    assert executable, f"none of {', '.join(NAMES)} is installed; `make test` installs it where it may"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable, args=[*QUIET, *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        )
        try:
            yield browser
        finally:
            browser.close()


def take_picture(page: Path, picture: Path) -> None:
    """A PNG of the upper part of a page, in light colours."""
    with chromium() as browser:
        tab = browser.new_page(viewport=PICTURE, color_scheme="light")
        tab.goto(page.resolve().as_uri())
        tab.screenshot(path=picture)


if __name__ == "__main__":
    take_picture(Path(sys.argv[1]), Path(sys.argv[2]))
