"""The hooks that attribution needs on a decoder's layers, as context managers that place all of them or none.

- Reading: `capture_call`, `calls_read`, `recorded_ffn`, `summed_ffn`, `ffn_inputs`, `ffn_products`, `active_tokens`,
  `recorded_states`.
- Intervening: `replaced_heads`, `moved_heads`, `scaled_ffn`, `ffn_factors`, `set_ffn`.
- Running less: `resumed` starts a forward at a middle layer, `last_ffn_at` runs the last FFN where it is read.

Nothing here recomputes what the model computes anyway: every hook reads or replaces an input that the model has just
produced.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hones_steer.errors import LayoutError
from hones_steer.injection import input_hooks, scale
from hones_steer.layout import DecoderLayer, Layout, ffn_gate

Scales = Mapping[int, Tensor]
Head = tuple[int, int]
"""(layer, head)."""


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


Shape = tuple[int, int]
"""(rows, positions) of a decoder's forward."""


_Hook = tuple[DecoderLayer, nn.Module, Callable[[Tensor, Shape], Tensor]]


@contextmanager
def _hooked(layout: Layout, hooks: Iterable[_Hook], outputs: Iterable[_Hook] = ()) -> Iterator[None]:
    """Within the block, replace each module's input by its function of the input and of the forward's shape.

    Those of `outputs` replace the module's output. A forward of the decoder that does not call one of the modules
    raises LayoutError, naming the layer.
    """
    hooks, outputs = list(hooks), list(outputs)
    modules = [(layer, module) for layer, module, _ in (*hooks, *outputs)]
    shape: Shape = (0, 0)
    called: set[int] = set()

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal shape
        given = (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args)
        rows, positions = next(x for x in given if x is not None).shape[:2]
        shape = rows, positions
        called.clear()

    def leave(*_: object) -> None:
        for layer, module in modules:
            if id(module) not in called:
                raise LayoutError(
                    f"{layer.name}: its {type(module).__name__} was not called in a forward of the decoder, so that "
                    "nothing can be read or changed there; use a model that calls it (no fused or replaced kernels)"
                )

    def noted(module: nn.Module, replace: Callable[[Tensor, Shape], Tensor]) -> Callable[[Tensor], Tensor]:
        def hook(x: Tensor) -> Tensor:
            called.add(id(module))
            return replace(x, shape)

        return hook

    with ExitStack() as stack:
        stack.callback(layout.decoder.register_forward_pre_hook(enter, with_kwargs=True).remove)
        stack.callback(layout.decoder.register_forward_hook(leave).remove)
        stack.enter_context(input_hooks((module, noted(module, replace)) for _, module, replace in hooks))
        for _, module, replace in outputs:
            stack.callback(module.register_forward_hook(_output_hook(noted(module, replace))).remove)
        yield


