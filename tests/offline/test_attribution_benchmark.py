"""benchmarks/attribution.py runs, finds what the plain twin finds, and says what it promises to say."""

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from hones_offline.running.prompts import prepare

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "attribution.py"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module."""
    monkeypatch.syspath_prepend(BENCHMARK.parent)
    return importlib.import_module("attribution")


def test_rows(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--quick", "--race", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
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


def test_ways(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--quick", "--ways", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["model"], row["way"]) for row in rows] == [
        (model, way)
        for model in ("llama text", "llava vqa")
        for way in ("hones", "hones, race", "hones, patch", "grad_all", "fisher")
    ]
    for exact, race, patch, *gradients in (rows[:5], rows[5:]):
        assert exact["time"] == exact["recall"] == exact["overlap"] == exact["evaluated"] == 1
        assert race["recall"] == race["overlap"] == race["evaluated"] == 1  # three examples are one round
        assert 0 < patch["recall"] <= 1
        assert patch["evaluated"] == 1  # eight heads of twelve, and a margin
        assert all(row["recall"] is row["evaluated"] is None and 0 <= row["overlap"] < 1 for row in gradients)
        assert all(0 < row["time_min"] <= row["time"] <= row["time_max"] for row in (race, patch, *gradients))


@pytest.mark.parametrize(("name", "tokens"), [("smollm2", 15), ("llava", 256)])
def test_the_large_cases_can_be_made(name: str, tokens: int, benchmark: Any) -> None:
    """Measuring them takes half an hour."""
    case = benchmark.CASES[name](argparse.Namespace(examples=2, smollm2=None))
    assert len(case.examples) == 2
    (shortest, _) = sorted(len(encoded.prompt(0)) for encoded in prepare(*case.arguments()).encoded)
    assert shortest > tokens


def test_help_teaches(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        benchmark.main(["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert "plain twin" in text
    assert "--smollm2" in text
