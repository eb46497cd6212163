"""Common ground of all tests: the same environment whatever the shell's, an order for two workers, a demo, a browser.

The first process of a run makes a folder for what is remembered between processes (compiled code, what vLLM knows of
models), which xdist's workers and the processes that tests start share, and which goes when the run ends.
"""

import locale
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# A loaded machine is no bug.
settings.register_profile("hones", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("hones")

RUN = "TESTS_RUN_FOLDER"  # the environment variable that holds the folder
STARTED_BY_OTHERS = RUN in os.environ

# Variables that change what is tested: of the libraries in use, of torchrun, of terminals.
FOREIGN_PREFIXES = (
    *("HF_", "HONES_", "HUGGINGFACE_", "OPENAI_", "PROMETHEUS_", "TORCHDYNAMO_", "TORCHINDUCTOR_", "TORCH_LOGS"),
    *("TRANSFORMERS_", "TRITON_", "VLLM_"),
)
FOREIGN = {
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("FORCE_COLOR", "NO_COLOR", "COLUMNS", "LINES", "LANG", "LANGUAGE"),
}


def _same_everywhere() -> None:
    """Give this process, and so all it starts, the environment that tests are written for."""
    if not STARTED_BY_OTHERS:
        for name in list(os.environ):
            if name.startswith((*FOREIGN_PREFIXES, "LC_")) or name in FOREIGN:
                del os.environ[name]
        folder = tempfile.mkdtemp(prefix="hones-tests-")
        os.environ.update(
            {
                RUN: folder,
                "HF_HOME": f"{folder}/huggingface",
                "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
                "VLLM_CACHE_ROOT": f"{folder}/vllm",
                "VLLM_CONFIG_ROOT": f"{folder}/vllm",
            }
        )
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", OMP_NUM_THREADS="1")
    os.environ.update(TZ="UTC", LC_ALL="C.UTF-8", COLUMNS="80")
    # Servers of the tests are on this machine; a proxy that it uses otherwise would not find them.
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"
    time.tzset()
    locale.setlocale(locale.LC_ALL, "C.UTF-8")
    os.umask(0o022)
    # Jobs that a script starts in the background ignore Ctrl-C, those of nohup SIGHUP, and so would their children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


_same_everywhere()


def pytest_unconfigure() -> None:
    """Remove the run's folder, at the end of the process that made it."""
    if not STARTED_BY_OTHERS:
        shutil.rmtree(os.environ[RUN], ignore_errors=True)


# What starts engines, servers, browsers, compilers or several processes that load a model: not in `make test-fast`.
SLOW_FILES = {
    *("test_in_vllm", "test_vllm_benchmark", "test_http", "test_playground", "test_hf_benchmark", "test_compile"),
    *("test_attribution_benchmark", "test_deployment", "test_gpu_benchmark", "test_distributed", "test_resume"),
    *("test_site", "test_wheel", "test_replicas"),
}
SLOW_FIXTURES = {"after_demo", "one_browser"}
# What takes longest, in that order: workers that begin with it end together.
LONGEST = ("test_in_vllm", "demo", "test_http[vllm", "test_http[transformers", "test_vllm_benchmark", "test_playground")


def group_of(nodeid: str) -> str:
    """The group that a test runs with in one worker, as they share something expensive: its file, with exceptions."""
    path, _, name = nodeid.partition("::")
    file = Path(path).stem
    if file in ("test_demo", "test_docs"):
        return "demo"
    if file in ("test_http", "test_in_vllm"):  # by the first parameter: an engine's servers, a process of vLLM's
        return file + "[" + re.split(r"[-\]]", name.partition("[")[2])[0]
    return file


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """The parameter's name in place of bytes: compressed ones can hold the time, and workers must agree on names."""
    return argname if isinstance(val, bytes) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is slow; the longest first."""
    for item in items:
        if item.path.stem in SLOW_FILES or SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
    places = {item: group_of(item.nodeid) for item in items}
    items.sort(key=lambda item: next((i for i, name in enumerate(LONGEST) if places[item].startswith(name)), 99))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One group after the other to whichever worker is free, in the order of collection."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False
    return ByGroup(config, log)


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
