"""vLLM's own kernel for experts, TritonExperts, steered: its rows are in the order that is expected of them.

Only processes that see Triton have it, those for the V2 runner; they interpret it. In engines it is in
`test_vllm_experts`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hones_serving.vllm.experts import Experts, MixtureTables
from hones_serving.vllm.scaling import SteeredExperts, TokenSlots
from serving.engines import V2
from serving.experts_on_cpu import aligned, summed
from serving.reference_slots import scale_choices
from torch import Tensor, nn
from vllm import _custom_ops

from hones_steer import ModelIdentity, Profile
from hones_steer.ffns import Ffn, FfnRun

pytestmark = [
    pytest.mark.both_runners(everyday=True),
    pytest.mark.skipif(not V2, reason="the kernel needs Triton; processes for the V2 runner have it"),
]

EXPERTS, CHOICES, WIDTH, HIDDEN, TOKENS = 8, 2, 24, 32, 9
MODEL = ModelIdentity(
    "", None, "qwen3_moe", 1, None, HIDDEN, None, (FfnRun(0, 1, experts=EXPERTS, expert_width=WIDTH),)
)


def profile(seed: int, experts: Sequence[int]) -> Profile:
    generator = np.random.default_rng(seed)
    layers = {
        Ffn(0, expert): (np.arange(WIDTH, dtype=np.int32), generator.uniform(-2, 3, WIDTH).astype(np.float32))
        for expert in experts
    }
    return Profile("vqa", layers, MODEL)


PROFILES = {1: profile(1, range(EXPERTS)), 2: profile(2, (0, 1, 3))}
SLOTS = [1, 0, 2, 2, 0, 1, 1, 2, 0]


class Layer(nn.Module):
    """Stands for vLLM's RoutedExperts, with the experts in `local`: runs the kernel."""

    def __init__(self, local: Sequence[int]) -> None:
        from vllm.model_executor.layers.fused_moe import config
        from vllm.model_executor.layers.fused_moe.activation import MoEActivation
        from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.gate_up = nn.Parameter(torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, generator=generator) / 6)
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH, generator=generator) / 5)
        self.local = list(local)
        self.expert_map = None
        if len(local) < EXPERTS:
            self.expert_map = torch.full((EXPERTS,), -1, dtype=torch.int32)
            self.expert_map[self.local] = torch.arange(len(local), dtype=torch.int32)
        self.kind = MoEActivation.SILU
        setting = config.FusedMoEConfig(
            num_experts=EXPERTS,
            experts_per_token=CHOICES,
            hidden_dim=HIDDEN,
            intermediate_size=WIDTH,
            num_local_experts=len(local),
            num_logical_experts=EXPERTS,
            activation=self.kind,
            device="cpu",
            routing_method=config.RoutingMethodType.Default,
            moe_parallel_config=config.FusedMoEParallelConfig.make_no_parallel(),
            in_dtype=torch.float32,
        )
        self.kernel = TritonExperts(setting, config.FUSED_MOE_UNQUANTIZED_CONFIG)

    @property
    def quant_method(self) -> Any:
        return self

    @property
    def moe_kernel(self) -> Any:
        return self

    @property
    def fused_experts(self) -> Any:
        return self.kernel

    @torch.no_grad()
    def forward_modular(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        sizes = (len(x), 2 * WIDTH, HIDDEN, CHOICES, EXPERTS, len(self.local), None, self.kind)
        space13, space2, _ = self.kernel.workspace_shapes(*sizes)
        output = torch.empty_like(x)
        self.kernel.apply(
            output=output,
            hidden_states=x,
            w1=self.gate_up[self.local],
            w2=self.down[self.local],
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            activation=self.kind,
            global_num_experts=EXPERTS,
            expert_map=self.expert_map,
            a1q_scale=None,
            a2_scale=None,
            workspace13=torch.empty(space13),
            workspace2=torch.empty(space2),
            expert_tokens_meta=None,
            apply_router_weight_on_input=False,
        )
        return output


@torch.no_grad()
def reference(layer: Layer, x: Tensor, weights: Tensor, choices: Tensor, slots: Sequence[int]) -> Tensor:
    """The sum of a token's chosen experts that are here, weighted, one after the other."""
    rows = []
    for token, hidden in enumerate(x):
        for expert in choices[token].tolist():
            gate, up = (layer.gate_up[expert] @ hidden).split(WIDTH)
            rows.append(nn.functional.silu(gate) * up)
    z = scale_choices(torch.stack(rows), choices, slots, PROFILES, 0).view(len(x), CHOICES, WIDTH)
    output = torch.zeros_like(x)
    for token in range(len(x)):
        for choice, expert in enumerate(choices[token].tolist()):
            if expert in layer.local:
                output[token] += weights[token, choice] * (layer.down[expert] @ z[token, choice])
    return output


@pytest.mark.parametrize("tokens", [1, TOKENS], ids=["one token, whose choices are not sorted", "several tokens"])
@pytest.mark.parametrize("local", [range(EXPERTS), (1, 3, 4)], ids=["all experts", "expert parallel"])
def test_each_row_is_scaled(local: Sequence[int], tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_custom_ops, "moe_align_block_size", aligned)
    monkeypatch.setattr(_custom_ops, "moe_sum", summed)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    weights = torch.rand(tokens, CHOICES, generator=generator)
    choices = torch.stack([torch.randperm(EXPERTS, generator=generator)[:CHOICES] for _ in x]).int()
    layer = Layer(local)
    unsteered = layer.forward_modular(x, topk_weights=weights, topk_ids=choices)
    experts = Experts("layer 0", layer, EXPERTS, WIDTH, slice(0, WIDTH), tuple(local))
    tables = MixtureTables({}, 3, {0: experts}, len(local))
    slots = TokenSlots(TOKENS, torch.device("cpu"))
    SteeredExperts(experts, 0, tables, slots, eager=True).place(experts)
    assert torch.equal(layer.forward_modular(x, topk_weights=weights, topk_ids=choices), unsteered)
    tables.require(PROFILES.values())
    for slot, written in PROFILES.items():
        tables.write(slot, written)
    slots.write(SLOTS[:tokens], [1] * tokens)
    steered = layer.forward_modular(x, topk_weights=weights, topk_ids=choices)
    torch.testing.assert_close(steered, reference(layer, x, weights, choices, SLOTS[:tokens]), rtol=1e-4, atol=1e-5)
    for token, slot in enumerate(SLOTS[:tokens]):
        listed = {expert for expert in choices[token].tolist() if slot and (0, expert) in PROFILES[slot].ffns}
        assert torch.equal(steered[token], unsteered[token]) == (not listed & set(local))
