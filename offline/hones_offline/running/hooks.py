"""Common parts of the hooks on a decoder's layers: `hooked` places all of them or none.

- `readings.py` has those that read;
- `interventions.py` those that change what a layer computes;
- `resumption.py` those that run less of the model.

None recomputes what the model computes anyway: every hook reads or replaces an input that the model has just produced.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hones_offline.running.activations import Activations, AnyActivations, Choices, ExpertActivations, Shape
from hones_steer.errors import LayoutError
from hones_steer.experts import Experts
from hones_steer.ffns import EXPERTS, Ffn
from hones_steer.injection import InstanceMethods, input_hooks
from hones_steer.layout import DecoderLayer, Layout

Head = tuple[int, int]
"""(layer, head)."""
Hook = tuple[DecoderLayer, nn.Module, Callable[[Tensor, Shape], Tensor]]
"""A layer, a module of it, and the function that replaces the module's input, or output, in forwards of a shape."""
ExpertsHook = tuple[DecoderLayer, Experts, Callable[[ExpertActivations], Tensor]]
"""A layer, its routed experts, and the function that replaces their activations."""
FfnHook = Callable[[AnyActivations], Tensor]
"""A function that replaces the activations of an FFN, or of all experts of a layer, in the shape of their `z`."""


@contextmanager
def hooked_ffns(layout: Layout, functions: Mapping[Ffn, FfnHook]) -> Iterator[None]:
    """Within the block, replace z of each FFN, or of all experts of a layer, by what its function gives.

    Raises LayoutError as `hooked` does, and if the model has no such FFN.
    """
    layout.require_ffns(functions)
    hooks: list[Hook] = []
    experts: list[ExpertsHook] = []
    for layer in layout.layers:
        for projection in layer.projections:
            if projection.ffn in functions:
                replace = on_tokens(functions[projection.ffn], projection.name, last=layer is layout.layers[-1])
                hooks.append((layer, projection.down_proj, replace))
        if layer.experts is not None and (ffn := Ffn(layer.index, EXPERTS)) in functions:
            experts.append((layer, layer.experts, functions[ffn]))
    with hooked(layout, hooks, experts=experts):
        yield


def on_tokens(function: FfnHook, name: str, *, last: bool) -> Callable[[Tensor, Shape], Tensor]:
    """A hook's function that is given what its module is given, or gives, as the activations of the layer `name`."""
    return lambda z, shape: function(Activations(name, z, shape, last))


