"""The comparison: every method gets the same draws, banks are masked once, and the tables say what was measured."""

import json
import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from hones_offline import evaluate
from hones_offline.attribution.baselines import (
    activation_entropy,
    activation_probability,
    direct_write_in,
    mean_activation,
)
from hones_offline.attribution.contrast import contrasted
from hones_offline.attribution.methods import AttributionOptions
from hones_offline.attribution.pipeline import Attribution, find_bank
from hones_offline.attribution.write_in import target_directions
from hones_offline.comparison.comparison import Comparison, compare
from hones_offline.comparison.settings import METHODS, CompareSettings, parse
from hones_offline.comparison.splits import Splits
from hones_offline.comparison.steering import STEERED
from hones_offline.data.examples import Example
from hones_offline.data.metrics import CrossedBootstrap, interval_of, mean_of_rows
from hones_offline.data.neurons import Bank, Importance, exact_groups, jaccard
from hones_offline.data.tasks import JsonlTask
from hones_offline.learning.factors import FitSettings
from hones_offline.running.execution import Execution
from hones_offline.running.prompts import Prepared, prepare
from problems import Problem, problem

from hones_steer.errors import DataError

TASKS = {"pets": ("cat", "dog"), "sizes": ("big", "small"), "places": ("town", "mat")}
SIZES = {"discovery": 6, "dev": 2, "test": 5}
SETTINGS = CompareSettings(
    methods=("random", "ap", "dvp", "hones_logprob"),
    main="hones_logprob",
    fractions=(0.05, 0.2),
    fraction=0.2,
    seeds=2,
    attribution_examples=4,
    top_heads=4,
    strengths=(0.0, 1.0),
    fit=FitSettings(epochs=1, lr=0.05, batch_size=4, accumulation_steps=1),
)


@pytest.fixture(scope="module")
def p() -> Problem:
    return problem("llama", "text")


@pytest.fixture(scope="module")
def examples(p: Problem) -> dict[str, dict[str, list[Example]]]:
    """Each task's splits; the right answer is what the model says, so that masking can only hurt."""

    def prompts(words: tuple[str, str], count: int) -> list[str]:
        ways = ["what is", "red", "blue", "a", "the left", "square of", "circle"]
        return [f"{ways[i % 7]} {words[i % 2]} {' '.join(ways[: i // 7 + 1])}" for i in range(count)]

    def said(name: str) -> list[Example]:
        asked = [Example(str(i), prompt, ("x",), None) for i, prompt in enumerate(prompts(TASKS[name], 20))]
        outputs = evaluate(p.model, p.processor, task(name), asked, batch_size=20).outputs
        return [Example(e.id, e.prompt, (str(out),), None) for e, out in zip(asked, outputs, strict=True) if out]

    result = {}
    for name in TASKS:
        every = iter(said(name))
        result[name] = {split: [next(every) for _ in range(size)] for split, size in SIZES.items()}
    return result


def task(name: str) -> JsonlTask:
    return JsonlTask(name, "anls", max_new_tokens=3)


def splits(p: Problem, examples: Any, work: Path, names: Any = tuple(TASKS)) -> dict[str, Splits]:
    return {
        name: Splits(
            **{split: prepare(p.model, p.processor, task(name), some) for split, some in examples[name].items()},
            run_path=work / name,
            batch_size=8,
        )
        for name in names
    }


