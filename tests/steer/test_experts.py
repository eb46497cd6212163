"""Mixtures of experts: steered by row under every experts implementation, compiled, folded, verified, or refused."""

import copy
import dataclasses
import re

import mixture_models
import numpy as np
import pytest
import tiny_models
import torch
from mixture_models import MIXTURES
from peft import PeftModel
from reference_steering import generated_alone, logits_alone, new_tokens
from safetensors.torch import load_file, save_file
from tiny_models import random_profile, text_inputs
from torch import nn
from torch._dynamo.utils import counters
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hones_steer import (
    LayoutError,
    MismatchError,
    ModelIdentity,
    Profile,
    StateError,
    export_lora,
    export_peft,
    import_peft,
    load_profile,
    merge_into,
    save_profile,
    steer,
)
from hones_steer._transformers import disable_checkpointing, enable_checkpointing
from hones_steer.errors import DataError
from hones_steer.experts import IMPLEMENTATIONS
from hones_steer.ffns import FfnRun
from hones_steer.layout import find_layout

ROWS = ["a", None, "b", "a@0.5+b"]
INPUTS = text_inputs()
MASK = INPUTS["attention_mask"].bool()
FULL_MATRIX = {"qwen3_moe": text_inputs, "qwen3_vl_moe": tiny_models.qwen2_5_vl_inputs}
CASES = ["qwen3_moe", pytest.param("qwen3_vl_moe", marks=pytest.mark.matrix)]


def steered(model):
    a, b = random_profile(model, 1), random_profile(model, 2)
    return steer(model, {"a": a, "b": b}), {"a": a, "b": b, None: None, "a@0.5+b": a * 0.5 + b}


def logits(model, inputs=INPUTS):
    with torch.no_grad():
        return model(**inputs).logits


def implementations(model):
    """Each implementation that the model's experts can be run by on a CPU, chosen."""
    if not any(experts.by_interface for experts in find_layout(model).experts.values()):
        yield "eager"
        return
    for name in IMPLEMENTATIONS:
        model.set_experts_implementation(name)
        yield name


@pytest.fixture(params=MIXTURES)
def mixture(request):
    return MIXTURES[request.param][0]()


@pytest.fixture
def model():
    return mixture_models.qwen3_moe()


@pytest.mark.parametrize("name", MIXTURES)
def test_the_identity_lists_experts_shared_and_dense_ffns(name, tmp_path):
    make, runs = MIXTURES[name]
    model = make()
    identity = ModelIdentity.from_model(model)
    assert (identity.ffns, identity.intermediate_size, identity.format) == (runs, None, 2)
    profile = random_profile(model, 1)
    save_profile(profile, tmp_path / "a.safetensors")
    assert load_profile(tmp_path / "a.safetensors") == profile
    parts = {ffn.part for ffn in profile.ffns}
    assert parts >= {0, 1}
    assert ("shared" in parts) == any(run.shared for run in runs)
    assert ("dense" in parts) == any(run.dense for run in runs)


def test_every_implementation_of_transformers_for_a_cpu_is_steered():
    """The others are kernels for GPUs. One that transformers adds belongs into `IMPLEMENTATIONS` or this set."""
    assert {*ALL_EXPERTS_FUNCTIONS.valid_keys(), "eager"} == {*IMPLEMENTATIONS, "deepgemm", "sonicmoe"}


