"""Mixtures of experts: what is counted of them offline, and what is refused by name.

That scores, importance, gradients, masking and learning equal their plain twins is in `test_equals_reference.py` and
`test_gradients.py`.
"""

from collections.abc import Callable
from typing import Any

import mixture_models
import numpy as np
import pytest
import reference
import torch
from hones_offline import attribute, evaluate
from hones_offline.attribution.baselines import (
    activation_probability,
    direct_write_in,
    gradient_activation,
    mean_activation,
)
from hones_offline.attribution.write_in import head_guided_importance, target_directions
from hones_offline.data.neurons import Bank, NeuronIndex
from hones_offline.learning.adapters import check_adapters
from hones_offline.learning.factors import FitSettings, fit_prepared
from hones_offline.running.evaluation import intervention, score
from hones_offline.running.execution import Execution
from hones_offline.running.prompts import Prepared, prepare
from problems import Problem, problem, some_ffns, some_heads

from hones_steer import load_profile, save_profile, steer
from hones_steer.errors import DataError, LayoutError
from hones_steer.ffns import Ffn, FfnRun
from hones_steer.layout import find_layout

INDEX = NeuronIndex((FfnRun(0, 1, dense=5), FfnRun(1, 2), FfnRun(2, 3, shared=4, experts=3, expert_width=2)))


@pytest.fixture(params=["qwen3_moe", "deepseek_v3", "gpt_oss", "llama4"], scope="module")
def case(request: pytest.FixtureRequest) -> tuple[Problem, Prepared]:
    p = problem(request.param, "text")
    return p, prepare(*asked(p))


def asked(p: Problem) -> tuple[Any, ...]:
    return p.model, p.processor, p.task, p.examples


def close(found: Any, expected: Any) -> None:
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * float(np.abs(expected).max()))


# Banks


def test_neurons_are_numbered_ffn_after_ffn() -> None:
    assert INDEX.size == 15
    assert INDEX.widths == (5, 0, 10)
    assert list(INDEX.groups.items()) == [
        (Ffn(0, "dense"), slice(0, 5)),
        (Ffn(2, "shared"), slice(5, 9)),
        (Ffn(2, "experts"), slice(9, 15)),
    ]
    bank = INDEX.bank(np.array([1, 4, 6, 10, 13, 14]))
    assert bank.to_json() == {"0": [1, 4], "2.shared": [1], "2.0": [1], "2.2": [0, 1]}
    assert bank.numbers(INDEX).tolist() == [1, 4, 6, 10, 13, 14]
    assert (bank.in_layer(0), bank.in_layer(1), bank.in_layer(2)) == (2, 0, 4)
    assert Bank.from_json(bank.to_json()).digest == bank.digest
    positions = {ffn: (own.tolist(), places.tolist()) for ffn, (own, places) in bank.positions(INDEX).items()}
    assert positions[Ffn(2, "experts")] == ([1, 4, 5], [3, 4, 5])
    assert bank.only(np.arange(6) >= 4).to_json() == {"2.2": [0, 1]}


def test_a_random_bank_has_as_many_of_each_expert() -> None:
    bank = Bank({0: [0, 1], (2, 2): [0], (2, "shared"): [1, 2, 3]})
    draws = [bank.random(INDEX, seed) for seed in range(20)]
    assert all({key: len(own) for key, own in drawn.items()} == {0: 2, (2, 2): 1, (2, "shared"): 3} for drawn in draws)
    assert {tuple(drawn[2, 2]) for drawn in draws} == {(0,), (1,)}


