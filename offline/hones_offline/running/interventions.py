"""Hooks that change heads' outputs and FFN activations, as context managers: replaced, moved, scaled or set."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hones_offline.running.hooks import Head, Hook, Shape, by_row, hooked
from hones_steer.injection import scale
from hones_steer.layout import DecoderLayer, Layout

Scales = Mapping[int, Tensor]


@contextmanager
def replaced_heads(layout: Layout, heads: Sequence[Head]) -> Iterator[None]:
    """Intervention I_h: in row r, at every position, head `heads[r]`'s output becomes the mean of its layer's others.

    Acts on the input of the attention output projection, [rows, T, heads·head_dim] (HONES, arXiv 2604.17941,
    section 3.1).
    """
    rows_of: dict[int, list[int]] = {}
    for row, (layer, _) in enumerate(heads):
        rows_of.setdefault(layer, []).append(row)

    def intervention(layer: DecoderLayer, count: int) -> Callable[[Tensor, Shape], Tensor]:
        rows = torch.tensor(rows_of[layer.index])
        chosen = torch.tensor([heads[row][1] for row in rows_of[layer.index]])

        def replace(x: Tensor, _shape: Shape) -> Tensor:
            outputs = by_row(x, len(heads), layer).unflatten(-1, (count, -1)).clone()  # [rows, T, heads, head_dim]
            output = outputs[rows, :, chosen].float()
            total = outputs.sum(-2, dtype=torch.float32)[rows]
            outputs[rows, :, chosen] = ((total - output) / (count - 1)).to(x.dtype)
            joined: Tensor = outputs.reshape(x.shape)
            return joined

        return replace

    with hooked(layout, _on_heads([layout.layers[index] for index in rows_of], intervention)):
        yield


@contextmanager
def moved_heads(layout: Layout, share: float) -> Iterator[dict[int, Tensor]]:
    """Move every head's output, at every position, by a share of the way to what `replaced_heads` puts in its place.

    Gradients can be taken by the shares, float32 [rows, heads] per layer; they are those of the latest forward. With
    shares of 0 it stays bit-equal.
    """
    shares: dict[int, Tensor] = {}

    def mover(layer: DecoderLayer, count: int) -> Callable[[Tensor, Shape], Tensor]:
        def move(x: Tensor, shape: Shape) -> Tensor:
            outputs = by_row(x, shape[0], layer).unflatten(-1, (count, -1))  # [rows, T, heads, head_dim]
            own = shares[layer.index] = torch.full((len(outputs), count), share, device=x.device, requires_grad=True)
            way = count / (count - 1) * (outputs.mean(-2, keepdim=True) - outputs)
            moved: Tensor = outputs + scale(way, own[:, None, :, None])
            return moved.reshape(x.shape)

        return move

    with hooked(layout, _on_heads([layer for layer in layout.layers if layer.attn_out is not None], mover)):
        yield shares


def _on_heads(
    layers: Iterable[DecoderLayer], intervention: Callable[[DecoderLayer, int], Callable[[Tensor, Shape], Tensor]]
) -> Iterator[Hook]:
    """Hooks on what the layers' heads put out; `intervention` makes one of a layer and its number of heads."""
    for layer in layers:
        assert layer.attn_out is not None  # Layout.require_attribution has been called
        assert layer.num_heads is not None
        yield layer, layer.attn_out, intervention(layer, layer.num_heads)


@contextmanager
def scaled_ffn(layout: Layout, scales: Scales) -> Iterator[None]:
    """Multiply the FFN activations of layer l by scales[l], float32 [I]; zeros mask, layers not named are untouched.

    A forward of the decoder that does not call one of these down-projections raises LayoutError.
    """

    def scaler(factors: Tensor) -> Callable[[Tensor, Shape], Tensor]:
        return lambda z, _shape: scale(z, factors.to(z.device))

    scaled = [(layout.layers[index], scaler(factors)) for index, factors in scales.items()]
    with hooked(layout, [(layer, layer.down_proj, replace) for layer, replace in scaled]):
        yield


@contextmanager
def ffn_factors(layout: Layout, columns: Tensor | None = None) -> Iterator[dict[int, Tensor]]:
    """Multiply z of each row by factors of 1 that gradients can be taken by, per layer: float32 [rows, I].

    They act at every position of the row, or at its one of `columns` [rows]. The forward stays bit-equal; the factors
    are those of the latest forward.
    """
    factors: dict[int, Tensor] = {}

    def multiplier(layer: DecoderLayer) -> Callable[[Tensor, Shape], Tensor]:
        def multiply(x: Tensor, shape: Shape) -> Tensor:
            z = by_row(x, shape[0], layer)
            factor = factors[layer.index] = torch.ones(len(z), z.shape[-1], device=z.device, requires_grad=True)
            if columns is None:
                z = scale(z, factor[:, None])
            else:
                at = torch.arange(len(z)), columns
                z = z.index_put(at, scale(z[at], factor))
            return z.reshape(x.shape)

        return multiply

    with hooked(layout, [(layer, layer.down_proj, multiplier(layer)) for layer in layout.with_ffn]):
        yield factors


@contextmanager
def set_ffn(layout: Layout, values: Mapping[int, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Set FFN activations of layer l at every position: those of neurons [k] to values [k], values[l] holding both.

    A forward of the decoder that does not call one of these down-projections raises LayoutError.
    """

    def setter(neurons: Tensor, fill: Tensor) -> Callable[[Tensor, Shape], Tensor]:
        def replace(z: Tensor, _shape: Shape) -> Tensor:
            filled = fill.to(z).expand(*z.shape[:-1], -1)
            return z.index_copy(-1, neurons.to(z.device), filled)

        return replace

    setters = [(layout.layers[index], setter(*of)) for index, of in values.items()]
    with hooked(layout, [(layer, layer.down_proj, replace) for layer, replace in setters]):
        yield