def test_rows_are_steered_alone_and_unsteered_ones_are_bit_equal(mixture):
    expected = None
    for name in implementations(mixture):
        untouched = logits(mixture)
        steering, profiles = steered(mixture)
        expected = expected or logits_alone(mixture, INPUTS, [profiles[task] for task in ROWS])
        assert torch.equal(logits(mixture), untouched), name
        with steering.task("none"):
            assert torch.equal(logits(mixture), untouched), name
        with steering.tasks(ROWS):
            mixed = logits(mixture)
        with steering.task("b"):
            uniform = logits(mixture)
        assert torch.equal(mixed[1], untouched[1]), name
        assert not torch.allclose(mixed[0], untouched[0], atol=1e-2)
        for row, alone in enumerate(expected):
            torch.testing.assert_close(mixed[row][MASK[row]], alone[MASK[row]], atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(uniform[2][MASK[2]], expected[2][MASK[2]], atol=1e-3, rtol=1e-4)
        steering.detach()
        assert torch.equal(logits(mixture), untouched), name


def test_each_expert_and_each_shared_neuron_is_its_own():
    """One neuron at a time, in every kind of FFN: a mix-up of two of them would not show in random profiles alone."""
    for make in (mixture_models.qwen3_5_moe, mixture_models.llama4, mixture_models.gpt_oss):
        model = make()
        identity = ModelIdentity.from_model(model)
        for ffn in [ffn for ffn in random_profile(model, 1).ffns if ffn.layer == 1]:
            width = identity.width(ffn)
            one = Profile("a", {ffn: (np.array([width - 1], np.int32), np.array([40.0], np.float32))}, identity)
            with steer(model, {"a": one}) as steering, steering.task("a"):
                found = logits(model)
            [alone] = logits_alone(model, tiny_models.select_row(INPUTS, 0), [one])
            torch.testing.assert_close(found[0], alone, atol=1e-3, rtol=1e-4)


def test_detached_it_is_exactly_what_it_was(mixture):
    before = {id(module): set(vars(module)) for module in mixture.modules()}
    weights = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}
    steering, _ = steered(mixture)
    assert steering.is_attached_to(mixture)
    with pytest.raises(StateError, match="a steered model cannot be copied"):
        copy.deepcopy(mixture)
    with steering.task("a"):
        logits(mixture)
    assert list(mixture.state_dict()) == list(weights)
    steering.detach()
    assert {id(module): set(vars(module)) for module in mixture.modules()} == before
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in mixture.modules())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in mixture.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folded_it_gives_the_same_and_unfolded_every_bit_is_back(mixture, dtype):
    mixture.to(dtype)
    before, untouched = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}, logits(mixture)
    steering, profiles = steered(mixture)
    with steering.task("a"):
        expected = logits(mixture)
    steering.fold("a")
    if dtype == torch.float32:
        torch.testing.assert_close(logits(mixture), expected, atol=1e-3, rtol=1e-4)
    assert not torch.equal(logits(mixture), untouched)
    changed = sum(
        int((tensor != before[name]).sum()) for name, tensor in mixture.state_dict().items() if "down_proj" in name
    )
    assert 0 < changed <= profiles["a"].num_neurons * before["lm_head.weight"].shape[1]
    assert all(torch.equal(t, before[name]) for name, t in mixture.state_dict().items() if "down_proj" not in name)
    steering.unfold()
    assert all(torch.equal(tensor, before[name]) for name, tensor in mixture.state_dict().items())


def test_folding_changes_just_the_columns_of_the_listed_experts(model):
    identity = ModelIdentity.from_model(model)
    layers = {(2, 1): (np.array([3, 40], np.int32), np.array([2, 0.5], np.float32))}
    before = model.model.layers[2].mlp.experts.down_proj.clone()
    with steer(model, {"a": Profile("a", layers, identity)}) as steering:
        steering.fold("a")
        after = model.model.layers[2].mlp.experts.down_proj
        assert (after != before).any(1).nonzero().tolist() == [[1, 3], [1, 40]]
        assert torch.equal(after[1, :, [3, 40]], before[1, :, [3, 40]] * torch.tensor([2, 0.5]))
    assert torch.equal(model.model.layers[2].mlp.experts.down_proj, before)


def test_verify_confirms_it(mixture):
    for name in implementations(mixture):
        steering, profiles = steered(mixture)
        report = steering.verify()
        assert [p.num_neurons for p in report.profiles] == [profiles[task].num_neurons for task in "ab"]
        assert all(p.largest_logit_change > 0.01 for p in report.profiles)
        assert "experts of" in report.lines()[0]
        assert next(iter(find_layout(mixture).experts.values())).implementation == name
        steering.detach()


