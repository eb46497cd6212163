"""The rows and tokens of a call of the model, or of `generate`, as its arguments tell them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from hones_steer.errors import RoutingError

_CACHES = ("past_key_values", "cache_params", "state")  # names of models' arguments


class Call(NamedTuple):
    """One call of the model: its rows, and each row's tokens; None where no input tells.

    `embedded`: the tokens come as embeddings. `cached` is the number of each row's tokens that are in the cache; None
    if the call has no cache.
    """

    rows: int | None
    tokens: int | None
    embedded: bool = False
    cached: int | None = None


@dataclass
class Generation:
    """A call of `generate`, whose prompts have `width` tokens, padding counted; None if no input tells.

    `cached` of them are in a cache that it was given. `with_cache`: whether it calls the model with a cache; None: the
    model has not run yet.
    """

    width: int | None
    cached: int = 0
    with_cache: bool | None = None


def call_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """The rows and tokens of a call of the model, None where no input tells them."""
    embeddings = kwargs.get("inputs_embeds")
    for value in (kwargs.get("input_ids"), embeddings, *args[:1]):
        if isinstance(value, Tensor):
            return Call(value.shape[0], value.shape[1] if value.dim() > 1 else None, value is embeddings)
    return Call(None, None)


def cached_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """The number of each row's tokens, padding counted, in the cache that a call is given; None: it is given none.

    The call is one of the model or of `generate`. Raises RoutingError if the cache does not tell.
    """
    counting = [value for value in (*args, *kwargs.values()) if hasattr(value, "get_seq_length")]
    others = [kwargs[name] for name in _CACHES if kwargs.get(name) is not None]
    cache = next(iter((*counting, *others)), None)
    if cache is None:
        return None
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError) as error:  # no attention layer counts tokens
        raise RoutingError(
            f"a {type(cache).__name__} does not tell how many tokens are cached, so a part of them cannot be steered; "
            "leave out scope"
        ) from error


def prompt_width(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """The number of tokens of each prompt in a call of `generate`, padding counted, or None if no input tells it.

    Beside a cache the input may have the last tokens of the prompt only, but the mask has all.
    """
    given = ("attention_mask", "inputs_embeds", "inputs", "input_ids")
    for value in (*(kwargs.get(name) for name in given[:2]), *args[:1], *(kwargs.get(name) for name in given[2:])):
        if isinstance(value, Tensor) and value.dim() == (3 if value is kwargs.get("inputs_embeds") else 2):
            return value.shape[1]
    return None


def num_prompts(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """The number of rows in a call of `generate`, or None if no input tells it."""
    for value in (*args[:1], kwargs.get("inputs"), kwargs.get("input_ids"), kwargs.get("inputs_embeds")):
        if isinstance(value, Tensor):
            return value.shape[0]
    return None
