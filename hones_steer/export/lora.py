"""Profiles written as LoRA adapters: exact up to a rank.

LoRA adds B·A·z to W_down·z: with one-hot rows in A and B = W_down[:, i]·(s_i − 1), the sum is W_down·(s⊙z) in real
arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from hones_steer._folding import FLOATS, not_finite
from hones_steer.errors import LayoutError, ProfileError
from hones_steer.export.adapters import (
    PREFIX,
    adapter_card,
    checked_layout,
    common_settings,
    is_conv1d,
    module_pattern,
    peft_package,
    write_adapter,
)
from hones_steer.export.sidecar import module_names, sidecar_text
from hones_steer.ffns import Ffn
from hones_steer.layout import Layout, Projection, down_weight
from hones_steer.profile import Profile, StrPath
from hones_steer.slots import ffn_tensors

MAX_RANK = 512  # vLLM takes no higher rank
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_NOT_FINITE = "lower the scale, load the model in bfloat16 or float32, or export IA3"


@dataclass(frozen=True)
class LoraExport:
    """Result of `export_lora`: the rank in each layer, and by how much the change of weights is off.
    `error` is the largest ‖ΔW − BA‖ / ‖ΔW‖ (Frobenius) over the layers, of the tensors as they were written: without
    truncation it is the rounding to their dtype.
    """

    ranks: Mapping[int, int]
    error: float
    truncated: bool


def export_lora(
    profile: Profile,
    model: nn.Module,
    folder: StrPath,
    *,
    max_rank: int = MAX_RANK,
    truncate: str | None = None,
    allow_mismatch: bool = False,
) -> LoraExport:
    """Write a profile as a LoRA adapter on the down-projections, for any engine that serves LoRAs.

    A layer's rank is the number of its neurons with a scale other than 1, at most the hidden size. The tensors have
    the weights' dtype: in float32 the adapter is exact up to rounding; in bfloat16 each entry of B is off by at most
    2^-9 of itself. The result's `error` says by how much the change of weights is off.
    With `truncate="svd"` a layer above `max_rank` gets the best approximation of that rank instead of an error.

    Raises:
        ProfileError: a layer needs more than `max_rank` (and `truncate` is None), every scale is 1, or a scale takes a
            column's change beyond the weights' dtype; nothing is written.
        DataError: peft is not installed, or the folder exists or cannot be written.
        LayoutError: the FFNs are not recognized, the model is a mixture of experts, or weights are quantized or not in
            memory.
        MismatchError: the profile is another model's.
    """
    if max_rank < 1 or truncate not in (None, "svd"):
        raise ProfileError(
            f"max_rank is {max_rank} and truncate {truncate!r}; give a rank of at least 1, and None or 'svd'"
        )
    layout = checked_layout(profile, model, allow_mismatch)
    _refuse_experts(layout)
    names = module_names(model, layout)
    counts = {ffn: int(np.sum(scales != 1)) for ffn, (_, scales) in profile.ffns.items()}
    needed = {ffn: min(count, layout.hidden_size) for ffn, count in counts.items() if count}
    _check_ranks(needed, max_rank, truncate)
    projections = {projection.ffn: projection for projection in layout.projections}
    tensors, errors = {}, {}
    for ffn in needed:
        a, b, errors[ffn] = _lora_pair(profile, projections[ffn], max_rank)
        tensors[f"{PREFIX}{names[ffn]}.lora_A.weight"] = a
        tensors[f"{PREFIX}{names[ffn]}.lora_B.weight"] = b
    ranks = {ffn: min(rank, max_rank) for ffn, rank in needed.items()}
    patterns = {names[ffn]: rank for ffn, rank in ranks.items()}
    targets = {ffn: names[ffn] for ffn in ranks}
    config = peft_package().LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),  # so that a reader which knows no patterns scales by 1 as well
        rank_pattern=patterns,
        alpha_pattern=patterns,
        lora_dropout=0.0,
        target_modules=module_pattern(model, targets),
        fan_in_fan_out=is_conv1d(layout),
        **common_settings(profile),
    )
    by_layer = {ffn.layer: rank for ffn, rank in ranks.items()}  # of dense FFNs, one a layer
    result = LoraExport(by_layer, max(errors.values()), truncated=ranks != needed)
    modules = {ffn: names[ffn] for ffn in profile.ffns}
    write_adapter(
        folder, config, tensors, sidecar_text(profile, modules), adapter_card(profile, "LoRA", _lora_notes(result))
    )
    return result


def _refuse_experts(layout: Layout) -> None:
    if layout.experts:
        raise LayoutError(
            f"model type {layout.model_type!r} is a mixture of experts, whose `down_proj` PEFT takes for a parameter "
            "of its experts, so that a LoRA of other FFNs would be read as such; export IA3, or merge the profile"
        )


def _check_ranks(needed: Mapping[Ffn, int], max_rank: int, truncate: str | None) -> None:
    if not needed:
        raise ProfileError("every scale is 1, so there is nothing for a LoRA to add; export other scales")
    ffn = max(needed, key=needed.__getitem__)
    if needed[ffn] > max_rank and truncate is None:
        raise ProfileError(
            f"{ffn} needs rank {needed[ffn]} (its changed neurons, at most the hidden size), more than "
            f"{max_rank}; raise --max-rank (vLLM takes at most 512), approximate with --truncate svd, or export IA3"
        )


def _lora_pair(profile: Profile, projection: Projection, max_rank: int) -> tuple[Tensor, Tensor, float]:
    """One down-projection's A `[r, I]`, B `[hidden, r]` and relative error."""
    weight = _plain_weight(projection)
    neurons, scales = ffn_tensors(profile, projection.ffn)
    neurons, scales = neurons[scales != 1], scales[scales != 1]
    columns = weight[:, neurons]
    delta = columns * (scales - 1)  # [hidden, k], in float32 at least
    if why := not_finite(columns, delta.to(weight.dtype), neurons, scales):
        raise ProfileError(f"{projection.name}: {why}; {_NOT_FINITE}")
    b, rows = delta, torch.eye(len(neurons))
    if len(neurons) > len(delta):  # no matrix has a rank above its height
        b, rows = torch.eye(len(delta)), delta
    if len(rows) > max_rank:
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        b, rows = u[:, :max_rank] * s[:max_rank], vh[:max_rank]
    b, rows = b.to(weight.dtype), rows.to(weight.dtype)
    if not (b.isfinite().all() and rows.isfinite().all()):
        largest, dtype = float(scales.abs().max()), str(weight.dtype).removeprefix("torch.")
        raise ProfileError(f"{projection.name}: truncated, scales up to {largest:g} go beyond {dtype}; {_NOT_FINITE}")
    a = torch.zeros(len(rows), weight.shape[1], dtype=weight.dtype)
    a[:, neurons] = rows
    return a, b, _relative_error(b.double() @ rows.double(), columns.double() * (scales.double() - 1))


