"""benchmarks/vllm_serving.py runs and prints the lines that it promises; its numbers mean nothing here."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hones_serving.settings import Settings

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "vllm_serving.py"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module."""
    monkeypatch.syspath_prepend(BENCHMARK.parent)
    return importlib.import_module("vllm_serving")


def run(*arguments: str) -> str:
    command = [sys.executable, str(BENCHMARK), *arguments]
    done = subprocess.run(command, env={**os.environ, "VLLM_CPU_CI_ENV": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


STEERED = ["absent", "again", "idle", "1", "8", "64"]
LORA = ["LoRA 1", "LoRA 8"]
EAGER = ("V1", "eager")


@pytest.mark.parametrize(
    ("options", "engines", "names"),
    [
        pytest.param(["--modes", "eager"], [EAGER], STEERED, id="eager"),
        pytest.param([], [EAGER, ("V1", "compiled")], STEERED, id="all", marks=pytest.mark.matrix),
        pytest.param(
            ["--runners", "V2", "--rows", "idle", "64"],
            [("V2", "eager")],
            ["absent", "idle", "64"],
            id="V2",
            marks=pytest.mark.matrix,
        ),
        pytest.param(
            ["--lora", "--modes", "eager"],
            [EAGER],
            [*STEERED, *LORA],
            id="lora",
            marks=pytest.mark.matrix,
        ),
    ],
)
def test_rows(options: list[str], engines: list[tuple[str, str]], names: list[str]) -> None:
    rows = json.loads(run("--quick", "--json", "--threads", "1", *options))
    assert [(row["runner"], row["mode"], row["phase"], row["name"]) for row in rows] == [
        (*engine, phase, name) for engine in engines for phase in ("decode", "prefill") for name in names
    ]
    for row in rows:
        for clock in ("wall", "cpu", "added_ms"):
            assert row[f"{clock}_low"] <= row[clock] <= row[f"{clock}_high"]
        assert row["tokens_per_s"] > 0
        assert row["n"] == 6
        if row["name"] == "absent":
            assert row["wall"] == row["cpu"] == 1
            assert row["added_ms"] == 0
        assert (row["kv_blocks_lost"] > 0) == (row["name"] not in ("absent", "again"))


def test_what_hones_steer_runs_is_noticed(benchmark: Any) -> None:
    """By this the benchmark knows that rounds without the plugin are without it."""
    with benchmark.calls_of_ours() as calls:
        json.dumps({})
    assert calls == set()
    with benchmark.calls_of_ours() as calls:
        Settings.from_env()
    assert "Settings.from_env" in calls


def test_an_interval_that_is_wide_by_cpu_time_is_marked(benchmark: Any) -> None:
    row = {"runner": "V1", "mode": "eager", "phase": "decode", "name": "idle", "tokens_per_s": 1000.0, "n": 6}
    row |= {"wall": 0.9, "wall_low": 0.5, "wall_high": 1.5, "added_ms": 0.1, "added_ms_low": 0.0, "added_ms_high": 0.2}
    row |= {"kv_blocks": 725, "kv_blocks_lost": 3}
    narrow = {"cpu": 0.99, "cpu_low": 0.98, "cpu_high": 1.0}
    wide = {"cpu": 0.99, "cpu_low": 0.96, "cpu_high": 1.0}
    assert "wide" not in benchmark.table([row | narrow])
    assert "[0.960, 1.000] wide" in benchmark.table([row | wide])


def test_the_v2_runner_is_not_compiled_without_triton(benchmark: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="V2 runner needs Triton"):
        benchmark.main(["--runners", "V2", "--modes", "compiled", "--model-dir", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--new-tokens", "1"], "begins with the second"), (["--rows", "idle", "LoRA 8"], "need --lora")],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], said: str, benchmark: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        benchmark.main(arguments)
    assert left.value.code == 2
    assert said in capsys.readouterr().err


def test_help_teaches() -> None:
    text = run("--help")
    assert "tokens per second" in text.lower()
    assert "--model-dir" in text
