"""Scales multiplied into the weights: W_down[:, i] · s_i does the same as scaling z_i, at no cost per token."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from hones_steer.errors import LayoutError, StateError
from hones_steer.injection import scale
from hones_steer.layout import DecoderLayer, Layout, down_weight
from hones_steer.profile import Profile
from hones_steer.slots import layer_tensors

# Types whose columns can be multiplied in place; 8-bit floats mean nothing without their own factors.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Folded:
    """A profile folded into a model's down-projections; only the touched columns are changed and kept.

    Raises:
        StateError: weights cannot be multiplied and restored in place: they are quantized, not in memory (meta,
            offloaded), shared with another module, sharded, under a PEFT adapter, or beyond their dtype once they are
            multiplied. Nothing was changed.
    """

    def __init__(self, model: nn.Module, layout: Layout, profile: Profile) -> None:
        touched = [(layout.layers[index], *layer_tensors(profile, index)) for index in profile.layers]
        pointers = Counter(p.data_ptr() for _, p in model.named_parameters(remove_duplicate=False))
        for layer, _, _ in touched:
            _require_own_weight(layer, pointers)
        self._originals: list[tuple[DecoderLayer, Tensor, Tensor]] = []
        scaled = []
        with torch.no_grad():
            for layer, neurons, scales in touched:
                weight = down_weight(layer)
                neurons, scales = neurons.to(weight.device), scales.to(weight.device)
                original = weight[:, neurons]
                scaled.append(scale(original, scales))
                if why := not_finite(original, scaled[-1], neurons, scales):
                    raise StateError(
                        f"{layer.name}: {why}; lower the scale, use task() instead of fold(), or load the model in "
                        "bfloat16 or float32"
                    )
                self._originals.append((layer, neurons, original))
            for (layer, neurons, _), columns in zip(self._originals, scaled, strict=True):
                down_weight(layer)[:, neurons] = columns

    def unfold(self) -> None:
        """Copy the original columns back, bit for bit."""
        with torch.no_grad():
            for layer, neurons, original in self._originals:
                down_weight(layer)[:, neurons] = original.to(down_weight(layer))
        self._originals.clear()


def not_finite(before: Tensor, after: Tensor, neurons: Tensor, scales: Tensor) -> str | None:
    """Say which neuron's column `[hidden]` of `after` is infinite or NaN, and why; None if all are finite.

    `before` and `after` are the columns `[hidden, k]` before and after scaling, `neurons` and `scales` are `[k]`.
    """
    columns = (~after.isfinite()).any(0).nonzero().flatten()
    if not len(columns):
        return None
    first = int(columns[0])
    if not before[:, first].isfinite().all():
        return f"the weights of neuron {int(neurons[first])} are infinite or NaN before they are scaled"
    dtype, largest = str(after.dtype).removeprefix("torch."), torch.finfo(after.dtype).max
    return f"neuron {int(neurons[first])} with scale {float(scales[first]):g} goes beyond {dtype} ({largest:g} at most)"


def _require_own_weight(layer: DecoderLayer, pointers: Counter[int]) -> None:
    if hasattr(layer.down_proj, "base_layer"):
        raise StateError(f"{layer.name}: its down-projection has a PEFT adapter; merge the adapter, or use task()")
    try:
        weight = down_weight(layer)
    except LayoutError as error:
        raise StateError(f"cannot fold: {error}, or use task()") from error
    if weight.dtype not in FLOATS:
        dtype = str(weight.dtype).removeprefix("torch.")
        raise StateError(f"{layer.name}: its down-projection is stored in {dtype}; use task() instead of fold()")
    if weight.is_meta:
        raise StateError(f"{layer.name}: its down-projection is offloaded (meta); use task() instead of fold()")
    if hasattr(weight, "to_local"):
        raise StateError(f"{layer.name}: its down-projection is sharded; use task() instead of fold()")
    if pointers[weight.data_ptr()] > 1:
        raise StateError(
            f"{layer.name}: its down-projection shares its weight with another module; use task() instead of fold()"
        )
