"""Routed experts: how a layer keeps them, and in which order their activations are computed.

transformers keeps all routed experts of a layer in one module, whose parameters are stacked: W_down is
`[experts, hidden, I]`, or transposed `[experts, I, hidden]`. An "experts implementation", chosen by its name,
multiplies them, so that there is no down-projection with an input to scale. But every implementation in plain PyTorch
calls the module's activation between its two products, for a row of each token and expert that the router has chosen:
`act_fn` on the gate, of which z = act(gate)·up is a multiple, or the module's own `_apply_gate`, which gives z itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hones_steer.errors import LayoutError

# The order of rows is known for these. The others of transformers are fused kernels for GPUs.
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
# Of these, what calls the gating as a function, of all rows at once, whatever the model's own code does.
READABLE = ("batched_mm", "grouped_mm")

_INTERFACE = "transformers.integrations.moe"
# Without the interface, and read: every expert computes every token, z = up·act(gate).
_ALL_TOKENS = "Llama4TextExperts"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class Experts:
    """All routed experts of one layer: `count` of them, with `width` neurons each.

    `name` is the module's dotted path in the model. `activation` is that whose output is scaled: a module, or the name
    of a method of `module`. `transposed` says that W_down is `[count, width, hidden]`.
    """

    name: str
    module: nn.Module
    count: int
    width: int
    hidden_size: int
    transposed: bool
    activation: nn.Module | str

    @property
    def all_tokens(self) -> bool:
        """Whether every expert computes every token, whose hidden states come `[count · tokens, hidden]`."""
        return type(self.module).__name__ == _ALL_TOKENS

    @property
    def by_interface(self) -> bool:
        """Whether transformers' interface runs them, by the experts implementation that is chosen."""
        return hasattr(self.module, "is_concatenated")

    @property
    def implementation(self) -> str:
        """Name of the experts implementation that a forward would use now."""
        if not self.by_interface:
            return "eager"
        return str(getattr(self.module.config, "_experts_implementation", None) or "eager")

    def require_implementation(self) -> None:
        """Raise LayoutError unless the present implementation calls the activation in an order that is known."""
        if self.implementation not in IMPLEMENTATIONS:
            raise LayoutError(
                f"{self.name}: the experts implementation {self.implementation!r} computes experts in a kernel of its "
                "own, where their neurons cannot be scaled; call model.set_experts_implementation('grouped_mm')"
            )

    @property
    def gating(self) -> nn.Module | str:
        """The part that gives z itself, of all rows at once, under `READABLE` implementations: as `activation`."""
        return "_apply_gate" if hasattr(self.module, "gate_up_proj") else self.activation

    @property
    def active(self) -> nn.Module | str:
        """The part that gives act(gate(x)), or act(up(x)) where there is no gate, as `gating`.

        Raises LayoutError if it is hidden in a gating of the experts' own.
        """
        if self.activation == "_apply_gate":
            raise LayoutError(
                f"{self.name}: {type(self.module).__name__} has a gating of its own, so that active neurons cannot be "
                "counted; use a method other than ap and ape"
            )
        return self.activation

    def require_readable(self) -> None:
        """Raise LayoutError unless z itself can be read."""
        if self.all_tokens:
            return
        if not self.by_interface:
            raise LayoutError(
                f"{self.name}: its experts ({type(self.module).__name__}) are run one after the other by code of their "
                "own, which does not show attribution what they compute; steering this model works, attributing on it "
                "does not"
            )
        if self.implementation not in READABLE:
            raise LayoutError(
                f"{self.name}: the experts implementation {self.implementation!r} does not show attribution what its "
                "experts compute; call model.set_experts_implementation('grouped_mm')"
            )

    def down_weight(self) -> Tensor:
        """W_down as a view `[count, hidden, width]`."""
        weight: Tensor = self.module.get_parameter("down_proj")
        return weight.transpose(1, 2) if self.transposed else weight

    def rows(self, hidden_states: Tensor, choices: Tensor | None) -> tuple[Tensor, Tensor]:
        """(token, expert) of each row of the activations, int64 `[rows]`, in the order in which they are computed.

        `choices` `[tokens, k]` are the experts that the router has chosen for each token.
        """
        if choices is None:
            tokens = hidden_states.shape[0] // self.count
            each = torch.arange(tokens, device=hidden_states.device)
            experts = torch.arange(self.count, device=hidden_states.device)
            return each.repeat(self.count), experts.repeat_interleave(tokens)
        order = self.order(choices)
        return order // choices.shape[1], choices.reshape(-1).index_select(0, order)

    def order(self, choices: Tensor) -> Tensor:
        """Where each row of the activations is in `choices` `[tokens, k]`, flattened: int64 `[tokens · k]`."""
        tokens, k = choices.shape
        if self.implementation == "batched_mm":
            return torch.arange(tokens * k, device=choices.device)
        if self.implementation == "grouped_mm":
            # The very call that transformers makes, which need not be stable: it gives the same on the same numbers.
            return torch.sort(choices.reshape(-1))[1]
        order = torch.sort(choices.t().reshape(-1), stable=True)[1]  # one expert after the other
        return order % tokens * k + order // tokens

    def num_tokens(self, hidden_states: Tensor, choices: Tensor | None) -> int:
        """Number of tokens in a call of the module."""
        return hidden_states.shape[0] // self.count if choices is None else choices.shape[0]


