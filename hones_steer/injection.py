"""The scaling itself, and the hooks that apply it.

The scaled quantity is z, the input of the FFN's down-projection: z' = s·z per neuron, where the paper has
s = 1 + m⊙λ.

`Injection` steers a model that is called as usual. A hook on the model, which always runs outside compiled code,
finds out once per forward what is asked for and writes it into static tensors; the hooks on the down-projections
read these tensors and nothing else when they are compiled, so switching tasks never recompiles.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hones_steer.errors import LayoutError, RoutingError, StateError
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
    """Within the block, each module's first positional input is replaced by what its function makes of it.

    All hooks are placed or none, and all are removed when the block is left, also by an exception.
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


@dataclass(eq=False)
class Routing:
    """What one `with` block asks for: one slot for every row, or one slot per prompt."""

    expressions: tuple[str, ...]
    slots: tuple[int, ...]
    per_row: bool
    forwards: int = 0
    closed: bool = False

    def __str__(self) -> str:
        return f"tasks({list(self.expressions)})" if self.per_row else f"task({self.expressions[0]!r})"

    @property
    def steers(self) -> bool:
        return any(slot != IDENTITY for slot in self.slots)

    def row_slots(self, rows: int | None, *, generating: bool) -> tuple[int, ...]:
        """The slot of each of the forward's rows, or a single slot for all of them.

        Within `generate`, beams and returned sequences repeat each prompt's row (`repeat_interleave`).
        """
        if not self.per_row:
            return self.slots
        repeats = self.require_prompts(rows, exactly=not generating) // len(self.slots)
        return tuple(slot for slot in self.slots for _ in range(repeats))

    def require_prompts(self, rows: int | None, *, exactly: bool = True) -> int:
        """`rows`, or RoutingError if they cannot be the rows of these tasks."""
        if rows is None:
            raise RoutingError(f"{self} cannot tell the number of rows; pass input_ids or inputs_embeds by keyword")
        if rows % len(self.slots) or (exactly and rows != len(self.slots)):
            raise RoutingError(
                f"{self} names {len(self.slots)} rows, but the model was called with {rows}; "
                "give one expression (or None) per row of the batch"
            )
        return rows


class Injection:
    """The hooks of one steered model; nothing of them is left after `detach`.

    `model` is the one that wrappers (PEFT, torch.compile) call in the end. `current` gives the routing of the
    calling context, `generating` whether it is inside `generate`. Forwards are
    serialised by `lock`, because the static tensors hold one forward's rows at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        slots: int,
        current: Callable[[], Routing | None],
        generating: Callable[[], bool],
    ) -> None:
        self.lock = threading.RLock()
        self.batch = 1
        self._current = current
        self._generating = generating
        self._owner: int | None = None  # the thread whose forward is in progress
        self._slots: tuple[int, ...] = (IDENTITY,)  # of its rows
        self._last_with_grad: tuple[Routing | None, tuple[int, ...]] = (None, (IDENTITY,))
        devices = [execution_device(layer.down_proj, layer.name) for layer in layout.layers]
        self.tables = ScaleTables(devices, layout.intermediate_size, slots)
        self._rows = {device: RowSlots(device) for device in devices}
        self._written: tuple[tuple[int, ...], int] = ((IDENTITY,), 1)
        self._handles: list[RemovableHandle] = []
        self._attach(model, layout, devices)

    def _attach(self, model: nn.Module, layout: Layout, devices: Sequence[torch.device]) -> None:
        modules = [model, *(layer.down_proj for layer in layout.layers)]
        if any(isinstance(hook, _Hook) for module in modules for hook in module._forward_pre_hooks.values()):
            raise StateError("the model is steered already; use that Steering, or detach() it first")
        try:
            self._handles.append(model.register_forward_pre_hook(_EnterHook(self), with_kwargs=True))
            self._handles.append(model.register_forward_hook(_LeaveHook(self), always_call=True))
            for layer, table, device in zip(layout.layers, self.tables.tables, devices, strict=True):
                hook = LayerHook(self, layer.name, table, self._rows[device])
                self._handles.append(layer.down_proj.register_forward_pre_hook(hook))
        except BaseException:
            self.detach()
            raise
        _forget_compiled_code()

    def detach(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        _forget_compiled_code()

    def is_attached_to(self, module: nn.Module) -> bool:
        """Whether this injection's hook is on a down-projection."""
        hooks = module._forward_pre_hooks.values()
        return any(isinstance(hook, LayerHook) and hook.injection is self for hook in hooks)

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward begins: fix the slots of its rows for all layers that it calls."""
        # Only an interrupt leaves a forward without an end (KeyboardInterrupt skips PyTorch's hooks).
        self.release()
        self.lock.acquire()
        self._owner = threading.get_ident()
        try:
            self._begin(_num_rows(args, kwargs))
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """End this thread's forward if one is in progress, so that other threads can go on."""
        if self._owner == threading.get_ident():
            self._owner = None
            self.lock.release()

    def rest(self) -> None:
        """Set the identity for code that is called without a forward of the model: compiled parts of it.

        Rows of a forward with gradients stay as they are: compiled backward code may still read them.
        """
        with self.lock:
            if self._last_with_grad[1] != self._written[0]:
                self._write((IDENTITY,), 1)

    def _begin(self, rows: int | None) -> None:
        routing = self._current()
        self._slots = (IDENTITY,)
        if routing is not None:
            if routing.closed:
                raise StateError(
                    f"the block of {routing} was left while a function that carries it still runs; "
                    "join its thread inside the block"
                )
            self._slots = routing.row_slots(rows, generating=self._generating())
            routing.forwards += 1
        self.batch = rows or 1
        self._write(self._slots, self.batch)
        if torch.is_grad_enabled():
            self._last_with_grad = (routing, self._slots)

    def _write(self, slots: tuple[int, ...], rows: int) -> None:
        if self._written != (slots, rows):
            for row_slots in self._rows.values():
                row_slots.write(slots, rows)
            self._written = (slots, rows)

    def eager_scales(self, hook: LayerHook, z: Tensor) -> Tensor | None:
        """S `[rows, I]`, or `[I]` or `[1, I]` for all rows, of an uncompiled layer called with z; None: not steered."""
        if self._owner == threading.get_ident():
            return self._scales_of_forward(hook, z)
        if torch._C._current_graph_task_id() != -1:
            return self._scales_of_recomputation(hook)
        routing = self._current()
        if routing is not None and routing.steers:
            raise RoutingError(
                f"{hook.layer} was called past the model inside {routing}; call the model itself, model(...), "
                "so that its rows are known"
            )
        return None

    def _scales_of_forward(self, hook: LayerHook, z: Tensor) -> Tensor | None:
        if self._slots == (IDENTITY,):
            return None
        if len(self._slots) == 1 and not torch.is_grad_enabled():
            return hook.by_slot[self._slots[0]]  # a view, which backward() might find overwritten
        if len(self._slots) > 1 and (z.shape[0] != self.batch if z.dim() > 2 else z.shape[0] % self.batch):
            raise RoutingError(
                f"{hook.layer} got {z.shape[0]} rows from a batch of {self.batch}: its rows are packed; "
                "steer the whole batch with task() instead of tasks()"
            )
        return hook.table.index_select(0, hook.rows.index[: len(self._slots)])

    def _scales_of_recomputation(self, hook: LayerHook) -> Tensor | None:
        """Gradient checkpointing runs the layers again in backward(), perhaps in another thread."""
        routing, slots = self._last_with_grad
        if slots == (IDENTITY,):
            return None
        if routing is not None and routing.closed:
            raise StateError(
                f"backward() recomputes a forward of {routing}, whose block was left; with gradient checkpointing "
                "call backward() inside the block"
            )
        return hook.table.index_select(0, torch.tensor(slots, device=hook.table.device))


