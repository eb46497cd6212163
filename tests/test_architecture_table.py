"""The table in docs/architectures.md: it has every architecture of transformers, and what it says is what happens."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import architecture_checks
import architecture_table
import pytest
from architecture_checks import COLUMNS, Cell, shortened
from architecture_table import HEADINGS, Results, cells_of, shown_row, table, try_row
from tiny_architectures import architectures, build
from transformers.models.auto import modeling_auto

ROWS = {row.name: row for row in architectures()}
REPRESENTED = ("gpt2", "mixtral", "gemma3n_text", "blip-2", "openai-gpt")


def committed() -> dict[str, list[str]]:
    """Cells of the committed table by row, with the reason in place of its number."""
    text = architecture_table.PAGE.read_text(encoding="utf-8")
    part = text.partition(architecture_table.BEGIN)[2].partition(architecture_table.END)[0]
    reasons = dict(re.findall(r"^(\d+)\. (.*)$", part, re.MULTILINE))
    lines = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| ")]
    return {
        name: [re.sub(r"^no \[(\d+)\]$", lambda found: f"no: {reasons[found[1]]}", cell) for cell in cells]
        for name, *cells in lines
        if name in ROWS
    }


def test_every_architecture_of_transformers_has_a_row() -> None:
    assert sorted(committed()) == sorted(ROWS)
    named = {row.model_type for row in ROWS.values()}
    assert named >= set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert named >= set(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def test_every_no_has_its_reason_and_nothing_is_wrong() -> None:
    for name, cells in committed().items():
        assert len(cells) == len(HEADINGS), name
        for cell in cells:
            assert re.match(r"yes|–|not tried|no: \S", cell), (name, cell)
            assert "WRONG" not in cell, (name, cell)


@pytest.mark.parametrize("name", REPRESENTED)
@pytest.mark.filterwarnings("ignore")  # of transformers, about its own settings
def test_a_row_reproduces(name: str) -> None:
    columns = [column for column in HEADINGS if column != "compile"]
    found = dict(cells_of(ROWS[name], columns))
    expected = dict(zip(HEADINGS, committed()[name], strict=True))
    assert shown_row(found, columns) == [expected[column] for column in columns]


@pytest.mark.matrix
def test_the_whole_table_reproduces(tmp_path: Path) -> None:
    command = [sys.executable, architecture_table.__file__, "--json", "--results", str(tmp_path / "results.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout)["rows"]
    found = {name: {column: Cell(**cell) for column, cell in cells.items()} for name, cells in rows.items()}
    assert {name: shown_row(cells, HEADINGS) for name, cells in found.items()} == committed()


def test_a_row_that_crashes_or_does_not_end_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(_model: Any) -> str:
        os.kill(os.getpid(), signal.SIGKILL)

    def spin(_model: Any) -> str:
        while True:
            time.monotonic()

    monkeypatch.setitem(COLUMNS, "text", crash)
    assert try_row(ROWS["gpt2"], ["vllm", "text"])["text"] == Cell(False, "its process ended with code -9")
    monkeypatch.setitem(COLUMNS, "text", spin)
    assert try_row(ROWS["gpt2"], ["text"], seconds=4)["text"].said.startswith("its process ended with code -")


def test_what_was_tried_is_kept_for_these_versions_only(tmp_path: Path) -> None:
    file = tmp_path / "kept" / "results.json"
    results = Results(file)
    results.add("llama", {"steer": Cell(True)})
    results.add("llama", {"text": Cell(False, "why")})
    assert Results(file).rows == {"llama": {"steer": Cell(True), "text": Cell(False, "why")}}
    file.write_text(file.read_text().replace('"transformers": "', '"transformers": "1'))
    assert Results(file).rows == {}


def test_equal_reasons_have_one_number() -> None:
    no = {"steer": Cell(False, "a: its FFN; do b"), "vllm": Cell(None)}
    lines = table({"b": no, "a": {"steer": Cell(True, "with <x>"), "text": Cell(False, "c: its FFN")}}).splitlines()
    assert lines[2:] == [
        "| a | yes (with &lt;x>) | no [1] | not tried | not tried | not tried |",
        "| b | no [1] | not tried | not tried | not tried | – |",
        "",
        "1. its FFN",
    ]


def test_what_differs_between_models_of_a_kind_is_left_out_of_a_reason() -> None:
    message = (
        "bart: its text decoder gives other logits than the whole model (by 3.1 at position 2 of 5), as where a; do"
    )
    assert shortened(message) == "its text decoder gives other logits than the whole model"
    experts = (
        "model.layers.0.mlp (MoE) of model type 'x': its experts are kept in a way of their own; use a dense model"
    )
    assert shortened(experts) == "its experts are kept in a way of their own"


def test_a_row_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert architecture_table.main(["--only", "lama"]) == 2
    assert capsys.readouterr().err == "no such row: lama; a row is named by its model type, as llama\n"


def test_models_are_tiny_and_keep_each_kind_of_layer() -> None:
    model = build(ROWS["qwen3_5_text"])
    assert sum(p.numel() for p in model.parameters()) < 100_000
    assert set(model.config.layer_types) == {"linear_attention", "full_attention"}
    assert architecture_checks.check_steering(model) == ""
