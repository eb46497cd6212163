"""Runs the tests in engine/, in processes of their own that each take several modules.

vLLM changes PyTorch in the process it is imported into, and wants torchvision there from the start. By hand:
`PYTHONPATH=.venv/torchvision .venv/bin/python -m pytest tests/serving/engine/test_environment.py -k llama`; with
`PYTHONPATH=.venv/triton-interpreter:.venv/torchvision` by the V2 model runner.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from serving.engines import ENVIRONMENT, ENVIRONMENT_V2

ENGINE = Path(__file__).parent / "engine"
# Before anything in their process has wrapped parts of vLLM: these look at a vLLM that hones-steer has not touched.
# Speculation before test_vllm_settings: vLLM looks for its kernels at all objects of all modules, numba's too, one of
# which it stumbles over, and n-gram speculation imports that.
FIRST = ("test_environment", "test_vllm_tokens", "test_vllm_refusals", "test_vllm_speculation")
MODULES = [ENGINE / f"{name}.py" for name in FIRST]
MODULES += sorted(module for module in ENGINE.glob("test_*.py") if module not in MODULES)
PROCESSES = {
    "first half": (MODULES[0::2], ENVIRONMENT),
    "second half": (MODULES[1::2], ENVIRONMENT),
    "V2 runner": (MODULES, ENVIRONMENT_V2),
}


@pytest.mark.parametrize(("modules", "environment"), PROCESSES.values(), ids=PROCESSES)
def test_engine(modules: list[Path], environment: dict[str, str], request: pytest.FixtureRequest) -> None:
    selected = request.config.getoption("markexpr")
    command = [sys.executable, "-m", "pytest", "-q", "-m", selected, *map(str, modules)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
