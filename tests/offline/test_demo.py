"""`hones demo` on a handful of scenes: what it leaves, what it says, and that it can be stopped and shown again."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hones_offline.comparison.splits import Splits
from hones_offline.data.content import content
from hones_offline.data.scenes import IN_WORDS, scenes
from hones_offline.data.tasks import TASKS
from hones_offline.demo.adapters import adapter_rows, write_table
from hones_offline.demo.command import WAYS
from hones_offline.demo.data_set import NEGATIVES, SCENE_TASKS, contents, data_set, in_words
from hones_offline.demo.measured import rows_by_task
from hones_offline.demo.picture import picture
from hones_offline.demo.settings import COMPARED, DEFAULT
from hones_offline.demo.text import comparison_table, headline, promise
from hones_offline.report.summary import read_summary, unknown_keys
from hones_offline.running.embedded import load_tiny_vlm
from hones_offline.running.evaluation import score
from hones_offline.running.prompts import prepare
from problems import SMALL_DEMO

from examples.tiny_vlm.compare import compare_adapters
from hones_steer import load_profile, steer
from hones_steer.cli import main
from hones_steer.errors import DataError

COUNTS = {split.removeprefix("--"): int(n) for split, n in zip(SMALL_DEMO[::2], SMALL_DEMO[1::2], strict=True)}
N = {name: COUNTS["test"] // (2 if name == "retrieval" else 1) for name in TASKS}
"""Scenes measured on: all of the test scenes, but half for retrieval with its many candidates."""
FOUND_ON = {name: COUNTS["discovery"] // (4 if name == "retrieval" else 1) for name in TASKS}
"""Scenes that neurons are found on and factors learned on; an example of retrieval has five pairs to learn from."""
SHOWN = ("base", "asked", *WAYS)


@pytest.fixture(scope="module")
def out(after_demo: Path) -> Path:
    return after_demo / "runs" / "demo"


@pytest.fixture(scope="module")
def summary(out: Path) -> Any:
    return json.loads((out / "summary.json").read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------- what it leaves


def test_the_summary_is_that_of_a_comparison(out: Path, summary: Any) -> None:
    assert unknown_keys(read_summary(out)) == []
    dev = {name: COUNTS["dev"] // (2 if name == "retrieval" else 1) for name in TASKS}
    assert {name: row["n"] for name, row in summary["tasks"].items()} == {
        name: {"discovery": FOUND_ON[name], "dev": dev[name], "test": n, "attribution": FOUND_ON[name]}
        for name, n in N.items()
    }
    assert all(row["failures"] == {} for row in summary["tasks"].values())
    assert [(row["task"], row["method"]) for row in summary["masking"]] == [
        (task, method) for task in N for method in COMPARED.methods
    ]
    assert [(row["task"], row["method"]) for row in summary["steering"]] == [(t, m) for t in N for m in SHOWN]
    for row in summary["steering"]:
        assert row["n"] == N[row["task"]]
        for name, interval in (("value", "ci95"), ("content", "content_ci95")):
            assert 0 <= row[interval][0] <= row[name] <= row[interval][1] <= 1
    assert set(summary["seconds"]) >= {"vqa", "comparison", "total"}
    for heads in summary["heads"].values():
        assert np.shape(heads["scores"]) == (summary["model"]["num_layers"], summary["model"]["num_heads"])


def test_a_gain_of_content_is_over_the_better_of_plain_and_asked_in_words(summary: Any) -> None:
    for task, ways in rows_by_task(summary["steering"]).items():
        better = max(ways["base"]["content"], ways["asked"]["content"])
        for way in WAYS:
            assert ways[way]["content_gain"] == pytest.approx(ways[way]["content"] - better)
            assert ways[way]["gain"] == pytest.approx(ways[way]["value"] - ways["base"]["value"])
        over = {other: row["gain"] for other, row in ways[DEFAULT]["over"].items()}
        assert over == {
            other: pytest.approx(ways[DEFAULT]["value"] - ways[other]["value"]) for other in WAYS if other != DEFAULT
        }
        assert {ways["asked"]["words"], ways["asked"]["content_words"]} <= set(IN_WORDS[task])
        assert set(ways[DEFAULT]["elsewhere"]) == set(N) - {task}


def test_masking_a_bank_by_its_own_task_is_the_cross_masking_diagonal(summary: Any) -> None:
    own = {row["task"]: row["own_drop"] for row in summary["masking"] if row["method"] == DEFAULT}
    assert {name: row[name]["drop"] for name, row in summary["cross"]["drops"].items()} == own


def test_profiles_are_small_carry_evidence_and_steer_the_model(out: Path, summary: Any) -> None:
    model, _ = load_tiny_vlm()
    files = {name: out / "profiles" / f"{name}.safetensors" for name in summary["tasks"]}
    rows = rows_by_task(summary["steering"])
    for name, file in files.items():
        assert file.stat().st_size < 3 * 1024
        assert file.stat().st_size == rows[name][DEFAULT]["bytes"]
        profile = load_profile(file)
        assert profile.task == name
        assert profile.num_neurons == rows[name][DEFAULT]["parameters"]
        assert profile.method["selection"] == DEFAULT
        assert profile.evidence["steered"] == rows[name][DEFAULT]["value"]
        assert profile.evidence["asked_in_words"] == rows[name]["asked"]["value"]
        assert profile.evidence["content"]["steered"] == pytest.approx(rows[name][DEFAULT]["content"])
        assert profile.evidence["n"] == N[name]
    with steer(model, files) as steering:
        assert len(steering.verify().profiles) == 4


def test_the_picture_is_drawn_from_the_run(out: Path, summary: Any) -> None:
    drawn = (out / "picture.svg").read_text(encoding="utf-8")
    assert drawn == picture(summary["steering"])
    shown = " ".join(ElementTree.fromstring(drawn).itertext())
    for row in summary["steering"]:
        if row["method"] in ("base", "asked", DEFAULT):
            assert f"{row['value']:.3f}" in shown
    assert all(part in shown for part in headline(summary["steering"]).split("; "))


# --------------------------------------------------------------------------------------------------- what it says


def test_it_tells_what_it_did_and_again_at_once(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file: file.read_bytes() for file in (out / "work").rglob("*") if file.is_file()}
    profiles = {file: file.read_bytes() for file in (out / "profiles").iterdir()}
    assert main(["demo", "--out", str(out), *SMALL_DEMO]) == 0
    said = capsys.readouterr().out
    assert {file: file.read_bytes() for file in before} == before
    assert {file: file.read_bytes() for file in profiles} == profiles
    assert f"among {NEGATIVES} negatives" in said
    told, counted = said.index("Steering gains on "), said.index("What the answers say, apart from their form")
    assert told < counted < said.index("Three answers") < said.index("Other ways to steer") < said.index("set to 0 (on")
    assert "IA3 and LoRA are not shown: their table" in said  # which is about more scenes
    assert said.count("same as alone") == 4


def way(task: str, method: str, gain: float, content_gain: float | None = None) -> dict[str, Any]:
    """A row whose intervals reach 0.05 to either side."""

    def around(value: float) -> list[float]:
        return [value - 0.05, value + 0.05]

    value = 0.4 + gain
    row: dict[str, Any] = {"task": task, "method": method, "value": value, "ci95": around(value), "gain": gain}
    row |= {"gain_ci95": around(gain), "content": 0.5 + (content_gain or 0), "n": 400, "bytes": 1900, "parameters": 92}
    row |= {"elsewhere_mean": -0.01} | ({"words": "Please.", "content_words": "Please."} if method == "asked" else {})
    if content_gain is not None:
        row |= {"content_gain": content_gain, "content_gain_ci95": around(content_gain)}
    return row | ({"over": {"random": {"gain": gain, "ci95": around(gain)}}} if method == DEFAULT else {})


def rows_of(gains: dict[str, tuple[float, float]]) -> list[dict[str, Any]]:
    """Rows of tasks with the default selection's gains of metric and content."""
    rows = []
    for task, (gain, content_gain) in gains.items():
        rows += [way(task, "base", 0), way(task, "asked", 0.1), way(task, DEFAULT, gain, content_gain)]
    return rows


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ({"vqa": (0.2, 0.1), "ocr": (0.3, 0.0)}, "on 2 of 2 tasks; on 1 (vqa) also in what the answers say"),
        ({"vqa": (0.2, 0.01), "ocr": (0.01, 0.0)}, "on 1 of 2 tasks; it teaches a convention, not sight"),
        ({"vqa": (0.0, 0.0), "ocr": (-0.2, 0.0)}, "on 0 of 2 tasks: every interval of a gain reaches down to zero"),
    ],
)
def test_the_headline_says_what_gains_and_what_does_not(gains: dict[str, tuple[float, float]], said: str) -> None:
    assert said in headline(rows_of(gains))


