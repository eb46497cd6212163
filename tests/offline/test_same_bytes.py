"""benchmarks/same_bytes.py removes times and nothing else, and says where two results first differ."""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "same_bytes.py"
SUMMARY = {
    "created": "2026-11-26T21:22:00+00:00",
    "seconds": {"total": 793.4, "vqa": 61},
    "tasks": {"vqa": {"base": 0.722, "n": {"test": 600}}},
    "masking": [{"task": "vqa", "own_drop": 0.177}, {"task": "ocr", "own_drop": -0.003}],
}


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module."""
    monkeypatch.syspath_prepend(BENCHMARK.parent)
    return importlib.import_module("same_bytes")


def as_json(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()


def test_times_do_not_matter_and_everything_else_does(benchmark: Any) -> None:
    later = {**SUMMARY, "created": "2027-01-01T00:00:00+00:00", "seconds": {"total": 5, "vqa": 1.5e-05}}
    assert benchmark.without_times(as_json(SUMMARY)) == benchmark.without_times(as_json(later))
    assert benchmark.first_difference("summary.json", as_json(SUMMARY), as_json(later)) is None
    more = {**SUMMARY, "seconds": {"total": 5}}
    assert benchmark.first_difference("summary.json", as_json(SUMMARY), as_json(more)) == "seconds.vqa: 1.0 / absent"
    assert json.loads(benchmark.without_times(as_json(SUMMARY)))["masking"] == SUMMARY["masking"]


def test_the_demos_last_line_has_a_time(benchmark: Any) -> None:
    one, two = (f"vqa 600 s\n\nProfiles: runs; numbers: runs/summary.json; {n} s.\n".encode() for n in (793, 5))
    assert benchmark.first_difference("stdout", one, two) is None
    assert benchmark.first_difference("stdout", one, two.replace(b"600", b"601")) == (
        'line 1, byte 6: "vqa 600 s" / "vqa 601 s"'
    ).replace('"', "'")


def test_json_differences_are_told_by_path(benchmark: Any) -> None:
    changed = json.loads(as_json(SUMMARY))
    changed["masking"][1]["own_drop"] = -0.0030000000000000005
    difference = benchmark.first_difference("summary.json", as_json(SUMMARY), as_json(changed))
    assert difference == "masking[1].own_drop: -0.003 / -0.0030000000000000005"
    shorter = {**SUMMARY, "masking": SUMMARY["masking"][:1]}
    assert (
        benchmark.first_difference("summary.json", as_json(SUMMARY), as_json(shorter))
        == "masking: 2 entries / 1 entries"
    )
    unindented = json.dumps(SUMMARY, sort_keys=True).encode()
    assert benchmark.first_difference("summary.json", as_json(SUMMARY), unindented).startswith("line 1, byte 1")
    assert benchmark.first_difference("a.json", b'{"n": 1}', b'{"n": 1.0}') == "n: 1 / 1.0"
    assert benchmark.first_difference("a.json", b'{"n": 1}\n', b'{"n": 1}') == "9 bytes / 8 bytes"


def test_tensors_differ_in_an_element_a_type_or_a_name(benchmark: Any) -> None:
    scales = np.arange(6, dtype=np.float32).reshape(2, 3)
    one = save({"scales": scales, "neurons": np.arange(2)}, {"task": "vqa"})
    assert benchmark.first_difference("p.safetensors", one, one) is None

    changed = scales.copy()
    changed[1, 0] = np.nextafter(changed[1, 0], np.float32(9))
    two = save({"scales": changed, "neurons": np.arange(2)}, {"task": "vqa"})
    difference = benchmark.first_difference("p.safetensors", one, two)
    assert difference == "tensor scales[1, 0], byte 12: 3.0 / 3.000000238418579 (1 of 6 elements differ)"

    metadata = save({"scales": scales, "neurons": np.arange(2)}, {"task": "ocr"})
    assert benchmark.first_difference("p.safetensors", one, metadata) == 'header.__metadata__.task: "vqa" / "ocr"'
    typed = save({"scales": scales.astype(np.float64), "neurons": np.arange(2)}, {"task": "vqa"})
    assert benchmark.first_difference("p.safetensors", one, typed) == 'header.scales.dtype: "F32" / "F64"'
    renamed = save({"factors": scales, "neurons": np.arange(2)}, {"task": "vqa"})
    assert "header.factors: absent" in benchmark.first_difference("p.safetensors", one, renamed)
    scalar = [save({"base": np.array(value)}) for value in (0.5, 0.25)]
    assert benchmark.first_difference("b.safetensors", *scalar).startswith("tensor base[0], byte 6: 0.5 / 0.25")


def test_results_must_exist_in_both_and_steps_may_move(benchmark: Any, tmp_path: Path) -> None:
    statistics = save({"statistics": np.arange(3.0)})
    both = save({"base": np.arange(3.0), "heads": np.arange(4.0)})
    trees = {
        "old": {
            "work/heads/base.safetensors": statistics,
            "gone.json": b"[3]",
            "run.json": b'{"version": 1}',
            "result.json": b'{"n": 1}',
        },
        "new": {"work/both.safetensors": both, "run.json": b'{"version": 2}', "work/more.json": b"{}"},
    }
    for name, files in trees.items():
        for path, data in {**files, "same.safetensors": statistics, "work/vqa.json": b"[1]"}.items():
            file = tmp_path / name / ("run" if path != "same.safetensors" else "") / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        (tmp_path / name / "stdout").write_bytes(b"done\n")
        (tmp_path / name / "done.json").write_text(json.dumps({"seconds": len(name)}))
    row = benchmark.compare_folders("attribute-vqa", tmp_path / "old", tmp_path / "new")
    assert (row.files, row.steps, row.moved) == (2, 2, 1)
    assert (row.old, row.new) == (2, 2)  # gone.json, result.json; more.json, the heads in both.safetensors
    assert row.differences == ["run/result.json: missing in the new tree"]
    assert row.notes == ["run/run.json: version: 1 / 2"]
    (tmp_path / "new/run/work/vqa.json").write_bytes(b"[2]")
    row = benchmark.compare_folders("attribute-vqa", tmp_path / "old", tmp_path / "new")
    assert row.differences[-1] == "run/work/vqa.json: [0]: 1 / 2"
    *lines, last = benchmark.table([row])
    assert "DIFFERS: run/result.json: missing in the new tree (and 1 more)" in "\n".join(lines)
    assert last == "1 of 1 steps differ"


def test_steps_come_after_what_they_need(benchmark: Any) -> None:
    every = [step.name for step in benchmark.steps()]
    assert len(set(every)) == len(every)
    for step in benchmark.steps():
        assert all(every.index(needed) < every.index(step.name) for needed in step.needs), step.name
    fits = [step.name for step in benchmark.chosen(["fit"], quick=True)]
    assert fits == ["attribute-vqa", "attribute-retrieval", "fit-vqa", "fit-retrieval", "fit-grid_search"]
    assert {step.command for step in benchmark.chosen(benchmark.COMMANDS, quick=True)} == set(benchmark.COMMANDS)
