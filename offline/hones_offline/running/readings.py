"""Hooks that read what a decoder's modules are given, as context managers; what is computed stays the same."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from hones_offline.data.neurons import NeuronIndex
from hones_offline.running.activations import Activations, AnyActivations, ExpertActivations, Shape, by_row
from hones_offline.running.hooks import FfnHook, hooked, hooked_ffns, on_tokens
from hones_steer.ffns import EXPERTS, SHARED, Ffn
from hones_steer.layout import DecoderLayer, Layout, Projection, ffn_gate

# Last name of a shared expert's gate of which transformers takes the sigmoid.
SIGMOID_GATE = "shared_expert_gate"


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


def _ffns(layout: Layout, first: int = 0) -> list[Ffn]:
    """All FFNs of the layers from `first` on, all experts of a layer being one."""
    return [ffn for ffn in NeuronIndex.of(layout).groups if ffn.layer >= first]


@contextmanager
def recorded_ffn(
    layout: Layout, columns: Tensor, *, first: int = 0, weighted: bool = False
) -> Iterator[dict[Ffn, Tensor]]:
    """Record z = act(gate(x))·up(x) of each row at its column, `columns` [rows], per FFN: float32 [rows, N].

    Recorded are the layers from `first` on, in forwards with that many rows: a prefix that rows share has none of their
    columns. Where the last FFN runs at one column of each row only (`last_ffn_at`), that column is the row's. With
    `weighted`, experts' are times the router's weight (`ExpertActivations.at`) and a shared expert's, once the block
    has ended, times the sigmoid of its `SIGMOID_GATE`.
    """
    recorded: dict[Ffn, Tensor] = {}
    gates: dict[Ffn, Tensor] = {}

    def recorder(into: dict[Ffn, Tensor], ffn: Ffn) -> FfnHook:
        def record(activations: AnyActivations) -> Tensor:
            if activations.shape[0] == len(columns):
                into[ffn] = activations.at(columns, weighted=weighted)
            return activations.z

        return record

    outputs = [
        (layer, layer.shared_gate[1], on_tokens(recorder(gates, ffn), layer.name, last=layer is layout.layers[-1]))
        for layer in layout.layers[first:]
        if weighted and layer.shared_gate is not None and (ffn := Ffn(layer.index, SHARED))
    ]
    with hooked_ffns(layout, {ffn: recorder(recorded, ffn) for ffn in _ffns(layout, first)}):
        with hooked(layout, (), outputs):
            yield recorded
        for ffn, gate in gates.items():
            recorded[ffn] = recorded[ffn] * gate.sigmoid()


@contextmanager
def summed_ffn(layout: Layout, real: Tensor) -> Iterator[dict[Ffn, tuple[Tensor, Tensor]]]:
    """Sum z over the positions of a forward that `real`, bool [rows, T], marks, per FFN: float64 [N].

    Beside it stands at how many of them the neuron has a z, int64 [N]: of an expert, those that it is chosen for.
    """
    sums: dict[Ffn, tuple[Tensor, Tensor]] = {}

    def adder(ffn: Ffn) -> FfnHook:
        def add(activations: AnyActivations) -> Tensor:
            sums[ffn] = activations.sums(real)
            return activations.z

        return add

    with hooked_ffns(layout, {ffn: adder(ffn) for ffn in _ffns(layout)}):
        yield sums


@contextmanager
def ffn_inputs(layout: Layout, calls: dict[Ffn, AnyActivations] | None = None) -> Iterator[dict[Ffn, Tensor]]:
    """Record z at every position of a forward, per FFN: [rows, T, I], which gradients can be taken by.

    Of experts it is [choices, I]. Where the weights are frozen the graph begins at the lowest layer's z. `calls`, if
    given, gets the activations, which say whose those are.
    """
    recorded: dict[Ffn, Tensor] = {}

    def recorder(ffn: Ffn) -> FfnHook:
        def record(activations: AnyActivations) -> Tensor:
            z = activations.by_row if isinstance(activations, Activations) else activations.z
            recorded[ffn] = z = z if z.requires_grad else z.detach().requires_grad_()
            if calls is not None:
                calls[ffn] = activations
            return z.reshape(activations.z.shape)

        return record

    with hooked_ffns(layout, {ffn: recorder(ffn) for ffn in _ffns(layout)}):
        yield recorded


@contextmanager
def ffn_products(
    layout: Layout, weights: Mapping[Ffn, AnyActivations], *, first: int = 0
) -> Iterator[dict[Ffn, Tensor]]:
    """Record Σ z·w over positions, per FFN from layer `first` on, for `weights` at the tokens of some rows.

    Forwards have copies of these rows, copy after copy; the sums are float64 [copies, rows, N].
    """
    recorded: dict[Ffn, Tensor] = {}

    def recorder(ffn: Ffn) -> FfnHook:
        def record(activations: Any) -> Tensor:
            recorded[ffn] = activations.products(weights[ffn])
            z: Tensor = activations.z
            return z

        return record

    with hooked_ffns(layout, {ffn: recorder(ffn) for ffn in _ffns(layout, first)}):
        yield recorded


@contextmanager
def active_tokens(layout: Layout, real: Tensor) -> Iterator[dict[Ffn, Tensor]]:
    """Count at how many of a forward's tokens each neuron is active, per FFN: int64 [N].

    A neuron is active where act(gate(x)) > 0 in a gated FFN, where act(up(x)) = z > 0 in another; an expert's only
    where the expert is chosen. `real`, bool [rows, T], says which tokens count.

    Raises LayoutError, naming the layer, for an FFN whose gate cannot be told.
    """
    counted: dict[Ffn, Tensor] = {}

    def counter(layer: DecoderLayer, projection: Projection) -> Callable[[Tensor, Shape], Tensor]:
        def count(x: Tensor, shape: Shape) -> Tensor:
            active = by_row(x, shape[0], layer.name)[..., : projection.width] > 0
            counted[projection.ffn] = (active & real.to(x.device)[..., None]).sum((0, 1))
            return x

        return count

    def of_experts(layer: DecoderLayer) -> Callable[[ExpertActivations], Tensor]:
        def count(activations: ExpertActivations) -> Tensor:
            counted[Ffn(layer.index, EXPERTS)] = activations.positive(real)
            return activations.z

        return count

    gates = [(layer, of, ffn_gate(layer, of.down_proj)) for layer in layout.layers for of in layer.projections]
    inputs = [(layer, of.down_proj, counter(layer, of)) for layer, of, gate in gates if gate is None]
    outputs = [(layer, gate, counter(layer, of)) for layer, of, gate in gates if gate is not None]
    experts = [(layout.layers[index], of, of_experts(layout.layers[index])) for index, of in layout.experts.items()]
    with hooked(layout, inputs, outputs, experts, active=True):
        yield counted
