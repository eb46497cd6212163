"""The runtime's scaling written plainly: one row at a time, the multiplication spelled out inside each projection.

Shares nothing with `hones_steer` but the profile: projections are found by their names, and a row's result comes
from running that row alone.
"""

from contextlib import contextmanager

import torch
from tiny_models import select_row


def down_projections(model):
    """The text decoder's FFN down-projections in layer order, by name."""
    return [
        module
        for name, module in model.named_modules()
        if name.endswith(("mlp.down_proj", "mlp.c_proj", "fc2")) and "vision" not in name and "visual" not in name
    ]


@contextmanager
def scaled(model, profile):
    """Within the block, each down-projection multiplies its input by the profile's scales; None changes nothing."""
    layers = {} if profile is None else profile.layers
    modules = down_projections(model)
    for index, (neurons, scales) in layers.items():
        module = modules[index]
        factor = torch.ones(module.weight.numel() // profile.base_model.hidden_size)
        for neuron, value in zip(neurons.tolist(), scales.tolist(), strict=True):
            factor[neuron] = value

        def forward(z, module=module, factor=factor):
            return type(module).forward(module, (z.float() * factor).to(z.dtype))

        module.forward = forward
    try:
        yield
    finally:
        for index in layers:
            del modules[index].forward


def logits_alone(model, inputs, profiles):
    """Logits `[T, V]` of each row, run alone under its profile."""
    rows = []
    for row, profile in enumerate(profiles):
        with torch.no_grad(), scaled(model, profile):
            rows.append(model(**select_row(inputs, row)).logits[0])
    return rows


def generated_alone(model, inputs, profiles, **options):
    """Generated ids of each row, run alone under its profile; a list of sequences per row."""
    rows = []
    for row, profile in enumerate(profiles):
        with scaled(model, profile):
            ids = model.generate(**select_row(inputs, row), do_sample=False, **options)
        rows.append(new_tokens(ids, inputs))
    return rows


def new_tokens(ids, inputs):
    """The generated part of `generate`'s result, as lists."""
    return ids[:, inputs["input_ids"].shape[1] :].tolist()
