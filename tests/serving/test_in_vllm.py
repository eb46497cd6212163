"""Runs the tests in engine/, each module in a process of its own.

vLLM changes PyTorch and the environment of the process it is imported into, and needs torchvision there from the start.
To run one by hand: `.venv/bin/python tests/serving/test_in_vllm.py tests/serving/engine/test_environment.py -k llama`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from serving.engines import ENVIRONMENT

MODULES = sorted((Path(__file__).parent / "engine").glob("test_*.py"))


def run_pytest(*arguments: str, **options: bool) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **ENVIRONMENT, "HONES_TEST_ENGINE": "1"}
    return subprocess.run([sys.executable, "-m", "pytest", *arguments], env=environment, text=True, **options)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.stem)
def test_module(module: Path) -> None:
    done = run_pytest("-q", str(module), capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    sys.exit(run_pytest(*sys.argv[1:]).returncode)
