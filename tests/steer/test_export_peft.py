"""IA3 adapters: what PEFT computes with one is what the runtime computes, and profiles survive the round trip."""

import json
import shutil

import pytest
import tiny_models
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from steer.conversions import INPUTS, MODELS, few_layers, logits, steered_logits
from torch import nn

from hones_steer import MismatchError, ProfileError, export_lora, export_peft, import_peft, layout, register_layout
from hones_steer.errors import DataError, LayoutError
from hones_steer.profile import serialize_profile

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def model():
    return tiny_models.llama()


@pytest.fixture
def adapter(model, tmp_path):
    export_peft(few_layers(model), model, tmp_path / "ia3")
    return tmp_path / "ia3"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_peft_gives_the_logits_of_the_runtime(name, dtype, tmp_path):
    model, inputs = MODELS[name]().to(dtype), INPUTS[name]()
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    profile = few_layers(model)
    plain, expected = logits(model, inputs), steered_logits(model, profile, inputs)
    export_peft(profile, model, tmp_path / "ia3")
    assert {tensor.dtype for tensor in load_file(tmp_path / "ia3" / WEIGHTS).values()} == {torch.float32}
    adapted = PeftModel.from_pretrained(model, tmp_path / "ia3")
    assert torch.equal(logits(adapted, inputs), expected)
    assert not torch.allclose(expected, plain, atol=0.1)


def test_only_the_language_models_steered_layers_are_touched(tmp_path):
    """Qwen2.5-VL's vision tower has down_proj modules too, which a plain list of names would hit."""
    model = tiny_models.qwen2_5_vl()
    export_peft(few_layers(model), model, tmp_path / "ia3")
    adapted = PeftModel.from_pretrained(model, tmp_path / "ia3").get_base_model()
    touched = [name for name, module in adapted.named_modules() if hasattr(module, "ia3_l")]
    assert touched == [f"model.language_model.layers.{layer}.mlp.down_proj" for layer in (0, 2)]


LANGUAGE_MODEL = {
    **dict.fromkeys(["llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "internvl"], "model.language_model"),
    "idefics3": "model.text_model",
    "smolvlm": "model.text_model",
    "llama": "model",
}


@pytest.mark.parametrize(("export", "part"), [(export_peft, "ia3_l"), (export_lora, "lora_A")])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "gemma3" else pytest.mark.matrix) for name in LANGUAGE_MODEL]
)
def test_names_are_those_of_transformers_5_and_match_its_modules(name, export, part, tmp_path):
    """Loads an adapter with PEFT and with transformers; vLLM's side is in serving/engine/test_vllm_families.py."""
    model, again = tiny_models.ALL[name](), tiny_models.ALL[name]()
    export(few_layers(model), model, tmp_path / "adapter")
    expected = [f"{LANGUAGE_MODEL[name]}.layers.{layer}.mlp.down_proj" for layer in (0, 2)]
    keys = [key.removeprefix("base_model.model.") for key in load_file(tmp_path / "adapter" / WEIGHTS)]
    assert {key.partition(".down_proj")[0] + ".down_proj" for key in keys} == set(expected)
    again.load_adapter(str(tmp_path / "adapter"))
    for adapted in (PeftModel.from_pretrained(model, tmp_path / "adapter").get_base_model(), again):
        assert [at for at, module in adapted.named_modules() if hasattr(module, part)] == expected


