"""Models that `find_layout` recognizes, and how it refuses the rest."""

import further_models
import numpy as np
import pytest
import tiny_architectures
import tiny_models
import torch
import torch.distributed as dist
import unusual_models
from peft import LoraConfig, get_peft_model
from reference_steering import down_projections
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaModel

from hones_steer import layout as layout_module
from hones_steer.errors import LayoutError
from hones_steer.export.peft import export_peft
from hones_steer.huggingface import steer
from hones_steer.layout import down_weight, ffn_gate, find_layout, register_layout
from hones_steer.profile import ModelIdentity, Profile


@pytest.fixture(params=tiny_models.ALL)
def any_model(request):
    return tiny_models.ALL[request.param]()


@pytest.fixture
def model():
    return tiny_models.llama()


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(layout_module, "_registered", {})


def test_every_architecture(any_model):
    layout = find_layout(any_model)
    layout.require_attribution()
    assert layout.model_type == any_model.config.model_type
    assert [layer.down_proj for layer in layout.layers] == down_projections(any_model)
    assert [layer.index for layer in layout.layers] == [0, 1, 2]
    assert (layout.hidden_size, layout.intermediate_size) == (32, 96)
    for layer in layout.layers:
        assert any_model.get_submodule(layer.name) is layer.module
        assert layer.num_heads == 4
        assert layer.attn_out in set(layer.module.modules())
    assert layout.unembedding is any_model.get_output_embeddings()
    assert layout.final_norm in set(layout.decoder.children())


@pytest.mark.parametrize("architecture", ["biogpt", "xglm"])
def test_a_final_norm_of_another_name(architecture):
    layout = find_layout(further_models.FURTHER[architecture]())
    assert layout.final_norm is layout.decoder.layer_norm


def test_a_final_norm_without_a_weight_is_none_and_attribution_does_without():
    layout = find_layout(further_models.nanochat())
    layout.require_attribution()
    assert layout.final_norm is None


def test_down_weight_is_a_view_hidden_by_neurons(any_model):
    layer = find_layout(any_model).layers[1]
    weight = down_weight(layer)
    assert weight.shape == (32, 96)
    assert weight.data_ptr() == layer.down_proj.weight.data_ptr()
    z = torch.randn(5, 96)
    torch.testing.assert_close(
        z @ weight.t() + (layer.down_proj.bias if layer.down_proj.bias is not None else 0), layer.down_proj(z)
    )


def test_the_gate_goes_through_the_activation(any_model):
    """The activation is above 0 where the gate is; where there is no gate it is z itself."""
    layer = find_layout(any_model).layers[1]
    gate = ffn_gate(layer)
    (function,) = (module for module in layer.module.modules() if "activation" in type(module).__module__)
    given = {}
    function.register_forward_hook(lambda *call: given.update(activated=call[-1].flatten(0, -2)))
    if gate is None:
        layer.down_proj.register_forward_pre_hook(lambda _, args: given.update(found=args[0].flatten(0, -2)))
    else:
        gate.register_forward_hook(lambda *call: given.update(found=call[-1].flatten(0, -2)))
    with torch.no_grad():
        any_model(**tiny_models.text_inputs())
    activated, found = given["activated"], given["found"]
    assert torch.equal(activated > 0, found[:, :96] > 0)
    assert 0 < (activated > 0).float().mean() < 1


def test_a_gate_inside_a_peft_layer(model):
    peft_model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    assert ffn_gate(find_layout(peft_model).layers[0]) is model.model.layers[0].mlp.gate_proj


def test_a_gate_that_cannot_be_told_is_refused(model):
    for layer in model.model.layers:
        layer.mlp.there, layer.mlp.gate_proj = layer.mlp.gate_proj, nn.Identity()
    message = (
        r"model\.layers\.0: the gate of its FFN is not recognized among its projections mlp\.up_proj, mlp\.there, so"
    )
    with pytest.raises(LayoutError, match=message):
        ffn_gate(find_layout(model).layers[0])


def test_an_activation_that_does_not_keep_the_sign_is_refused(model):
    model.model.layers[0].mlp.act_fn = nn.Sigmoid()
    with pytest.raises(
        LayoutError, match=r"model\.layers\.0: the activation of its FFN \(Sigmoid\) does not keep the sign"
    ):
        ffn_gate(find_layout(model).layers[0])


