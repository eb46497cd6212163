"""Settings for every test (no network, one thread), and the demo and the browser of several tests."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"  # where the servers of tests are


@pytest.fixture(scope="session")
def after_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the repository after a demo on a handful of scenes; its results are in runs/demo."""
    from problems import SMALL_DEMO

    from hones_steer.cli import main

    folder = tmp_path_factory.mktemp("repository")
    (folder / "examples").symlink_to(Path(__file__).parents[1] / "examples")
    assert main(["demo", "--out", str(folder / "runs" / "demo"), *SMALL_DEMO]) == 0
    return folder


@pytest.fixture(scope="module")
def one_browser() -> Iterator[Any]:
    """Closed after the module: while it runs, so does an event loop."""
    from browser import chromium

    with chromium() as started:
        yield started


@pytest.fixture
def browser(one_browser: Any) -> Iterator[Any]:
    """The module's browser, with no page left open by the test before."""
    yield one_browser
    for context in one_browser.contexts:
        context.close()