def test_verify_finds_a_wrong_table(model):
    steering, _ = steered(model)
    hook = steering._attached.injection.experts_hooks[2]
    with torch.no_grad():
        hook.by_expert[hook.experts.count + 1] += 0.5  # profile a's, of expert 1
    with steering.task("a"):  # takes the slot that verify() will use
        pass_through = logits(model)
    assert pass_through.isfinite().all()
    with torch.no_grad():
        hook.by_expert[hook.experts.count :] += 0.5
    with pytest.raises(
        StateError, match=r"layers\.2\.mlp\.experts: what its experts compute is not scaled as 'a' says"
    ):
        steering.verify()


class TestFullMatrix:
    @pytest.fixture(params=CASES)
    def case(self, request):
        return MIXTURES[request.param][0](), FULL_MATRIX[request.param]()

    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    def test_a_mixed_batch_generates_what_each_row_does_alone(self, case, implementation):
        model, inputs = case
        model.set_experts_implementation(implementation)
        options = {"do_sample": False, "max_new_tokens": 8}
        unsteered = new_tokens(model.generate(**inputs, **options), inputs)
        steering, profiles = steered(model)
        with steering.tasks(ROWS):
            mixed = new_tokens(model.generate(**inputs, **options), inputs)
        steering.detach()
        alone = generated_alone(model, inputs, [profiles[task] for task in ROWS], max_new_tokens=8)
        assert mixed == [row[0] for row in alone]
        assert mixed[1] == unsteered[1]
        assert sum(one != other for one, other in zip(mixed, unsteered, strict=True)) == 3

    def test_beams_follow_their_prompt(self, case):
        model, inputs = case
        options = {"do_sample": False, "max_new_tokens": 5, "num_beams": 2, "num_return_sequences": 2}
        steering, profiles = steered(model)
        with steering.tasks(ROWS):
            mixed = new_tokens(model.generate(**inputs, **options), inputs)
        steering.detach()
        options.pop("do_sample")
        alone = generated_alone(model, inputs, [profiles[task] for task in ROWS], **options)
        assert mixed == [sequence for row in alone for sequence in row]

    @pytest.mark.parametrize("implementation", ["grouped_mm", pytest.param("batched_mm", marks=pytest.mark.matrix)])
    def test_compiled_it_switches_without_compiling_again(self, case, implementation):
        model, _ = case
        model.set_experts_implementation(implementation)
        inputs = {"input_ids": INPUTS["input_ids"], "use_cache": False}
        torch.compiler.reset()
        counters.clear()
        steering, _ = steered(model)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        for step, tasks in enumerate((ROWS, [None] * 4, ROWS[::-1], ["b"] * 4)):
            with steering.tasks(tasks), torch.compiler.set_stance("force_eager"):
                expected = logits(model, inputs)
            with torch._dynamo.config.patch(error_on_recompile=step > 0), steering.tasks(tasks):
                found = logits(compiled, inputs)
            torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
        assert counters["stats"]["unique_graphs"] == 1
        torch.compiler.reset()

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradients_flow_and_checkpointing_recomputes_the_same(self, case, reentrant):
        model, _ = case
        model.train()
        inputs = INPUTS | {"labels": INPUTS["input_ids"]}
        gradients = []
        steering, _ = steered(model)
        for checkpointed in (False, True):
            model.zero_grad()
            if checkpointed:
                enable_checkpointing(model, use_reentrant=reentrant)
            with steering.tasks(ROWS):
                model(**inputs, use_cache=False).loss.backward()
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        disable_checkpointing(model)
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other)
        model.zero_grad()
        model(**inputs, use_cache=False).loss.backward()
        assert not torch.allclose(model.lm_head.weight.grad, gradients[0][-1])


