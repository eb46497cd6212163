"""Folding: the scales in the weights, and the weights back bit for bit."""

import numpy as np
import pytest
import tiny_models
import torch
from peft import LoraConfig, get_peft_model
from reference_steering import down_projections, new_tokens
from tiny_models import random_profile, text_inputs
from torch import nn

from hones_steer import Profile
from hones_steer.errors import RoutingError, StateError
from hones_steer.huggingface import steer

MODELS = {**tiny_models.FULL_MATRIX, "gpt2": tiny_models.gpt2, "opt": tiny_models.opt}


@pytest.fixture(params=MODELS)
def any_model(request):
    return MODELS[request.param]()


@pytest.fixture
def model():
    return tiny_models.llama()


def attach(model):
    return steer(model, {"a": random_profile(model, 1), "b": random_profile(model, 2)})


def logits(model):
    with torch.no_grad():
        return model(**text_inputs()).logits


def generate(model):
    inputs = text_inputs()
    return new_tokens(model.generate(**inputs, max_new_tokens=8, do_sample=False), inputs)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unfold_restores_every_bit(any_model, dtype):
    model = any_model.to(dtype)
    before, untouched = weights(model), logits(model)
    steering = attach(model)
    for expression in ("a", "a@0.5+b"):
        steering.fold(expression)
        assert not torch.equal(logits(model), untouched)
        steering.unfold()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert torch.equal(logits(model), untouched)


def test_folded_it_gives_what_the_hooks_give(any_model):
    steering = attach(any_model)
    for expression in ("a", "a@0.5+b"):
        with steering.task(expression):
            expected, tokens = logits(any_model), generate(any_model)
        steering.fold(expression)
        torch.testing.assert_close(logits(any_model), expected, atol=1e-3, rtol=1e-4)
        assert generate(any_model) == tokens
        steering.unfold()


def test_only_the_touched_columns_change(model):
    before = [module.weight.clone() for module in down_projections(model)]
    profile = random_profile(model, 1)
    steering = steer(model, {"a": profile})
    steering.fold("a")
    for layer, (module, original) in enumerate(zip(down_projections(model), before, strict=True)):
        changed = (module.weight != original).any(0).nonzero().flatten().tolist()
        neurons, scales = profile.layers[layer]
        assert changed == neurons[scales != 1].tolist()
        columns = torch.tensor(neurons)
        assert torch.equal(module.weight[:, columns], original[:, columns] * torch.tensor(scales))


def test_detach_unfolds(model):
    before = weights(model)
    steering = attach(model)
    steering.fold("a")
    steering.detach()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_folded_model_takes_no_task_and_a_task_no_fold(model):
    steering = attach(model)
    steering.fold("a")
    for call in (lambda: steering.task("b").__enter__(), steering.verify):
        with pytest.raises(StateError, match=r"folded into the weights; unfold\(\) it"):
            call()
    with pytest.raises(StateError, match="folded already"):
        steering.fold("b")
    steering.unfold()
    with pytest.raises(StateError, match="nothing is folded"):
        steering.unfold()
    with steering.task("a"):
        with pytest.raises(StateError, match=r"task\('a'\) is active"):
            steering.fold("b")
        logits(model)


def test_nothing_to_fold_is_refused(model):
    steering = attach(model)
    with pytest.raises(RoutingError, match="known tasks: a, b"):
        steering.fold("vqa")
    with pytest.raises(RoutingError, match="nothing to fold"):
        steering.fold("none")


class Int8Linear(nn.Module):
    """A linear layer with weights rounded to 8 bits, as a quantization library would put it in."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.abs().max() / 127
        self.register_buffer("weight", (linear.weight / self.scale).round().to(torch.int8))

    def forward(self, x):
        return x @ (self.weight.float() * self.scale).t()


def quantize(model):
    for layer in model.model.layers:
        layer.mlp.down_proj = Int8Linear(layer.mlp.down_proj)


def share(model):
    model.model.layers[2].mlp.down_proj.weight = model.model.layers[1].mlp.down_proj.weight


@pytest.mark.parametrize(("change", "message"), [(quantize, "quantization"), (share, "layers.1: .* shares its weight")])
def test_weights_that_cannot_be_changed_in_place_are_refused_untouched(model, change, message):
    with torch.no_grad():
        change(model)
    before = weights(model)
    steering = attach(model)
    with pytest.raises(StateError, match=message):
        steering.fold("a")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with steering.task("a"):
        logits(model)
    steering.verify()


def steep(model, dtype):
    """The model in `dtype`, with a large weight of neuron 7 in layer 1, and a profile that scales it by 100."""
    model.to(dtype)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 7] = 1000
    layers = {0: ([1], [2]), 1: ([5, 7], [0.5, 100])}
    identity = random_profile(model, 1).base_model
    return Profile("a", {i: (np.array(n, np.int32), np.array(s, np.float32)) for i, (n, s) in layers.items()}, identity)


def test_a_scale_beyond_float16_is_refused_untouched(model):
    steering = steer(model, {"a": steep(model, torch.float16)})
    before = weights(model)
    message = (
        r"layers\.1.*: neuron 7 with scale 100 goes beyond float16 \(65504 at most\); lower the scale, use task\(\)"
    )
    with pytest.raises(StateError, match=message):
        steering.fold("a")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(StateError, match="nothing is folded"):
        steering.unfold()
    steering.fold("a@0.5")
    assert model.model.layers[1].mlp.down_proj.weight[3, 7] == 50500 // 32 * 32  # float16's steps there


def test_bfloat16_takes_the_same_scale(model):
    steering = steer(model, {"a": steep(model, torch.bfloat16)})
    steering.fold("a")
    assert model.model.layers[1].mlp.down_proj.weight[3, 7] == torch.tensor(1e5, dtype=torch.bfloat16)


def test_weights_that_are_not_finite_already_are_not_blamed_on_the_scale(model):
    profile = steep(model, torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 5] = torch.nan
    with pytest.raises(StateError, match=r"the weights of neuron 5 are infinite or NaN before they are scaled"):
        steer(model, {"a": profile}).fold("a")


def test_eight_bit_floats_are_refused(model):
    profile = steep(model, torch.float32)
    projection = model.model.layers[1].mlp.down_proj
    projection.weight = nn.Parameter(projection.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(StateError, match=r"layers\.1.*is stored in float8_e4m3fn; use task\(\) instead of fold\(\)"):
        steer(model, {"a": profile}).fold("a")


def test_an_adapter_on_the_projection_is_refused(model):
    peft_model = get_peft_model(model, LoraConfig(target_modules=["down_proj"]))
    steering = attach(peft_model)
    with pytest.raises(StateError, match="PEFT adapter"):
        steering.fold("a")