@contextmanager
def hooked(
    layout: Layout,
    hooks: Iterable[Hook],
    outputs: Iterable[Hook] = (),
    experts: Iterable[ExpertsHook] = (),
    *,
    active: bool = False,
) -> Iterator[None]:
    """Within the block, replace each module's input by its function of the input and of the forward's shape.

    Those of `outputs` replace the module's output, those of `experts` what routed experts compute, or with `active`
    their act(gate(x)) alone. A forward of the decoder that runs a layer without calling one of its modules raises
    LayoutError, naming the layer. Layers that it leaves out (cross-attention to an absent image) have nothing to
    replace.
    """
    hooks, outputs, experts = list(hooks), list(outputs), list(experts)
    modules = [(layer, module) for layer, module, _ in (*hooks, *outputs)]
    forward = _Forward([*modules, *((layer, of_layer.module) for layer, of_layer, _ in experts)])

    def noted(module: nn.Module, replace: Callable[[Tensor, Shape], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: replace(x, forward.call(module))

    def noted_experts(layer: DecoderLayer, of: Experts, function: Callable[[ExpertActivations], Tensor]) -> _OnChoices:
        last = layer is layout.layers[-1]
        return lambda z, choices: function(
            ExpertActivations(of.name, z, forward.call(of.module), of.count, choices, last)
        )

    with ExitStack() as stack:
        forward.place(stack, layout.decoder)
        stack.enter_context(input_hooks((module, noted(module, replace)) for _, module, replace in hooks))
        for _, module, replace in outputs:
            stack.callback(module.register_forward_hook(_output_hook(noted(module, replace))).remove)
        place = _place_on_active if active else _place_on_experts
        for layer, of_layer, function in experts:
            place(stack, of_layer, noted_experts(layer, of_layer, function))
        yield


class _Forward:
    """The decoder's present forward: its shape, which layers have run, and which modules with hooks were called."""

    def __init__(self, modules: Sequence[tuple[DecoderLayer, nn.Module]]) -> None:
        self._modules = modules
        self._shape: Shape = (0, 0)
        self._called: set[int] = set()
        self._ran: set[int] = set()

    def place(self, stack: ExitStack, decoder: nn.Module) -> None:
        """Follow the decoder's forwards until the stack is left."""
        stack.callback(decoder.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
        stack.callback(decoder.register_forward_hook(self._leave).remove)
        for layer in {layer.index: layer for layer, _ in self._modules}.values():
            stack.callback(layer.module.register_forward_pre_hook(partial(self._note, layer.index)).remove)

    def call(self, module: nn.Module) -> Shape:
        """Note the call of a module; returns the forward's shape."""
        self._called.add(id(module))
        return self._shape

    def _note(self, index: int, *_: object) -> None:
        self._ran.add(index)

    def _enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args)
        rows, positions = next(x for x in given if x is not None).shape[:2]
        self._shape = rows, positions
        self._called.clear()
        self._ran.clear()

    def _leave(self, *_: object) -> None:
        for layer, module in self._modules:
            if id(module) not in self._called and layer.index in self._ran:
                raise LayoutError(
                    f"{layer.name}: its {type(module).__name__} was not called in a forward of the decoder, so that "
                    "nothing can be read or changed there; use a model that calls it (no fused or replaced kernels)"
                )


def _output_hook(replace: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    return lambda _module, _args, output: replace(output)


_OnChoices = Callable[[Tensor, Choices], Tensor]
"""(z [choices, I], whose they are) -> z."""


def _place_on_experts(stack: ExitStack, experts: Experts, replace: _OnChoices) -> None:
    """Replace what the experts compute until the stack is left; raises LayoutError where that cannot be read."""
    experts.require_readable()
    if not experts.all_tokens:
        _place_at(stack, experts, experts.gating, replace)
        return
    methods = InstanceMethods(experts.module)
    stack.callback(methods.remove)
    methods.wrap("forward", lambda _: partial(_all_tokens_computed, experts, replace))


def _place_on_active(stack: ExitStack, experts: Experts, replace: _OnChoices) -> None:
    """Replace act(gate(x)) of the experts until the stack is left; raises LayoutError where it is hidden."""
    _place_at(stack, experts, experts.active, replace)


def _place_at(stack: ExitStack, experts: Experts, part: nn.Module | str, replace: _OnChoices) -> None:
    """Replace what a part of the experts, or a method of theirs, gives for all choices, until the stack is left."""
    choices: Choices | None = None

    def begin(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal choices
        hidden_states, *routed = [*args, *kwargs.values()]
        if experts.all_tokens:
            tokens, numbers = experts.rows(hidden_states, None)
            choices = Choices(tokens, numbers, torch.ones_like(tokens), experts.num_tokens(hidden_states, None))
            return
        indices, weights = routed[:2]
        order = experts.order(indices)
        of_tokens = order // indices.shape[1], indices.reshape(-1)[order], weights.reshape(-1)[order]
        choices = Choices(*of_tokens, len(indices))

    def replaced(z: Tensor) -> Tensor:
        rows = z.flatten(0, -2)
        if choices is None or len(rows) != len(choices.tokens):
            raise LayoutError(
                f"{experts.name}: the experts implementation {experts.implementation!r} does not compute all choices "
                "of the router at once, so that they cannot be told apart; call "
                "model.set_experts_implementation('grouped_mm')"
            )
        return replace(rows, choices).view(z.shape)

    stack.callback(experts.module.register_forward_pre_hook(begin, with_kwargs=True).remove)
    if isinstance(part, nn.Module):
        stack.callback(part.register_forward_hook(_output_hook(replaced)).remove)
    else:
        methods = InstanceMethods(experts.module)
        stack.callback(methods.remove)
        methods.wrap(part, lambda function: lambda projected: replaced(function(projected)))


def _all_tokens_computed(experts: Experts, replace: _OnChoices, hidden_states: Tensor) -> Tensor:
    """The forward of experts that compute every token, with z of those that were chosen replaced.

    Others are given zeros, of which z is 0. The router has weighed what they are given; what they write adds up as is.
    """
    module: Any = experts.module
    given = hidden_states.view(experts.count, -1, experts.hidden_size)
    gate, up = torch.bmm(given, module.gate_up_proj).chunk(2, dim=-1)
    z = up * module.act_fn(gate)
    chosen, tokens = given.any(-1).nonzero(as_tuple=True)
    choices = Choices(tokens, chosen, z.new_ones(len(tokens)), given.shape[1])
    z = z.index_put((chosen, tokens), replace(z[chosen, tokens], choices))
    return torch.bmm(z, module.down_proj).view(hidden_states.shape)


def parent_of(layer: DecoderLayer, part: nn.Module | None) -> nn.Module:
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
