"""Scales multiplied into the weights: W_down[:, i] · s_i does the same as scaling z_i, at no cost per token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hones_steer.errors import LayoutError, StateError
from hones_steer.ffn_scales import Entries
from hones_steer.ffns import Ffn
from hones_steer.injection import scale
from hones_steer.layout import Layout, Projection, down_weight
from hones_steer.profile import Profile

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
        pointers = Counter(p.data_ptr() for _, p in model.named_parameters(remove_duplicate=False))
        touched = [_columns(layout, ffn, entries, pointers) for ffn, entries in profile.ffns.groups.items()]
        self._originals: list[tuple[Columns, Tensor]] = []
        scaled = []
        with torch.no_grad():
            for columns, scales in touched:
                original, scales = columns.read(), scales.to(columns.weight.device)
                scaled.append(scale(original, scales))
                if why := not_finite(original, scaled[-1], columns.neurons, scales, columns.experts):
                    raise StateError(
                        f"{columns.name}: {why}; lower the scale, use task() instead of fold(), or load the model in "
                        "bfloat16 or float32"
                    )
                self._originals.append((columns, original))
            for (columns, _), values in zip(self._originals, scaled, strict=True):
                columns.write(values)

    def unfold(self) -> None:
        """Copy the original columns back, bit for bit."""
        with torch.no_grad():
            for columns, original in self._originals:
                columns.write(original)
        self._originals.clear()


class Columns:
    """The columns of some neurons in W_down `[hidden, I]`, or in those of several experts, `[experts, hidden, I]`.

    They are read and written as `[hidden, k]`.
    """

    def __init__(self, name: str, weight: Callable[[], Tensor], neurons: Tensor, experts: Tensor | None) -> None:
        self.name = name
        self._weight = weight  # which may be moved to another device
        self.neurons = neurons
        self.experts = experts

    @property
    def weight(self) -> Tensor:
        return self._weight()

    def read(self) -> Tensor:
        """A copy of the columns."""
        if self.experts is None:
            return self.weight[:, self.neurons]
        return self.weight[self.experts, :, self.neurons].t()

    def write(self, values: Tensor) -> None:
        """Replace the columns."""
        if self.experts is None:
            self.weight[:, self.neurons] = values.to(self.weight)
        else:
            self.weight[self.experts, :, self.neurons] = values.t().to(self.weight)


def _columns(layout: Layout, ffn: Ffn, entries: Entries, pointers: Counter[int]) -> tuple[Columns, Tensor]:
    """The columns that a profile scales in an FFN, or in all experts of a layer, and their scales `[k]`."""
    neurons, scales = torch.tensor(entries.neurons, dtype=torch.int64), torch.tensor(entries.scales)
    layer = layout.layers[ffn.layer]
    if entries.experts is None:
        [projection] = (projection for projection in layer.projections if projection.ffn == ffn)
        _require_own_weight(projection, pointers)
        return Columns(projection.name, lambda: down_weight(projection), neurons, None), scales
    experts = layer.experts
    assert experts is not None  # the profile was checked against the layout
    _require_own_memory(experts.name, "their down-projection", experts.down_weight(), pointers)
    numbers = torch.tensor(entries.experts, dtype=torch.int64)
    return Columns(experts.name, experts.down_weight, neurons, numbers), scales


def not_finite(
    before: Tensor, after: Tensor, neurons: Tensor, scales: Tensor, experts: Tensor | None = None
) -> str | None:
    """Say which neuron's column `[hidden]` of `after` is infinite or NaN, and why; None if all are finite.

    `before` and `after` are the columns `[hidden, k]` before and after scaling, `neurons` and `scales` are `[k]`, and
    so is `experts` where the neurons are of several.
    """
    columns = (~after.isfinite()).any(0).nonzero().flatten()
    if not len(columns):
        return None
    first = int(columns[0])
    neuron = f"neuron {int(neurons[first])}"
    if experts is not None:
        neuron = f"expert {int(experts[first])}'s {neuron}"
    if not before[:, first].isfinite().all():
        return f"the weights of {neuron} are infinite or NaN before they are scaled"
    dtype, largest = str(after.dtype).removeprefix("torch."), torch.finfo(after.dtype).max
    return f"{neuron} with scale {float(scales[first]):g} goes beyond {dtype} ({largest:g} at most)"


def _require_own_weight(projection: Projection, pointers: Counter[int]) -> None:
    if hasattr(projection.down_proj, "base_layer"):
        raise StateError(f"{projection.name}: its down-projection has a PEFT adapter; merge the adapter, or use task()")
    try:
        weight = down_weight(projection)
    except LayoutError as error:
        raise StateError(f"cannot fold: {error}, or use task()") from error
    _require_own_memory(projection.name, "its down-projection", weight, pointers)


def _require_own_memory(name: str, what: str, weight: Tensor, pointers: Counter[int]) -> None:
    if weight.dtype not in FLOATS:
        dtype = str(weight.dtype).removeprefix("torch.")
        raise StateError(f"{name}: {what} is stored in {dtype}; use task() instead of fold()")
    if weight.is_meta:
        raise StateError(f"{name}: {what} is offloaded (meta); use task() instead of fold()")
    if hasattr(weight, "to_local"):
        raise StateError(f"{name}: {what} is sharded; use task() instead of fold()")
    if pointers[weight.data_ptr()] > 1:
        raise StateError(f"{name}: {what} shares its weight with another module; use task() instead of fold()")