def test_of_a_model_with_a_compiled_part_names_are_the_plain_ones(adapter, tmp_path):
    model = tiny_models.llama()
    model.model = torch.compile(model.model, backend="eager")
    export_peft(few_layers(model), model, tmp_path / "compiled")
    assert (tmp_path / "compiled" / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()


@pytest.mark.parametrize("export", [export_peft, export_lora])
def test_an_adapter_that_would_match_no_module_is_not_written(export, tmp_path, monkeypatch):
    """Layers that a registered list numbers otherwise than their names do cannot be named by number."""
    monkeypatch.setattr(layout, "_registered", {})
    model = tiny_models.llama()
    model.model.reversed = nn.ModuleList(reversed(model.model.layers))
    register_layout("llama", layers="reversed")
    with pytest.raises(LayoutError, match=r"for 2 modules, the first being .* would match 0 of the model's"):
        export(few_layers(model), model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_round_trip_changes_no_byte(model, adapter):
    profile = few_layers(model)
    assert serialize_profile(import_peft(adapter)) == serialize_profile(profile)
    assert serialize_profile(import_peft(adapter, model=model)) == serialize_profile(profile)
    assert import_peft(adapter, task="ocr").task == "ocr"


def test_the_scales_come_from_the_adapters_tensors(model, adapter):
    tensors = load_file(adapter / WEIGHTS)
    key = "base_model.model.model.layers.2.mlp.down_proj.ia3_l"
    profile = few_layers(model)
    listed = profile.layers[2][0].tolist()
    unlisted = next(neuron for neuron in range(96) if neuron not in listed)
    tensors[key][0, listed[5]], tensors[key][0, unlisted] = 7.5, 0.25
    save_file(tensors, adapter / WEIGHTS)
    with pytest.warns(UserWarning, match="evidence is left out"):
        changed = import_peft(adapter)
    scales = dict(zip(*changed.layers[2], strict=True))
    assert (scales[listed[5]], scales[unlisted]) == (7.5, 0.25)
    assert len(scales) == len(listed) + 1
    assert serialize_profile(changed) != serialize_profile(profile)
    assert (changed.evidence, changed.method["changed_from"]) == ({}, profile.digest)


def train(model, folder, **config):
    """An adapter as PEFT trains and saves it: random factors near 1."""
    adapted = get_peft_model(model, IA3Config(**config))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "ia3_l" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    adapted.save_pretrained(folder)
    return adapted


def test_an_adapter_trained_with_peft_becomes_a_profile(model, tmp_path):
    inputs = INPUTS["llama"]()
    adapted = train(model, tmp_path / "ia3", target_modules=["down_proj"], feedforward_modules=["down_proj"])
    expected = logits(adapted, inputs)
    with pytest.raises(ProfileError, match="was not exported by hones-steer; give the task's name and the model"):
        import_peft(tmp_path / "ia3")
    base = tiny_models.llama()
    profile = import_peft(tmp_path / "ia3", model=base, task="mine")
    assert (profile.task, profile.num_neurons) == ("mine", 3 * 96)
    assert torch.equal(steered_logits(base, profile, inputs), expected)


@pytest.mark.parametrize(
    ("targets", "feedforward", "message"),
    [
        (["k_proj", "v_proj", "down_proj"], ["down_proj"], r"self_attn\.k_proj, model\.layers\.\*\.self_attn\.v_proj"),
        (["down_proj"], [], r"down_proj has factors of shape \[32, 1\] where .* 96 inputs"),
        (["up_proj"], ["up_proj"], r"also scales model\.layers\.\*\.mlp\.up_proj"),
    ],
)
def test_adapters_that_scale_something_else_are_refused_by_name(model, tmp_path, targets, feedforward, message):
    train(model, tmp_path / "ia3", target_modules=targets, feedforward_modules=feedforward)
    with pytest.raises(ProfileError, match=message):
        import_peft(tmp_path / "ia3", model=tiny_models.llama(), task="mine")


def test_an_adapter_on_the_vision_tower_is_refused(tmp_path):
    train(tiny_models.qwen2_5_vl(), tmp_path, target_modules=["down_proj"], feedforward_modules=["down_proj"])
    with pytest.raises(ProfileError, match=r"also scales model\.visual\.blocks\.\*\.mlp\.down_proj"):
        import_peft(tmp_path, model=tiny_models.qwen2_5_vl(), task="mine")


def test_an_adapter_of_another_type_is_refused(model, tmp_path):
    get_peft_model(model, LoraConfig(target_modules=["down_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ProfileError, match="is a LORA adapter; only IA3"):
        import_peft(tmp_path, model=model, task="mine")


def test_a_profile_of_another_model_is_refused_both_ways(model, adapter, tmp_path):
    other = tiny_models.llama(seed=1)
    with pytest.raises(MismatchError, match="final norm"):
        export_peft(few_layers(model), other, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(MismatchError, match="final norm"):
        import_peft(adapter, model=other)
    export_peft(few_layers(model), other, tmp_path / "other", allow_mismatch=True)


def test_a_folder_that_holds_something_is_left_alone(model, adapter):
    before = {file.name: file.read_bytes() for file in adapter.iterdir()}
    with pytest.raises(DataError, match="exists already; name a new folder"):
        export_peft(few_layers(model), model, adapter)
    assert {file.name: file.read_bytes() for file in adapter.iterdir()} == before


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def edit(name, change):
    def apply(folder):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return apply


def factors(value):
    def apply(folder):
        tensors = load_file(folder / WEIGHTS)
        next(iter(tensors.values()))[0, 3] = value
        save_file(tensors, folder / WEIGHTS)

    return apply


DAMAGE = {
    "no adapter": (empty, "holds no adapter_config.json"),
    "no tensors": (lambda folder: (folder / WEIGHTS).unlink(), "holds no adapter_model.safetensors"),
    "truncated": (lambda folder: (folder / WEIGHTS).write_bytes(b"\x10"), "cannot be read"),
    "no JSON": (lambda folder: (folder / "hones_profile.json").write_text("{"), "is not valid JSON"),
    "no digest": (edit("hones_profile.json", lambda content: content.pop("digest")), "hones_profile.json is damaged"),
    "other layers": (edit("hones_profile.json", lambda content: content["modules"].pop("0")), "different FFNs"),
    "bad neuron": (
        edit("hones_profile.json", lambda content: content["neurons"]["0"].append(96)),
        "lists neurons beyond layer 0's 96",
    ),
    "bad metadata": (
        edit("hones_profile.json", lambda content: content["metadata"].pop("task")),
        "lacks the key 'task'",
    ),
    "NaN": (factors(float("nan")), "scales must be finite"),
    "huge": (factors(1e6), "at most 100 in magnitude"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_adapter_is_named(adapter, damage, message):
    damage(adapter)
    with pytest.raises(ProfileError, match=message) as caught:
        import_peft(adapter)
    assert str(adapter) in str(caught.value)


def test_the_card_says_what_it_is(adapter):
    text = (adapter / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\n")
    assert "library_name: peft" in text
    assert "| vqa | accuracy | 300 | 0.71 | 0.75 | [0.01, 0.07] |" in text
    assert "a \\| b" in text


def test_a_quantized_base_can_carry_it(model, tmp_path):
    """Only the names of the modules are needed, so the weights may be anything."""
    profile = few_layers(model)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight = nn.Parameter(layer.mlp.down_proj.weight.to(torch.float8_e4m3fn), False)
    export_peft(profile, model, tmp_path / "ia3")
    assert import_peft(tmp_path / "ia3") == profile
