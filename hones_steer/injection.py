"""The scaling itself, and the hooks that apply it.

The scaled quantity is z, the input of the FFN's down-projection: z' = s·z per neuron, where the paper has
s = 1 + m⊙λ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def scale(z: Tensor, s: Tensor) -> Tensor:
    """Multiply activations z `[..., I]`, of any floating dtype, with float32 scales s broadcastable to them.

    The product is formed in float32 and rounded once, so a scale of 1 leaves z bit-equal.
    """
    return (z.float() * s).to(z.dtype)


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


def _input_hook(
    replace: Callable[[Tensor], Tensor],
) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (replace(args[0]), *args[1:])

    return hook
