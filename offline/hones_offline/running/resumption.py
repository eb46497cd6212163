"""Hooks that run less of a decoder, as context managers.

`resumed` starts a forward at a middle layer, from what `recorded_states` keeps of another one; `last_ffn_at` runs the
last FFN only where it is read.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from hones_offline.running.hooks import parent_of
from hones_steer.errors import LayoutError
from hones_steer.injection import input_hooks
from hones_steer.layout import DecoderLayer, Layout


@dataclass(frozen=True)
class LayerInput:
    """The state from which a forward can be resumed at a layer, recorded in an undisturbed forward.

    `hidden` [rows, T, hidden] entered the layer ([streams, rows, T, hidden] where there are several residual streams);
    `heads` [rows, T, heads·head_dim] is what its attention heads put out, the same whichever of them is replaced, or
    None where the attention must run again (`_Recorder`). `returned` says of each layer that ran how many values it
    returned, 0 for a tensor by itself.
    """

    layer: int
    hidden: Tensor
    heads: Tensor | None = None
    returned: Mapping[int, int] = field(default_factory=dict)

    def repeat(self, copies: int) -> "LayerInput":
        """Copies of the rows, copy after copy: [copies·rows, T, ...]."""
        heads = None if self.heads is None else self.heads.repeat(copies, 1, 1)
        streams = [1] * (self.hidden.dim() - 3)
        return replace(self, hidden=self.hidden.repeat(*streams, copies, 1, 1), heads=heads)

    @property
    def unchanged(self) -> int:
        """Number of layers, from the lowest on, whose keys and values are the undisturbed ones after resuming."""
        return self.layer if self.heads is None else self.layer + 1


def resumed_from(layout: Layout, layer: int) -> int:
    """The layer at which a forward is resumed whose first change is in `layer`: that one, or a lower one.

    What a layer lends its keys and values to has to be run with it.
    """
    lenders = lending_layers(layout)
    return min(layer, lenders[0]) if lenders else layer


def lending_layers(layout: Layout) -> list[int]:
    """Layers whose keys and values later layers use, which have none of their own (Gemma 3n, Gemma 4); ascending."""
    config = getattr(layout.decoder, "config", None)
    borrowing = getattr(config, "num_kv_shared_layers", 0) or 0
    if not borrowing:
        return []
    kinds: list[str] = config.layer_types[: len(layout.layers) - borrowing]  # type: ignore[union-attr]
    return sorted({kind: layer for layer, kind in enumerate(kinds)}.values())


@contextmanager
def recorded_states(layout: Layout, layers: Collection[int]) -> Iterator[dict[int, list[LayerInput]]]:
    """Record, for each of `layers`, the state it can be resumed from in each forward, in the forwards' order.

    A forward in which a layer hands the next more than hidden states (Zaya, the states of its router) raises
    LayoutError, naming the layer: it cannot be resumed.
    """
    lenders, returned, handed = lending_layers(layout), dict[int, int](), list[Tensor]()
    recorders = {index: _Recorder(layout.layers[index], returned, lends=index in lenders) for index in layers}

    def note(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple[Any, ...], result: object) -> None:
            returned[index] = len(result) if isinstance(result, tuple) else 0
            handed[:] = [x for x in result[1:] if isinstance(x, Tensor)] if isinstance(result, tuple) else []

        return hook

    def refuse(layer: DecoderLayer) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if any(given is more for given in (*args, *kwargs.values()) for more in handed):
                raise LayoutError(
                    f"{layer.name} is handed more than hidden states by the layer below it, so that no forward can be "
                    "resumed there with a head replaced; use a method without heads, such as fisher"
                )

        return hook

    with ExitStack() as stack:
        for layer in layout.layers:
            stack.callback(layer.module.register_forward_pre_hook(refuse(layer), with_kwargs=True).remove)
            stack.callback(layer.module.register_forward_hook(note(layer.index)).remove)
        for recorder in recorders.values():
            recorder.place(stack)
        yield {index: recorder.inputs for index, recorder in recorders.items()}


class _Recorder:
    """Records a layer's input and its heads' output in every forward.

    The attention need not run again if it returns exactly (output projection of the heads' output, weights). Weights,
    the attention probabilities, are only for show: no layer computes with them. An attention that flattens its rows is
    run again, because copies of the rows are made along a dimension of their own, and so is one that lends its keys and
    values to later layers. A layer without heads has none to record.
    """

    def __init__(self, layer: DecoderLayer, returned: Mapping[int, int], *, lends: bool) -> None:
        self.layer, self.returned, self.lends, self.inputs = layer, returned, lends, list[LayerInput]()
        self._hidden = self._heads = self._projected = torch.empty(0)

    def place(self, stack: ExitStack) -> None:
        """Set the hooks, which are removed with the stack."""
        stack.enter_context(input_hooks([(self.layer.module, self._note_input)]))
        if self.layer.attn_out is None:
            return
        for module, hook in (
            (self.layer.attn_out, self._note_heads),
            (parent_of(self.layer, self.layer.attn_out), self._record),
        ):
            stack.callback(module.register_forward_hook(hook).remove)

    def _note_input(self, hidden: Tensor) -> Tensor:
        self._hidden = hidden.detach()
        if self.layer.attn_out is None:
            self.inputs.append(LayerInput(self.layer.index, self._hidden, None, self.returned))
        return hidden

    def _note_heads(self, _module: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> None:
        self._heads, self._projected = args[0].detach(), result

    def _record(self, _module: nn.Module, _args: tuple[Any, ...], result: Any) -> None:
        plain = isinstance(result, tuple) and len(result) == 2 and result[0] is self._projected
        plain = plain and not self.lends and self._heads.shape[:-1] == self._hidden.shape[-3:-1]
        self.inputs.append(LayerInput(self.layer.index, self._hidden, self._heads if plain else None, self.returned))


@contextmanager
def resumed(layout: Layout, layer_input: LayerInput) -> Iterator[None]:
    """Within the block, forwards of the decoder begin at the layer that `layer_input` was recorded at.

    If its heads' output is known, only the output projection of its attention runs. The decoder itself runs as always,
    so that masks, position embeddings and caches are its own for any architecture.
    """
    layer = layout.layers[layer_input.layer]

    def skip(index: int) -> Callable[..., Any]:
        more = layer_input.returned.get(index, 0)

        def forward(hidden_states: Tensor, *_args: object, **_kwargs: object) -> Any:
            return (hidden_states, *[None] * (more - 1)) if more else hidden_states

        return forward

    def project(*_args: object, **_kwargs: object) -> tuple[Tensor, None]:
        assert layer.attn_out is not None
        return layer.attn_out(layer_input.heads), None

    with ExitStack() as stack:
        for below in layout.layers[: layer_input.layer]:
            _assign_forward(stack, below.module, skip(below.index))
        if layer_input.heads is not None:
            _assign_forward(stack, parent_of(layer, layer.attn_out), project)
        stack.enter_context(input_hooks([(layer.module, lambda _: layer_input.hidden)]))
        yield


def _assign_forward(stack: ExitStack, module: nn.Module, forward: Callable[..., Any]) -> None:
    """Give a module instance another `forward` until the stack is left.

    One that was assigned to the instance before (accelerate does) is there again then.
    """
    stack.callback(_restore_forward, module, module.__dict__.get("forward"))
    module.forward = forward


def _restore_forward(module: nn.Module, assigned: Callable[..., Any] | None) -> None:
    del module.forward
    if assigned is not None:
        module.forward = assigned


@contextmanager
def last_ffn_at(layout: Layout, columns: Tensor | None) -> Iterator[None]:
    """Within the block, the last layer's FFNs run at these columns of each row only, [rows, n]; elsewhere they add 0.

    Only a later layer's attention reads other positions, and there is no later layer. An FFN that is not a module
    called with states [rows, T, ...] alone runs everywhere, as with `columns` None.
    """
    layer = layout.layers[-1]
    with ExitStack() as stack:
        if columns is not None and layer.ffn_out is not None:
            _narrow(stack, layer, parent_of(layer, layer.ffn_out), columns)
        if columns is not None and layer.experts is not None:  # which are run at some token at least
            columns = columns if columns.shape[1] else columns.new_zeros(len(columns), 1)
            _narrow(stack, layer, parent_of(layer, layer.experts.module), columns)
        yield


def _narrow(stack: ExitStack, layer: DecoderLayer, ffn: nn.Module, columns: Tensor) -> None:
    """Have an FFN run at these columns only until the stack is left, unless it is no module of its own."""
    if ffn is layer.module:
        return
    at = torch.arange(len(columns))[:, None], columns
    whole: Tensor | None = None

    def narrow(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal whole
        alone = len(args) == 1 and not kwargs and args[0].dim() == 3 and len(args[0]) == len(columns)
        whole = args[0] if alone else None
        return args if whole is None else (whole[at],), kwargs

    def widen(_module: nn.Module, _args: tuple[Any, ...], result: Any) -> Any:
        if whole is None:
            return result
        written, *more = result if isinstance(result, tuple) else (result,)  # the router's scores are more
        spread = written.new_zeros(*whole.shape[:2], written.shape[-1])
        spread = spread.index_put(at, written.reshape(*columns.shape, written.shape[-1]))
        return (spread, *more) if isinstance(result, tuple) else spread

    stack.callback(ffn.register_forward_pre_hook(narrow, with_kwargs=True).remove)
    stack.callback(ffn.register_forward_hook(widen).remove)
