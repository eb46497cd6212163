"""`hones demo` on a handful of scenes: what it leaves, what it says, and that it can be stopped and shown again."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hones_offline.demo import NEGATIVES
from hones_offline.running.embedded import load_tiny_vlm
from problems import SMALL_DEMO

from hones_steer import load_profile, steer
from hones_steer.cli import main

N = {"vqa": 10, "ocr": 10, "caption": 10, "retrieval": 5}
"""Scenes measured on: all of the test scenes, but half for retrieval with its many candidates."""
FOUND_ON = {name: 6 if name == "retrieval" else 24 for name in N}
"""Scenes that neurons are found on and factors learned on; an example of retrieval has five pairs to learn from."""


@pytest.fixture(scope="module")
def out(after_demo: Path) -> Path:
    return after_demo / "runs" / "demo"


@pytest.fixture(scope="module")
def summary(out: Path) -> Any:
    return json.loads((out / "summary.json").read_text(encoding="utf-8"))


def test_the_summary_is_that_of_a_comparison(summary: Any) -> None:
    assert {name: row["n"] for name, row in summary["tasks"].items()} == {
        name: {"discovery": FOUND_ON[name], "dev": 4 if name == "retrieval" else 8, "test": n}
        | {"attribution": FOUND_ON[name]}
        for name, n in N.items()
    }
    assert all(row["failures"] == {} for row in summary["tasks"].values())
    assert [(row["task"], row["method"]) for row in summary["masking"]] == [
        (task, method) for task in N for method in ("random", "ap", "ma", "dvp", "hones_task")
    ]
    steered = ("base", "fixed_amp", "grid_search", "random_neurons", "hones_no_kl", "hones")
    assert [(row["task"], row["method"]) for row in summary["steering"]] == [(t, m) for t in N for m in steered]
    for row in summary["steering"]:
        assert row["n"] == N[row["task"]]
        assert 0 <= row["ci95"][0] <= row["value"] <= row["ci95"][1] <= 1
    assert set(summary["seconds"]) >= {"vqa", "comparison", "total"}
    for heads in summary["heads"].values():
        assert np.shape(heads["scores"]) == (summary["model"]["num_layers"], summary["model"]["num_heads"])


def test_masking_a_bank_by_its_own_task_is_the_cross_masking_diagonal(summary: Any) -> None:
    own = {row["task"]: row["own_drop"] for row in summary["masking"] if row["method"] == "hones_task"}
    assert {name: row[name]["drop"] for name, row in summary["cross"]["drops"].items()} == own


def test_profiles_are_small_carry_evidence_and_steer_the_model(out: Path, summary: Any) -> None:
    model, _ = load_tiny_vlm()
    files = {name: out / "profiles" / f"{name}.safetensors" for name in summary["tasks"]}
    for name, file in files.items():
        assert file.stat().st_size < 64 * 1024
        profile = load_profile(file)
        assert profile.task == name
        (row,) = (row for row in summary["steering"] if (row["task"], row["method"]) == (name, "hones"))
        assert profile.evidence["steered"] == row["value"]
        assert any(f"{name} {fraction:g}" in summary["settings"]["steered_fractions"] for fraction in (0.05, 0.1))
        assert profile.evidence["n"] == N[name]
    with steer(model, files) as steering:
        assert len(steering.verify().profiles) == 4


def test_it_tells_what_it_did_and_again_at_once(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file: file.read_bytes() for file in (out / "work").rglob("*") if file.is_file()}
    profiles = {file: file.read_bytes() for file in (out / "profiles").iterdir()}
    assert main(["demo", "--out", str(out), *SMALL_DEMO]) == 0
    said = capsys.readouterr().out
    assert {file: file.read_bytes() for file in before} == before
    assert {file: file.read_bytes() for file in profiles} == profiles
    assert f"among {NEGATIVES} negatives" in said
    assert "were sized on dev" in said
    assert said.count("same as alone") == 4


def test_other_settings_in_the_same_folder_are_refused(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(out), "--discovery", "20", "--dev", "8", "--test", "10"]) == 2
    error = capsys.readouterr().err
    assert "examples was" in error
    assert error.count("\n") == 1


def test_json_goes_to_stdout_alone(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(out), *SMALL_DEMO, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["tasks"]) == {"vqa", "ocr", "caption", "retrieval"}


def test_control_c_says_how_to_resume(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "hones_steer", "demo", "--out", str(tmp_path / "demo"), *SMALL_DEMO],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("The embedded model on scenes")
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=120)[1]
    assert process.returncode == 130, error
    assert error.splitlines()[-1] == "hones demo: interrupted; run the same command again to resume"
    assert "Traceback" not in error