def test_the_decoder_takes_embeddings(any_model):
    layout = find_layout(any_model)
    embeddings = any_model.get_input_embeddings()(tiny_models.text_inputs()["input_ids"])
    with torch.no_grad():
        assert layout.decoder(inputs_embeds=embeddings, use_cache=False)[0].shape == embeddings.shape


def test_inside_wrappers(model):
    compiled = find_layout(torch.compile(model, backend="eager"))
    assert [layer.name for layer in compiled.layers] == [f"model.layers.{i}" for i in range(3)]
    peft_model = get_peft_model(model, LoraConfig(target_modules=["down_proj", "o_proj"]))
    layout = find_layout(peft_model)
    layout.require_attribution()
    assert layout.layers[0].name == "model.layers.0"
    assert layout.layers[0].down_proj is model.model.layers[0].mlp.down_proj
    assert down_weight(layout.layers[0]) is model.model.layers[0].mlp.down_proj.base_layer.weight


def test_a_model_without_a_head_has_a_layout_but_cannot_be_attributed(model):
    layout = find_layout(model.model)
    assert len(layout.layers) == 3
    with pytest.raises(LayoutError, match=r"attribution needs unembedding, .*register_layout\('llama'"):
        layout.require_attribution()
    assert isinstance(layout.decoder, LlamaModel)


def test_experts_that_are_modules_of_their_own_are_refused():
    model = tiny_models.llama()
    model.model.layers[1].mlp.experts = nn.ModuleList([nn.Linear(32, 96), nn.Linear(96, 32)])
    with pytest.raises(
        LayoutError, match=r"layers\.1\.mlp\.experts \(ModuleList\) .* are not kept as transformers keeps"
    ):
        find_layout(model)


def test_models_that_are_no_decoders_are_refused():
    with pytest.raises(LayoutError, match=r"'Linear' is not recognized: no text decoder.*register_layout"):
        find_layout(nn.Linear(3, 4))


def rename(model, name):
    """Give the FFN of every layer another name."""
    for layer in model.model.layers:
        layer.add_module(name, layer.mlp)
        del layer.mlp


def test_an_unknown_name_is_found_by_shape(model):
    rename(model, "feedforward")
    layout = find_layout(model)
    assert [layer.down_proj for layer in layout.layers] == [layer.feedforward.down_proj for layer in model.model.layers]


@pytest.mark.parametrize(
    "architecture",
    ["mamba", pytest.param("falcon_mamba", marks=pytest.mark.matrix)],
)
def test_a_state_space_mixer_is_no_ffn(architecture):
    with pytest.raises(LayoutError, match=r"layers.0 \(.* has no recognized FFN, and its .*\(\w+Mixer\) is none"):
        find_layout(getattr(unusual_models, architecture)())


@pytest.mark.matrix
def test_a_layer_with_an_ffn_among_state_space_mixers_is_found():
    assert [layer.index for layer in find_layout(unusual_models.zamba()).with_ffn] == [2]


@pytest.fixture
def wide_mixer():
    """A model whose attention has another name, and more features than the hidden states."""
    model = tiny_models.llama(head_dim=16, num_key_value_heads=4)
    for layer in model.model.layers:
        layer.add_module("mixer", layer.self_attn)
        del layer.self_attn
    return model


def test_attention_of_another_name_is_no_ffn(wide_mixer):
    for layer in wide_mixer.model.layers:
        del layer.mlp
    with pytest.raises(LayoutError, match=r"no recognized FFN, and its mixer \(LlamaAttention\) is none"):
        find_layout(wide_mixer)


def test_an_ffn_is_told_from_a_mixer_beside_it(wide_mixer):
    rename(wide_mixer, "feedforward")
    layers = wide_mixer.model.layers
    assert [layer.down_proj for layer in find_layout(wide_mixer).layers] == [x.feedforward.down_proj for x in layers]


@pytest.mark.matrix
def test_an_ffn_that_mixes_tokens_first_is_found_by_name():
    model = unusual_models.rwkv()
    assert [layer.down_proj for layer in find_layout(model).layers] == [
        block.feed_forward.value for block in model.rwkv.blocks
    ]


def test_an_ffn_of_half_the_configured_width_is_not_taken_for_a_shard():
    assert find_layout(unusual_models.recurrent_gemma()).intermediate_size == 96