_Function = TypeVar("_Function", bound=Callable[..., object])
_never_compiled: Callable[[_Function], _Function] = torch.compiler.disable


class _Hook:
    """A hook that keeps a steered model from being copied: the copy would run, and be steered, by accident."""

    def __init__(self, injection: Injection) -> None:
        self.injection = injection

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        raise StateError("a steered model cannot be copied or pickled; detach() first, or save its state_dict")


class _EnterHook(_Hook):
    @_never_compiled
    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.injection.enter(args, kwargs)


class _LeaveHook(_Hook):
    @_never_compiled
    def __call__(self, _module: nn.Module, _args: tuple[Any, ...], _output: object) -> None:
        self.injection.release()


class LayerHook(_Hook):
    """Scales the input of one down-projection. Compiled, it reads tensors only, and no state of Python's."""

    def __init__(self, injection: Injection, layer: str, table: Tensor, rows: RowSlots) -> None:
        super().__init__(injection)
        self.layer = layer
        self.table = table
        self.by_slot = table.unbind()
        self.rows = rows

    def __call__(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        z: Tensor = args[0]
        # Some architectures (OPT) flatten [B, T, I] to [B * T, I].
        batch = z.shape[0] if z.dim() > 2 else self.injection.batch
        if torch.compiler.is_compiling():
            s = self.table.index_select(0, self.rows.index[:batch])
        elif (eager := self.injection.eager_scales(self, z)) is not None:
            s = eager
        else:
            return None
        if s.dim() == 1:
            return (scale(z, s), *args[1:])
        rows = z if z.dim() > 2 else z.reshape(batch, -1, z.shape[-1])
        s = s.view(s.shape[0], *[1] * (rows.dim() - 2), s.shape[1])
        return (scale(rows, s).view(z.shape), *args[1:])


def execution_device(module: nn.Module, name: str) -> torch.device:
    """Where a module computes: where its weights are, or where accelerate moves them (offloading)."""
    hook = getattr(module, "_hf_hook", None)
    for part in (hook, *getattr(hook, "hooks", ())):
        if (device := getattr(part, "execution_device", None)) is not None:
            return torch.device(device)
    device = next((tensor.device for tensor in base_layer(module).state_dict().values()), torch.device("meta"))
    if device.type == "meta":
        raise LayoutError(f"{name}: its weights are not loaded (meta device); load the model before steering it")
    return device


def _num_rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """The batch size of a call of the model, or None if no input tells it."""
    for value in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]):
        if isinstance(value, Tensor):
            return value.shape[0]
    return None


def _forget_compiled_code() -> None:
    # Unless told to, Dynamo does not guard on hooks. Code compiled before they came or went would go on without (or
    # with) them, and a steered model would run the code compiled later for an unsteered one of the same class.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    torch.compiler.reset()
