"""Racing finds the heads that exact scoring finds, as often as stated, from fewer evaluations."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hones_offline import attribute
from hones_offline.attribution.heads import head_scores, head_statistics, top_heads
from hones_offline.attribution.racing import race, rounds, student_quantile, surviving
from hones_offline.data.examples import Example
from hones_offline.data.tasks import JsonlTask
from hones_offline.running.evaluation import score
from hones_offline.running.execution import Execution
from hones_offline.running.prompts import prepare
from offline.killed_run import contents
from problems import Problem, problem

from hones_steer.cli import main
from hones_steer.errors import DataError

HEADS, KEEP, ERROR = 64, 8, 0.05
Draw = Callable[[np.random.Generator, int], np.ndarray]


def normal(rng: np.random.Generator, items: int) -> np.ndarray:
    means = rng.exponential(size=(HEADS, 1)) ** 2 * 0.02
    return means + rng.normal(0, 0.1, (HEADS, items)) + rng.normal(0, 0.1, items)


def right_or_wrong(rng: np.random.Generator, items: int) -> np.ndarray:
    share = np.minimum(rng.exponential(size=(HEADS, 1)) ** 2 * 0.02, 0.9)
    return (rng.random((HEADS, items)) < share).astype(float) - (rng.random((HEADS, items)) < 0.01)


def skewed(rng: np.random.Generator, items: int) -> np.ndarray:
    means = rng.exponential(size=(HEADS, 1)) ** 2 * 0.02
    return means * rng.lognormal(0, 1.5, (HEADS, items)) + rng.normal(0, 0.05, items)


def equal(rng: np.random.Generator, items: int) -> np.ndarray:
    return rng.normal(0, 1, (HEADS, items))


def raced(drops: np.ndarray, order: np.ndarray) -> tuple[set[int], int]:
    """The race on known drops [heads, items], plainly: the best `KEEP` of what is left, and the evaluations."""
    alive, evaluations, begin = list(range(len(drops))), 0, 0
    stages = rounds(drops.shape[1])
    for end in stages:
        evaluations += len(alive) * (end - begin)
        begin = end
        if end < drops.shape[1]:
            level = ERROR / (KEEP * len(drops) * (len(stages) - 1))
            stays = surviving(drops[alive][:, order[:end]], drops.shape[1], KEEP, level)
            alive = [head for head, stay in zip(alive, stays, strict=True) if stay]
    return set(sorted(alive, key=lambda head: -drops[head].mean())[:KEEP]), evaluations


@pytest.mark.parametrize("draw", [normal, right_or_wrong, skewed, equal])
@pytest.mark.parametrize("items", [96, 512])
def test_other_heads_are_found_no_more_often_than_stated(draw: Draw, items: int) -> None:
    draws, wrong, used = 100, 0, 0
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        drops = draw(rng, items)
        found, evaluations = raced(drops, rng.permutation(items))
        wrong += found != set(np.argsort(-drops.mean(axis=1), kind="stable")[:KEEP].tolist())
        used += evaluations
    assert wrong <= ERROR * draws
    if items == 512 and draw is not equal:
        assert used < 0.75 * draws * HEADS * items


def test_the_bound_is_reached_where_comparisons_are_few() -> None:
    """With one comparison and no union bound the rate of errors is the level: the bound is neither loose nor broken."""
    wrong, draws, level = 0, 2000, 0.05
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        drops = rng.normal(0, 1, (2, 400))
        drops -= drops.mean(axis=1, keepdims=True)  # equal over all items
        stays = surviving(drops[:, :100], 400, 1, level)
        wrong += not stays[0]
    assert wrong / draws == pytest.approx(level, abs=0.016)


def test_a_head_that_is_never_better_nor_worse_stays() -> None:
    assert surviving(np.zeros((5, 40)), 100, 2, 0.05).all()
    assert surviving(np.arange(6.0).reshape(2, 3), 100, 2, 0.05).all()  # no more heads than are wanted


def test_rounds_see_every_item_and_no_few() -> None:
    assert rounds(1000) == [125, 250, 500, 1000]
    assert rounds(100) == [32, 50, 100]
    assert rounds(33) == [32, 33]
    assert rounds(8) == [8]


@pytest.mark.parametrize("freedom", [31, 124, 1000])
@pytest.mark.parametrize("level", [0.05, 1e-4, 1e-7])
def test_students_quantile(freedom: int, level: float) -> None:
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    x = np.linspace(student_quantile(level, freedom), 60, 400_001)
    density = scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    assert np.trapezoid(density, x) == pytest.approx(level, rel=0.02)


@pytest.fixture(scope="module")
def p() -> Problem:
    """A text model that is asked to write what it writes, so that a replaced head can only make it worse."""
    p = problem("llama", "text")
    task, rng = JsonlTask("text", "anls", 4), np.random.default_rng(0)
    words = ("cat", "dog", "big", "small", "town", "red", "blue", "a", "the", "mat")
    asked = [" ".join(rng.choice(words, rng.integers(2, 6))) for _ in range(48)]
    examples = [Example(str(i), prompt, ("?",), None) for i, prompt in enumerate(asked)]
    texts = score(prepare(p.model, p.processor, task, examples), batch_size=16).outputs
    return replace(
        p, task=task, examples=[replace(e, targets=(str(t) or "a",)) for e, t in zip(examples, texts, strict=True)]
    )


SETTINGS: dict[str, Any] = {"method": "hones", "top_heads": 2, "top_fraction": 0.05, "batch_size": 8}


@pytest.mark.parametrize("head_metric", ["task", "logprob"])
def test_on_a_model_the_heads_their_weights_and_the_bank_are_the_exact_ones(p: Problem, head_metric: Any) -> None:
    arguments = (p.model, p.processor, p.task, p.examples)
    exact = attribute(*arguments, head_metric=head_metric, **SETTINGS)
    found = attribute(*arguments, head_metric=head_metric, heads="race", **SETTINGS)
    assert exact.race is None
    assert found.race is not None
    assert found.race.of == 3 * 4 * 48
    assert found.race.evaluations < found.race.of
    assert 2 <= found.race.finished < 3 * 4
    assert [head[:2] for head in found.heads] == [head[:2] for head in exact.heads]
    np.testing.assert_allclose([w for *_, w in found.heads], [w for *_, w in exact.heads], rtol=1e-4)
    assert found.base == pytest.approx(exact.base, rel=1e-6)
    np.testing.assert_allclose(found.importance, exact.importance, rtol=1e-3, atol=1e-4 * np.max(exact.importance))


def test_scores_of_finished_heads_are_exact_and_the_others_are_of_items_seen(p: Problem) -> None:
    prepared = prepare(p.model, p.processor, p.task, p.examples)
    base, replaced = head_statistics(prepared, "logprob", Execution(batch_size=8))
    expected = head_scores(prepared, "logprob", base, replaced).by_head
    raced = race(prepared, "logprob", Execution(batch_size=8), keep=2, error=0.05, seed=1)
    scores, finished = raced.by_head, raced.finished
    assert finished is not None
    np.testing.assert_allclose(scores[finished], expected[finished], atol=1e-5)
    assert not np.allclose(scores[~finished], expected[~finished], atol=1e-5)
    drawn = np.sort(np.random.default_rng(1).permutation(48)[:32])
    of_seen = head_scores(prepared, "logprob", base[drawn], replaced[:, :, drawn]).by_head
    np.testing.assert_allclose(scores[~finished], of_seen[~finished], atol=1e-5)
    assert set(top_heads(expected, 2)[0][:2]) <= set(np.argwhere(finished).flatten().tolist())


def test_an_interrupted_race_goes_on_and_ends_in_the_same_bytes(p: Problem, tmp_path: Path) -> None:
    arguments = (p.model, p.processor, p.task, p.examples)
    calls = []

    def interrupt(*_: object) -> None:
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt

    handle = p.model.model.register_forward_hook(interrupt)
    stop = 0
    race_settings = {**SETTINGS, "heads": "race", "head_metric": "logprob"}
    attribute(*arguments, run_dir=tmp_path / "whole", **race_settings)
    stop = len(calls) * 3 // 4
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        attribute(*arguments, run_dir=tmp_path / "again", **race_settings)
    handle.remove()
    attribute(*arguments, run_dir=tmp_path / "again", **race_settings)
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")
    with pytest.raises(DataError, match=r"error was 0\.05 and now is 0\.01"):
        attribute(*arguments, run_dir=tmp_path / "again", **race_settings, error=0.01)
    with pytest.raises(DataError, match="heads was 'race' and now is None"):
        attribute(*arguments, run_dir=tmp_path / "again", **{**race_settings, "heads": "exact"})


def test_a_metric_that_is_no_mean_is_refused_by_name(tmp_path: Path) -> None:
    p = problem("llava", "caption", count=3)
    with pytest.raises(DataError, match=r"BLEU-4 is no mean over examples.*--head-metric logprob or --heads exact"):
        attribute(p.model, p.processor, p.task, p.examples, heads="race", run_dir=tmp_path / "run", **SETTINGS)
    attribute(p.model, p.processor, p.task, p.examples, heads="race", head_metric="logprob", **SETTINGS)


def test_means_of_ranking_are_taken() -> None:
    p = problem("llava", "retrieval", count=3)
    prepared = prepare(p.model, p.processor, p.task, p.examples)
    raced = race(prepared, "task", Execution(batch_size=8), keep=2, error=0.05)
    finished, costs = raced.finished, raced.race
    assert finished is not None
    assert costs is not None
    assert finished.all()  # three examples are one round
    assert costs.evaluations == costs.of


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": "fast"}, "heads must be 'exact' or 'race' or 'patch', not 'fast'"),
        ({"error": 0.0}, "error is a probability between 0 and 1, not 0.0"),
    ],
)
def test_bad_settings(p: Problem, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        attribute(p.model, p.processor, p.task, p.examples, **{**SETTINGS, **change})


def test_the_command_says_what_was_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    p = problem("llama", "text")
    p.model.save_pretrained(tmp_path / "model")
    p.processor.save_pretrained(tmp_path / "model")
    words = ["red", "blue", "green", "cat", "dog", "town"]
    lines = [
        json.dumps({"prompt": f"what is {words[i % 6]} {words[i % 5]}", "targets": [words[-i % 6]]}) for i in range(40)
    ]
    (tmp_path / "words.jsonl").write_text("\n".join(lines))
    command = [
        "attribute",
        tmp_path / "model",
        "--task",
        "words",
        "--data",
        tmp_path / "words.jsonl",
        "--out",
        tmp_path / "run",
    ]
    command += ["--method", "hones", "--heads", "race", "--error", 0.1, "--head-metric", "logprob", "--top-heads", 1]
    command += ["--top-fraction", 0.05]
    assert main([*map(str, command)]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["race"]["error"] == 0.1
    assert result["race"]["evaluations"] <= result["race"]["of"] == 12 * 40
    assert "other heads than exact's with probability 0.1 at most" in capsys.readouterr().out
