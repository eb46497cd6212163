"""The hooks attribution needs, as context managers that place all or none.

Reading (`capture_call`, `recorded_ffn`, `ffn_inputs`, `recorded_states`), intervening (`replaced_heads`,
`scaled_ffn`) and resuming in the middle (`resumed`) on a decoder's layers. Nothing here recomputes what the model
computes anyway: every hook reads or replaces an input the model has just produced.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hones_steer.injection import input_hooks, scale
from hones_steer.layout import Layout

Scales = Mapping[int, Tensor]
Head = tuple[int, int]
"""(layer, head)."""


class _Captured(Exception):  # noqa: N818 - control flow: leaves the model's forward early
    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments


def capture_call(module: nn.Module, run: Callable[[], object]) -> dict[str, Any]:
    """The keyword arguments `module` is called with during `run()`, which is left at that point."""

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args:
            kwargs = {"input_ids": args[0], **kwargs}
        raise _Captured(kwargs)

    handle = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run()
    except _Captured as captured:
        return captured.arguments
    finally:
        handle.remove()
    raise RuntimeError(f"{type(module).__name__} was not called by the model's forward")


@contextmanager
def recorded_ffn(layout: Layout, columns: Tensor) -> Iterator[dict[int, Tensor]]:
    """Record z = act(gate(x))·up(x) of each row at its column, `columns` [rows], per layer: float32 [rows, I].

    Only of forwards with that many rows: a beginning that rows share has none of their columns.
    """
    recorded: dict[int, Tensor] = {}

    def recorder(index: int) -> Callable[[Tensor], Tensor]:
        def record(z: Tensor) -> Tensor:
            if len(z) == len(columns):
                recorded[index] = z[torch.arange(len(z)), columns.cpu()].detach().float()
            return z

        return record

    with input_hooks((layer.down_proj, recorder(layer.index)) for layer in layout.layers):
        yield recorded


@contextmanager
def ffn_inputs(layout: Layout) -> Iterator[dict[int, Tensor]]:
    """Record z at every position of a forward, per layer: [rows, T, I], as part of the gradients' graph."""
    recorded: dict[int, Tensor] = {}

    def recorder(index: int) -> Callable[[Tensor], Tensor]:
        def record(z: Tensor) -> Tensor:
            recorded[index] = z
            return z

        return record

    with input_hooks((layer.down_proj, recorder(layer.index)) for layer in layout.layers):
        yield recorded


@contextmanager
def recorded_states(layout: Layout, layers: Collection[int]) -> Iterator[dict[int, list[Tensor]]]:
    """Record the hidden states entering each of `layers`, one tensor [rows, T, hidden] per forward."""
    states: dict[int, list[Tensor]] = {index: [] for index in layers}

    def recorder(index: int) -> Callable[[Tensor], Tensor]:
        def record(x: Tensor) -> Tensor:
            states[index].append(x.detach())
            return x

        return record

    with input_hooks((layout.layers[index].module, recorder(index)) for index in layers):
        yield states


@contextmanager
def resumed(layout: Layout, start: int, states: Tensor) -> Iterator[None]:
    """Within the block, forwards of the decoder skip the layers below `start`, which is given `states` instead.

    The decoder itself runs as always, so that masks, position embeddings and caches are its own for any architecture.
    """

    def skip(hidden_states: Tensor, *_args: object, **_kwargs: object) -> Tensor:
        return hidden_states

    with ExitStack() as stack:
        for layer in layout.layers[:start]:
            stack.callback(_restore_forward, layer.module, layer.module.__dict__.get("forward"))
            layer.module.forward = skip
        stack.enter_context(input_hooks([(layout.layers[start].module, lambda _: states)]))
        yield


def _restore_forward(module: nn.Module, own: Callable[..., Any] | None) -> None:
    """`own` is what was assigned to the instance before (accelerate does), or None."""
    del module.forward
    if own is not None:
        module.forward = own


@contextmanager
def replaced_heads(layout: Layout, heads: Sequence[Head]) -> Iterator[None]:
    """Intervention I_h: in row r, at every position, head `heads[r]`'s output becomes the mean of its layer's others.

    Acts on the input of the attention output projection, [rows, T, heads·head_dim] (paper, section 3; design 2.1).
    """
    rows_of: dict[int, list[int]] = {}
    for row, (layer, _) in enumerate(heads):
        rows_of.setdefault(layer, []).append(row)

    def intervention(layer: int, count: int) -> Callable[[Tensor], Tensor]:
        rows = torch.tensor(rows_of[layer])
        chosen = torch.tensor([heads[row][1] for row in rows_of[layer]])

        def replace(x: Tensor) -> Tensor:
            slices = x.unflatten(-1, (count, -1)).clone()  # [rows, T, heads, head_dim]
            own = slices[rows, :, chosen].float()
            total = slices.sum(-2, dtype=torch.float32)[rows]
            slices[rows, :, chosen] = ((total - own) / (count - 1)).to(x.dtype)
            joined: Tensor = slices.flatten(-2)
            return joined

        return replace

    def hooks() -> Iterator[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
        for index in rows_of:
            layer = layout.layers[index]
            assert layer.attn_out is not None  # Layout.require_attribution has been called
            assert layer.num_heads is not None
            yield layer.attn_out, intervention(index, layer.num_heads)

    with input_hooks(hooks()):
        yield


@contextmanager
def scaled_ffn(layout: Layout, scales: Scales) -> Iterator[None]:
    """Multiply the FFN activations of layer l by scales[l], float32 [I]; zeros mask, layers not named are untouched."""

    def scaler(factors: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda z: scale(z, factors.to(z.device))

    with input_hooks((layout.layers[index].down_proj, scaler(factors)) for index, factors in scales.items()):
        yield


def dense_scales(width: int, layers: Mapping[int, tuple[Any, Any]]) -> dict[int, Tensor]:
    """{layer: (neurons [k], scales [k])} as {layer: float32 [width]} with 1 for the neurons not listed."""
    dense = {}
    for index, (neurons, factors) in layers.items():
        dense[index] = torch.ones(width)
        dense[index][torch.tensor(neurons, dtype=torch.long)] = torch.tensor(factors, dtype=torch.float32)
    return dense
