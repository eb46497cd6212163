"""`hones demo` on a handful of scenes: what it leaves, what it says, and that it can be stopped and shown again."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hones_offline.demo import NEGATIVES
from hones_offline.embedded import load_tiny_vlm
from problems import SMALL_DEMO

from hones_steer import load_profile, steer
from hones_steer.cli import main

N = {"vqa": 10, "ocr": 10, "caption": 10, "retrieval": 5}
"""Scenes measured on: all of the test scenes, but half for retrieval with its many candidates."""
METHODS = ("base", "masked", "fixed_amp", "grid_search", "random_neurons", "hones_no_kl", "hones")


@pytest.fixture(scope="module")
def out(after_demo: Path) -> Path:
    return after_demo / "runs" / "demo"


@pytest.fixture(scope="module")
def summary(out: Path) -> Any:
    return json.loads((out / "summary.json").read_text(encoding="utf-8"))


def test_the_summary_holds_every_method_for_every_task(summary: Any) -> None:
    assert set(summary["tasks"]) == {"vqa", "ocr", "caption", "retrieval"}
    assert {name: row["n"] for name, row in summary["tasks"].items()} == N
    for row in summary["tasks"].values():
        for method in METHODS:
            low, high = row["ci95"][method]
            assert 0 <= low <= row[method] <= high <= 1
        assert len(row["masked_random_banks"]) >= 5
        assert row["masked_random"] == pytest.approx(np.mean(row["masked_random_banks"]))
        assert row["bank_fraction"] in summary["settings"]["bank_fractions_tried_on_dev"]
        assert row["failures"] == {"discovery": {}, "dev": {}, "test": {}}
    assert set(summary["seconds"]) >= {"vqa", "total"}


def test_masking_a_bank_by_its_own_task_is_the_cross_masking_diagonal(summary: Any) -> None:
    for name, row in summary["tasks"].items():
        assert summary["cross_masking"][name][name] == row["masked"]


def test_profiles_are_small_carry_evidence_and_steer_the_model(out: Path, summary: Any) -> None:
    model, _ = load_tiny_vlm()
    files = {name: out / "profiles" / f"{name}.safetensors" for name in summary["tasks"]}
    for name, file in files.items():
        assert file.stat().st_size < 64 * 1024
        profile = load_profile(file)
        assert profile.task == name
        assert profile.num_neurons == summary["tasks"][name]["bank_neurons"]
        assert profile.evidence["steered"] == summary["tasks"][name]["hones"]
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
