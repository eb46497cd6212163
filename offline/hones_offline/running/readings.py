"""Hooks that read what a decoder's modules are given, as context managers; what is computed stays the same."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hones_offline.running.hooks import Shape, by_row, hooked
from hones_steer.errors import LayoutError
from hones_steer.layout import DecoderLayer, Layout, ffn_gate


class _Captured(Exception):  # noqa: N818 - control flow: leaves the model's forward early
    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments


def capture_call(module: nn.Module, run: Callable[[], object]) -> dict[str, Any]:
    """Run `run()` up to the call of `module`, and return the keyword arguments of that call.

    Raises:
        RuntimeError: `run()` ends without the call.
    """

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
def calls_read(
    modules: Mapping[str, nn.Module], read: Callable[[str, nn.Module, Tensor, Tensor], None]
) -> Iterator[None]:
    """Within the block, `read(name, module, input, output)` after each module call with a tensor that gives one."""

    def reader(name: str) -> Callable[[nn.Module, tuple[Any, ...], object], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                read(name, module, args[0], output)

        return hook

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(reader(name)).remove)
        yield


@contextmanager
def recorded_ffn(layout: Layout, columns: Tensor, *, first: int = 0) -> Iterator[dict[int, Tensor]]:
    """Record z = act(gate(x))·up(x) of each row at its column, `columns` [rows], per layer: float32 [rows, I].

    Recorded are the layers from `first` on, in forwards with that many rows: a prefix that rows share has none of their
    columns. Where the last FFN runs at one column of each row only (`last_ffn_at`), that column is the row's.
    """
    recorded: dict[int, Tensor] = {}

    def recorder(layer: DecoderLayer) -> Callable[[Tensor, Shape], Tensor]:
        def record(x: Tensor, shape: Shape) -> Tensor:
            rows, positions = shape
            if rows == len(columns):
                z = by_row(x, rows, layer)
                if z.shape[1] == positions:
                    recorded[layer.index] = z[torch.arange(rows), columns.cpu()].detach().float()
                elif z.shape[1] == 1 and layer is layout.layers[-1]:
                    recorded[layer.index] = z[:, 0].detach().float()
                else:
                    raise LayoutError(
                        f"{layer.name}: its FFN ran at {z.shape[1]} of {positions} positions, so that it is not known "
                        "which; attributing on this model does not work"
                    )
            return x

        return record

    layers = [layer for layer in layout.with_ffn if layer.index >= first]
    with hooked(layout, [(layer, layer.down_proj, recorder(layer)) for layer in layers]):
        yield recorded


@contextmanager
def summed_ffn(layout: Layout, real: Tensor) -> Iterator[dict[int, Tensor]]:
    """Sum z over the positions of a forward that `real`, bool [rows, T], marks, per layer: float64 [I]."""
    sums: dict[int, Tensor] = {}

    def adder(layer: DecoderLayer) -> Callable[[Tensor, Shape], Tensor]:
        def add(x: Tensor, shape: Shape) -> Tensor:
            z = by_row(x, shape[0], layer).detach()
            sums[layer.index] = z[real.to(z.device)].sum(0, dtype=torch.float64)
            return x

        return add

    with hooked(layout, [(layer, layer.down_proj, adder(layer)) for layer in layout.with_ffn]):
        yield sums


@contextmanager
def ffn_inputs(layout: Layout) -> Iterator[dict[int, Tensor]]:
    """Record z at every position of a forward, per layer: [rows, T, I], which gradients can be taken by.

    Where the weights are frozen the graph begins at the lowest layer's z.
    """
    recorded: dict[int, Tensor] = {}

    def recorder(layer: DecoderLayer) -> Callable[[Tensor, Shape], Tensor]:
        def record(x: Tensor, shape: Shape) -> Tensor:
            z = by_row(x, shape[0], layer)
            recorded[layer.index] = z = z if z.requires_grad else z.detach().requires_grad_()
            return z.reshape(x.shape)

        return record

    with hooked(layout, [(layer, layer.down_proj, recorder(layer)) for layer in layout.with_ffn]):
        yield recorded


@contextmanager
def ffn_products(layout: Layout, weights: Mapping[int, Tensor], *, first: int = 0) -> Iterator[dict[int, Tensor]]:
    """Record Σ z·w over positions, per layer from `first` on, for `weights` {layer: [rows, T, I]}.

    Forwards have copies of these rows, copy after copy; the sums are float64 [copies, rows, I].
    """
    recorded: dict[int, Tensor] = {}

    def recorder(layer: DecoderLayer) -> Callable[[Tensor, Shape], Tensor]:
        def record(x: Tensor, shape: Shape) -> Tensor:
            weight = weights[layer.index].float()
            copies = by_row(x, shape[0], layer).split(len(weight))
            sums = [(z.float() * weight).sum(1, dtype=torch.float64) for z in copies]
            recorded[layer.index] = torch.stack(sums)
            return x

        return record

    layers = [layer for layer in layout.with_ffn if layer.index >= first]
    with hooked(layout, [(layer, layer.down_proj, recorder(layer)) for layer in layers]):
        yield recorded


@contextmanager
def active_tokens(layout: Layout, real: Tensor) -> Iterator[dict[int, Tensor]]:
    """Count at how many of a forward's tokens each neuron is active, per layer: int64 [I].

    A neuron is active where act(gate(x)) > 0 in a gated FFN, where act(up(x)) = z > 0 in another. `real`, bool [rows,
    T], says which tokens count.

    Raises LayoutError, naming the layer, for an FFN whose gate cannot be told.
    """
    counted: dict[int, Tensor] = {}

    def counter(layer: DecoderLayer) -> Callable[[Tensor, Shape], Tensor]:
        def count(x: Tensor, shape: Shape) -> Tensor:
            active = by_row(x, shape[0], layer)[..., : layer.width] > 0
            counted[layer.index] = (active & real.to(x.device)[..., None]).sum((0, 1))
            return x

        return count

    gates = [(layer, ffn_gate(layer)) for layer in layout.with_ffn]
    inputs = [(layer, layer.down_proj, counter(layer)) for layer, gate in gates if gate is None]
    outputs = [(layer, gate, counter(layer)) for layer, gate in gates if gate is not None]
    with hooked(layout, inputs, outputs):
        yield counted
