"""Tests that import vLLM: they are collected in the processes that `../test_in_vllm.py` starts, nowhere else.

Processes that see Triton run vLLM's V2 model runner, with the tests marked `both_runners`. Interpreted kernels are
slow: `make test` has those of them that are marked `both_runners(everyday=True)`, `make test-all` the others, too.
"""

import os
import sys
from pathlib import Path

import pytest
from serving.engines import ENVIRONMENT, ENVIRONMENT_V2, TORCHVISION, V2
from serving.steered import write_profiles
from transformers import AutoModelForCausalLM

IN_A_PROCESS_FOR_IT = str(TORCHVISION) in sys.path
collect_ignore_glob = [] if IN_A_PROCESS_FOR_IT else ["test_*.py"]
if IN_A_PROCESS_FOR_IT:
    os.environ.update(ENVIRONMENT_V2 if V2 else ENVIRONMENT)


@pytest.hookimpl(tryfirst=True)  # before pytest reads the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is not for the V2 runner, where it is this process's; what is not everyday goes to the matrix."""
    if not V2:
        return
    chosen = [item for item in items if item.get_closest_marker("both_runners")]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen
    for item in items:
        if not item.get_closest_marker("both_runners").kwargs.get("everyday"):
            item.add_marker(pytest.mark.matrix)


@pytest.fixture(scope="module")
def profiles(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of `write_profiles` for the Llama; modules that need others as well have a fixture of the same name."""
    folder = tmp_path_factory.mktemp("llama_profiles") / "profiles"
    write_profiles(AutoModelForCausalLM.from_pretrained(llama), folder)
    return folder
