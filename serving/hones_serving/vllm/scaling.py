"""In a vLLM worker: each token's slot, and the FFNs' activations multiplied by their scales for it.

A dense FFN or a shared expert has its down-projection's input multiplied; routed experts have what vLLM computes
between their two products.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hones_serving.vllm.experts import Experts, MixtureTables
from hones_steer.errors import StateError
from hones_steer.injection import scale
from hones_steer.slots import IDENTITY

_CHUNK = 2**22  # float32 scales gathered at a time in eager mode: 16 MB
# Tokens in a row with one slot (a run) are multiplied at once where that is quicker than looking each one's row up:
_FEW_RUNS = 4
_LONG_RUN = 16  # tokens, on average


class TokenSlots:
    """The slot of each token of a step, `index` int64 `[max tokens]`.

    Rows beyond the step's tokens (padding) keep the slot they had: nobody reads their activations.
    """

    def __init__(self, max_tokens: int, device: torch.device) -> None:
        self.index = torch.full((max_tokens,), IDENTITY, dtype=torch.int64, device=device)
        self.runs: list[tuple[int, int, int]] = []  # (first token, end, slot) of the steered tokens
        self.by_run = True

    def write(self, slots: Sequence[int], counts: Sequence[int]) -> None:
        """Set the slots of a step's tokens: `counts[i]` consecutive tokens have `slots[i]`."""
        if all(slot == IDENTITY for slot in slots):
            if self.runs:
                self.runs, self.by_run = [], True
                self.index.fill_(IDENTITY)
            return
        self.runs = _runs(slots, counts)
        steered = sum(end - start for start, end, _ in self.runs)
        self.by_run = len(self.runs) <= _FEW_RUNS or steered >= _LONG_RUN * len(self.runs)
        host = torch.from_numpy(np.repeat(np.asarray(slots, dtype=np.int64), counts))
        if self.index.device.type == "cuda":
            host = host.pin_memory()  # else the copy would wait for the GPU
        self.index[: len(host)].copy_(host, non_blocking=True)


def _runs(slots: Sequence[int], counts: Sequence[int]) -> list[tuple[int, int, int]]:
    """(first token, end, slot) of each longest run of consecutive tokens with one slot, unsteered ones left out."""
    runs: list[tuple[int, int, int]] = []
    start = 0
    for slot, count in zip(slots, counts, strict=True):
        end = start + int(count)
        if runs and runs[-1][1:] == (start, slot):
            runs[-1] = (runs[-1][0], end, slot)
        elif slot != IDENTITY:
            runs.append((start, end, slot))
        start = end
    return runs