@pytest.mark.matrix
@pytest.mark.parametrize("name", MIXTURES)
def test_compiled_under_every_implementation_rows_are_steered_alone(name):
    model = MIXTURES[name][0]()
    inputs = {**INPUTS, "use_cache": False}
    orders = (ROWS, ROWS[::-1])
    steering, profiles = steered(model)
    steering.detach()
    expected = [logits_alone(model, INPUTS, [profiles[task] for task in tasks]) for tasks in orders]
    for implementation in implementations(model):
        torch.compiler.reset()
        steering, _ = steered(model)
        # "eager" asks which experts were chosen at all, and goes through them: that breaks the graph.
        compiled = torch.compile(model, fullgraph=implementation != "eager", backend="eager")
        for tasks, alone in zip(orders, expected, strict=True):
            with steering.tasks(tasks):
                found = logits(compiled, inputs)
            for row, of_row in enumerate(alone):
                torch.testing.assert_close(found[row][MASK[row]], of_row[MASK[row]], atol=1e-3, rtol=1e-4)
        steering.detach()
    torch.compiler.reset()


OTHERS = [pytest.param(name, marks=pytest.mark.matrix) for name in ("eager", "batched_mm")]


@pytest.mark.parametrize("part", ["experts", "activation", "forward"])
@pytest.mark.parametrize("implementation", ["grouped_mm", *OTHERS])
def test_parts_that_are_compiled_by_themselves_are_steered(model, part, implementation):
    model.set_experts_implementation(implementation)
    torch.compiler.reset()
    steering, _ = steered(model)
    with steering.tasks(ROWS):
        expected = logits(model)
    for layer in (0, 2):
        mlp = model.model.layers[layer].mlp
        if part == "experts":
            mlp.experts = torch.compile(mlp.experts, backend="eager")
        elif part == "activation":
            mlp.experts.act_fn = torch.compile(mlp.experts.act_fn, backend="eager")
        else:
            mlp.experts.forward = torch.compile(mlp.experts.forward, backend="eager")
    with steering.tasks(ROWS):
        torch.testing.assert_close(logits(model), expected, atol=1e-3, rtol=1e-4)
    torch.compiler.reset()


# What is refused


def no_hooks(model):
    return not any(m._forward_pre_hooks or m._forward_hooks or "_apply_gate" in vars(m) for m in model.modules())


def test_profiles_of_other_ffns_are_refused_and_nothing_is_attached(model):
    dense, profile = tiny_models.qwen3(), random_profile(model, 1)
    identity = profile.base_model
    more = dataclasses.replace(identity, ffns=(FfnRun(0, 1, experts=5, expert_width=48), *identity.ffns[1:]))
    wider = dataclasses.replace(identity, ffns=(FfnRun(0, 1, experts=4, expert_width=64), *identity.ffns[1:]))
    one = (np.array([50], np.int32), np.array([2], np.float32))
    few = (np.array([1], np.int32), np.array([2], np.float32))
    for target, wrong, message in (
        (
            dense,
            profile,
            "layer 0 has 4 experts of 48 neurons in the profile and a dense FFN of 96 neurons in the model",
        ),
        (
            model,
            random_profile(dense, 1),
            "layer 0 has a dense FFN of 96 neurons in the profile and 4 experts of 48 neurons",
        ),
        (
            model,
            Profile("a", {(0, 4): few}, more),
            "layer 0 has 5 experts of 48 neurons in the profile and 4 experts of",
        ),
        (
            model,
            Profile("a", {(0, 1): one}, wider),
            "layer 0 has 4 experts of 64 neurons in the profile and 4 experts of",
        ),
    ):
        with pytest.raises(MismatchError, match=message):
            steer(target, {"a": wrong}, allow_mismatch=True)
        assert no_hooks(target)


