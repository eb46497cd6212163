"""`Steering.verify` confirms a model that is steered rightly, and names the layers that it has not seen."""

import json

import pytest
import tiny_models
import torch
import unusual_models
from torch.nn import functional
from torch.nn.modules import module as torch_module

from hones_steer.cli import main
from hones_steer.errors import HonesError, RoutingError, StateError
from hones_steer.huggingface import steer
from hones_steer.profile import save_profile

IDS = torch.tensor([[10, 11, 12, 13], [14, 15, 16, 17]])


def steered(model):
    return steer(model, {"a": tiny_models.random_profile(model, 1)})


def neurons_of(steering, layers):
    profile = steering._profiles["a"]
    return sum(len(profile.layers[layer][0]) for layer in layers)


@pytest.mark.parametrize(
    "architecture",
    ["instructblip", "idefics", pytest.param("blip2", marks=pytest.mark.matrix)],
)
def test_a_model_that_needs_an_image_is_given_a_blank_one(architecture):
    steering = steered(getattr(unusual_models, architecture)())
    report = steering.verify()
    assert report.layers_not_run == ()
    assert report.profiles[0].num_neurons == neurons_of(steering, range(3))
    assert report.profiles[0].largest_logit_change > 0.01


def test_a_layer_that_text_does_not_reach_is_named_and_not_counted():
    steering = steered(unusual_models.mllama())
    report = steering.verify()
    assert report.layers_not_run == ("model.language_model.layers.1",)
    assert "model.language_model.layers.1 did not run in this test and is not verified" in "\n".join(report.lines())
    assert report.profiles[0].num_neurons == neurons_of(steering, (0, 2))


@pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated:FutureWarning")  # transformers' own
def test_given_inputs_reach_it():
    steering = steered(unusual_models.mllama())
    report = steering.verify(
        input_ids=torch.cat([torch.full((2, 1), tiny_models.IMAGE), IDS], dim=1),
        pixel_values=torch.zeros(2, 1, 1, 3, 16, 16),
        aspect_ratio_ids=torch.ones(2, 1, dtype=torch.long),
        aspect_ratio_mask=torch.ones(2, 1, 1, dtype=torch.long),
        cross_attention_mask=torch.ones(2, 5, 1, 1, dtype=torch.long),
    )
    assert report.layers_not_run == ()
    assert report.profiles[0].num_neurons == neurons_of(steering, range(3))


@pytest.mark.filterwarnings("ignore:the profile has no sketch")
def test_a_model_that_needs_more_than_a_blank_image_says_so_and_takes_it():
    steering = steered(unusual_models.kosmos2())
    with pytest.raises(StateError, match=r"Kosmos2.* does not run on a few plain tokens .*pixel_values.*verify\(\*\*"):
        steering.verify()
    positions = torch.tensor([[1, 1, 0, 0]] * 2)
    report = steering.verify(
        input_ids=IDS, pixel_values=torch.zeros(2, 3, 16, 16), image_embeds_position_mask=positions
    )
    assert report.profiles[0].num_neurons == neurons_of(steering, range(3))


def test_given_inputs_of_other_than_two_rows_are_refused():
    with pytest.raises(RoutingError, match="names 2 rows, but the model was called with 1"):
        steered(tiny_models.llama()).verify(input_ids=IDS[:1])


def test_a_layer_that_ran_past_its_down_projection_is_a_fault():
    """Fused kernels do that."""
    model = tiny_models.llama()
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: functional.linear(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), mlp.down_proj.weight)
    with pytest.raises(HonesError, match=r"model\.layers\.1"):
        steered(model).verify()


def test_nothing_of_the_test_is_left_on_the_model():
    model = unusual_models.instructblip()
    steering = steered(model)
    steering.verify()
    steering.detach()
    assert not torch_module._global_forward_pre_hooks
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_the_command_names_layers_that_did_not_run(tmp_path, capsys):
    model = unusual_models.mllama()
    model.save_pretrained(tmp_path / "model")
    path = str(tmp_path / "a.safetensors")
    save_profile(tiny_models.random_profile(model, 1), path)
    assert main(["verify", path, str(tmp_path / "model")]) == 0
    assert "model.language_model.layers.1 did not run" in capsys.readouterr().out
    assert main(["verify", path, str(tmp_path / "model"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["fits"], answer["layers_not_run"]) == (True, ["model.language_model.layers.1"])
