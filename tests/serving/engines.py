"""Engines for a test: vLLM in this process (`offline`), or any server (`server`); both end with the block.

Engines in one process come one after the other, each with the environment variables of its time. Processes that run
vLLM need `ENVIRONMENT` from their start, or `ENVIRONMENT_V2`; the tests in engine/ have it.
"""

import gc
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

TORCHVISION = Path(sys.prefix, "torchvision")  # see install_vllm.py
TRITON = Path(sys.prefix, "triton-interpreter")  # likewise; processes that see it run vLLM's V2 model runner, others V1
V2 = str(TRITON) in sys.path  # whether this is such a process
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(filter(None, [str(TORCHVISION), os.environ.get("PYTHONPATH")])),
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else to cores that must exist, and all engines to the same
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
}
ENVIRONMENT_V2 = {
    **ENVIRONMENT,
    "PYTHONPATH": os.pathsep.join([str(TRITON), ENVIRONMENT["PYTHONPATH"]]),
    "TORCH_COMPILE_DISABLE": "1",  # even eager models have compiled parts, which would ask for a real Triton
}
START_SECONDS = 300


def fresh_cache(folder: Path) -> str:
    """An empty VLLM_CACHE_ROOT, but that vLLM knows the models it has looked at: each look takes a process."""
    known = Path(os.environ["VLLM_CACHE_ROOT"], "modelinfos")
    known.mkdir(parents=True, exist_ok=True)
    (folder / "modelinfos").symlink_to(known)
    return str(folder)


@contextmanager
def offline(model: Path, **options: Any) -> Iterator[Any]:
    """A `vllm.LLM` in this process, eager and in float32 unless told otherwise; afterwards nothing of it is left."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    settings: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 8}
    llm = None
    gc.freeze()  # vLLM collects garbage time and again, and all that has been imported is none
    try:
        llm = LLM(str(model), **{**settings, **options})
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()  # also forgets the environment variables that vLLM has read


@dataclass(frozen=True)
class Server:
    """A running server: its URL (without /v1), its process, and its output so far."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path


@contextmanager
def server(command: Sequence[str], log: Path, env: Mapping[str, str], health: str = "/health") -> Iterator[Server]:
    """Run `command` plus a free --port until the block ends, from when the path `health` answers 200.

    `env` is added to this process's environment. A server that ends before, or is not there after five minutes, fails
    the test with what it printed.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env={**os.environ, **env},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_healthy(url + health, process, log)
        yield Server(url, process, log)
    finally:
        _stop(process)


def free_port() -> int:
    """A port of 127.0.0.1 on which nothing listens."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url, timeout=5, verify=False).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise AssertionError(f"the server did not start (exit code {process.poll()}):\n{log.read_text(errors='replace')}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a server as Ctrl-C would, and kill the processes that it leaves behind."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=30)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its session holds the engine's processes as well
    process.wait()
