"""Names that transformers has changed within the versions allowed, looked up on each object instead of by version.

Gradient checkpointing is called activation checkpointing from 5.23 on, and the key-value cache `cache` instead of
`past_key_values` from 5.24 on; 5.40 no longer takes the old name. Models whose code is not part of transformers may
keep it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

CACHE_NAMES = ("cache", "past_key_values")


def cache_name(forward: Callable[..., object]) -> str:
    """Name of the argument that a model's or decoder's `forward` takes its key-value cache by."""
    parameters = inspect.signature(forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), CACHE_NAMES[0])


def takes_cache(forward: Callable[..., object]) -> bool:
    """Whether a `forward` takes a key-value cache at all."""
    return any(name in inspect.signature(forward).parameters for name in CACHE_NAMES)


def returned_cache(output: Any) -> Any:
    """The key-value cache in what a model or decoder returns, or None."""
    # Not getattr with a default: asking for the old name where there is the new one warns.
    return output.cache if hasattr(output, "cache") else output.past_key_values


def enable_checkpointing(model: Any, *, use_reentrant: bool = False) -> None:
    """Make backward() recompute the layers of a model in training mode."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


def disable_checkpointing(model: Any) -> None:
    """Undo `enable_checkpointing`, with the hook that it leaves on the input embeddings."""
    (getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable)()
    model.disable_input_require_grads()
