"""benchmarks/hf_runtime.py runs, and prints what it promises to print. Its measurements here mean nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "hf_runtime.py"


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, str(BENCHMARK), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("options", "modes", "batches"),
    [
        pytest.param(["--modes", "eager", "--batches", "8"], [False], [8], id="eager"),
        pytest.param([], [False, True], [1, 8], id="all", marks=pytest.mark.matrix),
    ],
)
def test_rows(options: list[str], modes: list[bool], batches: list[int]) -> None:
    rows = json.loads(run("--quick", "--json", *options))
    everywhere = [
        ("transformers", "unsteered", None),
        ("transformers", "again", None),
        ("transformers", "hooked", 0),
        ("transformers", "hooked", 1),
        ("transformers", "unguarded", 1),
        ("transformers", "folded", 1),
        ("transformers", "merged", 1),
        ("peft", "ia3", 1),
        ("peft", "lora", 1),
    ]
    mixed = [*everywhere[:5], ("transformers", "hooked", 8), *everywhere[5:]]
    speeds = [row for row in rows if "ratio" in row]
    assert [
        (row["compiled"], row["batch"], row["phase"], row["engine"], row["mode"], row["profiles"]) for row in speeds
    ] == [
        (compiled, batch, phase, *variant)
        for compiled in modes
        for batch in batches
        for phase in ("prefill", "decode")
        for variant in (mixed if batch > 1 else everywhere)
    ]
    for row in speeds:
        assert 0 < row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
        assert row["mode"] != "unsteered" or row["ratio"] == 1
        assert row["tokens_per_s"] > 0
    assert {row["phase"] for row in rows if "seconds" in row} == {"switch", "load", "import"}
    sizes = {row["mode"]: row["bytes"] for row in rows if "bytes" in row}
    assert sizes["profile"] < sizes["ia3"] < sizes["lora"]


def test_help_teaches() -> None:
    text = run("--help")
    assert "folded" in text
    assert "--compiled-layers" in text
