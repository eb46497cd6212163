"""The steering study: banks of several methods with factors chosen on dev, beside what needs no bank, on every task."""

import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hones_offline.comparison.comparison import Comparison, compare
from hones_offline.comparison.settings import COMPARATORS, CompareSettings
from hones_offline.comparison.splits import Splits
from hones_offline.comparison.steering import STEERED, Steering, share
from hones_offline.data.examples import Example
from hones_offline.data.metrics import interval_of
from hones_offline.data.tasks import JsonlTask
from hones_offline.learning.adapters import Adapter, adapted
from hones_offline.learning.choosing import FitGrid
from hones_offline.learning.factors import FitSettings
from hones_offline.running.evaluation import intervention, score
from hones_offline.running.prompts import prepare
from problems import Problem, problem

from hones_steer.errors import DataError
from hones_steer.profile import serialize_profile

TASKS = {"pets": ("cat", "dog"), "sizes": ("big", "small"), "places": ("town", "mat")}
SIZES = {"discovery": 6, "dev": 3, "test": 5}
NAMES = ("dvp", "random", *COMPARATORS)
SETTINGS = CompareSettings(
    methods=("dvp",),
    main="dvp",
    fractions=(0.1,),
    fraction=0.1,
    seeds=2,
    attribution_examples=4,
    stages=("selections",),
    selections=("dvp", "random"),
    fit=FitSettings(batch_size=4, accumulation_steps=1),
    grid=FitGrid(lrs=(0.3,), epochs=4, patience=1, strengths=(1.0, 2.0)),
    lora_lrs=(0.1,),
)


@pytest.fixture(scope="module")
def p() -> Problem:
    return problem("llama", "text")


def splits(p: Problem, work: Path) -> dict[str, Splits]:
    """Each task wants one word, whatever is asked, which the model does not say before it is steered."""
    ways = ["what is", "red", "blue", "a", "the left", "square of", "circle"]
    result = {}
    for name, words in TASKS.items():
        prompts = [f"{ways[i % 7]} {words[i % 2]} {' '.join(ways[: i // 7 + 1])}" for i in range(sum(SIZES.values()))]
        examples = iter(Example(str(i), prompt, (words[0],), None) for i, prompt in enumerate(prompts))
        task = JsonlTask(name, "anls", max_new_tokens=2)
        parts = {
            split: prepare(p.model, p.processor, task, [next(examples) for _ in range(size)])
            for split, size in SIZES.items()
        }
        result[name] = Splits(**parts, run_path=work / name, batch_size=8)
    return result


