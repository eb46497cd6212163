"""Tests that import vLLM: they are collected in the processes that `../test_in_vllm.py` starts, nowhere else."""

import os
import sys
from pathlib import Path

import pytest
from serving.engines import ENVIRONMENT, TORCHVISION
from serving.steered import write_profiles
from transformers import AutoModelForCausalLM

IN_A_PROCESS_FOR_IT = str(TORCHVISION) in sys.path
collect_ignore_glob = [] if IN_A_PROCESS_FOR_IT else ["test_*.py"]
if IN_A_PROCESS_FOR_IT:
    os.environ.update(ENVIRONMENT)


@pytest.fixture(scope="module")
def profiles(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of `write_profiles` for the Llama; modules that need others as well have a fixture of the same name."""
    folder = tmp_path_factory.mktemp("llama_profiles") / "profiles"
    write_profiles(AutoModelForCausalLM.from_pretrained(llama), folder)
    return folder
