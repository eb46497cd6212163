"""benchmarks/attribution.py runs, finds what the plain twin finds, and says what it promises to say."""

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hones_offline.prompts import prepare

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "attribution.py"


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, str(BENCHMARK), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_rows() -> None:
    rows = json.loads(run("--quick", "--race", "--json"))
    assert [(row["model"], row["metric"], row["mode"]) for row in rows] == [
        (model, metric, mode)
        for model in ("llama text", "llava vqa")
        for metric in ("task", "logprob")
        for mode in ("exact", "race")
    ]
    for row in rows:
        assert row["same_bank"]
        assert row["score_error"] < 1e-4
        assert row["importance_error"] < 1e-4
        for name in ("speedup", "limit_speedup", "over_limit", "over_layers"):
            assert 0 < row[f"{name}_min"] <= row[name] <= row[f"{name}_max"]
        assert row["over_limit"] < row["over_layers"]


@pytest.mark.parametrize(("name", "tokens"), [("smollm2", 15), ("llava", 256)])
def test_the_large_cases_can_be_made(name: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring them takes half an hour."""
    monkeypatch.syspath_prepend(BENCHMARK.parent)
    benchmark = importlib.import_module("attribution")
    case = benchmark.CASES[name](argparse.Namespace(examples=2, smollm2=None))
    assert len(case.examples) == 2
    (shortest, _) = sorted(len(encoded.prompt(0)) for encoded in prepare(*case.arguments()).encoded)
    assert shortest > tokens


def test_help_teaches() -> None:
    text = run("--help")
    assert "plain twin" in text
    assert "--smollm2" in text