def test_a_decoder_beside_an_encoder_is_found():
    model = unusual_models.blip2()
    assert find_layout(model).decoder is model.language_model.model.decoder


def test_a_model_without_attention_is_steered_but_not_attributed():
    (row,) = (row for row in tiny_architectures.architectures() if row.name == "xlstm")
    layout = find_layout(tiny_architectures.build(row))
    with pytest.raises(LayoutError, match="no layer of model type 'xlstm' has attention heads"):
        layout.require_attribution()


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("blip", "text_decoder.bert"),
        ("florence2", "model.language_model.decoder"),
        ("kosmos-2", "text_model.model"),
        ("modernbert-decoder", "model"),
    ],
)
def test_a_decoder_inside_a_language_model_of_its_own_is_found(name, path):
    (row,) = (row for row in tiny_architectures.architectures() if row.name == name)
    model = tiny_architectures.build(row)
    assert find_layout(model).decoder is model.get_submodule(path)


@pytest.mark.parametrize(
    "part", ["mlp.down_proj", *(pytest.param(part, marks=pytest.mark.matrix) for part in ("mlp", ""))]
)
def test_a_compiled_part_is_steered_like_any_other(model, part):
    profile, inputs = tiny_models.random_profile(model, 1), tiny_models.text_inputs()
    with torch.no_grad():
        with steer(model, {"a": profile}) as steering, steering.task("a"):
            expected = model(**inputs).logits
        for layer in model.model.layers:
            name = f"{layer.self_attn.layer_idx}.{part}".rstrip(".")
            compiled = torch.compile(model.model.layers.get_submodule(name), backend="eager")
            model.model.layers.set_submodule(name, compiled)
        assert [layer.name for layer in find_layout(model).layers] == [f"model.layers.{i}" for i in range(3)]
        assert down_weight(find_layout(model).layers[0]).shape == (32, 96)
        with steer(model, {"a": profile}) as steering:
            steering.verify()
            with steering.task("a"):
                torch.testing.assert_close(model(**inputs).logits, expected)


@pytest.mark.parametrize(
    ("architecture", "heads", "ffns", "cached"),
    [
        ("qwen3_5_text", [None, 4, None], [True, True, True], False),
        ("nemotron_h", [None, None, 4, None], [False, True, False, True], False),
        pytest.param("lfm2", [None, 4, None], [True, True, True], False, marks=pytest.mark.matrix),
        pytest.param("bamba", [None, 4, None], [True, True, True], False, marks=pytest.mark.matrix),
        pytest.param("olmo_hybrid", [None, 4, None], [True, True, True], False, marks=pytest.mark.matrix),
        pytest.param("gemma4_shared", [4, 4, 4], [True, True, True], True, marks=pytest.mark.matrix),
    ],
)
def test_layers_without_heads_or_ffn_beside_others(architecture, heads, ffns, cached):
    layout = find_layout(further_models.FURTHER[architecture]())
    layout.require_attribution()
    assert [layer.num_heads for layer in layout.layers] == heads
    assert [layer.has_ffn for layer in layout.layers] == ffns
    assert [layer.index for layer in layout.with_ffn] == [i for i, there in enumerate(ffns) if there]
    assert layout.keeps_only_keys_and_values == cached


def test_where_some_layers_have_no_ffn_the_others_are_steered(tmp_path):
    model = further_models.nemotron_h()
    neurons = {i: (np.arange(0, 96, 3, dtype=np.int32), np.full(32, 2.0, np.float32)) for i in (1, 3)}
    profile = Profile(task="a", layers=neurons, base_model=ModelIdentity.from_model(model))
    assert (profile.base_model.num_layers, profile.base_model.intermediate_size) == (4, 96)
    inputs = tiny_models.text_inputs()
    plain = model(**inputs).logits
    expected = further_models.nemotron_h()
    with torch.no_grad():
        for i in (1, 3):
            expected.model.layers[i].mixer.down_proj.weight[:, ::3] *= 2
    with steer(model, {"a": profile}) as steering:
        assert "(2 of them have no FFN)" in steering.verify().lines()[0]
        with steering.tasks(["a", None, "a", None]):
            steered = model(**inputs).logits
        torch.testing.assert_close(steered[::2], expected(**inputs).logits[::2], rtol=1e-4, atol=1e-4)
        assert steered[1::2].equal(plain[1::2])
    assert model(**inputs).logits.equal(plain)
    wrong = Profile(task="a", layers={0: neurons[1]}, base_model=profile.base_model)
    for refused in (lambda: steer(model, {"a": wrong}), lambda: export_peft(wrong, model, tmp_path / "out")):
        with pytest.raises(LayoutError, match=r"model\.layers\.0 \(NemotronHBlock\) has no FFN"):
            refused()


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=pytest.mark.matrix) for name in ("git", "glm_moe_dsa", "falcon_h1", "gemma4_text")],
)
@pytest.mark.filterwarnings("ignore:the profile has no sketch of the final norm")  # GIT has no norm at the end
def test_a_decoder_that_takes_or_keeps_more_is_steered(architecture):
    model = getattr(unusual_models, architecture)()
    with steer(model, {"a": tiny_models.random_profile(model, 1)}) as steering:
        assert steering.verify().layers_not_run == ()


