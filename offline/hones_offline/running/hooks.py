"""Common parts of the hooks on a decoder's layers: `hooked` places all of them or none.

- `readings.py` has those that read;
- `interventions.py` those that change what a layer computes;
- `resumption.py` those that run less of the model.

None recomputes what the model computes anyway: every hook reads or replaces an input that the model has just produced.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from hones_steer.errors import LayoutError
from hones_steer.injection import input_hooks
from hones_steer.layout import DecoderLayer, Layout

Head = tuple[int, int]
"""(layer, head)."""
Shape = tuple[int, int]
"""(rows, positions) of a decoder's forward."""
Hook = tuple[DecoderLayer, nn.Module, Callable[[Tensor, Shape], Tensor]]
"""A layer, a module of it, and the function that replaces the module's input, or output, in forwards of a shape."""


@contextmanager
def hooked(layout: Layout, hooks: Iterable[Hook], outputs: Iterable[Hook] = ()) -> Iterator[None]:
    """Within the block, replace each module's input by its function of the input and of the forward's shape.

    Those of `outputs` replace the module's output. A forward of the decoder that runs a layer without calling one of
    its modules raises LayoutError, naming the layer. Layers that it leaves out (cross-attention to an image that is not
    there) have nothing to replace.
    """
    hooks, outputs = list(hooks), list(outputs)
    modules = [(layer, module) for layer, module, _ in (*hooks, *outputs)]
    shape: Shape = (0, 0)
    called: set[int] = set()
    ran: set[int] = set()

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal shape
        given = (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args)
        rows, positions = next(x for x in given if x is not None).shape[:2]
        shape = rows, positions
        called.clear()
        ran.clear()

    def leave(*_: object) -> None:
        for layer, module in modules:
            if id(module) not in called and layer.index in ran:
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
        for layer in {layer.index: layer for layer, _ in modules}.values():
            note = partial(_note, ran, layer.index)
            stack.callback(layer.module.register_forward_pre_hook(note).remove)
        stack.enter_context(input_hooks((module, noted(module, replace)) for _, module, replace in hooks))
        for _, module, replace in outputs:
            stack.callback(module.register_forward_hook(_output_hook(noted(module, replace))).remove)
        yield


def _note(ran: set[int], index: int, *_: object) -> None:
    ran.add(index)


def _output_hook(replace: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    return lambda _module, _args, output: replace(output)


def by_row(x: Tensor, rows: int, layer: DecoderLayer) -> Tensor:
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