def test_tables_hold_what_a_person_looks_for() -> None:
    rows = rows_of({"vqa": (0.2, 0.1)})
    summary = {"steering": rows, "tasks": {"vqa": {"metric": "VQA accuracy"}}}
    assert promise(summary)[-1].split()[-2:] == ["1,900", "bytes"]
    assert ".400 [.350, .450] .500 [.450, .550] .600 [.550, .650]" in " ".join(promise(summary)[-1].split())
    rows += [way("vqa", "ia3", 0.25, 0.1)]
    lines = comparison_table(summary, "nothing is missing")
    assert any(line.startswith("IA3") and "+.250 [+.200, +.300]" in line for line in lines)
    assert lines[-1] == "\nnothing is missing"


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


# ------------------------------------------------------------------------------------------------ what it measures


@pytest.mark.parametrize("name", TASKS)
def test_a_task_has_the_metric_of_the_papers_and_the_content_beside_it(name: str) -> None:
    task, of_paper = SCENE_TASKS[name], TASKS[name]
    examples = data_set(name, {"discovery": 4, "dev": 8, "test": 4})["dev"]
    outputs: list[Any] = [example.targets[0] for example in examples]
    if name == "retrieval":
        outputs = [np.linspace(1, 0, 1 + NEGATIVES) for _ in examples]
    rows = np.stack([task.statistics(e, output) for e, output in zip(examples, outputs, strict=True)])
    metric = np.stack([of_paper.statistics(e, output) for e, output in zip(examples, outputs, strict=True)])
    np.testing.assert_array_equal(rows[:, :-1], metric)
    assert task.aggregate(rows.sum(0), len(rows)) == of_paper.aggregate(metric.sum(0), len(rows)) == pytest.approx(1)
    np.testing.assert_array_equal(contents(rows), np.ones((len(examples), 1)))
    if name == "vqa":
        sentence = examples[0].scene.asked.sentence
        assert task.statistics(examples[0], sentence).tolist() == [0, content("vqa", sentence, examples[0].scene)]
    assert task.prompts(examples[0]) == of_paper.prompts(examples[0])
    assert in_words(name, "Please.").prompts(examples[0]) == tuple(
        f"{prompt}\nPlease." for prompt in of_paper.prompts(examples[0])
    )