def find_experts(layer: nn.Module, name: str, model_type: str) -> Experts | None:
    """Find the routed experts of the decoder layer called `name`; None if it has none.

    Raises:
        LayoutError: it has experts that cannot be scaled; the message says why.
    """
    found: dict[str, nn.Module] = {}
    suspects: dict[str, nn.Module] = {}
    for path, module in layer.named_modules():
        weight = getattr(module, "down_proj", None)
        if isinstance(weight, Tensor) and weight.dim() == 3:
            found[path] = module
        elif path.endswith(("experts", "block_sparse_moe")) or type(module).__name__.endswith(("Experts", "MoE")):
            suspects[path] = module
    for path, module in suspects.items():
        known = any(inner.startswith(f"{path}.") or path.startswith(f"{inner}.") for inner in found)
        if not known and not (found and "shared" in path):
            raise _unsteerable(
                name,
                path,
                module,
                model_type,
                "are not kept as transformers keeps them, stacked in `gate_up_proj` and `down_proj`",
            )
    if not found:
        return None
    routed = {path: module for path, module in found.items() if "shared" not in path}
    if len(routed) != 1 or len(found) != 1:
        path, module = next(iter((found.items() - routed.items()) or found.items()))
        raise _unsteerable(name, path, module, model_type, "are not the only ones stacked in parameters of this layer")
    [(path, module)] = routed.items()
    return _describe(name, path, module, model_type)


def _describe(name: str, path: str, module: nn.Module, model_type: str) -> Experts:
    part: Any = module
    down: Tensor = part.down_proj
    gated = isinstance(getattr(module, "gate_up_proj", None), Tensor)
    up = getattr(module, "gate_up_proj" if gated else "up_proj", None)
    if "base_layer" in path.split(".") or not isinstance(module._parameters.get("down_proj"), nn.Parameter):
        raise _unsteerable(name, path, module, model_type, "have a PEFT adapter or another parametrization")
    if down.dtype not in _DTYPES or not isinstance(up, Tensor):
        raise _unsteerable(name, path, module, model_type, "are quantized or otherwise packed")
    count, width, hidden = down.shape
    transposed = getattr(module, "is_transposed", up.shape[2] == 2 * width)
    if not transposed:
        width, hidden = hidden, width
    fused = width * (2 if gated else 1)
    whole = tuple(up.shape) == ((count, hidden, fused) if transposed else (count, fused, hidden))
    sharded = hasattr(down, "to_local") or getattr(module, "_is_expert_parallel", False)
    if sharded or not whole or getattr(module, "num_experts", count) != count:
        raise _unsteerable(name, path, module, model_type, "are sharded, or of shapes that do not belong together")
    return Experts(
        name=f"{name}.{path}",
        module=module,
        count=count,
        width=width,
        hidden_size=hidden,
        transposed=bool(transposed),
        activation=_activation(name, path, module, model_type),
    )


def _activation(name: str, path: str, module: nn.Module, model_type: str) -> nn.Module | str:
    """The module, or the name of the experts' method, whose output is scaled."""
    gate = getattr(type(module), "_apply_gate", None)
    if gate is not None and gate.__module__ != _INTERFACE:
        return "_apply_gate"
    activation = getattr(module, "act_fn", None)
    if callable(activation) and (gate is not None or type(module).__name__ == _ALL_TOKENS):
        return activation if isinstance(activation, nn.Module) else "act_fn"
    raise _unsteerable(
        name,
        path,
        module,
        model_type,
        "do not run through transformers' `use_experts_implementation`, which says where their activations are",
    )


def _unsteerable(name: str, path: str, module: nn.Module, model_type: str, why: str) -> LayoutError:
    return LayoutError(
        f"{name}.{path} ({type(module).__name__}) of model type {model_type!r}: its experts {why}, so their neurons "
        "cannot be scaled; load the model by transformers' own code, whole and without quantization, or use a dense one"
    )
