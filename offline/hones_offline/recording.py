"""The hooks attribution needs, as context managers that place all or none.

Reading (`capture_call`, `recorded_ffn`) and intervening (`replaced_head`, `scaled_ffn`) on a decoder's layers. Nothing
here recomputes what the model computes anyway: every hook reads or replaces an input the model has just produced.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hones_steer.injection import input_hooks, scale
from hones_steer.layout import Layout

Scales = Mapping[int, Tensor]


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
def recorded_ffn(layout: Layout) -> Iterator[dict[int, Tensor]]:
    """Record z = act(gate(x))·up(x) at the last position of each forward, per layer: float32 [rows, I]."""
    recorded: dict[int, Tensor] = {}

    def recorder(index: int) -> Callable[[Tensor], Tensor]:
        def record(z: Tensor) -> Tensor:
            recorded[index] = z[:, -1].detach().float()
            return z

        return record

    with input_hooks((layer.down_proj, recorder(layer.index)) for layer in layout.layers):
        yield recorded


@contextmanager
def replaced_head(layout: Layout, layer: int, head: int) -> Iterator[None]:
    """Intervention I_h: at every position, head (layer, head)'s output becomes the mean of the layer's other heads.

    Acts on the input of the attention output projection, [rows, T, heads·head_dim] (paper, section 3; design 2.1).
    """
    target = layout.layers[layer]
    attn_out, heads = target.attn_out, target.num_heads
    assert attn_out is not None  # Layout.require_attribution has been called
    assert heads is not None

    def intervene(x: Tensor) -> Tensor:
        slices: Tensor = x.unflatten(-1, (heads, -1)).to(torch.float32, copy=True)
        mean_of_others = (slices.sum(-2) - slices[..., head, :]) / (heads - 1)
        slices[..., head, :] = mean_of_others
        return slices.flatten(-2).to(x.dtype)

    with input_hooks([(attn_out, intervene)]):
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