def _output_hook(replace: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    return lambda _module, _args, output: replace(output)


def _by_row(x: Tensor, rows: int, layer: DecoderLayer) -> Tensor:
    """A module's input as [rows, T, features]; some architectures (OPT) give [rows·T, features].

    Raises LayoutError, naming the layer, for any other shape.
    """
    if x.dim() == 3 and len(x) == rows:
        return x
    if x.dim() == 2 and len(x) % rows == 0:
        return x.reshape(rows, -1, x.shape[-1])
    raise LayoutError(
        f"{layer.name}: a module of it got an input of shape {list(x.shape)} in a forward of {rows} rows, which cannot "
        "be told apart there; steering this model may work, attributing on it does not"
    )


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
                z = _by_row(x, rows, layer)
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

    with _hooked(layout, [(layer, layer.down_proj, recorder(layer)) for layer in layout.layers[first:]]):
        yield recorded


@contextmanager
def summed_ffn(layout: Layout, real: Tensor) -> Iterator[dict[int, Tensor]]:
    """Sum z over the positions of a forward that `real`, bool [rows, T], marks, per layer: float64 [I]."""
    sums: dict[int, Tensor] = {}

    def adder(layer: DecoderLayer) -> Callable[[Tensor, Shape], Tensor]:
        def add(x: Tensor, shape: Shape) -> Tensor:
            z = _by_row(x, shape[0], layer).detach()
            sums[layer.index] = z[real.to(z.device)].sum(0, dtype=torch.float64)
            return x

        return add

    with _hooked(layout, [(layer, layer.down_proj, adder(layer)) for layer in layout.layers]):
        yield sums


@contextmanager
def ffn_inputs(layout: Layout) -> Iterator[dict[int, Tensor]]:
    """Record z at every position of a forward, per layer: [rows, T, I], which gradients can be taken by.

    Where the weights are frozen the graph begins at the lowest layer's z.
    """
    recorded: dict[int, Tensor] = {}

    def recorder(layer: DecoderLayer) -> Callable[[Tensor, Shape], Tensor]:
        def record(x: Tensor, shape: Shape) -> Tensor:
            z = _by_row(x, shape[0], layer)
            recorded[layer.index] = z = z if z.requires_grad else z.detach().requires_grad_()
            return z.reshape(x.shape)

        return record

    with _hooked(layout, [(layer, layer.down_proj, recorder(layer)) for layer in layout.layers]):
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
            copies = _by_row(x, shape[0], layer).split(len(weight))
            sums = [(z.float() * weight).sum(1, dtype=torch.float64) for z in copies]
            recorded[layer.index] = torch.stack(sums)
            return x

        return record

    with _hooked(layout, [(layer, layer.down_proj, recorder(layer)) for layer in layout.layers[first:]]):
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
            active = _by_row(x, shape[0], layer)[..., : layout.intermediate_size] > 0
            counted[layer.index] = (active & real.to(x.device)[..., None]).sum((0, 1))
            return x

        return count

    gates = [(layer, ffn_gate(layer)) for layer in layout.layers]
    inputs = [(layer, layer.down_proj, counter(layer)) for layer, gate in gates if gate is None]
    outputs = [(layer, gate, counter(layer)) for layer, gate in gates if gate is not None]
    with _hooked(layout, inputs, outputs):
        yield counted


@dataclass(frozen=True)
class LayerInput:
    """The state from which a forward can be resumed at a layer, recorded in an undisturbed forward.

    `hidden` [rows, T, hidden] entered the layer; `heads` [rows, T, heads·head_dim] is what its attention heads put out,
    the same whichever of them is replaced, or None where the attention must run again (`_Recorder`).
    """

    layer: int
    hidden: Tensor
    heads: Tensor | None = None

    def repeat(self, copies: int) -> "LayerInput":
        """Copies of the rows, copy after copy: [copies·rows, T, ...]."""
        heads = None if self.heads is None else self.heads.repeat(copies, 1, 1)
        return LayerInput(self.layer, self.hidden.repeat(copies, 1, 1), heads)

    @property
    def unchanged(self) -> int:
        """Number of layers, from the lowest on, whose keys and values are the undisturbed ones after resuming."""
        return self.layer if self.heads is None else self.layer + 1


@contextmanager
def recorded_states(layout: Layout, layers: Collection[int]) -> Iterator[dict[int, list[LayerInput]]]:
    """Record, for each of `layers`, the state it can be resumed from in each forward, in the forwards' order."""
    recorders = {index: _Recorder(layout.layers[index]) for index in layers}
    with ExitStack() as stack:
        for recorder in recorders.values():
            recorder.place(stack)
        yield {index: recorder.inputs for index, recorder in recorders.items()}


class _Recorder:
    """Records a layer's input and its heads' output in every forward.

    The attention need not run again if it returns exactly (output projection of the heads' output, weights). Weights,
    the attention probabilities, are only for show: no layer computes with them. An attention that flattens its rows is
    run again, because copies of the rows are made along a dimension of their own.
    """

    def __init__(self, layer: DecoderLayer) -> None:
        self.layer, self.inputs = layer, list[LayerInput]()
        self._hidden = self._heads = self._projected = torch.empty(0)

    def place(self, stack: ExitStack) -> None:
        """Set the hooks, which are removed with the stack."""
        stack.enter_context(input_hooks([(self.layer.module, self._note_input)]))
        assert self.layer.attn_out is not None  # Layout.require_attribution has been called
        for module, hook in (
            (self.layer.attn_out, self._note_heads),
            (_parent(self.layer, self.layer.attn_out), self._record),
        ):
            stack.callback(module.register_forward_hook(hook).remove)

    def _note_input(self, hidden: Tensor) -> Tensor:
        self._hidden = hidden.detach()
        return hidden

    def _note_heads(self, _module: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> None:
        self._heads, self._projected = args[0].detach(), result

    def _record(self, _module: nn.Module, _args: tuple[Any, ...], result: Any) -> None:
        plain = isinstance(result, tuple) and len(result) == 2 and result[0] is self._projected
        plain = plain and self._heads.shape[:-1] == self._hidden.shape[:-1]
        self.inputs.append(LayerInput(self.layer.index, self._hidden, self._heads if plain else None))


def _parent(layer: DecoderLayer, part: nn.Module | None) -> nn.Module:
    """The module that holds `part`, an output projection: the layer's attention or FFN, or the layer itself.

    Raises LayoutError, naming the layer, if none does.
    """
    parents = (m for m in layer.module.modules() if any(child is part for child in m.children()))
    if (parent := next(parents, None)) is None:
        raise LayoutError(
            f"{layer.name}: its {type(part).__name__} was taken out of the model after the examples were encoded; "
            "change the model first"
        )
    return parent


@contextmanager
def last_ffn_at(layout: Layout, columns: Tensor | None) -> Iterator[None]:
    """Within the block, the last layer's FFN runs at these columns of each row only, [rows, n]; elsewhere it adds 0.

    Only a later layer's attention reads other positions, and there is no later layer. An FFN that is not a module
    called with states [rows, T, ...] alone runs everywhere, as with `columns` None.
    """
    layer = layout.layers[-1]
    ffn = _parent(layer, layer.down_proj)
    if columns is None or ffn is layer.module:
        yield
        return
    at = torch.arange(len(columns))[:, None], columns
    whole: Tensor | None = None

    def narrow(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal whole
        alone = len(args) == 1 and not kwargs and args[0].dim() == 3 and len(args[0]) == len(columns)
        whole = args[0] if alone else None
        return args if whole is None else (whole[at],), kwargs

    def widen(_module: nn.Module, _args: tuple[Any, ...], written: Tensor) -> Tensor:
        if whole is None:
            return written
        return written.new_zeros(*whole.shape[:2], written.shape[-1]).index_put(at, written)

    with ExitStack() as stack:
        stack.callback(ffn.register_forward_pre_hook(narrow, with_kwargs=True).remove)
        stack.callback(ffn.register_forward_hook(widen).remove)
        yield


@contextmanager
def resumed(layout: Layout, layer_input: LayerInput) -> Iterator[None]:
    """Within the block, forwards of the decoder begin at the layer that `layer_input` was recorded at.

    If its heads' output is known, only the output projection of its attention runs. The decoder itself runs as always,
    so that masks, position embeddings and caches are its own for any architecture.
    """
    layer = layout.layers[layer_input.layer]

    def skip(hidden_states: Tensor, *_args: object, **_kwargs: object) -> Tensor:
        return hidden_states

    def project(*_args: object, **_kwargs: object) -> tuple[Tensor, None]:
        assert layer.attn_out is not None
        return layer.attn_out(layer_input.heads), None

    with ExitStack() as stack:
        for below in layout.layers[: layer_input.layer]:
            _assign_forward(stack, below.module, skip)
        if layer_input.heads is not None:
            _assign_forward(stack, _parent(layer, layer.attn_out), project)
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
            outputs = _by_row(x, len(heads), layer).unflatten(-1, (count, -1)).clone()  # [rows, T, heads, head_dim]
            output = outputs[rows, :, chosen].float()
            total = outputs.sum(-2, dtype=torch.float32)[rows]
            outputs[rows, :, chosen] = ((total - output) / (count - 1)).to(x.dtype)
            joined: Tensor = outputs.reshape(x.shape)
            return joined

        return replace

    def hooks() -> Iterator[tuple[DecoderLayer, nn.Module, Callable[[Tensor, Shape], Tensor]]]:
        for index in rows_of:
            layer = layout.layers[index]
            assert layer.attn_out is not None  # Layout.require_attribution has been called
            assert layer.num_heads is not None
            yield layer, layer.attn_out, intervention(layer, layer.num_heads)

    with _hooked(layout, hooks()):
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
            outputs = _by_row(x, shape[0], layer).unflatten(-1, (count, -1))  # [rows, T, heads, head_dim]
            own = shares[layer.index] = torch.full((len(outputs), count), share, device=x.device, requires_grad=True)
            way = count / (count - 1) * (outputs.mean(-2, keepdim=True) - outputs)
            moved: Tensor = outputs + scale(way, own[:, None, :, None])
            return moved.reshape(x.shape)

        return move

    def hooks() -> Iterator[tuple[DecoderLayer, nn.Module, Callable[[Tensor, Shape], Tensor]]]:
        for layer in layout.layers:
            assert layer.attn_out is not None  # Layout.require_attribution has been called
            assert layer.num_heads is not None
            yield layer, layer.attn_out, mover(layer, layer.num_heads)

    with _hooked(layout, hooks()):
        yield shares


@contextmanager
def scaled_ffn(layout: Layout, scales: Scales) -> Iterator[None]:
    """Multiply the FFN activations of layer l by scales[l], float32 [I]; zeros mask, layers not named are untouched.

    A forward of the decoder that does not call one of these down-projections raises LayoutError.
    """

    def scaler(factors: Tensor) -> Callable[[Tensor, Shape], Tensor]:
        return lambda z, _shape: scale(z, factors.to(z.device))

    scaled = [(layout.layers[index], scaler(factors)) for index, factors in scales.items()]
    with _hooked(layout, [(layer, layer.down_proj, replace) for layer, replace in scaled]):
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
            z = _by_row(x, shape[0], layer)
            factor = factors[layer.index] = torch.ones(len(z), z.shape[-1], device=z.device, requires_grad=True)
            if columns is None:
                z = scale(z, factor[:, None])
            else:
                at = torch.arange(len(z)), columns
                z = z.index_put(at, scale(z[at], factor))
            return z.reshape(x.shape)

        return multiply

    with _hooked(layout, [(layer, layer.down_proj, multiplier(layer)) for layer in layout.layers]):
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
    with _hooked(layout, [(layer, layer.down_proj, replace) for layer, replace in setters]):
        yield