class SteeredInput(nn.Module):
    """Scales the input of a down-projection: each token's row times its slot's row of the table.

    It is a part of the down-projection that `place` calls before it; the table and the slots are its buffers, so that
    vLLM compiles them as it does the model's own.
    """

    table: Tensor
    index: Tensor

    def __init__(self, table: Tensor, tokens: TokenSlots, *, eager: bool) -> None:
        super().__init__()
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("index", tokens.index, persistent=False)
        self._tokens = tokens
        self._eager = eager

    def place(self, down_projection: Any) -> None:
        """Become a part of `down_projection`; raises StateError if it has one already.

        A hook leaves the module's type and its weights' names alone, which LoRA and reloading of weights go by.
        """
        if hasattr(down_projection, "hones_scaling"):
            raise StateError("the model is steered already; start vLLM anew")
        down_projection.hones_scaling = self
        down_projection.register_forward_pre_hook(_scaled)
        # Else some models' activations hand on a quantized product, which leaves nothing to scale.
        down_projection.requires_unquantized_input = True

    def forward(self, z: Tensor) -> Tensor:
        """Scale activations z, `[tokens, w]` or in transformers' code `[1, tokens, w]`; w neurons reach this worker.

        Not eager, this reads tensors only, so that compiled code and captured graphs see every later change.
        """
        if not self._eager:
            return scale(z, self.table.index_select(0, self.index[: z.shape[-2]]))
        if self._tokens.runs:
            self._scale_in_place(z if z.dim() == 2 else z[0])
        return z

    def _scale_in_place(self, z: Tensor) -> None:
        runs = self._tokens.runs
        if self._tokens.by_run:
            for start, end, slot in runs:
                z[start:end].mul_(self.table[slot])
            return
        step = max(1, _CHUNK // z.shape[1])
        for start in range(runs[0][0], runs[-1][1], step):
            end = min(start + step, runs[-1][1])
            z[start:end].mul_(self.table.index_select(0, self.index[start:end]))


def _scaled(down_projection: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a down-projection, the first one scaled by its part; calling the part would cost more."""
    return (down_projection.hones_scaling.forward(args[0]), *args[1:])


class SteeredExperts:
    """Scales what the routed experts of one layer compute between their two products: vLLM's `activation`.

    This is given no tokens and no experts, so a wrapper around the whole layer of experts notes the router's choices,
    `[tokens, choices]`. Row i of the activations is of token i // choices, and of the expert chosen there.
    """

    def __init__(self, experts: Experts, layer: int, tables: MixtureTables, tokens: TokenSlots, *, eager: bool) -> None:
        self._name = experts.name
        self._rows, self._each = tables.rows, tables.each
        self._numbers = tables.numbers_of(layer)
        self._tokens = tokens
        self._eager = eager
        self._choices: Tensor | None = None
        self._scaled = False

    def place(self, experts: Experts) -> None:
        """Wrap the methods of vLLM's objects.

        Raises:
            StateError: they are wrapped already.
            LayoutError: vLLM runs these experts in a way that cannot be steered.
        """
        module, kernel = experts.module, experts.kernel()
        if "forward_modular" in vars(module):
            raise StateError("the model is steered already; start vLLM anew")
        forward, activation = module.forward_modular, kernel.activation

        @functools.wraps(forward)
        def forward_steered(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            self._choices, self._scaled = topk_ids, False
            result = forward(x, topk_weights, topk_ids, *args, **kwargs)
            self._choices = None
            if not self._scaled:  # vLLM may make another kernel, when weights are loaded again
                raise StateError(f"{self._name}: vLLM ran its experts without the part that steers them; restart vLLM")
            return result

        @functools.wraps(activation)
        def activation_scaled(kind: Any, output: Tensor, *args: Any, **kwargs: Any) -> None:
            activation(kind, output, *args, **kwargs)
            self._scale(output)
            self._scaled = True

        module.forward_modular = forward_steered
        kernel.activation = activation_scaled

    def _scale(self, output: Tensor) -> None:
        choices = self._choices
        if choices is None or output.shape[0] != choices.numel():
            raise StateError(f"{self._name}: vLLM computes its experts in an order that is not known; restart vLLM")
        tokens, each = choices.shape
        z = output[:, : self._rows.shape[1]]  # some kernels pad the neurons
        start, end = 0, tokens
        if self._eager:
            if not (runs := self._tokens.runs):
                return
            start, end = runs[0][0], runs[-1][1]
        if torch.compiler.is_compiling():
            self._multiply(z, choices, start, end)
            return
        step = max(1, _CHUNK // (each * z.shape[1]))
        for first in range(start, end, step):
            self._multiply(z, choices, first, min(first + step, end))

    def _multiply(self, z: Tensor, choices: Tensor, start: int, end: int) -> None:
        """Scale the rows of the tokens from `start` to before `end`, in place."""
        each = choices.shape[1]
        numbers = self._numbers.index_select(0, choices[start:end].reshape(-1)).view(-1, each)
        rows = self._tokens.index[start:end].unsqueeze(1) * self._each + numbers
        z[start * each : end * each].mul_(self._rows.index_select(0, rows.reshape(-1)))
