"""benchmarks/hf_serving.py runs and prints the lines that it promises; its numbers mean nothing here."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "hf_serving.py"


def test_rows() -> None:
    options = ["--quick", "--json", "--clients", "3", "--prompt", "8", "--new", "6"]
    done = subprocess.run([sys.executable, str(BENCHMARK), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout)
    assert [row["row"] for row in rows] == ["generate", "pages", "pages, 3", "batches, 3"]
    assert rows[0]["over_generate"] == {"cpu": [1, 1, 1], "wall": [1, 1, 1]}
    for row in rows:
        assert row["n"] == 1
        assert row["over_one"]["cpu"][0] > 0
