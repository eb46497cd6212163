"""A real browser for tests of pages, and pictures of them: Chromium without a window, from whatever is installed.

    python tests/browser.py runs/demo/report.html docs/report.png
    python tests/browser.py runs/smolvlm/steering/report.html docs/results/smolvlm.png '#selections .figures'

writes a picture of the page's upper part, or of what a CSS selector finds.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
    """A running browser with nothing in its profile."""
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


class Opened:
    """A page in the browser, with whatever it asked for or complained about."""

    def __init__(self, browser: Browser, page: Path | str, width: int = 1280, scheme: str = "light") -> None:
        url = page if isinstance(page, str) else page.as_uri()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.tab = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.on("console", lambda message: self.complaints.append(message.text))
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        self.tab.goto(url, wait_until="load")
        self.asked_for_nothing = self.requests == [url]

    def ask(self, script: str) -> Any:
        return self.tab.evaluate(script)


# The worst ratio of contrast of each kind of element, "TAG.class", that has text.
CONTRASTS = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const known = {};
  const rgb = color => known[color] ??= (() => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  })();
  const luminance = color => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => {
    const part = color[i] / 255;
    return sum + weight * (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  }, 0);
  const ground = element => {
    for (let e = element; e; e = e.parentElement) {
      const color = rgb(getComputedStyle(e).backgroundColor);
      if (color[3] === 255) return color;
    }
  };
  const worst = {};
  for (const element of document.querySelectorAll('body *:not(title):not(style)')) {
    if (![...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())) continue;
    const style = getComputedStyle(element);
    const [a, b] = [rgb(element.ownerSVGElement ? style.fill : style.color), ground(element)].map(luminance);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const kind = `${element.tagName}.${element.getAttribute('class') ?? ''}`;
    worst[kind] = Math.min(worst[kind] ?? 99, ratio);
  }
  return worst;
}"""


def take_picture(page: Path, picture: Path, part: str | None = None) -> None:
    """A PNG of the upper part of a page, or of what the selector `part` finds, in light colors."""
    with chromium() as browser:
        tab = browser.new_page(viewport=PICTURE, color_scheme="light")
        tab.goto(page.resolve().as_uri())
        (tab.locator(part) if part else tab).screenshot(path=picture)


if __name__ == "__main__":
    take_picture(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
