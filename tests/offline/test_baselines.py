"""The baselines and the named options of the importance equal their plain twins; what they are asked wrongly."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hones_offline import attribute
from hones_offline.attribution.baselines import (
    activation_entropy,
    activation_probability,
    direct_write_in,
    gradient_activation,
    mean_activation,
)
from hones_offline.attribution.heads import head_scores, head_statistics, top_heads, weigh
from hones_offline.attribution.write_in import Target, head_guided_importance, target_directions
from hones_offline.data.neurons import Importance, NeuronIndex
from hones_offline.running.execution import Execution
from hones_offline.running.prompts import Prepared, prepare
from problems import HEADS, Problem, every_architecture, problem, some_heads

from hones_steer.errors import DataError, LayoutError
from hones_steer.layout import ffn_gate

CASES = every_architecture(
    [
        ("llama", "text"),
        ("opt", "text"),  # no gate
        ("phi3", "text"),  # gate and up in one
        ("llava", "caption"),
        ("qwen2_5_vl", "vqa"),
        ("llava", "retrieval"),
    ],
    mixtures=False,  # in `test_mixtures.py`: their activation probability is refused
)
UNGATED = ("opt", "gpt2", "nanochat", "biogpt", "xglm", "nemotron_h")


@pytest.fixture(params=CASES, ids="-".join, scope="module")
def case(request: pytest.FixtureRequest) -> tuple[Problem, Prepared]:
    p = problem(*request.param)
    return p, prepare(p.model, p.processor, p.task, p.examples)


def close(found: Any, expected: Any) -> None:
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * float(np.abs(expected).max()))


def asked(p: Problem) -> tuple[Any, ...]:
    return p.model, p.processor, p.task, p.examples


def test_activation_probability_counts_active_gates_at_all_tokens(case: tuple[Problem, Prepared]) -> None:
    p, prepared = case
    expected = reference.activation_probability(*asked(p))
    for batch_size in (1, 3):
        close(activation_probability(prepared, Execution(batch_size)), expected)
    for layer in prepared.decoder.layout.with_ffn:
        gate = ffn_gate(layer)
        assert (gate is None) == (p.model.config.get_text_config().model_type in UNGATED)


@pytest.mark.parametrize("method", ["ap", "hones", "ma"])
def test_only_active_neurons_need_a_gate_that_is_told(method: str, tmp_path: Any) -> None:
    p = problem("llama", "text")
    for layer in p.model.model.layers:
        layer.mlp.act_fn = torch.nn.Sigmoid()
    run = partial(attribute, *asked(p), method=method, head_metric="logprob", run_dir=tmp_path / "run")
    if method != "ap":
        run()
        return
    with pytest.raises(LayoutError, match=r"model\.layers\.0: .* use a method other than ap and ape"):
        run()
    assert list(tmp_path.iterdir()) == []


def test_mean_activation_reads_z_at_the_last_prompt_token(case: tuple[Problem, Prepared]) -> None:
    p, prepared = case
    every = [z.numpy() for z in reference.activations(*asked(p))]
    close(mean_activation(prepared, Execution(batch_size=3)), np.mean([abs(z) for z in every], axis=0))


def test_the_write_in_alone_in_all_directions(case: tuple[Problem, Prepared]) -> None:
    p, prepared = case
    directions: dict[Target, Any] = {
        "paper": reference.directions,
        "centred": reference.centred_directions,
    }
    for target, of in directions.items():
        found = direct_write_in(prepared, target_directions(prepared, target), Execution(batch_size=3))
        close(found, reference.mean_write_in(*asked(p), units=[u.detach() for u in of(*asked(p))]))


def test_gradient_times_activation(case: tuple[Problem, Prepared]) -> None:
    p, prepared = case
    expected = reference.gradient_activation(*asked(p))
    assert all(parameter.grad is None for parameter in p.model.parameters())
    close(gradient_activation(prepared, Execution(batch_size=3)), expected)
    assert all(parameter.grad is None for parameter in p.model.parameters())


def test_the_positive_part_of_each_example(case: tuple[Problem, Prepared]) -> None:
    p, prepared = case
    units = target_directions(prepared)
    plain = head_guided_importance(prepared, units, some_heads(prepared), Execution(batch_size=9))
    found = head_guided_importance(
        prepared, units, some_heads(prepared), Execution(batch_size=9), positive_part="example"
    )
    close(found, reference.importance_by_example(*asked(p), some_heads(prepared), [u.detach() for u in units]))
    found, plain = np.asarray(found), np.asarray(plain)
    assert (found >= plain - 1e-6).all()  # the positive part is convex
    assert (found > plain + 1e-6).any()
    tight = Execution(batch_size=2, memory_gb=1e-9)
    small = head_guided_importance(prepared, units, some_heads(prepared), tight, positive_part="example")
    close(small, found)


def test_targets_that_differ_have_contrastive_directions() -> None:
    p = problem("llama", "text")
    p.examples = [
        type(e)(e.id, e.prompt, (answer,), e.image)
        for e, answer in zip(p.examples, ["red cat", "a blue dog", "small town", "big", "red cat"], strict=True)
    ]
    prepared = prepare(p.model, p.processor, p.task, p.examples)
    found = target_directions(prepared, "contrastive")
    for got, want in zip(found, reference.contrastive_directions(*asked(p)), strict=True):
        close(got.numpy(), want.detach().numpy())
    towards = [unit.detach() for unit in reference.contrastive_directions(*asked(p))]
    close(direct_write_in(prepared, found, Execution(batch_size=3)), reference.mean_write_in(*asked(p), towards))


@pytest.mark.parametrize("asks", [("llama", "text"), ("llava", "retrieval")], ids="-".join)
def test_targets_that_are_all_the_same_have_none(asks: tuple[str, str]) -> None:
    p = problem(*asks)
    prepared = prepare(p.model, p.processor, p.task, p.examples)
    with pytest.raises(DataError, match="its 5 targets are all the same"):
        target_directions(prepared, "contrastive")


def test_ranks_as_weights_fall_evenly_to_one_share() -> None:
    assert weigh(HEADS, "score") == list(HEADS)
    assert weigh(HEADS, "rank") == [(0, 1, 1.0), (1, 3, pytest.approx(2 / 3)), (2, 0, pytest.approx(1 / 3))]


# ------------------------------------------------------------------------------------------------ entropy


def importances(tables: dict[str, Any]) -> dict[str, Importance]:
    return {
        task: Importance(NeuronIndex.dense((table.shape[1],) * len(table)), table.reshape(-1))
        for task, table in tables.items()
    }


def test_entropy_over_tasks_equals_the_plain_sum() -> None:
    rng = np.random.default_rng(0)
    tables = {task: (rng.integers(0, 9, (3, 40)) / 8).astype(np.float32) for task in ("a", "b", "c")}
    expected = reference.activation_entropy(tables)
    for task, found in activation_entropy(importances(tables)).items():
        np.testing.assert_allclose(found, expected[task], atol=1e-6)


def test_a_neuron_active_in_one_task_alone_leads_that_tasks_list_and_no_others() -> None:
    everywhere = np.full((1, 50), 0.5, dtype=np.float32)
    own = everywhere.copy()
    own[0, 7] = 1.0
    everywhere[0, 7] = 0.0
    found = {task: i.values for task, i in activation_entropy(importances({"own": own, "other": everywhere})).items()}
    assert found["own"].argmax() == 7
    assert found["own"][7] == pytest.approx(2 * np.log(2))
    assert found["other"][7] < found["own"][7]


def test_entropy_needs_two_tasks() -> None:
    with pytest.raises(DataError, match="'ape' compares tasks; give at least two"):
        activation_entropy(importances({"one": np.ones((1, 2), dtype=np.float32)}))


# --------------------------------------------------------------------------------------------- attribute


def test_attribute_takes_every_method_and_option(tmp_path: Any) -> None:
    p = problem("llama", "text")
    prepared = prepare(p.model, p.processor, p.task, p.examples)
    plain = {"top_fraction": 0.1, "head_metric": "logprob", "batch_size": 9}
    hones = {**plain, "method": "hones", "top_heads": 4}
    paper = attribute(*asked(p), **hones, run_dir=tmp_path / "paper")
    ap = attribute(*asked(p), **plain, method="ap", run_dir=tmp_path / "ap")
    close(ap.importance, activation_probability(prepared, Execution(batch_size=9)))
    assert ap.base == pytest.approx(paper.base)
    assert (ap.heads, ap.head_scores.shape, ap.bank.size) == ([], (0, 0), paper.bank.size)
    scores = head_scores(prepared, "logprob", *head_statistics(prepared, "logprob", Execution(batch_size=9))).by_head
    heads = weigh(top_heads(scores, 4), "rank")
    varied = attribute(*asked(p), **hones, target="centred", positive_part="example", head_weights="rank")
    expected = head_guided_importance(
        prepared, target_directions(prepared, "centred"), heads, Execution(batch_size=9), positive_part="example"
    )
    close(varied.importance, expected)
    again = attribute(*asked(p), **plain, run_dir=tmp_path / "ap", method="ap")
    np.testing.assert_array_equal(again.importance, ap.importance)
    with pytest.raises(DataError, match="method was 'ap' and now is 'ma'"):
        attribute(*asked(p), **plain, run_dir=tmp_path / "ap", method="ma")
    first, second = (attribute(*asked(p), **plain, method="random", seed=seed).bank for seed in (1, 2))
    assert str(first) != str(second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"method": "lape"},
            "method must be one of hones, head_grad, .*, ma, ap, random, not 'lape'",
        ),
        ({"top_heads": 4}, "method 'fisher' scores no heads; leave top_heads=4 out, or choose 'hones'"),
        ({"target": "mean"}, "target must be one of paper, contrastive, centred, not 'mean'"),
        ({"positive_part": "no"}, "positive_part must be one of mean, example, not 'no'"),
        ({"head_weights": "one"}, "head_weights must be one of score, rank, not 'one'"),
        ({"method": "ap", "target": "centred"}, "method 'ap' takes no target; leave it out"),
        ({"method": "ap", "heads": "race"}, "method 'ap' scores no heads; leave heads='race' out"),
        ({"method": "dvp", "head_weights": "rank"}, "method 'dvp' takes no head_weights; leave it out"),
    ],
)
def test_an_option_out_of_range_is_refused(tmp_path: Any, change: dict[str, Any], message: str) -> None:
    p = problem("llama", "text", count=1)
    with pytest.raises(DataError, match=message):
        attribute(*asked(p), run_dir=tmp_path / "run", **change)
    assert list(tmp_path.iterdir()) == []
