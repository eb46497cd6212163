"""Runs the tests in engine/, in processes of their own that each take several modules.

vLLM changes PyTorch in the process it is imported into, and wants torchvision there from the start. By hand:
`PYTHONPATH=.venv/torchvision .venv/bin/python -m pytest tests/serving/engine/test_environment.py -k llama`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from serving.engines import ENVIRONMENT

ENGINE = Path(__file__).parent / "engine"
# What compares with a vLLM that hones-steer has not touched comes first in its process.
FIRST = ("test_environment", "test_vllm_tokens")
MODULES = sorted(ENGINE.glob("test_*.py"), key=lambda module: (module.stem not in FIRST, module.stem))
PROCESSES = [
    pytest.param(MODULES[at::2], id="+".join(module.stem for module in MODULES[at::2]), marks=mark)
    for at, mark in enumerate(map(pytest.mark.xdist_group, ("engine-0", "engine-1")))
]


@pytest.mark.parametrize("modules", PROCESSES)
def test_engine(modules: list[Path], request: pytest.FixtureRequest) -> None:
    selected = request.config.getoption("markexpr")
    command = [sys.executable, "-m", "pytest", "-q", "-m", selected, *map(str, modules)]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