def test_an_implementation_in_one_kernel_is_refused(model):
    steering, _ = steered(model)
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        config._experts_implementation = "sonicmoe"
    message = (
        r"layers\.0\.mlp\.experts: the experts implementation 'sonicmoe' .*set_experts_implementation\('grouped_mm'\)"
    )
    with steering.task("a"), pytest.raises(LayoutError, match=message):
        logits(model)
    with pytest.raises(LayoutError, match=message), steering.task("a"):
        logits(model)
    steering.detach()
    with pytest.raises(LayoutError, match=message):
        steered(model)
    assert no_hooks(model)


def test_an_order_that_is_not_known_is_refused(model):
    kind = type(model.model.layers[0].mlp.experts)

    def descending(experts, hidden_states, *_):
        """As the eager implementation, with the last expert first and all tokens of two experts at once."""
        gate = torch.nn.functional.linear(hidden_states, experts.gate_up_proj[3])[:, :48]
        experts.act_fn(gate)
        return torch.zeros_like(hidden_states)

    model.set_experts_implementation("eager")
    steering, _ = steered(model)
    for layer in (0, 2):
        experts = model.model.layers[layer].mlp.experts
        experts.forward = descending.__get__(experts, kind)
    with (
        steering.task("a"),
        pytest.raises(StateError, match="computes its experts in an order that hones-steer does not"),
    ):
        logits(model)


def test_experts_that_ran_past_the_activation_are_noticed(model):
    steering, _ = steered(model)
    experts = model.model.layers[2].mlp.experts
    experts.forward = lambda hidden_states, *_: torch.zeros_like(hidden_states)
    logits(model)
    with (
        steering.task("a"),
        pytest.raises(StateError, match=r"layers\.2\.mlp\.experts ran without calling its experts'"),
    ):
        logits(model)


def test_experts_that_were_replaced_are_noticed(model):
    steering, _ = steered(model)
    model.model.layers[2].mlp.experts = mixture_models.qwen3_moe(1).model.layers[2].mlp.experts
    assert not steering.is_attached_to(model)
    with (
        pytest.raises(StateError, match=r"layers\.2\.mlp\.experts was replaced after steer"),
        steering.task("a"),
    ):
        logits(model)
    with pytest.raises(StateError, match=r"layers\.2\.mlp\.experts: its module was replaced after steer"):
        steering.verify()


def eight_bit(experts):
    experts.down_proj = nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)


def halved(experts):
    experts.down_proj = nn.Parameter(experts.down_proj[:2])


def parametrized(experts):
    nn.utils.parametrize.register_parametrization(experts, "down_proj", nn.Identity())


def without_activation(experts):
    del experts.act_fn


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            eight_bit,
            "its experts are quantized or otherwise packed, so their neurons cannot be scaled; load the model by",
        ),
        (halved, "its experts are sharded, or of shapes that do not belong together"),
        (parametrized, "its experts have a PEFT adapter or another parametrization"),
        (without_activation, "its experts do not run through transformers' `use_experts_implementation`"),
    ],
)
def test_experts_that_cannot_be_scaled_are_refused_by_name(model, change, message):
    change(model.model.layers[2].mlp.experts)
    where = r"model\.layers\.2\.mlp\.experts \(\w*Qwen3MoeExperts\) of model type 'qwen3_moe': "
    with pytest.raises(LayoutError, match=where + re.escape(message)):
        steer(model, {})
    assert no_hooks(model)


def test_several_shared_experts_that_are_kept_apart_are_refused():
    model = mixture_models.qwen3_5_moe()
    block = model.model.layers[1].mlp
    block.shared_expert = nn.ModuleList([block.shared_expert, copy.deepcopy(block.shared_expert)])
    with pytest.raises(
        LayoutError, match=r"its shared expert is not recognized among .*keeps all shared experts in one"
    ):
        steer(model, {})
    assert no_hooks(model)


