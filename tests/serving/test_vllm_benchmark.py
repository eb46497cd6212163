"""benchmarks/vllm_serving.py runs and prints the lines that it promises; its numbers mean nothing here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "vllm_serving.py"


def run(*arguments: str) -> str:
    command = [sys.executable, str(BENCHMARK), *arguments]
    done = subprocess.run(command, env={**os.environ, "VLLM_CPU_CI_ENV": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


STEERED = [("vllm", None), ("vllm", 0), ("vllm", 1), ("vllm", 8), ("vllm", 64)]
LORA = [("vllm-lora", 1), ("vllm-lora", 8)]


@pytest.mark.parametrize(
    ("options", "modes", "variants"),
    [
        pytest.param(["--modes", "eager", "--no-lora"], ["eager"], STEERED, id="eager"),
        pytest.param([], ["eager", "compiled"], [*STEERED, *LORA], id="all", marks=pytest.mark.matrix),
    ],
)
def test_rows(options: list[str], modes: list[str], variants: list[tuple[str, int | None]]) -> None:
    rows = json.loads(run("--quick", "--json", "--threads", "1", *options))
    assert [(row["mode"], row["phase"], row["engine"], row["profiles"]) for row in rows] == [
        (mode, phase, *variant) for mode in modes for phase in ("decode", "prefill") for variant in variants
    ]
    for row in rows:
        assert 0 < row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
        assert row["tokens_per_s"] > 0
        assert row["n"] == 1
        if row["profiles"] is None:
            assert row["ratio"] == 1
            assert row["kv_blocks_lost"] == 0
        else:
            assert row["kv_blocks_lost"] > 0


def test_help_teaches() -> None:
    text = run("--help")
    assert "tokens per second" in text.lower()
    assert "--model-dir" in text
