"""Routed experts for vLLM on a CPU, in tests only: vLLM's own are one kernel there, which cannot be steered.

Processes without Triton have experts in plain PyTorch, which keep to what vLLM's TritonExperts does: two products, with
`activation` between them, whose rows are in the order of (token, choice). Those with Triton have TritonExperts itself,
interpreted; what it has compiled for GPUs only, `aligned` and `summed` do. `registered` makes `register` a plugin of
vLLM's, so that each of its processes has them.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from serving.engines import V2
from torch import Tensor
from vllm import _custom_ops
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm.model_executor.layers.fused_moe.oracle import unquantized
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm.model_executor.layers.fused_moe.utils import _resize_cache

PLUGIN = "experts_on_cpu"


class PlainExperts(mk.FusedMoEExpertsModular):
    """Each expert computes every token; rows of the experts that the router has chosen are picked."""

    @staticmethod
    def activation_format() -> mk.FusedMoEActivationFormat:
        return mk.FusedMoEActivationFormat.Standard

    @staticmethod
    def _supports_current_device() -> bool:
        return True

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return (weight_key, activation_key) == (None, None)

    @staticmethod
    def _supports_activation(_: Any) -> bool:
        return True

    @staticmethod
    def _supports_parallel_config(_: Any) -> bool:
        return True

    def finalize_weight_and_reduce_impl(self) -> Any:
        return TopKWeightAndReduceNoOP()

    def workspace_shapes(self, M: int, N: int, K: int, topk: int, *_: Any) -> tuple[tuple[int, ...], ...]:  # noqa: N803
        return (M, topk, max(N // 2, K)), (M, topk, max(N, K)), (M, K)

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: Any,
        expert_map: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor,
        **_: Any,
    ) -> None:
        tokens, each = topk_ids.shape
        both = w1.shape[1]
        here = (topk_ids if expert_map is None else expert_map[topk_ids]).long()
        chosen = here.clamp(min=0)
        gate_up = _resize_cache(workspace2, (tokens, each, both))
        gate_up.copy_(torch.matmul(hidden_states, w1.transpose(1, 2))[chosen, torch.arange(tokens).unsqueeze(1)])
        z = _resize_cache(workspace13, (tokens * each, both // 2))
        self.activation(activation, z, gate_up.view(-1, both))
        down = torch.matmul(z, w2.transpose(1, 2))[chosen.view(-1), torch.arange(tokens * each)]
        weights = topk_weights.masked_fill(here < 0, 0).unsqueeze(2)  # experts of other workers
        output.copy_((down.view(tokens, each, -1) * weights).sum(1))


def aligned(
    topk_ids: Tensor,
    num_experts: int,
    block_size: int,
    sorted_ids: Tensor,
    expert_ids: Tensor,
    total: Tensor,
    expert_map: Tensor | None = None,
    *_: Any,
) -> None:
    """Write the indices of `topk_ids` by expert, each expert's in whole blocks."""
    sorted_ids.fill_(topk_ids.numel())
    block = 0
    for expert in range(num_experts):
        number = expert if expert_map is None else int(expert_map[expert])
        if number < 0:  # on another rank
            continue
        found = (topk_ids.flatten() == expert).nonzero().flatten()
        blocks = -(-len(found) // block_size)
        sorted_ids[block * block_size : block * block_size + len(found)] = found
        expert_ids[block : block + blocks] = number
        block += blocks
    total.fill_(block * block_size)


def summed(given: Tensor, output: Tensor, topk_ids: Tensor | None = None, expert_map: Tensor | None = None) -> None:
    """Add up choices, of the experts that are here."""
    if topk_ids is not None and expert_map is not None:
        given = torch.where((expert_map[topk_ids] >= 0).unsqueeze(2), given, 0)
    output.copy_(given.sum(1))


def register() -> None:
    """Have vLLM run unquantized experts by these: a plugin of vLLM's."""
    from hones_serving.vllm import experts

    if V2:
        TritonExperts._supports_current_device = staticmethod(lambda: True)
        _custom_ops.moe_align_block_size, _custom_ops.moe_sum = aligned, summed
        unquantized.backend_to_kernel_cls = lambda _: [TritonExperts]
    else:
        unquantized.backend_to_kernel_cls = lambda _: [PlainExperts]
        experts.STEERABLE.append(PlainExperts.__name__)


def write_plugin(folder: Path) -> None:
    """Write what makes `register` a plugin of vLLM's, for processes that have `folder` in their path."""
    package = folder / f"{PLUGIN}-0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PLUGIN}\nVersion: 0\n")
    (package / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{PLUGIN} = {__name__}:{register.__name__}\n")


@contextmanager
def registered(folder: Path) -> Iterator[None]:
    """Let vLLM find `register` as the plugin `PLUGIN`, in a `folder` for it; afterwards nothing of it is left."""
    from hones_serving.vllm import experts

    write_plugin(folder)
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (unquantized, "backend_to_kernel_cls"),
            (TritonExperts, "_supports_current_device"),
            (_custom_ops, "moe_align_block_size"),
            (_custom_ops, "moe_sum"),
        ):
            patch.setattr(owner, name, vars(owner)[name])  # what `register` changes comes back
        patch.setattr(experts, "STEERABLE", [*experts.STEERABLE])
        patch.setattr(sys, "path", [*sys.path, str(folder)])
        yield
