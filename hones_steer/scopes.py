"""Scopes: which tokens of a sequence are steered, by their positions.

``all`` steers every token, ``prompt`` those before the prompt's end, ``generated`` those from it on. The prompt's last
token is the prompt's: its forward gives the answer's first token, which with ``generated`` is therefore chosen
unsteered. What phase a token is computed in does not matter: a generated token that is computed anew stays one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from hones_steer.errors import RoutingError

ALL, PROMPT, GENERATED = SCOPES = ("all", "prompt", "generated")


def check_scope(value: object) -> str:
    """Return a scope; raises RoutingError if `value` is none."""
    if isinstance(value, str) and value in SCOPES:
        return value
    text = repr(value)
    raise RoutingError(
        f"the scope is {text if len(text) <= 60 else text[:57] + '...'}; give 'all', 'prompt' or 'generated'"
    )


def of_each(value: Any, count: int, name: str) -> list[Any]:
    """The value of each of `count` rows, of which one is given for all, or one for each; raises RoutingError."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise RoutingError(f"{name} has {len(value)} values for {count} rows; give one for all, or one for each")
    return list(value)


def check_end(end: object) -> int:
    """Return where a prompt ends, a number of tokens; raises RoutingError if `end` is none."""
    if type(end) is not int or end < 0:
        raise RoutingError(f"prompt_end is {end!r}; give the number of the prompt's tokens")
    return end


def split(scope: str, end: int, start: int, count: int) -> tuple[tuple[int, bool], tuple[int, bool]]:
    """Numbers of the `count` tokens from position `start` on that are before and after a prompt's `end`.

    Each comes with whether `scope` steers them.
    """
    before = min(max(end - start, 0), count)
    return (before, scope != GENERATED), (count - before, scope != PROMPT)


def scoped_digest(digest: str, scope: str) -> str:
    """The digest of what a profile with this digest does to the tokens of a scope; with ``all`` the profile's own."""
    return digest if scope == ALL else hashlib.sha256(f"{digest}:{scope}".encode()).hexdigest()