@pytest.mark.parametrize(
    ("ffns", "message"),
    [
        (
            {(2, 3): [0]},
            "the bank names layer 2's expert 3, but that layer of the model has 3 experts of 2 neurons and a",
        ),
        ({2: [0]}, "the bank names layer 2, but that layer of the model has 3 experts"),
        ({(0, 1): [0]}, "the bank names layer 0's expert 1, but that layer of the model has a dense FFN of 5 neurons"),
        ({(2, 1): [2]}, r"the bank's layer 2's expert 1 names neurons outside \[0, 2\)"),
        ({(2, "experts"): [0]}, "the bank names an FFN that is none: layer 2 has no FFN 'experts'"),
    ],
)
def test_a_bank_of_other_ffns_is_refused(ffns: dict[Any, list[int]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Bank(ffns).check(INDEX)


# What is counted


def test_baselines_equal_their_plain_twins_in_any_batch_size(case: tuple[Problem, Prepared]) -> None:
    p, prepared = case
    every = [z.numpy() for z in reference.activations(*asked(p))]
    unchosen = [int((z == 0).sum()) for z in every]
    assert min(unchosen) >= 2 * 48  # of two experts of four in a layer
    activity, gradients = np.mean([abs(z) for z in every], axis=0), reference.gradient_activation(*asked(p))
    directions, written = target_directions(prepared), reference.mean_write_in(*asked(p))
    for batch_size in (1, 3):
        close(mean_activation(prepared, Execution(batch_size)), activity)
        close(gradient_activation(prepared, Execution(batch_size)), gradients)
        close(direct_write_in(prepared, directions, Execution(batch_size)), written)


def test_an_experts_neurons_are_active_where_the_expert_is_chosen() -> None:
    for architecture in ("qwen3_moe", "deepseek_v3", "llama4", "nemotron_h_moe"):
        p = problem(architecture, "text")
        prepared, expected = prepare(*asked(p)), reference.activation_probability(*asked(p))
        for batch_size in (1, 3):
            close(activation_probability(prepared, Execution(batch_size)), expected)


def test_the_positive_part_of_each_example(case: tuple[Problem, Prepared]) -> None:
    p, prepared = case
    units, heads = target_directions(prepared), some_heads(prepared)
    expected = reference.importance_by_example(*asked(p), heads, [unit.detach() for unit in units])
    for execution in (Execution(9), Execution(2, memory_gb=1e-9)):
        close(head_guided_importance(prepared, units, heads, execution, positive_part="example"), expected)


def test_the_router_chooses_anew_under_an_intervention(case: tuple[Problem, Prepared]) -> None:
    p, prepared = case
    inputs = reference.prompt_inputs(p.processor, p.examples[-1], p.task.prompts(p.examples[-1])[0])
    index = NeuronIndex.of(prepared.decoder.layout)
    below = index.bank(np.arange(index.layer(2).start))
    chosen = []
    for mask in (None, below):
        with torch.no_grad(), intervention(prepared, mask=mask), reference.choices_recorded(p.model) as choices:
            p.model(**inputs)
        chosen.append(choices[2] > 0)
    assert not torch.equal(*chosen)


def test_what_is_learned_steers_the_model_alike_in_both_runtimes(case: tuple[Problem, Prepared], tmp_path: Any) -> None:
    p, prepared = case
    bank = Bank({ffn: np.arange(3, 40) for ffn in some_ffns(prepared)})
    profile = fit_prepared(prepared, bank, FitSettings(epochs=1, lr=0.5), Execution())
    save_profile(profile, tmp_path / "a.safetensors")
    assert load_profile(tmp_path / "a.safetensors") == profile
    assert [*profile.ffns] == sorted(bank, key=lambda key: Ffn.of(key).order)
    inputs = reference.prompt_inputs(p.processor, p.examples[0], p.task.prompts(p.examples[0])[0])
    with torch.no_grad():
        plain = p.model(**inputs).logits
        with intervention(prepared, steering=profile):
            offline = p.model(**inputs).logits
        with steer(p.model, {"a": profile}) as steering, steering.task("a"):
            expected = p.model(**inputs).logits
        assert torch.equal(p.model(**inputs).logits, plain)
    torch.testing.assert_close(offline, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(offline, plain, atol=1e-3)


def test_gradient_checkpointing_learns_the_same() -> None:
    prepared = prepare(*asked(problem("qwen3_moe", "text")))
    bank = Bank({ffn: np.arange(3, 9) for ffn in some_ffns(prepared)})
    plain, checkpointed = (
        fit_prepared(prepared, bank, FitSettings(epochs=1, lr=1e-2, gradient_checkpointing=flag), Execution())
        for flag in (False, True)
    )
    for ffn in plain.ffns:
        np.testing.assert_allclose(plain.ffns[ffn][1], checkpointed.ffns[ffn][1], atol=1e-5)


def test_the_other_implementation_gives_the_same() -> None:
    p = problem("qwen3_moe", "text")
    expected = attribute(*asked(p), head_metric="logprob", batch_size=3)
    p.model.set_experts_implementation("batched_mm")
    found = attribute(*asked(p), head_metric="logprob", batch_size=3)
    close(found.importance, expected.importance)
    assert evaluate(*asked(p), mask=found.bank).outputs == evaluate(*asked(p), mask=expected.bank).outputs


def test_a_shared_experts_own_gate_weighs_what_it_writes() -> None:
    p = problem("qwen3_5_moe", "text")
    prepared = prepare(*asked(p))
    written, every = reference.mean_write_in(*asked(p)), prepared.decoder.layout.layers
    for batch_size in (1, 3):
        close(direct_write_in(prepared, target_directions(prepared), Execution(batch_size)), written)
    close(attribute(*asked(p), head_metric="logprob", batch_size=3).importance, reference.fisher(*asked(p)))
    assert all(layer.shared_gate is not None for layer in every)
    assert all(layer.shared_gate is None for layer in find_layout(mixture_models.deepseek_v3()).layers)


# What is refused


def eager(p: Problem) -> None:
    p.model.set_experts_implementation("eager")


def other_gate(p: Problem) -> None:
    """Gives the first layer's shared expert a gate of another name."""
    block = p.model.model.layers[0].mlp
    gate = block.shared_scale = block.shared_expert_gate
    del block.shared_expert_gate
    vars(block)["shared_expert_gate"] = gate


@pytest.mark.parametrize(
    ("architecture", "change", "method", "message"),
    [
        ("qwen3_moe", eager, "fisher", r"layers\.0\.mlp\.experts: the experts implementation 'eager' does not show"),
        ("gpt_oss", lambda _: None, "ap", r"layers\.0\.mlp\.experts: GptOssExperts has a gating of its own, so that"),
        (
            "qwen3_5_moe",
            other_gate,
            "hones",
            r"layers\.0: its shared expert has a gate of its own, mlp\.shared_scale, of",
        ),
        ("qwen3_5_moe", other_gate, "dvp", "use a method without write-in: fisher"),
    ],
)
def test_it_is_refused_before_any_work(
    architecture: str, change: Callable[[Problem], None], method: str, message: str, tmp_path: Any
) -> None:
    p = problem(architecture, "text")
    change(p)
    with pytest.raises(LayoutError, match=message):
        attribute(*asked(p), method=method, head_metric="logprob", run_dir=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in p.model.modules())


def test_an_implementation_chosen_later_is_refused_and_leaves_no_hook() -> None:
    p = problem("qwen3_moe", "text")
    prepared = prepare(*asked(p))
    eager(p)
    with pytest.raises(LayoutError, match="'eager' does not show"), intervention(prepared, mask=Bank({(0, 1): [3]})):
        pass
    p.model.set_experts_implementation("grouped_mm")
    with intervention(prepared, mask=Bank({(0, 1): [3]})):
        eager(p)
        with pytest.raises(LayoutError, match="was not called in a forward of the decoder"):
            score(prepared, batch_size=3)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in p.model.modules())
    assert "_apply_gate" not in vars(p.model.model.layers[0].mlp.experts)


@pytest.mark.parametrize("kind", ["ia3", "lora"])
def test_no_adapter_is_trained_beside_experts(kind: str) -> None:
    prepared = prepare(*asked(problem("qwen3_moe", "text")))
    with pytest.raises(LayoutError, match="PEFT wraps no experts that are stacked in parameters"):
        check_adapters(prepared.decoder, [kind])
