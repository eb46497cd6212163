"""The scaling itself, and the hooks that apply it.

The scaled quantity is z, the input of the FFN's down-projection: z' = s·z per neuron, where the paper (HONES, arXiv
2604.17941) has s = 1 + m⊙λ.

`Injection` steers a model that is called as usual. A hook on the model, which always runs outside compiled code,
asks once per forward which block of `Steering.task` it is in and writes the slots of its rows into static tensors. The
hooks on the down-projections read these tensors and nothing else when they are compiled, so switching tasks never
recompiles.

No row stays unsteered without an error: before a steered forward the modules on the way to each down-projection must be
those that were there at `steer`, and after it no decoder layer may have run whose down-projection was not called.
Tracing finds out which ones compiled code calls, and the code sets `LayerHook.called` accordingly at each run.

Routed experts have no down-projection to hook (`experts.py`). `ExpertsHook` learns from their module's arguments which
token and expert each row of their activations will be of, and scales these.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hones_steer._blocks import Routing
from hones_steer._calls import Generation, cached_tokens, call_of
from hones_steer._recomputation import ForwardsWithGradients
from hones_steer.errors import LayoutError, RoutingError, StateError
from hones_steer.experts import Experts
from hones_steer.ffns import EXPERTS, Ffn
from hones_steer.layout import Layout, base_layer
from hones_steer.slots import IDENTITY, RowSlots, ScaleTables


def scale(z: Tensor, s: Tensor) -> Tensor:
    """Multiply activations z `[..., I]`, of any floating dtype, with float32 scales s `[I]` or `[..., I]`.

    The product is formed in float32 (float64 for such z) and rounded once: (z.float() * s).to(z.dtype), without
    a float32 copy of z. A scale of 1 leaves z bit-equal.
    """
    return (z * s).to(z.dtype)


@contextmanager
def input_hooks(pairs: Iterable[tuple[nn.Module, Callable[[Tensor], Tensor]]]) -> Iterator[None]:
    """Replace each module's first positional input, within the block, by what its function returns for it.

    Either all hooks are placed or none; all are removed when the block is left, also by an exception.
    """
    handles: list[RemovableHandle] = []
    try:
        for module, replace in pairs:
            handles.append(module.register_forward_pre_hook(_input_hook(replace)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _input_hook(replace: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (replace(args[0]), *args[1:])

    return hook


@dataclass(frozen=True)
class Edge:
    """One step of the way from the model to a down-projection: `parent` had `child` under `name` at `steer`."""

    path: str
    parent: nn.Module
    name: str
    child: nn.Module

    @property
    def unchanged(self) -> bool:
        """Whether `parent` still has `child` there; compiled since then, its hooks still run."""
        present = self.parent._modules.get(self.name)
        return present is self.child or getattr(present, "_orig_mod", None) is self.child


def is_injected(model: nn.Module, layout: Layout) -> bool:
    """Whether an `Injection` has its hooks on the model; inside a wrapper, `model` is the one that it calls."""
    modules = [model, *(projection.down_proj for projection in layout.projections)]
    return any(isinstance(hook, _Hook) for module in modules for hook in module._forward_pre_hooks.values())


class Injection:
    """The hooks of one steered model, and the state that they share; `detach` removes every hook.

    `model` is the one that wrappers (PEFT, torch.compile) call in the end. `current` returns the routing of the
    calling context, `generation` the call of `generate` that it is inside, or None.

    Forwards are serialized by `lock`, because the static tensors hold one forward's rows at a time. To one thread the
    injection is IDLE (`_owner` is None), RUNNING (`_owner` is this thread, which holds the lock) or TAKEN (`_owner` is
    another thread). `_written` is what the static tensors say: the slots of the latest forward's rows, or the identity.

        event                        | IDLE                       | RUNNING                    | TAKEN
        -----------------------------+----------------------------+----------------------------+-------------------
        enter: a forward begins      | lock, write its rows, note | release the forward before | wait, then as IDLE
                                     | those of gradients:        | (it was interrupted), then |
                                     | → RUNNING (IDLE if         | as IDLE                    |
                                     | refused)                   |                            |
        eager_scales: a layer runs   | in backward(), scales of   | scales of the rows         | as IDLE
        uncompiled                   | the recomputed forward;    |                            |
                                     | else, in a block, refused  |                            |
        a layer runs compiled        | scales of `_written`       | scales of `_written`       | scales of `_written`
        check: the forward returns   | never                      | refused if a layer ran     | never
                                     |                            | without its down_proj      |
        release: the forward, its    | nothing                    | unlock; `_written` stays:  | nothing
        `generate` or its block ends |                            | → IDLE                     |
        rest: a block has ended      | write the identity, unless | nothing                    | wait, then as IDLE
                                     | `_written` is that of the  |                            |
                                     | latest with gradients      |                            |

    PyTorch calls `release` after every forward, also a failed one, but not after a KeyboardInterrupt; the next `enter`
    of the same thread, or the end of its block, makes up for that.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        slots: int,
        current: Callable[[], Routing | None],
        generation: Callable[[], Generation | None],
    ) -> None:
        self.lock = threading.RLock()
        self.batch = 1
        self.each_token = False  # the tokens of the forward's rows have slots of their own
        self.missed: str | None = None  # says of a layer that it ran in this forward without calling what is scaled
        self._current = current
        self._generation = generation
        self._owner: int | None = None  # the thread whose forward is in progress
        self._routing: Routing | None = None  # the block that this forward is in
        self._slots: tuple[int, ...] = (IDENTITY,)  # one for each of its rows, or tokens, or one for all
        self._eager_layers = 0  # how many layers of this forward ran uncompiled
        self._with_gradients = ForwardsWithGradients()
        places = _places(layout)
        self.tables = ScaleTables(places, slots)
        self._rows = {device: RowSlots(device) for device, _ in places.values()}
        self._written: tuple[tuple[int, ...], int] = ((IDENTITY,), 1)
        self._edges = _edges(model, _scaled_modules(layout))
        self._hooked: list[nn.Module] = []  # down-projections and modules of experts
        self._layer_hooks: list[LayerHook | ExpertsHook] = []
        self._experts_hooks: dict[int, ExpertsHook] = {}
        self._handles: list[RemovableHandle | InstanceMethods] = []
        self._attach(model, layout, {ffn: self._rows[device] for ffn, (device, _) in places.items()})

    def _attach(self, model: nn.Module, layout: Layout, rows: Mapping[Ffn, RowSlots]) -> None:
        if is_injected(model, layout):
            raise StateError("the model is steered already; use that Steering, or detach() it first")
        try:
            self._handles.append(model.register_forward_pre_hook(_EnterHook(self), with_kwargs=True))
            self._handles.append(model.register_forward_hook(_CheckHook(self)))
            self._handles.append(model.register_forward_hook(_LeaveHook(self), always_call=True))
            if layout.decoder is not model:
                self._handles.append(layout.decoder.register_forward_pre_hook(_DecoderHook(self)))
            for projection in layout.projections:
                ffn = projection.ffn
                hook = LayerHook(self, projection.name, self.tables.tables[ffn], rows[ffn])
                self._handles.append(projection.down_proj.register_forward_pre_hook(hook))
                self._hooked.append(projection.down_proj)
                self._guard(layout.layers[ffn.layer].module, hook)
            for layer, experts in layout.experts.items():
                ffn = Ffn(layer, EXPERTS)
                of_experts = ExpertsHook(self, experts, self.tables.tables[ffn], rows[ffn])
                self._experts_hooks[layer] = of_experts
                self._attach_experts(experts, of_experts)
                self._guard(layout.layers[layer].module, of_experts)
        except BaseException:
            self.detach()
            raise
        _forget_compiled_code()

    def _guard(self, layer: nn.Module, hook: LayerHook | ExpertsHook) -> None:
        self._layer_hooks.append(hook)
        self._handles.append(layer.register_forward_hook(GuardHook(hook)))

    def _attach_experts(self, experts: Experts, hook: ExpertsHook) -> None:
        module = experts.module
        self._hooked.append(module)
        self._handles.append(module.register_forward_pre_hook(hook.begin, with_kwargs=True))
        self._handles.append(module.register_forward_hook(hook.end))
        if isinstance(experts.activation, nn.Module):
            self._handles.append(experts.activation.register_forward_hook(hook.scale_output))
        else:
            methods = InstanceMethods(module)
            self._handles.append(methods)
            methods.wrap(experts.activation, hook.scaling)

    def detach(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        _forget_compiled_code()

    def is_attached_to(self, module: nn.Module) -> bool:
        """Whether this injection's hook is on the down-projection `module`."""
        hooks = [getattr(hook, "__self__", hook) for hook in module._forward_pre_hooks.values()]
        return any(isinstance(hook, LayerHook | ExpertsHook) and hook.injection is self for hook in hooks)

    def is_attached(self) -> bool:
        """Whether all its hooks are on the modules that had them at `steer`, and these are still the model's."""
        return self.replaced() is None and all(map(self.is_attached_to, self._hooked))

    @property
    def experts_hooks(self) -> dict[int, ExpertsHook]:
        """The hook of each layer's routed experts, by the layer's index."""
        return dict(self._experts_hooks)

    def replaced(self) -> str | None:
        """The path of the first module, on the way to a down-projection, that was replaced after `steer`; or None."""
        return next((edge.path for edge in self._edges if not edge.unchanged), None)

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin a forward: fix the slots of its rows for all layers that it calls.

        Raises:
            RoutingError: its rows cannot be those of the block that it is in.
            StateError: the block was left, a module was replaced after `steer`, or the forward is being recorded.
        """
        self.release()  # a forward of this thread that was interrupted
        self.lock.acquire()
        self._owner = threading.get_ident()
        try:
            self._begin(args, kwargs)
        except BaseException:
            self.release()
            raise

    def release_block(self, routing: Routing) -> None:
        """End this thread's forward if one of this block is in progress."""
        if self._routing is routing:
            self.release()

    def release(self) -> None:
        """End this thread's forward if one is in progress, so that other threads can go on."""
        if self.is_running_here():
            self._with_gradients.end()
            self._owner = self._routing = None
            self.each_token = False
            self.lock.release()

    def rest(self) -> None:
        """Write the identity, which compiled parts of the model read when they are called without the model.

        Rows of a forward with gradients stay as they are: compiled backward code may still read them. So do those of
        a forward in progress: a generator's block is left wherever the generator happens to be collected.
        """
        with self.lock:
            if not self.is_running_here() and self._with_gradients.latest_slots != self._written[0]:
                self._write((IDENTITY,), 1)

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        refuse_recording()
        routing = self._current()
        call = call_of(args, kwargs)
        self._routing, self._slots = routing, (IDENTITY,)
        if routing is not None:
            if routing.closed:
                raise StateError(
                    f"the block of {routing} was left while a thread or function that belongs to it still runs; "
                    "join it inside the block"
                )
            if routing.is_scoped:
                call = call._replace(cached=cached_tokens(args, kwargs))
            self._slots, each_token = routing.slots_of(call, self._generation())
            if routing.steers and (path := self.replaced()) is not None:
                raise StateError(
                    f"{path} was replaced after steer(), so that {routing} would not steer it as before (adding or "
                    "merging a PEFT adapter does that, too); detach() and steer() again"
                )
            if each_token and torch.is_grad_enabled():
                raise RoutingError(
                    f"{routing} steers a row's tokens differently, and so no forward with gradients; call the model "
                    "under torch.no_grad()"
                )
            routing.forwards += 1
            self.each_token = each_token
        self.batch = call.rows or 1
        self.missed = None
        self._eager_layers = 0
        for hook in self._layer_hooks:
            hook.called = False
        self._write(self._slots, len(self._slots) if self.each_token else self.batch)
        if torch.is_grad_enabled():
            self._with_gradients.begin(routing, self._slots)

    def _write(self, slots: tuple[int, ...], rows: int) -> None:
        if self._written != (slots, rows):
            for row_slots in self._rows.values():
                row_slots.write(slots, rows)
            self._written = (slots, rows)

    def check(self) -> None:
        """Raise StateError if a layer of the steered forward that returns ran without its down-projection."""
        if self.missed is not None and self._slots != (IDENTITY,):
            raise StateError(
                f"{self.missed}, so {self._routing} has not scaled its "
                "neurons (a fused kernel that reads the weight itself does that); switch the fused kernel off, or "
                "use fold()"
            )
        if self.each_token and self._slots != (IDENTITY,) and self._eager_layers != len(self._layer_hooks):
            raise StateError(
                f"{self._eager_layers} of {len(self._layer_hooks)} layers ran uncompiled, and only these tell the "
                f"tokens of {self._routing} apart; do not compile the model"
            )

    def is_running_here(self) -> bool:
        """Whether a forward of the model is in progress in the calling thread."""
        return self._owner == threading.get_ident()

    def eager_scales(self, hook: LayerHook, z: Tensor) -> Tensor | None:
        """Scales for the input z `[rows, ..., I]` of an uncompiled layer; None where it is not steered.

        They are `[rows, I]`, or `[I]` or `[1, I]` for all rows, or with `each_token` `[tokens, I]`, in float32.
        """
        if self.is_running_here():
            hook.called = True
            self._eager_layers += 1
            return self._scales_of_forward(hook, z)
        if torch._C._current_graph_task_id() != -1:
            return self._scales_of_recomputation(hook)
        self.refuse_past_the_model(hook.layer)
        return None

    def eager_slots(self, hook: ExpertsHook, tokens: int) -> Tensor | None:
        """Slots of the batch rows that `tokens` tokens of an uncompiled layer are of; None where it is not steered.

        They are int64 `[rows]`, or `[1]` for all rows.
        """
        if self.is_running_here():
            self._eager_layers += 1
            if self._slots == (IDENTITY,):
                return None
            self._check_rows(hook.layer, tokens, None)
            return hook.rows.index[: len(self._slots)]
        if torch._C._current_graph_task_id() != -1:
            slots = self._with_gradients.slots_of_recomputation(hook.layer)
            return None if slots == (IDENTITY,) else torch.tensor(slots, device=hook.table.device)
        self.refuse_past_the_model(hook.layer)
        return None

    def refuse_past_the_model(self, part: str) -> None:
        """Raise RoutingError inside a block: `part` was called without the model, so its rows are not known."""
        refuse_recording()
        routing = self._current()
        if routing is not None and routing.steers:
            raise RoutingError(
                f"{part} was called past the model inside {routing}; call the model itself, model(...), "
                "so that its rows are known"
            )

    def _scales_of_forward(self, hook: LayerHook, z: Tensor) -> Tensor | None:
        if self._slots == (IDENTITY,):
            return None
        if len(self._slots) == 1 and not torch.is_grad_enabled():
            return hook.by_slot[self._slots[0]]  # a view, which backward() might find overwritten
        self._check_rows(hook.layer, z.shape[:-1].numel(), None if z.dim() <= 2 else z.shape[0])
        return hook.table.index_select(0, hook.rows.index[: len(self._slots)])

    def _check_rows(self, layer: str, tokens: int, rows: int | None) -> None:
        """Raise RoutingError if what a layer got cannot be this batch's; `rows` is None where all tokens are in one."""
        if len(self._slots) == 1:
            return
        if self.each_token:
            if tokens != len(self._slots) or rows not in (None, self.batch):
                raise RoutingError(
                    f"{layer} got {tokens} tokens of {len(self._slots)}, so that {self._routing} does not know which; "
                    "this model cannot be steered token by token"
                )
        elif tokens % self.batch if rows is None else rows != self.batch:
            raise RoutingError(
                f"{layer} got {tokens if rows is None else rows} rows from a batch of {self.batch}: its rows are "
                "packed; steer the whole batch with task() instead of tasks()"
            )

    def _scales_of_recomputation(self, hook: LayerHook) -> Tensor | None:
        """Scales of the forward that backward(), perhaps in another thread, recomputes (gradient checkpointing)."""
        slots = self._with_gradients.slots_of_recomputation(hook.layer)
        if slots == (IDENTITY,):
            return None
        return hook.table.index_select(0, torch.tensor(slots, device=hook.table.device))


_Function = TypeVar("_Function", bound=Callable[..., object])
_never_compiled: Callable[[_Function], _Function] = torch.compiler.disable


def _never_compiled_alone(function: _Function) -> _Function:
    """Let Dynamo trace a hook only inside a larger program; a hook of the compiled module itself runs as it is."""
    torch._dynamo.eval_frame.skip_code(function.__code__)
    return function


class _Hook:
    """Base of the hooks; it keeps a steered model from being copied, as the copy would be steered by accident."""

    def __init__(self, injection: Injection) -> None:
        self.injection = injection

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        raise StateError("a steered model cannot be copied or pickled; detach() first, or save its state_dict")


class _EnterHook(_Hook):
    @_never_compiled_alone
    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_exporting():
            refuse_recording()  # where Dynamo traces this hook
        self._enter(args, kwargs)

    @_never_compiled
    def _enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.injection.enter(args, kwargs)


class _CheckHook(_Hook):
    @_never_compiled
    def __call__(self, _module: nn.Module, _args: tuple[Any, ...], _output: object) -> None:
        self.injection.check()


class _LeaveHook(_Hook):
    @_never_compiled
    def __call__(self, _module: nn.Module, _args: tuple[Any, ...], _output: object) -> None:
        self.injection.release()


class _DecoderHook(_Hook):
    """Refuses the decoder without its model; also where the decoder is compiled and the layers' hooks read tensors."""

    @_never_compiled_alone
    def __call__(self, module: nn.Module, _args: tuple[Any, ...]) -> None:
        if not torch.compiler.is_compiling():
            self._refuse(module)

    @_never_compiled
    def _refuse(self, module: nn.Module) -> None:
        if not self.injection.is_running_here():
            self.injection.refuse_past_the_model(type(module).__name__)


class LayerHook(_Hook):
    """Scales the input of one down-projection. When it is compiled, it reads tensors only, and no Python state."""

    def __init__(self, injection: Injection, layer: str, table: Tensor, rows: RowSlots) -> None:
        super().__init__(injection)
        self.layer = layer
        self.table = table
        self.by_slot = table.unbind()
        self.rows = rows
        self.called = False  # whether it ran since its layer began, in a forward of the model
        self.missed = f"{layer} ran without calling its down-projection"

    def __call__(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        z: Tensor = args[0]
        # Some architectures (OPT) flatten [B, T, I] to [B * T, I].
        batch = z.shape[0] if z.dim() > 2 else self.injection.batch
        if torch.compiler.is_compiling():
            refuse_recording()
            self.called = True
            s = self.table.index_select(0, self.rows.index[:batch])
        elif (eager := self.injection.eager_scales(self, z)) is not None:
            if eager.dim() == 1 or self.injection.each_token:
                return (scale(z, eager if eager.dim() == 1 else eager.view(z.shape)), *args[1:])
            s = eager
        else:
            return None
        rows = z if z.dim() > 2 else z.reshape(batch, -1, z.shape[-1])
        s = s.view(s.shape[0], *[1] * (rows.dim() - 2), s.shape[1])
        return (scale(rows, s).view(z.shape), *args[1:])


class ExpertsHook(_Hook):
    """Scales the activations of one layer's routed experts, of each row by its token's slot and its expert.

    `begin` runs before their module, `scale_output` or `scaling` at its activation, once or once for each expert, and
    `end` after it. Compiled code reads tensors only; the rows of an uncompiled call are its thread's own.
    """

    def __init__(self, injection: Injection, experts: Experts, table: Tensor, rows: RowSlots) -> None:
        super().__init__(injection)
        self.layer = experts.name
        self.experts = experts
        self.table = table
        self.by_expert = table.view(-1, experts.width)  # [slots · experts, I]
        self.rows = rows
        self.called = False
        self.missed = f"{self.layer} ran without calling its experts' activation"
        self.watch: Callable[[Tensor, Tensor, Tensor], None] | None = None
        """Called, if it is set, with each uncompiled call's places in `by_expert`, activations before and after."""
        self._traced: Tensor | None = None  # the place in `by_expert` of each row, in the present call of the module
        self._traced_rows = 0  # how many of them compiled code has scaled
        self._eager = _EagerRows()

    @_never_compiled_alone
    def begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find out the rows of the call that begins."""
        hidden_states, choices = _experts_arguments(args, kwargs, self.experts)
        if torch.compiler.is_compiling():
            refuse_recording()
            self._traced = self._places(hidden_states, choices, self.rows.index[: self.injection.batch])
            self._traced_rows = 0
        else:
            self._begin_eagerly(hidden_states, choices)

    @_never_compiled
    def _begin_eagerly(self, hidden_states: Tensor, choices: Tensor | None) -> None:
        slots = self.injection.eager_slots(self, self.experts.num_tokens(hidden_states, choices))
        places = None if slots is None else self._places(hidden_states, choices, slots)
        self._eager.begin(places)
        if self.injection.is_running_here():  # its activation may be compiled by itself
            self._traced, self._traced_rows = places, 0

    def _places(self, hidden_states: Tensor, choices: Tensor | None, slots: Tensor) -> Tensor:
        """The place in `by_expert` of each row, int64 `[rows]`."""
        self.experts.require_implementation()
        tokens, experts = self.experts.rows(hidden_states, choices)
        each = self.experts.num_tokens(hidden_states, choices) // slots.shape[0]
        return slots.index_select(0, tokens // each) * self.experts.count + experts

    @_never_compiled_alone
    def scale_output(self, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Scale the output of the activation, `[rows, I]`, or `[experts, tokens, I]` where all tokens are computed."""
        return self._scaled(output)

    def scaling(self, activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Wrap a method of the experts, their own gating or activation, so that what it returns is scaled."""

        def scaled_activation(projected: Tensor) -> Tensor:
            return self._scaled(activation(projected))

        return scaled_activation

    def _scaled(self, z: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return self._scaled_eagerly(z)
        if self._traced is None:
            return z
        rows = z.shape[:-1].numel()
        places = self._traced
        if places.shape[0] != rows:
            places = places[self._traced_rows : self._traced_rows + rows]
        self._traced_rows += rows
        return scale(z, self.by_expert.index_select(0, places).view(z.shape))

    @_never_compiled
    def _scaled_eagerly(self, z: Tensor) -> Tensor:
        places = self._eager.take(z.shape[:-1].numel())
        if places is None:
            return z
        self._refuse_unknown_order(places, z)
        scaled = scale(z, self.by_expert.index_select(0, places).view(z.shape))
        if self.watch is not None:
            self.watch(places, z.reshape(-1, z.shape[-1]), scaled.reshape(-1, z.shape[-1]))
        return scaled

    def _refuse_unknown_order(self, places: Tensor, z: Tensor) -> None:
        """Raise StateError if these cannot be the rows expected: those of one expert, where not all come at once."""
        experts = places % self.experts.count
        complete = len(places) == z.shape[:-1].numel()
        if not complete or not (self._eager.is_whole(places) or bool((experts == experts[0]).all())):
            raise StateError(
                f"{self.layer}: {type(self.experts.module).__name__} computes its experts in an order that hones-steer "
                f"does not know, with the experts implementation {self.experts.implementation!r}; call "
                "model.set_experts_implementation('grouped_mm')"
            )

    @_never_compiled_alone
    def end(self, _module: nn.Module, _args: tuple[Any, ...], _output: object) -> None:
        """Note that the call has ended, and whether all its rows were scaled."""
        if torch.compiler.is_compiling():
            self.called = self._traced is None or self._traced_rows == self._traced.shape[0]
            self._traced = None
        else:
            self._end_eagerly()

    @_never_compiled
    def _end_eagerly(self) -> None:
        expected, scaled = self._eager.end()
        if self.injection.is_running_here():
            self.called = scaled + self._traced_rows == expected
            self._traced = None


class _EagerRows(threading.local):
    """The rows of a thread's present call of an experts module: their places, and how many were scaled."""

    def __init__(self) -> None:
        self._places: Tensor | None = None
        self._taken = 0

    def begin(self, places: Tensor | None) -> None:
        """Begin a call; None if it is not steered."""
        self._places, self._taken = places, 0

    def take(self, rows: int) -> Tensor | None:
        """The places of the next rows; None if they are not steered."""
        if self._places is None:
            return None
        self._taken += rows
        return self._places[self._taken - rows : self._taken]

    def is_whole(self, places: Tensor) -> bool:
        """Whether these are the places of all rows of the call."""
        return self._places is not None and len(places) == len(self._places)

    def end(self) -> tuple[int, int]:
        """End the call; return how many rows it had, and how many were taken."""
        rows = 0 if self._places is None else self._places.shape[0]
        taken, self._places = self._taken, None
        return rows, taken


class GuardHook(_Hook):
    """Notes, after a decoder layer has run, that its down-projection was not called.

    When it is compiled, what it notes is a constant, which the code sets again at each run.
    """

    def __init__(self, hook: LayerHook | ExpertsHook) -> None:
        super().__init__(hook.injection)
        self.hook = hook

    def __call__(self, _module: nn.Module, _args: tuple[Any, ...], _output: object) -> None:
        if torch.compiler.is_compiling() or self.injection.is_running_here():
            if not self.hook.called:
                self.injection.missed = self.hook.missed
            self.hook.called = False


class InstanceMethods:
    """Methods replaced on one module; those that somebody else had put there before are kept for `remove`."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._before: dict[str, Callable[..., Any] | None] = {}

    def wrap(self, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Replace the module's method by the wrapped one, if it has the method."""
        if (method := getattr(self._module, name, None)) is not None:
            self._before[name] = self._module.__dict__.get(name)
            self._module.__dict__[name] = wrapper(method)

    def remove(self) -> None:
        """Put the module's own methods back."""
        for name, before in self._before.items():
            del self._module.__dict__[name]
            if before is not None:
                self._module.__dict__[name] = before


def _experts_arguments(args: tuple[Any, ...], kwargs: dict[str, Any], experts: Experts) -> tuple[Tensor, Tensor | None]:
    """The hidden states `[tokens, hidden]` and choices `[tokens, k]` that experts are called with."""
    given = [*args, *kwargs.values()]
    return given[0], None if experts.all_tokens else given[1]


def _places(layout: Layout) -> dict[Ffn, tuple[torch.device, slice]]:
    """The device of each FFN, all routed experts of a layer being one, and the range of its neurons."""
    places = {
        projection.ffn: (execution_device(projection.down_proj, projection.name), slice(0, projection.width))
        for projection in layout.projections
    }
    for layer, experts in layout.experts.items():
        experts.require_implementation()
        device = execution_device(experts.module, experts.name)
        places[Ffn(layer, EXPERTS)] = device, slice(0, experts.count * experts.width)
    return places


def _scaled_modules(layout: Layout) -> list[nn.Module]:
    """The modules that hooks scale something of."""
    modules = [projection.down_proj for projection in layout.projections]
    for experts in layout.experts.values():
        modules += [module for module in (experts.module, experts.activation) if isinstance(module, nn.Module)]
    return modules


def refuse_recording() -> None:
    """Raise StateError while a program is being recorded: it would be steered forever as it is now, or never."""
    if torch.compiler.is_exporting():
        recorder = "torch.export"
    elif torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        recorder = "torch.jit.trace"
    elif torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        recorder = "a CUDA graph"
    else:
        return
    raise StateError(
        f"{recorder} cannot record a steered model, whose task changes from call to call; detach() first, and record a "
        "checkpoint made by merge_into() for a steered program"
    )


def _edges(model: nn.Module, modules: Sequence[nn.Module]) -> list[Edge]:
    """The steps of the ways from a model to these modules inside it, each step once."""
    targets = {id(module) for module in modules}
    edges: dict[str, Edge] = {}
    for path, module in model.named_modules():
        if id(module) in targets:
            parent, names = model, path.split(".")
            for depth, name in enumerate(names, 1):
                child = parent.get_submodule(name)
                step = ".".join(names[:depth])
                edges[step] = Edge(step, parent, name, child)
                parent = child
    return list(edges.values())


def execution_device(module: nn.Module, name: str) -> torch.device:
    """The device on which a module computes: where its weights are, or where accelerate moves them (offloading).

    Raises LayoutError, naming the layer, if its weights are not loaded.
    """
    hook = getattr(module, "_hf_hook", None)
    for part in (hook, *getattr(hook, "hooks", ())):
        if (device := getattr(part, "execution_device", None)) is not None:
            return torch.device(device)
    device = next((tensor.device for tensor in base_layer(module).state_dict().values()), torch.device("meta"))
    if device.type == "meta":
        raise LayoutError(f"{name}: its weights are not loaded (meta device); load the model before steering it")
    return device


def _forget_compiled_code() -> None:
    # Unless told to, Dynamo does not guard on hooks. Code compiled before they came or went would go on without (or
    # with) them, and a steered model would run the code compiled later for an unsteered one of the same class.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    torch.compiler.reset()
