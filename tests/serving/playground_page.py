"""The playground of a real server, used as people use it; run as a script, this takes its picture for the docs:

PYTHONPATH=tests python -m serving.playground_page PROFILES PICTURE

with the profiles that `hones demo` has written.
"""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from browser import chromium
from hones_offline.data.scenes import scenes
from hones_offline.running.embedded import checkpoint
from serving.engines import Server, server


@contextmanager
def playground(model: Path, profiles: Path, here: Path, *options: str) -> Iterator[Server]:
    """A server of the transformers engine with the page; it generates nothing while the file `here`/gate exists."""
    command = [sys.executable, str(Path(__file__).with_name("gated_server.py")), str(here / "gate"), str(model)]
    command += ["--profiles", str(profiles), "--engine", "transformers", "--device", "cpu", "--playground", *options]
    with server(command, here / "log", {}) as running:
        yield running


def fill(tab: Any, prompt: str, left: str, right: str, image: Path | None = None, tokens: int = 12) -> None:
    """Fill in the form."""
    tab.fill("#prompt", prompt)
    tab.fill("#tokens", str(tokens))
    for at, expression in enumerate((left, right)):
        tab.locator(".expression").nth(at).fill(expression)
    if image is not None:
        tab.set_input_files("#image", image)
        tab.wait_for_selector("#preview")


def answers(tab: Any) -> list[dict[str, str]]:
    """Press Run, and return the visible texts of each side when both are done: answer, applied, wrong."""
    tab.get_by_role("button", name="Run").click()
    tab.get_by_role("button", name="Run").wait_for()  # it is called "Stop" meanwhile
    return shown(tab)


def shown(tab: Any) -> list[dict[str, str]]:
    """The visible texts of each side."""
    texts: list[dict[str, str]] = tab.evaluate(
        "() => [...document.querySelectorAll('.side')].map(side => Object.fromEntries(['answer', 'applied', 'wrong']"
        ".map(kind => [kind, side.querySelector('.' + kind)]).map(([kind, e]) => [kind, e.hidden ? '' : e.innerText])))"
    )
    return texts


def take_picture(profiles: Path, picture: Path) -> None:
    """A PNG of the page, in light colors, with the first test scene to which the profile gives another answer."""
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        with playground(checkpoint(), profiles, here, "--served-model-name", "tiny") as running, chromium() as browser:
            tab = browser.new_page(viewport={"width": 1040, "height": 1000}, color_scheme="light")
            for scene in scenes("test", 50):
                tab.goto(f"{running.url}/hones")  # anew, so that the preview awaited is not the last scene's
                tab.wait_for_selector("#profiles tr")
                scene.image().resize((256, 256)).save(here / "scene.png")
                fill(tab, scene.prompt("vqa"), "none", "vqa", here / "scene.png")
                plain, steered = answers(tab)
                if plain["answer"] != steered["answer"]:
                    break
            tab.screenshot(path=picture, full_page=True)


if __name__ == "__main__":
    take_picture(Path(sys.argv[1]), Path(sys.argv[2]))
