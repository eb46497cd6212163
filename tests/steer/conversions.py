"""Models with their inputs, and the logits that the runtime computes, for the tests of exports."""

import tiny_models
import torch
from tiny_models import llava_inputs, qwen2_5_vl_inputs, random_profile, text_inputs

from hones_steer import Profile, steer

INPUTS = {"llama": text_inputs, "llava": llava_inputs, "qwen2_5_vl": qwen2_5_vl_inputs, "gpt2": text_inputs}
MODELS = {**tiny_models.FULL_MATRIX, "gpt2": tiny_models.gpt2}


def few_layers(model, seed=1, task="vqa"):
    """A random profile that leaves layer 1 alone and has some scales of exactly 1, 0 and −2."""
    full = random_profile(model, seed, task)
    layers = {layer: (neurons, scales.copy()) for layer, (neurons, scales) in full.layers.items() if layer != 1}
    for _, scales in layers.values():
        scales[:3] = 1, 0, -2
    return Profile(
        task=task,
        layers=layers,
        base_model=full.base_model,
        description="a | b",
        license="apache-2.0",
        evidence={"metric": "accuracy", "n": 300, "base": 0.71, "steered": 0.75, "gain_ci95": [0.01, 0.07]},
    )


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def steered_logits(model, profile, inputs):
    """Logits of the model steered by the runtime; the model is unsteered again afterwards."""
    with steer(model, {"t": profile}) as steering, steering.task("t"):
        return logits(model, inputs)
