"""benchmarks/gpu.py runs without a GPU, and prints what it promises to print. Its measurements here mean nothing."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.scaling import estimate

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module."""
    monkeypatch.syspath_prepend(BENCHMARK.parent)
    return importlib.import_module("gpu")


def run(*arguments: str) -> str:
    command = [sys.executable, str(BENCHMARK), "--cpu", "--threads", "1", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("options", "modes", "batches"),
    [
        pytest.param(["--modes", "eager", "--batches", "8", "--examples", "4"], ["eager"], [8], id="eager"),
        pytest.param([], ["eager", "compiled"], [1, 32], id="all", marks=pytest.mark.matrix),
    ],
)
def test_rows(options: list[str], modes: list[str], batches: list[int]) -> None:
    machine, *rows = json.loads(run("--quick", "--json", *options))
    assert machine["part"] == "machine"
    assert machine["torch"] == torch.__version__
    assert machine["dtype"] == "bfloat16"
    speeds = [row for row in rows if row["part"] == "runtime"]
    alone = ["unsteered", "again", "hooked, idle", "hooked, 1"]
    assert [(row["mode"], row["batch"], row["phase"], row["variant"]) for row in speeds] == [
        (mode, batch, phase, variant)
        for mode in modes
        for batch in batches
        for phase in ("prefill", "decode")
        for variant in (alone if batch == 1 else [*alone, "hooked, 8"])
    ]
    for row in speeds:
        assert 0 < row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert row["variant"] != "unsteered" or row["ratio"] == 1
        assert row["tokens_per_s"] > 0
        assert row["n"] == 6
        assert row["peak_gib"] is None
    attributed = rows[len(speeds) :]
    assert [row["step"] for row in attributed] == ["head scores", "importance"]
    for row in attributed:
        assert row["heads"] == 2
        assert row["prompt"] == 4 + 44
        assert row["per_head_and_example"] == pytest.approx(row["seconds"] / 2 / row["examples"])
        assert row["over_estimate"] == pytest.approx(row["per_head_and_example"] / row["estimate"])
        assert 0 < row["utilisation"] == pytest.approx(row["tflops"] / row["matmul_tflops"])


def test_the_estimate_is_asked_about_the_model_that_runs(benchmark: Any) -> None:
    """The estimate has numbers of its own for LLaVA-1.5-7B; the model of that shape is made without memory."""
    shape, theirs = benchmark.LLAVA_7B, estimate.llava()
    text = (shape.text.layers, shape.text.heads, shape.text.kv_heads, shape.text.hidden, shape.text.ffn)
    assert text == (theirs.layers, theirs.heads, theirs.kv_heads, theirs.hidden, theirs.ffn)
    assert shape.image_tokens == theirs.image_tokens
    with torch.device("meta"):
        model = benchmark.llava_of(shape, "bfloat16")
    assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(theirs.weights, rel=0.01)
    assert benchmark.vision_flops(shape, model) == pytest.approx(theirs.vision_flops, rel=0.02)


def test_a_model_that_is_not_steered_is_not_measured(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark.Models, "steered", lambda *_: benchmark.nullcontext())
    with pytest.raises(SystemExit, match="hooked, 1: the logits are those of the unsteered model"):
        benchmark.main(["--quick", "--cpu", "--modes", "eager", "--batches", "1", "--no-attribution"])


def test_help_teaches() -> None:
    text = run("--help")
    assert "estimate.py" in text
    assert "--small" in text
