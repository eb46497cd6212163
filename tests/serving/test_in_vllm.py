"""Runs the tests in engine/, each module in a process of its own.

vLLM changes PyTorch in the process it is imported into, and wants torchvision there from the start. By hand:
`PYTHONPATH=.venv/torchvision .venv/bin/python -m pytest tests/serving/engine/test_environment.py -k llama`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from serving.engines import ENVIRONMENT

MODULES = sorted((Path(__file__).parent / "engine").glob("test_*.py"))


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.stem)
def test_engine(module: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", str(module)]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
