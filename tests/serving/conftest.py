"""Fixtures: folders of tiny checkpoints, made once per session."""

from pathlib import Path

import pytest

from serving import checkpoints


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of `checkpoints.llama`."""
    return checkpoints.llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def qwen2_5_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of `checkpoints.qwen2_5_vl`."""
    return checkpoints.qwen2_5_vl(tmp_path_factory.mktemp("qwen2_5_vl"))


@pytest.fixture(scope="session")
def embedded() -> Path:
    """Folder of the LLaVA that ships with hones-steer."""
    from hones_offline.running.embedded import checkpoint

    return checkpoint()