def test_an_encoder_decoder_is_refused_by_attribution(model):
    model.config.is_encoder_decoder = True
    with pytest.raises(LayoutError, match=r"'llama' is an encoder-decoder, whose prompts go to the encoder"):
        find_layout(model).require_attribution()


def test_a_configuration_that_names_two_text_decoders_is_refused(model):
    model.config.text_config, model.config.decoder = LlamaConfig(), LlamaConfig()
    with pytest.raises(LayoutError, match="configuration of model type 'llama' names no single text decoder"):
        find_layout(model)


def test_a_model_with_a_configuration_of_its_own_kind_or_none_is_identified(model):
    identity = ModelIdentity.from_model(model)
    stack = model.model
    stack.get_decoder = lambda: stack
    for config in ({"hidden_size": 32}, None):
        stack.config = config
        found = ModelIdentity.from_model(stack)
        assert (found.model_type, found.name) == ("LlamaModel", "")
        assert found.sketch == identity.sketch


def test_an_unknown_structure_is_refused_until_registered(model):
    for layer in model.model.layers:
        layer.add_module("up", nn.Linear(32, 96))
        layer.add_module("down", layer.mlp.down_proj)
        layer.add_module("other", nn.Linear(96, 32))
        del layer.mlp
    with pytest.raises(
        LayoutError, match=r"model.layers.0 \(LlamaDecoderLayer\) has no recognized FFN.*register_layout"
    ):
        find_layout(model)
    register_layout("llama", down_proj="down")
    layout = find_layout(model)
    layout.require_attribution()
    assert layout.layers[2].down_proj is model.model.layers[2].down


def test_registered_paths_are_used(model):
    register_layout(
        "llama",
        decoder="model",
        layers="layers",
        down_proj="mlp.down_proj",
        attn_out="self_attn.o_proj",
        num_heads=2,
        final_norm="norm",
        unembedding="lm_head",
    )
    layout = find_layout(model)
    assert {layer.num_heads for layer in layout.layers} == {2}
    assert layout.layers[0].attn_out is model.model.layers[0].self_attn.o_proj
    assert layout.unembedding is model.lm_head


@pytest.mark.parametrize("part", ["decoder", "layers", "down_proj", "attn_out", "final_norm", "unembedding"])
def test_a_registered_path_that_does_not_exist_is_named(model, part):
    register_layout("llama", **{part: "no.such"})
    with pytest.raises(LayoutError, match=r"names 'no.such', which .* does not have"):
        find_layout(model)


def test_a_shared_ffn_is_refused(model):
    model.model.layers[2].mlp = model.model.layers[0].mlp
    with pytest.raises(LayoutError, match=r"model\.layers\.2 and model\.layers\.0 .* share one FFN"):
        find_layout(model)


def test_an_ffn_sharded_by_tensor_parallelism_is_refused(model):
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            linear = layer.mlp.down_proj
            linear.weight = nn.Parameter(distribute_tensor(linear.weight, mesh, [Shard(1)]))
        with pytest.raises(LayoutError, match=r"holds 48 of 96 FFN neurons.*tp_plan"):
            find_layout(model)
    finally:
        dist.destroy_process_group()


def test_an_ffn_sharded_by_hand_is_refused(model):
    for layer in model.model.layers:
        layer.mlp.down_proj = nn.Linear(48, 32)
    with pytest.raises(LayoutError, match="holds 48 of 96 FFN neurons"):
        find_layout(model)