def _relative_error(approximation: Tensor, exact: Tensor) -> float:
    """‖approximation − exact‖ / ‖exact‖ (Frobenius)."""
    difference, size = float((approximation - exact).norm()), float(exact.norm())
    return difference / size if difference else 0.0


def _plain_weight(projection: Projection) -> Tensor:
    """W_down `[hidden, I]` on the CPU; raises LayoutError if it is not in memory, or quantized."""
    weight = down_weight(projection).detach()
    if weight.is_meta:
        raise LayoutError(f"{projection.name}: its down-projection is offloaded (meta); load the whole model")
    if weight.dtype not in FLOATS:
        raise LayoutError(
            f"{projection.name}: its down-projection is quantized ({weight.dtype}), which a LoRA's change of the "
            "weights does not fit; load the model without quantization, or export IA3"
        )
    return weight.cpu()


def _lora_notes(result: LoraExport) -> str:
    rank = max(result.ranks.values())
    served = next((allowed for allowed in _VLLM_RANKS if rank <= allowed), None)
    vllm = f"vLLM: `--enable-lora --max-lora-rank {served}`." if served else "Above vLLM's highest rank, 512."
    if not result.truncated:
        return (
            f"Exact but for rounding, by which the change of a layer's weights is off by up to {result.error:.1g} "
            f"(relative Frobenius norm); the highest rank is {rank}. {vllm}"
        )
    return (
        f"Truncated by SVD to rank {rank}: the change of a layer's weights is off by up to {result.error:.2%} "
        f"(relative Frobenius norm), and the evidence was measured without that. {vllm}"
    )