@pytest.fixture(scope="module")
def out(p: Problem, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("selections")
    compare(splits(p, folder / "work"), SETTINGS, folder, title="selections")
    return folder


@pytest.fixture(scope="module")
def section(out: Path) -> Any:
    return json.loads((out / "summary.json").read_text(encoding="utf-8"))["selections"]


@pytest.fixture(scope="module")
def steering(p: Problem, out: Path) -> Steering:
    return Comparison(splits(p, out / "work"), SETTINGS).steering


def test_a_row_is_what_its_profiles_and_adapters_measure(steering: Steering, section: Any) -> None:
    """Each task's own gain, and the others' where the route is wrong; measured here without the study."""
    rows = {(row["task"], row["method"]): row for row in section["rows"]}
    assert list(rows) == [(task, name) for task in TASKS for name in NAMES]
    bases = {task: score(of.test, batch_size=8).value for task, of in steering.tasks.items()}

    def gain(task: str, steered: Any) -> float:
        test = steering.tasks[task].test
        if isinstance(steered, Adapter):
            with adapted(test, steered) as inside:
                return score(inside, batch_size=8).value - bases[task]
        with intervention(test, steering=steered):
            return score(test, batch_size=8).value - bases[task]

    for (task, name), row in rows.items():
        steered = [steering.selected(task, name, seed) for seed in (0, 1)]
        gains = {measured: np.mean([gain(measured, one) for one in steered]) for measured in TASKS}
        assert row["gain"] == pytest.approx(gains.pop(task))
        assert row["value"] == pytest.approx(bases[task] + row["gain"])
        assert row["value"] == pytest.approx(np.mean(row["by_seed"]))
        assert {other: cell["gain"] for other, cell in row["elsewhere"].items()} == pytest.approx(gains)
        assert row["elsewhere_mean"] == pytest.approx(np.mean(list(gains.values())))
        files = [s.serialized if isinstance(s, Adapter) else serialize_profile(s) for s in steered]
        assert row["bytes"] == np.mean([len(file) for file in files])
        assert (row["n"], row["seeds"]) == (5, 2)
    assert max(row["gain"] for row in rows.values()) > 0.1
    assert min(row["elsewhere_mean"] for row in rows.values()) != max(row["elsewhere_mean"] for row in rows.values())


def test_settings_are_no_table_inside_a_table(out: Path) -> None:
    settings = json.loads((out / "summary.json").read_text(encoding="utf-8"))["settings"]
    assert (settings["grid_epochs"], settings["fit_batch_size"], settings["lora_lrs"]) == (4, 4, [0.1])
    assert not [name for name, value in settings.items() if isinstance(value, dict)]


def test_sizes_and_choices_are_said(steering: Steering, section: Any) -> None:
    rows = {(row["task"], row["method"]): row for row in section["rows"]}
    size = round(0.1 * steering.index.size)
    width = steering.index.size // 3
    expected = {"dvp": size, "random": size, "grid_search": 1, "sparse": size, "ia3": 3 * width}
    assert {name: rows["pets", name]["parameters"] for name in expected} == expected
    for (_, name), row in rows.items():
        assert len(row["chosen"]) == 2
        for chosen in row["chosen"]:
            if name == "grid_search":
                assert chosen["factor"] in (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
            else:
                assert chosen["lr"] == (0.1 if name == "lora" else 0.3)
                assert (chosen["epoch"] in (1, 2, 3, 4), chosen["strength"] in (1, 2)) == (True, True)


def test_nested_choice_takes_what_is_best_on_dev(steering: Steering) -> None:
    for task, seed in product(TASKS, steering.seeds):
        on_dev = {
            name: steering.tasks[task].dev_score(steering.selected(task, name, seed)) for name in ("dvp", "random")
        }
        best = max(on_dev, key=on_dev.__getitem__)
        assert steering.selected(task, "best_on_dev", seed) is steering.selected(task, best, seed)
    assert on_dev["dvp"] != on_dev["random"]


def test_means_differences_and_shares_are_those_of_the_rows(section: Any) -> None:
    rows = {(row["task"], row["method"]): row for row in section["rows"]}
    means = {row["method"]: row for row in section["means"]}
    assert (list(means), section["reference"]) == ([*NAMES], "dvp")
    for name, mean in means.items():
        of_tasks = [rows[task, name] for task in TASKS]
        for key in ("gain", "elsewhere_mean", "parameters", "bytes"):
            assert mean[key] == pytest.approx(np.mean([row[key] for row in of_tasks]))
        if name == "dvp":
            assert "over_reference" not in mean
        else:
            assert mean["over_reference"] == pytest.approx(mean["gain"] - means["dvp"]["gain"])
            for task in TASKS:
                difference = rows[task, name]["gain"] - rows[task, "dvp"]["gain"]
                assert rows[task, name]["over_reference"] == pytest.approx(difference)
        assert ("ia3_share" in mean) == (means["ia3"]["gain"] > 0 and name != "ia3")
        if "ia3_share" in mean:
            assert mean["ia3_share"] == pytest.approx(mean["gain"] / means["ia3"]["gain"])
        low, high = mean["gain_ci95"]
        assert low <= mean["gain"] <= high


def test_an_interval_of_a_mean_resamples_tasks(steering: Steering, section: Any) -> None:
    """With gains that differ from task to task it is wider than seeds and examples alone make it."""
    own = [steering.bootstrap.over_seeds(steering._selection(task, "lora").own) for task in TASKS]
    assert len({round(float(gain[0]), 6) for gain in own}) > 1
    low, high = interval_of(np.mean(own, axis=0))
    [mean] = [row for row in section["means"] if row["method"] == "lora"]
    assert mean["gain_ci95"][1] - mean["gain_ci95"][0] > high - low


def test_a_share_of_nothing_or_of_a_loss_is_none() -> None:
    gain = np.array([0.2, 0.1, 0.3])
    assert share("s", gain, np.array([0.0, 0.1, 0.1])) == {}
    assert share("s", gain, np.array([-0.1, 0.1, 0.1])) == {}
    assert share("s", gain, np.array([0.4, -0.1, 0.1])) == {"s": 0.5}
    sure = share("s", gain, np.array([0.4, 0.1, 0.1]))
    assert sure["s"] == 0.5
    assert sure["s_ci95"] == pytest.approx([1.05, 2.95])


def test_again_it_does_nothing_and_keeps_no_trial_of_an_adapter(p: Problem, out: Path, tmp_path: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in (out / "work").rglob("*") if file.is_file()}
    assert not [file for file in before if "-lr-" in str(file)]
    assert len([file for file in before if file.name.startswith("trials-lora")]) == 2 * len(TASKS)
    again = compare(splits(p, out / "work"), SETTINGS, tmp_path, title="selections")
    assert {file: file.stat().st_mtime_ns for file in (out / "work").rglob("*") if file.is_file()} == before
    first = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert json.loads(json.dumps(again["selections"])) == first["selections"]


def test_a_choice_of_an_adapter_goes_on_where_it_was_killed(
    p: Problem, steering: Steering, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = steering.selected("pets", "ia3", 0)
    fresh = splits(p, tmp_path)["pets"]
    measure, measured = fresh.dev_score, []

    def killed(steered: Any) -> Any:
        measured.append(steered)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return measure(steered)

    fit = FitSettings(**{**vars(SETTINGS.fit), "seed": 0})
    monkeypatch.setattr(fresh, "dev_score", killed)
    with pytest.raises(KeyboardInterrupt):
        fresh.adapter_on_dev("ia3", fit, SETTINGS.grid)
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("epoch-*.safetensors")}
    assert len(kept) == 3  # the beginning and two epochs
    monkeypatch.setattr(fresh, "dev_score", measure)
    written = []
    monkeypatch.setattr("hones_offline.comparison.splits.shutil.rmtree", lambda folder: written.append(folder))
    assert fresh.adapter_on_dev("ia3", fit, SETTINGS.grid).digest == whole.digest
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert [folder.name.partition("-lr-")[2] for folder in written] == ["0.3"]


def test_the_main_methods_profiles_are_measured_on_the_other_tasks(p: Problem, out: Path, tmp_path: Path) -> None:
    settings = CompareSettings(**{**vars(SETTINGS), "stages": ("steering",)})
    rows = compare(splits(p, out / "work"), settings, tmp_path, title="main")["steering"]
    assert [(row["task"], row["method"]) for row in rows] == [(task, name) for task in TASKS for name in STEERED]
    for row in rows:
        assert ("elsewhere" in row) == (row["method"] == "hones")
        if row["method"] == "hones":
            assert list(row["elsewhere"]) == [task for task in TASKS if task != row["task"]]
            gains = [cell["gain"] for cell in row["elsewhere"].values()]
            assert row["elsewhere_mean"] == pytest.approx(np.mean(gains))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"selections": ()}, "the stage 'selections' has none to compare"),
        ({"selections": ("best",)}, "unknown method 'best'"),
        ({"selections": ("dvp", "dvp")}, "selections and comparators name dvp twice"),
        (
            {"comparators": ("ia3", "dora")},
            "unknown comparators dora; choose from grid_search, sparse, ia3, lora, best",
        ),
        ({"selection_reference": "ap"}, "selection_reference must be one of the selections or comparators, not 'ap'"),
        ({"lora_lrs": (0.1, 0.2)}, "lora_lrs must be as many as the grid's learning rates, 1,"),
        ({"lora_lrs": (-1.0,)}, "lrs must be positive, not -1.0"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        CompareSettings(**{**vars(SETTINGS), **change})


def test_without_peft_it_is_refused_before_anything_is_learned(
    p: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = splits(p, tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(DataError, match=r"peft is not installed; run: pip install 'hones-steer\[peft\]'"):
        Comparison(tasks, SETTINGS)
    Comparison(tasks, CompareSettings(**{**vars(SETTINGS), "comparators": ("sparse",)}))