def test_no_caption_of_the_data_set_is_cut_off() -> None:
    _, processor = load_tiny_vlm()
    longest = max(len(processor.tokenizer.encode(scene.captions[0])) for scene in scenes("dev", 200))
    assert longest < SCENE_TASKS["caption"].max_new_tokens


# ----------------------------------------------------------------------------------------------- the adapters' table


@pytest.fixture(scope="module")
def some_splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Splits]:
    model, processor = load_tiny_vlm()
    parts = {
        split: prepare(model, processor, SCENE_TASKS["ocr"], examples)
        for split, examples in data_set("ocr", {"discovery": 2, "dev": 2, "test": 2}).items()
    }
    return {"ocr": Splits(**parts, run_path=tmp_path_factory.mktemp("splits") / "ocr", batch_size=2)}


def test_the_table_of_adapters_is_shown_if_it_was_made_of_the_same(
    some_splits: dict[str, Splits], tmp_path: Path
) -> None:
    file, rows = tmp_path / "adapters.json", [way("ocr", "ia3", 0.2, 0.1)]
    found, why = adapter_rows(some_splits, file)
    assert found == []
    assert why.startswith("IA3 and LoRA are not shown: their table is missing; ")
    assert "compare --adapters" in why
    write_table(some_splits, rows, file)
    assert adapter_rows(some_splits, file) == (rows, "")
    table = json.loads(file.read_text())
    table["made_of"]["model"] = "0" * 64
    file.write_text(json.dumps(table))
    found, why = adapter_rows(some_splits, file)
    assert found == []
    assert "was made with other model; " in why
    file.write_text("[]")
    with pytest.raises(DataError, match=r"adapters\.json is damaged"):
        adapter_rows(some_splits, file)


def test_the_example_makes_the_table_that_the_demo_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "adapters.json"
    counts = {"discovery": 8, "dev": 4, "test": 4}
    splits = compare_adapters(tmp_path / "run", counts, file, tasks=("vqa", "ocr"))
    rows, why = adapter_rows(splits, file)
    assert why == ""
    assert [(row["task"], row["method"]) for row in rows] == [(t, k) for t in ("vqa", "ocr") for k in ("ia3", "lora")]
    for row in rows:
        assert row["parameters"] > 4000
        assert set(row["elsewhere"]) == {"vqa", "ocr"} - {row["task"]}
        assert {"gain_ci95", "content", "content_gain_ci95", "bytes"} <= set(row)
    assert capsys.readouterr().out.count(" gain ") == 4


def test_scores_of_a_task_have_a_column_more(some_splits: dict[str, Splits]) -> None:
    scores = score(some_splits["ocr"].test, batch_size=2)
    assert scores.statistics.shape == (2, 2)
    assert scores.value == pytest.approx(scores.statistics[:, 0].mean())
