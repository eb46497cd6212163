"""LoRA adapters: the sum that PEFT computes with one is what the runtime multiplies, up to rounding."""

import json

import numpy as np
import pytest
import tiny_models
import torch
from peft import PeftModel
from reference_steering import down_projections
from safetensors.torch import load_file
from steer.conversions import INPUTS, MODELS, few_layers, logits, steered_logits
from tiny_models import random_profile
from torch import nn

from hones_steer import (
    LayoutError,
    MismatchError,
    Profile,
    ProfileError,
    export_lora,
    export_peft,
    import_peft,
)


@pytest.fixture
def model():
    return tiny_models.llama()


def in_dtype(inputs, dtype):
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}


@pytest.mark.parametrize("name", MODELS)
def test_peft_gives_the_logits_of_the_runtime(name, tmp_path):
    model, inputs = MODELS[name](), INPUTS[name]()
    profile = few_layers(model)
    expected = steered_logits(model, profile, inputs)
    done = export_lora(profile, model, tmp_path / "lora")
    assert done.ranks == {layer: min(int(np.sum(s != 1)), 32) for layer, (_, s) in profile.layers.items()}
    assert sorted(done.ranks.values()) == [28, 32]  # fewer and more changed neurons than the hidden size
    assert not done.truncated
    assert done.error < 1e-7
    adapted = PeftModel.from_pretrained(model, tmp_path / "lora")
    torch.testing.assert_close(logits(adapted, inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_in_bfloat16_it_is_nearer_than_bfloat16_is_to_float32(name, tmp_path):
    exact, inputs = MODELS[name](), INPUTS[name]()
    profile = few_layers(exact)
    in_float32 = steered_logits(exact, profile, inputs)
    model, inputs = exact.to(torch.bfloat16), in_dtype(inputs, torch.bfloat16)
    expected = steered_logits(model, profile, inputs)
    export_lora(profile, model, tmp_path / "lora")
    assert {tensor.dtype for tensor in load_file(tmp_path / "lora" / "adapter_model.safetensors").values()} == {
        torch.bfloat16
    }
    adapted = PeftModel.from_pretrained(model, tmp_path / "lora")
    difference = (logits(adapted, inputs) - expected).abs().max()
    assert difference <= (expected - in_float32).abs().max()


def test_any_reader_scales_by_one(model, tmp_path):
    """Readers that know no patterns divide lora_alpha by r; others divide each layer's alpha by its rank."""
    done = export_lora(few_layers(model), model, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == max(done.ranks.values())
    assert config["alpha_pattern"] == config["rank_pattern"]
    assert list(config["rank_pattern"].values()) == list(done.ranks.values())


def deltas(folder):
    """The product B A `[hidden, I]` of each layer."""
    tensors = load_file(folder / "adapter_model.safetensors")
    names = sorted({key.rpartition(".lora_")[0] for key in tensors})
    layers = [int(name.split(".layers.")[1].split(".")[0]) for name in names]
    pairs = [(tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]) for name in names]
    return {layer: b @ a for layer, (a, b) in zip(layers, pairs, strict=True)}


def test_above_the_highest_rank_it_is_refused_or_truncated_with_the_error_stated(model, tmp_path):
    profile = few_layers(model)
    with pytest.raises(ProfileError, match=r"layer 2 needs rank 32 .* --truncate svd, or export IA3"):
        export_lora(profile, model, tmp_path / "lora", max_rank=30)
    assert list(tmp_path.iterdir()) == []
    done = export_lora(profile, model, tmp_path / "lora", max_rank=30, truncate="svd")
    assert done.ranks == {0: 28, 2: 30}
    neurons, scales = profile.layers[2]
    exact = torch.zeros(32, 96)
    columns = torch.tensor(neurons.copy())
    exact[:, columns] = down_projections(model)[2].weight.detach()[:, columns] * (torch.tensor(scales.copy()) - 1)
    error = float((deltas(tmp_path / "lora")[2] - exact).norm() / exact.norm())
    assert done.error == pytest.approx(error, rel=1e-3)
    # Nothing of this rank comes nearer (Eckart-Young).
    assert error == pytest.approx(float(torch.linalg.svdvals(exact)[30:].norm() / exact.norm()), rel=1e-3)
    assert f"{done.error:.2%}" in (tmp_path / "lora" / "README.md").read_text(encoding="utf-8")


def one_layer(model, neurons, scales):
    """A profile that changes these neurons of layer 1."""
    layers = {1: (np.array(neurons, dtype=np.int32), np.array(scales, dtype=np.float32))}
    return Profile("vqa", layers, random_profile(model, 1).base_model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("count", "max_rank"), [(8, 512), (60, 512), (60, 20)], ids=["one-hot", "eye", "svd"])
def test_the_error_stated_is_that_of_the_tensors_written(model, tmp_path, dtype, count, max_rank):
    model.to(dtype)
    rng = np.random.default_rng(0)
    neurons, scales = np.arange(count), rng.uniform(-3, 3, count)
    profile = one_layer(model, neurons, scales)
    done = export_lora(profile, model, tmp_path / "lora", max_rank=max_rank, truncate="svd")
    weight = down_projections(model)[1].weight.detach().double()
    exact = torch.zeros_like(weight)
    exact[:, :count] = weight[:, :count] * (torch.tensor(profile.layers[1][1].copy()).double() - 1)
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    a, b = (next(t for key, t in tensors.items() if f".lora_{letter}." in key).double() for letter in "AB")
    assert done.error == pytest.approx(float((b @ a - exact).norm() / exact.norm()), rel=1e-6)
    assert done.error > 0
    assert done.truncated == (max_rank == 20)
    stated = f"{done.error:.2%}" if done.truncated else f"{done.error:.1g}"
    assert f"off by up to {stated} (relative Frobenius norm)" in (tmp_path / "lora" / "README.md").read_text()


@pytest.mark.parametrize(("count", "options"), [(2, {}), (60, {}), (60, {"max_rank": 20, "truncate": "svd"})])
def test_a_scale_beyond_float16_is_refused(model, tmp_path, count, options):
    model.half()
    with torch.no_grad():
        down_projections(model)[1].weight[3, 1] = 1000
    profile = one_layer(model, range(count), [2.0, 100.0, *[0.5] * (count - 2)])
    message = r"layers\.1.*: neuron 1 with scale 100 goes beyond float16 \(65504 at most\); lower the scale, load .*IA3"
    with pytest.raises(ProfileError, match=message):
        export_lora(profile, model, tmp_path / "lora", **options)
    assert list(tmp_path.iterdir()) == []
    export_peft(profile, model, tmp_path / "ia3")  # its factors are float32's
    assert import_peft(tmp_path / "ia3") == profile
    model.to(torch.bfloat16)
    assert export_lora(profile, model, tmp_path / "lora", **options).error < 0.5


def test_a_truncation_beyond_float16_is_refused_though_each_change_is_not(model, tmp_path):
    model.half()
    with torch.no_grad():
        down_projections(model)[1].weight[:, :60] = 600  # the first singular vector adds all of them up
    profile = one_layer(model, range(60), [100.0] * 60)
    with pytest.raises(ProfileError, match=r"layers\.1.*: truncated, scales up to 100 go beyond float16; lower"):
        export_lora(profile, model, tmp_path / "lora", max_rank=20, truncate="svd")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_zero_have_no_error(model, tmp_path):
    with torch.no_grad():
        down_projections(model)[1].weight[:, :2] = 0
    done = export_lora(one_layer(model, range(2), [2.0, 3.0]), model, tmp_path / "lora", max_rank=1, truncate="svd")
    assert done.error == 0


def test_scales_of_one_take_no_rank(model, tmp_path):
    full = random_profile(model, 1)
    layers = {layer: (neurons, np.ones_like(scales)) for layer, (neurons, scales) in full.layers.items()}
    with pytest.raises(ProfileError, match="every scale is 1"):
        export_lora(Profile("vqa", layers, full.base_model), model, tmp_path / "lora")
    layers[1][1][4] = 0.5
    assert export_lora(Profile("vqa", layers, full.base_model), model, tmp_path / "lora").ranks == {1: 1}


def quantize(model):
    for layer in model.model.layers:
        weight = layer.mlp.down_proj.weight.to(torch.float8_e4m3fn)
        layer.mlp.down_proj.weight = nn.Parameter(weight, requires_grad=False)


def offload(model):
    model.model.layers[0].mlp.down_proj.to("meta")


@pytest.mark.parametrize(("change", "message"), [(quantize, "is quantized"), (offload, r"offloaded \(meta\)")])
def test_weights_that_cannot_be_read_are_refused(model, tmp_path, change, message):
    profile = few_layers(model)
    change(model)
    with pytest.raises(LayoutError, match=message):
        export_lora(profile, model, tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []


def test_a_profile_of_another_model_is_refused(model, tmp_path):
    with pytest.raises(MismatchError, match="final norm"):
        export_lora(few_layers(model), tiny_models.llama(seed=1), tmp_path / "lora")


def test_nonsense_is_refused(model, tmp_path):
    for options in ({"max_rank": 0}, {"truncate": "qr"}):
        with pytest.raises(ProfileError, match="give a rank of at least 1, and None or 'svd'"):
            export_lora(few_layers(model), model, tmp_path / "lora", **options)
