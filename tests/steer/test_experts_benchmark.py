"""benchmarks/experts.py runs, and prints what it promises to print. Its measurements here mean nothing."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "experts.py"


def test_rows() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--quick", "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout)
    assert [(row["implementation"], row["phase"], row["mode"]) for row in rows] == [
        (implementation, phase, mode)
        for implementation in ("eager", "batched_mm", "grouped_mm")
        for phase in ("prefill", "decode")
        for mode in ("unsteered", "again", "hooked, idle", "hooked, 1", "hooked, 8", "folded")
    ]
    for row in rows:
        assert 0 < row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
        assert row["mode"] != "unsteered" or row["ratio"] == 1
