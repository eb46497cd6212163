"""Hooks that change heads' outputs and FFN activations, as context managers: replaced, moved, scaled or set."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hones_offline.data.neurons import NeuronIndex
from hones_offline.running.activations import AnyActivations, Shape, by_row
from hones_offline.running.hooks import FfnHook, Head, Hook, hooked, hooked_ffns
from hones_steer.ffns import Ffn
from hones_steer.injection import scale
from hones_steer.layout import DecoderLayer, Layout

Scales = Mapping[Ffn, Tensor]


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
            outputs = by_row(x, len(heads), layer.name).unflatten(-1, (count, -1)).clone()  # [rows, T, heads, head_dim]
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
            outputs = by_row(x, shape[0], layer.name).unflatten(-1, (count, -1))  # [rows, T, heads, head_dim]
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
    """Multiply the activations of each FFN by its scales, float32 [N]; zeros mask, FFNs not named are untouched.

    For (layer, "experts") they are those of all experts, one after the other. A forward of the decoder that does not
    call one of these FFNs raises LayoutError.
    """

    def scaler(factors: Tensor) -> FfnHook:
        return lambda activations: activations.scaled(factors)

    with hooked_ffns(layout, {ffn: scaler(factors) for ffn, factors in scales.items()}):
        yield


@contextmanager
def ffn_factors(layout: Layout, columns: Tensor | None = None) -> Iterator[dict[Ffn, Tensor]]:
    """Multiply z of each row by factors of 1 that gradients can be taken by, per FFN: float32 [rows, N].

    They act at every position of the row, or at its one of `columns` [rows]. The forward stays bit-equal; the factors
    are those of the latest forward.
    """
    factors: dict[Ffn, Tensor] = {}

    def multiplier(ffn: Ffn, neurons: int) -> FfnHook:
        def multiply(activations: AnyActivations) -> Tensor:
            rows, device = activations.shape[0], activations.z.device
            factor = factors[ffn] = torch.ones(rows, neurons, device=device, requires_grad=True)
            return activations.scaled_by_row(factor, columns)

        return multiply

    groups = NeuronIndex.of(layout).groups
    with hooked_ffns(layout, {ffn: multiplier(ffn, of.stop - of.start) for ffn, of in groups.items()}):
        yield factors


@contextmanager
def set_ffn(layout: Layout, values: Mapping[Ffn, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Set activations of an FFN at every position: those of neurons [k] to values [k], `values[ffn]` holding both.

    Of (layer, "experts") neurons are numbered one expert after the other, and set where their expert is chosen. A
    forward of the decoder that does not call one of these FFNs raises LayoutError.
    """

    def setter(neurons: Tensor, fill: Tensor) -> FfnHook:
        return lambda activations: activations.filled(neurons, fill)

    with hooked_ffns(layout, {ffn: setter(*of) for ffn, of in values.items()}):
        yield
