"""Tiny checkpoints, made once, and a cache folder for vLLM."""

from pathlib import Path

import pytest

from serving import checkpoints


@pytest.fixture(autouse=True)
def _vllm_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path_factory.getbasetemp() / "vllm"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `checkpoints.llama`."""
    return checkpoints.llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def qwen2_5_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `checkpoints.qwen2_5_vl`."""
    return checkpoints.qwen2_5_vl(tmp_path_factory.mktemp("qwen2_5_vl"))


@pytest.fixture(scope="session")
def embedded() -> Path:
    """The folder of the LLaVA that ships with hones-steer."""
    from hones_offline.embedded import checkpoint

    return checkpoint()
