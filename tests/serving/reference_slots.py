"""Slow twins of the scaling in a step, written plainly: one token and one neuron list at a time, no tables."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hones_steer import Profile


def scale_tokens(z: Tensor, slots: Sequence[int], profiles: Mapping[int, Profile], layer: int) -> Tensor:
    """FFN activations `[tokens, I]` with token i scaled by the profile in slots[i]; a slot without one changes nothing.

    The product is taken in float32 and rounded once to z's own type.
    """
    out = z.clone()
    for token, slot in enumerate(slots):
        if slot in profiles and layer in profiles[slot].layers:
            neurons, scales = profiles[slot].layers[layer]
            for neuron, value in zip(neurons.tolist(), scales.tolist(), strict=True):
                out[token, neuron] = (z[token, neuron].float() * torch.tensor(value)).to(z.dtype)
    return out


def scale_choices(
    z: Tensor, choices: Tensor, slots: Sequence[int], profiles: Mapping[int, Profile], layer: int
) -> Tensor:
    """Activations of routed experts `[tokens * choices, I]`, of one token after the other and in it by its choices.

    `choices` `[tokens, choices]` has the experts of each token; the rest is as in `scale_tokens`.
    """
    out = z.clone()
    each = choices.shape[1]
    for row in range(len(z)):
        token, expert = row // each, int(choices[row // each, row % each])
        if slots[token] in profiles and (layer, expert) in profiles[slots[token]].ffns:
            neurons, scales = profiles[slots[token]].ffns[layer, expert]
            for neuron, value in zip(neurons.tolist(), scales.tolist(), strict=True):
                out[row, neuron] = (z[row, neuron].float() * torch.tensor(value)).to(z.dtype)
    return out
