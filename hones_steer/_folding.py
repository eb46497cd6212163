"""Scales multiplied into the weights: W_down[:, i] · s_i has the effect of scaling z_i, at no cost per token."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from hones_steer.errors import LayoutError, StateError
from hones_steer.injection import scale
from hones_steer.layout import DecoderLayer, Layout, down_weight
from hones_steer.profile import Profile


class Folded:
    """A profile folded into a model's down-projections; only the touched columns are changed and kept.

    Raises StateError, before anything is changed, for weights that cannot be multiplied and restored in place:
    quantised, not in memory (meta, offloaded), shared with another module, sharded, or under a PEFT adapter.
    """

    def __init__(self, model: nn.Module, layout: Layout, profile: Profile) -> None:
        touched = [
            (layout.layers[index], torch.tensor(neurons, dtype=torch.int64), torch.tensor(scales))
            for index, (neurons, scales) in profile.layers.items()
        ]
        pointers = Counter(p.data_ptr() for _, p in model.named_parameters(remove_duplicate=False))
        for layer, _, _ in touched:
            _require_own_weight(layer, pointers)
        self._originals: list[tuple[DecoderLayer, Tensor, Tensor]] = []
        with torch.no_grad():
            for layer, neurons, scales in touched:
                weight = down_weight(layer)
                neurons, scales = neurons.to(weight.device), scales.to(weight.device)
                original = weight[:, neurons]
                self._originals.append((layer, neurons, original))
                weight[:, neurons] = scale(original, scales)

    def unfold(self) -> None:
        """Copy the original columns back, bit for bit."""
        with torch.no_grad():
            for layer, neurons, original in self._originals:
                down_weight(layer)[:, neurons] = original.to(down_weight(layer))
        self._originals.clear()


def _require_own_weight(layer: DecoderLayer, pointers: Counter[int]) -> None:
    if hasattr(layer.down_proj, "base_layer"):
        raise StateError(f"{layer.name}: its down-projection has a PEFT adapter; merge the adapter, or use task()")
    try:
        weight = down_weight(layer)
    except LayoutError as error:
        raise StateError(f"cannot fold: {error}, or use task()") from error
    if weight.is_meta:
        raise StateError(f"{layer.name}: its down-projection is offloaded (meta); use task() instead of fold()")
    if hasattr(weight, "to_local"):
        raise StateError(f"{layer.name}: its down-projection is sharded; use task() instead of fold()")
    if pointers[weight.data_ptr()] > 1:
        raise StateError(
            f"{layer.name}: its down-projection shares its weight with another module; use task() instead of fold()"
        )
