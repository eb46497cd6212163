"""Settings for every test (no network, one thread), and the demo that several tests look at."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@pytest.fixture(scope="session")
def after_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the repository after a demo on a handful of scenes; its results are in runs/demo."""
    from problems import SMALL_DEMO

    from hones_steer.cli import main

    folder = tmp_path_factory.mktemp("repository")
    (folder / "examples").symlink_to(Path(__file__).parents[1] / "examples")
    assert main(["demo", "--out", str(folder / "runs" / "demo"), *SMALL_DEMO]) == 0
    return folder
