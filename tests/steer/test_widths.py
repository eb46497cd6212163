"""Models whose layers differ in width: steered, folded, exported and learned like others, with profiles of format 2."""

import dataclasses

import further_models
import numpy as np
import pytest
import tiny_models
import torch
from peft import PeftModel
from reference_steering import logits_alone
from transformers import AutoModelForCausalLM

from hones_steer import (
    LayoutError,
    MismatchError,
    ModelIdentity,
    Profile,
    export_lora,
    export_peft,
    import_peft,
    load_profile,
    merge_into,
    save_profile,
    steer,
)
from hones_steer.ffns import FfnRun
from hones_steer.layout import find_layout

INPUTS = tiny_models.text_inputs()


@pytest.fixture(scope="module")
def model():
    return further_models.gemma4_wide()


@pytest.fixture(scope="module")
def profile(model):
    return tiny_models.random_profile(model, 1, "wide")


def logits(model):
    with torch.no_grad():
        return model(**INPUTS).logits


def test_the_identity_has_each_layers_width(model, profile, tmp_path):
    identity = ModelIdentity.from_model(model)
    assert (identity.intermediate_size, identity.ffns) == (None, (FfnRun(0, 2, dense=96), FfnRun(2, 3, dense=192)))
    assert find_layout(model).intermediate_size is None
    assert [layer.width for layer in find_layout(model).layers] == [96, 96, 192]
    assert max(profile.layers[2][0]) >= 96
    save_profile(profile, tmp_path / "wide.safetensors")
    assert load_profile(tmp_path / "wide.safetensors") == profile


def test_rows_of_a_mixed_batch_are_steered_alone_and_detached(model, profile):
    other, plain = profile * 0.5, logits(model)
    with steer(model, {"a": profile, "b": other}) as steering:
        assert "3 layers of 96 or 192 neurons" in steering.verify().lines()[0]
        with steering.tasks(["a", None, "b", "a@0.5"]):
            steered = logits(model)
    expected = logits_alone(model, INPUTS, [profile, None, other, other])
    for row, alone in enumerate(expected):
        torch.testing.assert_close(steered[row, row % 3 :], alone[row % 3 :], rtol=1e-4, atol=1e-4)
    assert steered[1].equal(plain[1])
    assert logits(model).equal(plain)


def test_compiled_rows_are_steered_alike(model, profile):
    with steer(model, {"a": profile}) as steering, steering.tasks(["a", None, "a", None]):
        expected = logits(model)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with torch.no_grad():
            steered = compiled(**INPUTS, use_cache=False).logits
    torch.testing.assert_close(steered, expected, rtol=1e-4, atol=1e-4)


def test_folded_exported_and_merged_it_gives_the_same(model, profile, tmp_path):
    plain = logits(model)
    with steer(model, {"a": profile}) as steering:
        with steering.task("a"):
            expected = logits(model)
        steering.fold("a")
        folded = logits(model)
        torch.testing.assert_close(folded, expected, rtol=1e-3, atol=1e-3)
    assert logits(model).equal(plain)
    export_peft(profile, model, tmp_path / "ia3")
    assert import_peft(tmp_path / "ia3") == profile
    export_lora(profile, model, tmp_path / "lora")
    for folder in ("ia3", "lora"):
        with_adapter = PeftModel.from_pretrained(further_models.gemma4_wide(), tmp_path / folder)
        torch.testing.assert_close(logits(with_adapter.eval()), expected, rtol=1e-3, atol=1e-3)
    model.save_pretrained(tmp_path / "base")
    assert merge_into(profile, tmp_path / "base", tmp_path / "merged") == profile.num_neurons
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert logits(merged).equal(folded)


def test_a_profile_of_other_widths_or_with_experts_is_refused_and_nothing_is_attached(model, profile):
    dense = further_models.gemma4_shared()
    experts = (FfnRun(0, 2, dense=96), FfnRun(2, 3, experts=4, expert_width=48))
    with_experts = Profile(
        task="a",
        layers={(2, 3): (np.array([0], np.int32), np.array([2.0], np.float32))},
        base_model=dataclasses.replace(profile.base_model, ffns=experts),
    )
    of_one_width = tiny_models.random_profile(dense, 1)
    for target, wrong, message in (
        (dense, profile, "layer 2 has a dense FFN of 192 neurons in the profile and a dense FFN of 96 neurons in the"),
        (model, of_one_width, "layer 2 has a dense FFN of 96 neurons in the profile and a dense FFN of 192 neurons in"),
        (model, with_experts, "layer 2 has 4 experts of 48 neurons in the profile and a dense FFN of 192 neurons in"),
        (dense, with_experts, "layer 2 has 4 experts of 48 neurons in the profile and a dense FFN of 96 neurons in"),
    ):
        with pytest.raises(MismatchError, match=message):
            steer(target, {"a": wrong}, allow_mismatch=True)
        with pytest.raises(MismatchError, match=message):
            export_peft(wrong, target, "nowhere", allow_mismatch=True)
        assert not any(module._forward_pre_hooks for module in target.modules())
    with pytest.raises(
        LayoutError, match=r"layer 2's expert 3 is not in model type 'gemma4_text': model\.layers\.2 has"
    ):
        find_layout(model).require_ffns(with_experts.ffns)


def test_hidden_sizes_that_differ_are_refused():
    model = tiny_models.llama()
    model.model.layers[1].mlp.down_proj = torch.nn.Linear(96, 40)
    with pytest.raises(LayoutError, match=r"hidden sizes of model type 'llama' differ .*has 32, .*has 40"):
        find_layout(model)
