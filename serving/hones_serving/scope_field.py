"""The field `hones_scope` of a request: which of its tokens are steered (`hones_steer.scopes`)."""

from __future__ import annotations

from typing import Any

from hones_steer.errors import RoutingError
from hones_steer.scopes import ALL, check_scope

SCOPE = "hones_scope"


def scope_of(body: dict[str, Any]) -> str:
    """The scope that a JSON body names at top level or in `vllm_xargs`; ``all`` if it names none.

    Raises:
        RoutingError: it is no scope, or two different ones are named.
    """
    xargs = body.get("vllm_xargs")
    values = [place.get(SCOPE) for place in (body, xargs) if isinstance(place, dict)]
    scopes = [check_scope(value) for value in values if value is not None]
    if len({*scopes}) > 1:
        raise RoutingError(f"{SCOPE} is {scopes[0]!r} and in vllm_xargs {scopes[1]!r}; give it once")
    return scopes[0] if scopes else ALL