def test_adapters_refuse_experts_in_one_sentence(model, tmp_path):
    profile = random_profile(model, 1)
    for export in (export_peft, export_lora):
        with pytest.raises(
            LayoutError, match=r"layer 0's expert 0 of model type 'qwen3_moe': .* which no adapter scales"
        ):
            export(profile, model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_attribution_refuses_what_it_cannot_read_in_one_sentence(model):
    find_layout(model).require_attribution()
    model.set_experts_implementation("eager")
    with pytest.raises(LayoutError, match=r"'eager' does not show attribution .*set_experts_implementation\('grouped"):
        find_layout(model).require_attribution()


# Exports


def test_a_scale_beyond_float16_is_refused_by_expert(tmp_path):
    """On the disk and in the model, Qwen3-VL-MoE keeps all experts of a layer in one tensor."""
    model = mixture_models.qwen3_vl_moe().half()
    with torch.no_grad():
        find_layout(model).experts[2].down_weight()[1, 5, 3] = 1000
    model.save_pretrained(tmp_path / "base")
    steep = {(2, 1): (np.array([3], np.int32), np.array([100], np.float32))}
    profile = Profile("a", steep, ModelIdentity.from_model(model))
    message = r"layers\.2\.mlp\.experts: expert 1's neuron 3 with scale 100 goes beyond float16 \(65504 at most\)"
    with steer(model, {"a": profile}) as steering, pytest.raises(StateError, match=message):
        steering.fold("a")
    with pytest.raises(DataError, match=message):
        merge_into(profile, tmp_path / "base", tmp_path / "merged")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_vl_moe", "gpt_oss", "mixtral", "deepseek_v3"])
def test_merged_it_is_the_folded_model_bit_for_bit(name, dtype, tmp_path):
    """On the disk experts are apart, stacked the other way round, stacked as in the model, or under other names."""
    saved = MIXTURES[name][0]().to(dtype)
    saved.save_pretrained(tmp_path / "base", max_shard_size="100KB")
    model, profile = type(saved).from_pretrained(tmp_path / "base").eval(), random_profile(saved, 1)
    plain = logits(model)
    steering = steer(model, {"a": profile})
    with steering.task("a"):
        expected = logits(model)
    steering.fold("a")
    assert merge_into(profile, tmp_path / "base", tmp_path / "merged") == profile.num_neurons
    merged = type(saved).from_pretrained(tmp_path / "merged").eval()
    weights = model.state_dict()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in merged.state_dict().items())
    assert torch.equal(logits(merged), logits(model))
    assert not torch.allclose(logits(merged), plain, atol=0.1)
    if dtype == torch.float32:
        torch.testing.assert_close(logits(merged), expected, atol=1e-3, rtol=1e-4)


def test_experts_that_the_disk_keeps_in_another_form_are_not_merged(model, tmp_path):
    model.save_pretrained(tmp_path / "base")
    [file] = (tmp_path / "base").glob("*.safetensors")
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.experts.3.down_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"has no model\.layers\.0\.mlp\.experts\.down_proj of its own"):
        merge_into(random_profile(model, 1), tmp_path / "base", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_dense_and_shared_ffns_of_a_mixture_go_into_ia3_alone(tmp_path):
    model = mixture_models.deepseek_v3()
    ffns = {ffn: pair for ffn, pair in random_profile(model, 1).ffns.items() if isinstance(ffn.part, str)}
    assert {ffn.part for ffn in ffns} == {"dense", "shared"}
    profile = Profile("a", ffns, ModelIdentity.from_model(model))
    with steer(model, {"a": profile}) as steering, steering.task("a"):
        expected = logits(model)
    export_peft(profile, model, tmp_path / "ia3")
    assert import_peft(tmp_path / "ia3") == profile
    adapted = PeftModel.from_pretrained(mixture_models.deepseek_v3(), tmp_path / "ia3").eval()
    torch.testing.assert_close(logits(adapted), expected, atol=1e-3, rtol=1e-4)
    with pytest.raises(LayoutError, match="'deepseek_v3' is a mixture of experts, whose `down_proj` PEFT takes for"):
        export_lora(profile, model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