@pytest.fixture(scope="module")
def out(p: Problem, examples: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    compare(splits(p, examples, folder / "work"), with_stages("groups", "steer_groups"), folder, title="three")
    return folder


@pytest.fixture(scope="module")
def summary(out: Path) -> Any:
    return json.loads((out / "summary.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def comparison(p: Problem, examples: Any, out: Path) -> Comparison:
    return Comparison(splits(p, examples, out / "work"), with_stages())


def with_stages(*more: str, **changes: Any) -> CompareSettings:
    stages = ("masking", "steering", "strength", *more)
    return CompareSettings(**{**vars(SETTINGS), "stages": stages, "group_seeds": 2, **changes})


RUN = Execution(batch_size=8)


def dvp(prepared: Prepared) -> Importance:
    return direct_write_in(prepared, target_directions(prepared), RUN)


def attributed(prepared: Prepared, **options: Any) -> Attribution:
    """The attribution of a run of its own."""
    defaults = {"method": "hones", "head_metric": "logprob", "top_heads": 4}
    return find_bank(prepared, AttributionOptions(**{**defaults, **options}), RUN)


# ------------------------------------------------------------------------------------------------- finding


def test_seeds_draw_different_examples_and_every_method_the_same(comparison: Comparison) -> None:
    first, second = (comparison.finder.drawn("pets", seed) for seed in (0, 1))
    assert set(first) != set(second)
    assert len(set(first)) == len(set(second)) == 4
    pool = comparison.tasks["pets"].discovery
    drawn = comparison.finder.examples("pets", 1)
    assert [example.id for example in drawn.examples] == [pool.examples[i].id for i in second]
    np.testing.assert_array_equal(comparison.finder.importance("pets", "dvp", 1), dvp(drawn))


@pytest.mark.parametrize("metric", ["logprob", "task"])
def test_heads_scored_once_for_all_seeds_find_what_a_run_on_the_draw_finds(comparison: Comparison, metric: Any) -> None:
    drawn = comparison.finder.examples("sizes", 1)
    scores = comparison.finder.scores("sizes", metric, 1)
    alone = attributed(drawn, head_metric=metric)
    assert scores.base == pytest.approx(alone.base, abs=1e-5)
    np.testing.assert_allclose(scores.by_head, alone.head_scores, atol=1e-5)
    if metric == "logprob":
        found = comparison.finder.attribution("sizes", "hones_logprob", 1)
        np.testing.assert_allclose(found.importance, alone.importance, rtol=1e-3, atol=1e-5)
        assert [head[:2] for head in found.heads] == [head[:2] for head in alone.heads]


def test_items_of_a_task_with_several_answers_are_those_of_the_examples_drawn(tmp_path: Path) -> None:
    """Retrieval has three (prompt, answer) pairs for some examples, four for others."""
    r = problem("llava", "retrieval", count=4)
    prepared = prepare(r.model, r.processor, r.task, r.examples)
    parts = {name: Splits(prepared, prepared, prepared, tmp_path / name, batch_size=8) for name in ("one", "two")}
    settings = CompareSettings(methods=("hones_logprob",), main="hones_logprob", seeds=2, attribution_examples=2)
    finder = Comparison(parts, settings).finder
    alone = attributed(finder.examples("one", 1))
    np.testing.assert_allclose(finder.scores("one", "logprob", 1).by_head, alone.head_scores, atol=1e-5)


def test_variants_are_the_options_of_attribution(comparison: Comparison) -> None:
    drawn = comparison.finder.examples("pets", 0)
    for name, options in {
        "hones_logprob:centred+rank": {"target": "centred", "head_weights": "rank"},
        "hones_logprob:contrastive": {"target": "contrastive"},
        "hones_logprob:example": {"positive_part": "example"},
    }.items():
        alone = attributed(drawn, **options)
        found = comparison.finder.importance("pets", name, 0)
        np.testing.assert_allclose(found, alone.importance, rtol=1e-3, atol=1e-5)


def test_damage_divides_a_heads_score_by_its_share_of_harm_to_all_tasks(comparison: Comparison) -> None:
    scores = {name: comparison.finder.scores(name, "logprob", 0).by_head for name in TASKS}
    plain = comparison.finder.attribution("pets", "hones_logprob", 0).heads
    found = comparison.finder.attribution("pets", "hones_logprob:damage", 0).heads
    for (layer, head, weight), (*place, divided) in zip(plain, found, strict=True):
        assert place == [layer, head]
        harm = np.mean([max(float(s[layer, head]), 0) / float(s.max()) for s in scores.values()])
        assert divided == pytest.approx(weight / harm)


def test_heads_that_are_among_the_strongest_of_every_task_are_left_out(comparison: Comparison) -> None:
    strongest = [{h[:2] for h in comparison.finder.attribution(name, "hones_logprob", 0).heads} for name in TASKS]
    everywhere = set.intersection(*strongest)
    assert everywhere  # or the test says nothing
    found = comparison.finder.attribution("pets", "hones_logprob:leave_out", 0).heads
    assert everywhere.isdisjoint({head[:2] for head in found})
    assert {h[:2] for h in found} >= strongest[0] - everywhere


@pytest.mark.parametrize("option", ["leave_out", "by_damage"])
def test_options_that_compare_tasks_need_the_scores_of_all(comparison: Comparison, option: str) -> None:
    with pytest.raises(DataError, match="leave_out and by_damage compare tasks; give the scores of all tasks"):
        attributed(comparison.finder.examples("pets", 0), **{option: True})


@pytest.mark.parametrize("contrast", ["max", "ratio"])
def test_a_contrasted_bank_is_that_of_the_importances_of_the_same_seed(comparison: Comparison, contrast: Any) -> None:
    finder = comparison.finder
    own, *others = (finder.importance(name, "hones_logprob:rank", 1) for name in ("sizes", "pets", "places"))
    found = finder.bank("sizes", f"hones_logprob:{contrast}+rank", 0.05, 1)
    assert found.digest == contrasted(own, others, contrast, 0.05).bank(0.05).digest
    assert found.digest != own.bank(0.05).digest
    alone = find_bank(finder.examples("sizes", 1), AttributionOptions("ap", top_fraction=0.05), RUN)
    others = [finder.importance(name, "ap", 1) for name in ("pets", "places")]
    expected = contrasted(alone.importance, others, contrast, 0.05).bank(0.05)
    assert finder.bank("sizes", f"ap:{contrast}", 0.05, 1).digest == expected.digest


def test_tasks_can_be_named_that_enter_contrasts(p: Problem, examples: Any, out: Path) -> None:
    """A task among them is contrasted with the rest of them, another one with all of them; "ape" goes by them too."""
    methods = ("ape", "dvp:ratio", "hones_logprob:max")
    changes = {"methods": methods, "main": "dvp:ratio", "contrast_tasks": ("places", "pets"), "pool_factor": 2}
    finder = Comparison(splits(p, examples, out / "work"), with_stages(**changes)).finder
    tables = {name: finder.importance(name, "dvp", 0) for name in TASKS}
    for own, others in {"pets": ["places"], "places": ["pets"], "sizes": ["pets", "places"]}.items():
        assert finder.others(own) == others
        against = [tables[other] for other in others]
        expected = contrasted(tables[own], against, "ratio", 0.2, pool_factor=2).bank(0.2)
        assert finder.bank(own, "dvp:ratio", 0.2, 0).digest == expected.digest
        entropy = activation_entropy(
            {name: finder.importance(name, "ap", 0) for name in TASKS if name in (own, *others)}
        )
        np.testing.assert_array_equal(finder.importance(own, "ape", 0), entropy[own])


@pytest.mark.parametrize("method", ["dvp:ratio", "ape", "hones_logprob:max+rank"])
def test_a_contrast_with_nothing_is_refused_before_anything_is_done(
    p: Problem, examples: Any, tmp_path: Path, method: str
) -> None:
    tasks = splits(p, examples, tmp_path / "work")
    before = list(tmp_path.rglob("*"))
    settings = with_stages(methods=(method,), main=method, contrast_tasks=("pets",))
    with pytest.raises(DataError, match=f"method '{re.escape(method)}' has no task to contrast 'pets' with; name"):
        Comparison(tasks, settings)
    with pytest.raises(DataError, match="contrast_tasks names cats, which is not among the tasks pets, sizes, places"):
        Comparison(tasks, with_stages(contrast_tasks=("pets", "cats")))
    settled = with_stages(contrast_tasks=("pets",), selections=(method,))
    with pytest.raises(DataError, match=f"method '{re.escape(method)}' has no task to contrast 'pets' with; name"):
        Comparison(tasks, settled)
    assert list(tmp_path.rglob("*")) == before
    Comparison(tasks, replace(settings, measured=("sizes", "places")))  # nobody asks for the bank of pets


def test_an_attribution_has_the_bank_of_its_method_and_is_refused_without_one_of_its_own(
    comparison: Comparison,
) -> None:
    finder = comparison.finder
    ratio = finder.attribution("pets", "hones_logprob:ratio", 0).bank
    assert ratio.digest == finder.bank("pets", "hones_logprob:ratio", 0.2, 0).digest
    assert ratio.digest != finder.attribution("pets", "hones_logprob", 0).bank.digest
    for name in ("ape", "random"):
        with pytest.raises(DataError, match=f"method '{name}' is not attributed on its own"):
            finder.attribution("pets", name, 0)


def test_entropy_takes_all_tasks_probabilities_of_the_same_seed(comparison: Comparison) -> None:
    tables = {name: activation_probability(comparison.finder.examples(name, 1), RUN) for name in TASKS}
    found = comparison.finder.importance("places", "ape", 1)
    np.testing.assert_array_equal(found, activation_entropy(tables)["places"])


def test_a_random_bank_has_the_main_methods_sizes_per_layer(comparison: Comparison) -> None:
    main, drawn = (comparison.finder.bank("pets", name, 0.2, 1) for name in ("hones_logprob", "random"))
    assert {layer: len(neurons) for layer, neurons in drawn.items()} == {layer: len(n) for layer, n in main.items()}
    assert drawn.digest != main.digest


@pytest.mark.parametrize(
    "name",
    [
        "hones",
        "hones_task:",
        "hones_task:best",
        "ap:rank",
        "dvp:rank",
        "random:ratio",
        "hones_task:specific",
        "hones_task:contrastive+centred",
        "dvp:max+ratio",
        "ap:max+max",
    ],
)
def test_an_unknown_method_is_refused(name: str) -> None:
    with pytest.raises(DataError, match=r"unknown method|two variants"):
        parse(name)
    assert [parse(known).name for known in METHODS] == list(METHODS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1, not 0"),
        ({"fractions": (2.0,)}, "top_fraction must lie in"),
        ({"fraction": 0.3}, "fraction must be one of the fractions, not 0.3"),
        ({"main": "random"}, "main must be one of the methods other than random"),
        ({"main": "ma"}, "main must be one of the methods other than random"),
        ({"stages": ("mask",)}, "unknown stages mask; choose from masking"),
        ({"pool_factor": 0}, "pool_factor must be 1 or more, not 0"),
        ({"floor": -1}, "floor must be positive, not -1"),
        ({"group_seeds": 3}, "group_seeds must lie between 1 and seeds, not 3"),
        ({"ablations": ("noise",)}, "unknown ablations noise; choose from zero, mean"),
        ({"ablations": ()}, "ablations is empty; choose from zero, mean"),
        ({"own_drop_levels": (0.0,)}, r"own_drop_levels must lie in \(0, 1\], not 0.0"),
        ({"measured": ("pets",)}, "measured must name at least two tasks, not pets"),
        ({"measured": ()}, "measured must name at least two tasks, not none"),
        ({"reference": "ma"}, "reference must be one of the methods, not 'ma'"),
    ],
)
def test_a_setting_out_of_range_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        CompareSettings(**{**vars(SETTINGS), **change})


def test_too_few_examples_for_the_seeds_and_a_single_task_are_refused(p: Problem, examples: Any, out: Path) -> None:
    tasks = splits(p, examples, out / "work")
    with pytest.raises(DataError, match="'pets' has 6 examples to draw from, so that each seed would draw the same"):
        Comparison(tasks, with_stages(attribution_examples=6))
    Comparison(tasks, with_stages(attribution_examples=6, seeds=1, group_seeds=1))
    places = {**examples["places"], "discovery": examples["places"]["discovery"][:4]}
    few = splits(p, {**examples, "places": places}, out / "few")
    with pytest.raises(DataError, match="'places' has 4 examples to draw from"):
        Comparison(few, SETTINGS)
    finder = Comparison(few, with_stages(measured=("pets", "sizes"), contrast_tasks=("places",))).finder
    assert [len(finder.examples("places", seed)) for seed in (0, 1)] == [4, 4]
    with pytest.raises(DataError, match="selectivity compares tasks; give at least two"):
        Comparison({"pets": tasks["pets"]}, SETTINGS)
    for name in ("measured", "contrast_tasks"):
        with pytest.raises(DataError, match=f"{name} names moods, which is not among the tasks pets, sizes, places"):
            Comparison(tasks, with_stages(**{name: ("pets", "moods")}))


# ------------------------------------------------------------------------------------------------ measuring


def test_a_masking_row_is_what_evaluate_measures(
    p: Problem, examples: Any, comparison: Comparison, summary: Any
) -> None:
    rows = {(row["task"], row["method"], row["fraction"]): row for row in summary["masking"]}
    assert list(rows) == [(t, m, f) for t in TASKS for m in SETTINGS.methods for f in SETTINGS.fractions]
    row = rows["pets", "dvp", 0.2]
    drops: dict[str, list[float]] = {name: [] for name in TASKS}
    for seed in (0, 1):
        bank = dvp(comparison.finder.examples("pets", seed)).bank(0.2)
        for name, of in drops.items():
            test = examples[name]["test"]
            plain, masked = (evaluate(p.model, p.processor, task(name), test, mask=m).value for m in (None, bank))
            of.append(plain - masked)
    assert row["own_drop"] == pytest.approx(np.mean(drops["pets"]))
    assert row["by_seed"]["own_drop"] == pytest.approx(drops["pets"])
    assert row["other_drops"] == pytest.approx({name: np.mean(drops[name]) for name in ("sizes", "places")})
    selectivity = np.array(drops["pets"]) - (np.array(drops["sizes"]) + drops["places"]) / 2
    assert row["by_seed"]["selectivity"] == pytest.approx(selectivity)
    assert row["selectivity"] == pytest.approx(selectivity.mean())
    assert (row["seeds"], row["n"], row["neurons"]) == (2, 5, round(0.2 * 3 * 96))
    assert max(row["own_drop"] for row in summary["masking"]) > 0.1
    for row in summary["masking"]:
        for name in ("own_drop", "selectivity"):
            low, high = row[f"{name}_ci95"]
            assert low <= row[name] <= high


@pytest.fixture(scope="module")
def found(p: Problem, examples: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The finding study of two of the tasks; the third enters contrasts only."""
    folder = tmp_path_factory.mktemp("finding")
    settings = with_stages(
        methods=("random", "dvp", "ma"),
        main="dvp",
        stages=("masking", "finding"),
        measured=("pets", "places"),
        contrast_tasks=("sizes",),
        ablations=("zero", "mean"),
        own_drop_levels=(0.1,),
        reference="ma",
    )
    return folder, compare(splits(p, examples, folder / "work"), settings, folder, title="two of three")


def test_the_finding_study_measures_the_measured_tasks_under_both_ablations(
    p: Problem, examples: Any, comparison: Comparison, found: tuple[Path, Any]
) -> None:
    _, summary = found
    section = summary["finding"]
    assert section["bystanders"] == {"pets": ["places"], "places": ["pets"]}
    rows = {(row["task"], row["method"], row["fraction"], row["ablation"]): row for row in section["rows"]}
    assert list(rows) == [
        (t, m, f, a)
        for t in ("pets", "places")
        for a in ("zero", "mean")
        for m in ("random", "dvp", "ma")
        for f in SETTINGS.fractions
    ]
    for row in summary["masking"]:  # what is the same in both
        same = rows[row["task"], row["method"], row["fraction"], "zero"]
        kept = ("own_drop", "own_drop_ci95", "selectivity", "selectivity_ci95", "other_drops", "relative_drop", "n")
        assert {name: same[name] for name in kept} == {name: row[name] for name in kept}
        assert row["relative_drop"] == pytest.approx(row["own_drop"] / summary["tasks"][row["task"]]["base"])
    tasks = {name: prepare(p.model, p.processor, task(name), examples[name]["discovery"]) for name in TASKS}
    means = sum(reference.position_means(p.model, p.processor, t.task, t.examples) for t in tasks.values()) / 3
    row, drops = rows["pets", "ma", 0.05, "mean"], []
    for seed in (0, 1):
        bank = mean_activation(comparison.finder.examples("pets", seed), RUN).bank(0.05)
        for name in ("pets", "places"):
            test = examples[name]["test"]
            filled = {layer: (neurons, means[layer][neurons]) for layer, neurons in bank.items()}
            plain = reference.metric(p.model, p.processor, task(name), test)
            with reference.neurons_set(p.model, filled):
                drops.append(plain - reference.metric(p.model, p.processor, task(name), test))
    assert 0 < max(drops) <= 1
    assert row["by_seed"]["own_drop"] == pytest.approx(drops[::2])
    assert row["by_seed"]["bystander_drop"] == pytest.approx(drops[1::2])
    assert any(row["by_seed"] != rows[(*key[:3], "zero")]["by_seed"] for key, row in rows.items())
    cell = next(
        row for row in section["means"] if (row["method"], row["fraction"], row["ablation"]) == ("ma", 0.2, "mean")
    )
    for name in ("own_drop", "bystander_drop", "selectivity"):
        assert cell[name] == pytest.approx(np.mean([rows[t, "ma", 0.2, "mean"][name] for t in ("pets", "places")]))
        assert cell["difference"][name] == 0
    assert {(row["method"], row["ablation"]) for row in section["matched"]} == {
        (method, ablation) for method in ("random", "dvp", "ma") for ablation in ("zero", "mean")
    }


def test_tasks_that_are_not_measured_are_only_compared_with(found: tuple[Path, Any]) -> None:
    folder, summary = found
    assert list(summary["tasks"]) == list(TASKS)
    assert {row["task"] for row in summary["masking"]} == set(summary["cross"]["drops"]) == {"pets", "places"}
    masked = {name: len([*(folder / "work" / name).glob("*masked*")]) for name in TASKS}
    assert masked["sizes"] == 0
    assert masked["pets"] == masked["places"] > 0
    assert all((folder / "work" / name / "discovery-position-means.safetensors").exists() for name in TASKS)


def test_the_cross_matrix_is_the_main_methods(summary: Any) -> None:
    assert (summary["cross"]["method"], summary["cross"]["fraction"]) == ("hones_logprob", 0.2)
    for row in summary["masking"]:
        if (row["method"], row["fraction"]) == ("hones_logprob", 0.2):
            cells = summary["cross"]["drops"][row["task"]]
            assert cells[row["task"]] == {"drop": row["own_drop"], "ci95": row["own_drop_ci95"]}
            assert {name: cells[name]["drop"] for name in row["other_drops"]} == row["other_drops"]


def test_heads_layers_overlap_and_stability(comparison: Comparison, summary: Any) -> None:
    banks = {name: [comparison.finder.bank(name, "dvp", 0.2, seed) for seed in (0, 1)] for name in TASKS}
    counts = [np.mean([len(bank.get(layer, ())) for bank in banks["sizes"]]) for layer in range(3)]
    assert summary["neurons_per_layer"]["sizes"]["dvp"] == counts
    assert summary["overlap"]["dvp"]["tasks"] == list(TASKS)
    expected = np.mean([jaccard(a, b) for a, b in zip(banks["pets"], banks["places"], strict=True)])
    assert summary["overlap"]["dvp"]["jaccard"][0][2] == pytest.approx(expected)
    assert [row[i] for i, row in enumerate(summary["overlap"]["dvp"]["jaccard"])] == [1, 1, 1]
    assert summary["stability"]["pets"]["dvp"] == pytest.approx(jaccard(*banks["pets"]))
    heads = summary["heads"]["pets"]
    assert (heads["metric"], heads["seeds"], heads["n"]) == ("logprob", 2, 4)
    mean = np.mean([comparison.finder.scores("pets", "logprob", seed).by_head for seed in (0, 1)], axis=0)
    np.testing.assert_allclose(heads["scores"], mean, rtol=1e-5)
    assert [tuple(head) for head in heads["chosen"]] == comparison.finder.attribution("pets", "hones_logprob", 0).heads


def test_groups_are_disjoint_and_masked_and_steered(comparison: Comparison, summary: Any) -> None:
    rows = {row["group"]: row for row in summary["groups"]}
    kinds = {"pets": "one", "pets+sizes": "pair", "pets+sizes+places": "all"}
    assert {group: rows[group]["kind"] for group in kinds if group in rows}.items() <= kinds.items()
    assert "pets+sizes+places" in rows
    per_seed = [
        exact_groups({name: comparison.finder.bank(name, "hones_logprob", 0.2, seed) for name in TASKS})
        for seed in (0, 1)
    ]
    for group, row in rows.items():
        banks = [groups[key] for groups in per_seed if (key := tuple(group.split("+"))) in groups]
        assert (row["seeds"], row["neurons"]) == (len(banks), round(np.mean([bank.size for bank in banks])))
        for name in TASKS:
            drop = np.mean([comparison.drop(name, bank)[0] for bank in banks])
            assert row["drops"][name]["drop"] == pytest.approx(drop)
            low, high = row["gains"][name]["ci95"]
            assert low <= row["gains"][name]["gain"] <= high


def test_steering_and_strength(summary: Any) -> None:
    rows = {(row["task"], row["method"]): row for row in summary["steering"]}
    assert list(rows) == [(name, method) for name in TASKS for method in STEERED]
    strengths = {(row["task"], row["strength"]): row for row in summary["strength"]}
    for name in TASKS:
        base = summary["tasks"][name]["base"]
        assert rows[name, "base"]["gain"] == 0
        assert rows[name, "hones"]["gain"] == pytest.approx(rows[name, "hones"]["value"] - base)
        assert rows[name, "hones"]["value"] == pytest.approx(np.mean(rows[name, "hones"]["by_seed"]))
        assert strengths[name, 0.0]["value"] == base
        assert strengths[name, 1.0]["value"] == rows[name, "hones"]["value"]
        assert strengths[name, 1.0]["elsewhere"] == rows[name, "hones"]["elsewhere"]
        assert strengths[name, 0.0]["elsewhere_mean"] == 0


def test_strength_learns_nothing_but_what_it_shows(p: Problem, examples: Any, tmp_path: Path) -> None:
    settings = with_stages(stages=("strength",), seeds=2, learned_seeds=1)
    compare(splits(p, examples, tmp_path / "work"), settings, tmp_path, title="three")
    assert len(list((tmp_path / "work").glob("*/fit-*"))) == len(TASKS)


def test_again_it_only_does_what_is_new(p: Problem, examples: Any, out: Path, tmp_path: Path) -> None:
    """The same comparison computes nothing; with another method and size it keeps what it has."""
    before = {file: file.stat().st_mtime_ns for file in (out / "work").rglob("*") if file.is_file()}
    tasks = splits(p, examples, out / "work")
    again = compare(tasks, with_stages("groups", "steer_groups"), tmp_path, title="three")
    assert {file for file in (out / "work").rglob("*") if file.is_file()} == set(before)
    first = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    for changing in ("created", "seconds"):
        first.pop(changing), again.pop(changing)
    assert json.loads(json.dumps(again)) == first
    more = with_stages(methods=("dvp", "ma", "hones_logprob"), fractions=(0.1, 0.2), stages=("masking",))
    compare(tasks, more, tmp_path, title="three")
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_stages_can_be_switched_off(p: Problem, examples: Any, out: Path, tmp_path: Path) -> None:
    summary = compare(splits(p, examples, out / "work"), with_stages(stages=()), tmp_path, title="three")
    assert {"masking", "cross", "groups", "steering", "strength"}.isdisjoint(summary)
    assert set(summary["seconds"]) == {"base", "attribution"}


# ------------------------------------------------------------------------------------- banks and intervals


def test_groups_and_overlap_of_banks() -> None:
    def bank(**layers: list[int]) -> Bank:
        return Bank({int(layer[1:]): neurons for layer, neurons in layers.items()})

    banks = {"a": bank(l0=[1, 2, 3], l2=[5]), "b": bank(l0=[2, 3], l1=[7]), "c": bank(l0=[3, 9])}
    found = {tasks: {layer: n.tolist() for layer, n in group.items()} for tasks, group in exact_groups(banks).items()}
    assert found == {
        ("a",): {0: [1], 2: [5]},
        ("b",): {1: [7]},
        ("c",): {0: [9]},
        ("a", "b"): {0: [2]},
        ("a", "b", "c"): {0: [3]},
    }
    assert list(found) == [("a",), ("b",), ("c",), ("a", "b"), ("a", "b", "c")]
    assert jaccard(banks["a"], banks["b"]) == pytest.approx(2 / 5)
    for one, other in combinations(banks.values(), 2):
        assert jaccard(one, other) == jaccard(other, one) < jaccard(one, one) == 1
    with pytest.raises(DataError, match="two empty banks"):
        jaccard(Bank({}), Bank({}))
    digests = [b.digest for b in (*banks.values(), Bank({}))]
    assert len(set(digests)) == 4
    assert Bank({2: banks["a"][2], 1: np.array([], dtype=np.int32), 0: banks["a"][0]}).digest == digests[0]


def test_a_crossed_interval_is_as_wide_as_examples_and_seeds_make_it() -> None:
    rng = np.random.default_rng(0)
    bootstrap = CrossedBootstrap(resamples=4000)
    statistics = rng.normal(size=(50, 1))
    values = bootstrap.values("task", statistics, mean_of_rows)
    assert values[0] == pytest.approx(statistics.mean())
    assert values[1:].std() == pytest.approx(statistics.std() / np.sqrt(50), rel=0.1)
    shifts = (0.0, 1.0, 2.0)
    over = bootstrap.over_seeds([values + shift for shift in shifts])
    assert over[0] == pytest.approx(statistics.mean() + 1)
    expected = statistics.var() / 50 + np.var(shifts) / 3
    assert over[1:].var() == pytest.approx(expected, rel=0.1)
    low, high = interval_of(over)
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(expected), rel=0.15)


def test_the_same_examples_are_drawn_for_whatever_is_measured_on_a_task() -> None:
    bootstrap = CrossedBootstrap()
    statistics = np.random.default_rng(0).normal(size=(20, 1))
    one, other, elsewhere = (
        bootstrap.values(name, table, mean_of_rows)
        for name, table in (("task", statistics), ("task", statistics - 1), ("elsewhere", statistics))
    )
    np.testing.assert_allclose(one - other, 1)
    assert abs(np.corrcoef(one[1:], elsewhere[1:])[0, 1]) < 0.2
