"""Attribution patching estimates what its plain twin does, and the heads it preselects have their exact scores."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hones_offline import attribute
from hones_offline.attribution.heads import head_scores, head_statistics, top_heads
from hones_offline.attribution.patching import head_estimates, highest, preselect, slopes
from hones_offline.running.execution import Execution
from hones_offline.running.interventions import moved_heads
from hones_offline.running.prompts import Prepared, prepare
from offline.killed_run import contents
from offline.several_processes import writes_its_targets
from problems import Problem, every_architecture, problem

from hones_steer.cli import main
from hones_steer.errors import DataError, LayoutError

CASES = every_architecture(
    [
        ("llama", "text"),  # two heads share keys and values
        ("llama", "shots"),
        ("opt", "text"),
        ("gpt2", "text"),
        ("llava", "retrieval"),  # two answers of an example
        ("qwen2_5_vl", "caption"),
    ]
)
RUN = Execution(batch_size=4)
SETTINGS: dict[str, Any] = {"method": "hones", "top_heads": 2, "top_fraction": 0.05, "batch_size": 2}


def prepared_of(p: Problem) -> Prepared:
    return prepare(p.model, p.processor, p.task, p.examples)


@pytest.mark.parametrize("names", CASES, ids="-".join)
def test_estimates_equal_one_backward_pass_at_a_time(names: tuple[str, str]) -> None:
    p = problem(*names)
    prepared = prepared_of(p)
    first, half_way = (
        np.array(reference.head_slopes(p.model, p.processor, p.task, p.examples, share)) for share in (0, 0.5)
    )
    expected = np.stack([first.mean(0), abs(first).mean(0), half_way.mean(0)])
    required = [parameter.requires_grad for parameter in p.model.parameters()]
    for batch_size in (1, 4):
        found = head_estimates(prepared, Execution(batch_size=batch_size))
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.nanmax(abs(expected)))
    assert [parameter.requires_grad for parameter in p.model.parameters()] == required
    assert all(parameter.grad is None for parameter in p.model.parameters())


def test_slopes_add_up_to_what_replacing_all_heads_costs() -> None:
    """Gauss-Legendre quadrature of the way from the model to the one with every head replaced."""
    p = problem("gpt2", "text", count=3)
    prepared = prepared_of(p)
    points = zip(*np.polynomial.legendre.leggauss(8), strict=True)
    total = sum(
        weight / 2 * slopes(prepared.decoder, prepared.pairs(), (point + 1) / 2).sum() / 3 for point, weight in points
    )
    utilities = []
    for share in (0.0, 1.0):
        with torch.no_grad(), moved_heads(prepared.decoder.layout, share):
            utilities.append(reference.mean_log_probability(p.model, p.processor, p.task, p.examples))
    assert abs(utilities[0] - utilities[1]) > 0.1
    assert total == pytest.approx(utilities[0] - utilities[1], rel=0.01)


def test_the_highest_of_each_ranking_come_in_turn() -> None:
    estimates = np.array([[[9, 8, 7], [6, 5, 4]], [[9, 8, 4], [7, 6, 5]], [[1, 2, 3], [4, 5, 6]]], dtype=float)
    order = [(0, 0), (1, 2), (0, 1), (1, 1), (0, 2), (1, 0)]  # 0.0 is the first of two rankings, 0.1 their second
    for count in range(8):
        assert {(int(i), int(j)) for i, j in np.argwhere(highest(estimates, count))} == set(order[:count])


def test_heads_that_are_run_have_the_scores_of_exact_scoring_and_the_others_their_estimates() -> None:
    p = problem("llama", "text")
    prepared = prepared_of(p)
    exact = head_scores(prepared, "logprob", *head_statistics(prepared, "logprob", RUN))
    estimates = head_estimates(prepared, RUN)
    found = preselect(prepared, "logprob", RUN, keep=3, margin=0.5)
    assert found.finished is not None
    assert found.preselection is not None
    assert found.base == exact.base
    np.testing.assert_allclose(found.by_head[found.finished], exact.by_head[found.finished], atol=1e-6)
    np.testing.assert_array_equal(found.by_head[~found.finished], estimates[0].astype(np.float32)[~found.finished])
    assert not np.allclose(found.by_head[~found.finished], exact.by_head[~found.finished], atol=1e-6)
    np.testing.assert_array_equal(found.finished, highest(estimates, 5))
    costs = found.preselection
    assert (costs.pairs, costs.evaluations, costs.of, costs.finished) == (5, 5 * 5, 12 * 5, 5)


def test_with_a_margin_that_takes_in_all_heads_everything_is_exact() -> None:
    p = problem("llava", "vqa")
    prepared = prepared_of(p)
    exact = head_scores(prepared, "logprob", *head_statistics(prepared, "logprob", RUN))
    found = preselect(prepared, "logprob", RUN, keep=3, margin=100)
    np.testing.assert_array_equal(found.by_head, exact.by_head)
    assert found.finished is not None
    assert found.finished.all()


def test_a_metric_that_is_no_mean_is_scored_exactly_and_preselected_by_log_probability() -> None:
    p = writes_its_targets(problem("llava", "caption"))
    arguments = (p.model, p.processor, p.task, p.examples)
    prepared = prepared_of(p)
    exact = head_scores(prepared, "task", *head_statistics(prepared, "task", RUN)).by_head
    best = highest(head_estimates(prepared, RUN), 4)
    by_head = preselect(prepared, "task", RUN, keep=2, margin=1).by_head
    np.testing.assert_allclose(by_head[best], exact[best], atol=1e-6)
    assert np.isnan(by_head[~best]).all()
    found = attribute(*arguments, head_metric="task", heads="patch", margin=100, **SETTINGS)
    assert [head[:2] for head in found.heads] == [head[:2] for head in top_heads(exact, 2)]


@pytest.mark.parametrize("head_metric", ["task", "logprob"])
def test_heads_that_were_not_run_guide_nothing(head_metric: Any) -> None:
    p = writes_its_targets(problem("llava", "caption"))
    found = attribute(
        p.model, p.processor, p.task, p.examples, head_metric=head_metric, heads="patch", margin=0, **SETTINGS
    )
    prepared = prepared_of(p)
    run = highest(head_estimates(prepared, Execution(batch_size=2)), 2)
    assert all(run[head[:2]] for head in found.heads)


def test_an_interrupted_run_goes_on_and_ends_in_the_same_bytes(tmp_path: Path) -> None:
    p = problem("llama", "text")
    arguments = (p.model, p.processor, p.task, p.examples)
    settings = {**SETTINGS, "heads": "patch", "head_metric": "logprob"}
    calls: list[bool] = []

    def interrupt(*_: object) -> None:
        calls.append(torch.is_grad_enabled())
        if len(calls) == stop:
            raise KeyboardInterrupt

    handle = p.model.model.register_forward_hook(interrupt)
    stop = 0
    attribute(*arguments, run_dir=tmp_path / "whole", **settings)
    whole = contents(tmp_path / "whole")
    assert sum(name.startswith("estimates-") for name in whole) == 3
    to_go_back = [number for number, goes_back in enumerate(calls, 1) if goes_back]
    for number in (to_go_back[-3], len(calls) * 3 // 4):  # among the estimates, and among the heads that are run
        stop = number
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            attribute(*arguments, run_dir=tmp_path / str(number), **settings)
        estimated = sum(name.startswith("estimates-") for name in contents(tmp_path / str(number)))
        assert estimated == (1 if number == to_go_back[-3] else 3)
        stop = 0
        attribute(*arguments, run_dir=tmp_path / str(number), **settings)
        assert contents(tmp_path / str(number)) == whole
    handle.remove()
    with pytest.raises(DataError, match=r"margin was 1\.5 and now is 2"):
        attribute(*arguments, run_dir=tmp_path / "whole", **settings, margin=2)
    with pytest.raises(DataError, match="heads was 'patch' and now is None"):
        attribute(*arguments, run_dir=tmp_path / "whole", **{**settings, "heads": "exact"})


def test_gradients_that_are_not_finite_are_refused() -> None:
    p = problem("llama", "text")
    prepared = prepared_of(p)
    with torch.no_grad():
        prepared.decoder.unembedding.weight[3] = torch.inf
    with pytest.raises(DataError, match="not finite; use --dtype bfloat16 or float32, or --heads exact"):
        head_estimates(prepared, RUN)


def test_too_little_memory_and_a_model_without_a_backward_pass_are_refused_before_the_work(tmp_path: Path) -> None:
    p = problem("llama", "text")
    arguments = (p.model, p.processor, p.task, p.examples)
    with pytest.raises(DataError, match=r"memory_gb=1e-06; --memory-gb 0\.01 is enough"):
        attribute(*arguments, heads="patch", memory_gb=1e-6, run_dir=tmp_path / "little", **SETTINGS)
    with warnings.catch_warnings(action="ignore"):
        p.model.model = torch.ao.quantization.quantize_dynamic(
            p.model.model, {"layers.0.self_attn.o_proj"}, dtype=torch.float16
        )
    message = r"its model\.layers\.0\.self_attn\.o_proj .* no gradient on; .* \(with heads exact or race\)"
    with pytest.raises(LayoutError, match=message):
        attribute(*arguments, heads="patch", run_dir=tmp_path / "quantized", **SETTINGS)
    for run in ("little", "quantized"):
        assert [file.name for file in (tmp_path / run).iterdir()] == ["run.json"]


@pytest.mark.parametrize("margin", [-0.5, float("nan"), float("inf")])
def test_a_margin_that_is_no_share(margin: float) -> None:
    p = problem("llama", "text")
    with pytest.raises(DataError, match="margin is a share of top_heads, zero or more, not"):
        attribute(p.model, p.processor, p.task, p.examples, method="hones", heads="patch", margin=margin)


def test_the_command_says_what_was_saved_and_by_what_heads_were_preselected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    p = problem("llama", "text")
    p.model.save_pretrained(tmp_path / "model")
    p.processor.save_pretrained(tmp_path / "model")
    words = ["red", "blue", "green", "cat", "dog", "town"]
    lines = [json.dumps({"prompt": f"what is {word}", "targets": [words[-i]]}) for i, word in enumerate(words)]
    (tmp_path / "words.jsonl").write_text("\n".join(lines))
    command = ["attribute", tmp_path / "model", "--task", "words", "--data", tmp_path / "words.jsonl"]
    command += ["--method", "hones", "--heads", "patch", "--head-metric", "logprob"]
    command += ["--top-heads", 2, "--top-fraction", 0.05]
    assert main([*map(str, command), "--margin", "1", "--out", str(tmp_path / "run")]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["preselection"] == {
        "margin": 1.0,
        "metric": "log-probability",
        "pairs": 6,
        "evaluations": 4 * 6,
        "of": 12 * 6,
        "finished": 4,
    }
    assert "4 heads preselected by log-probability" in capsys.readouterr().out
    assert main([*map(str, command), "--margin", "-1", "--out", str(tmp_path / "other")]) == 2
    assert "margin is a share of top_heads" in capsys.readouterr().err
