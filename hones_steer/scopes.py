"""Scopes: which tokens of a sequence are steered, by their positions.

``all`` steers every token, ``prompt`` those before the prompt's end, ``generated`` those from it on. The prompt's last
token is the prompt's: its forward gives the answer's first token, which with ``generated`` is therefore chosen
unsteered. What phase a token is computed in does not matter: a generated token that is computed anew stays one.
"""

from __future__ import annotations

import hashlib

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


def split(scope: str, end: int, start: int, count: int) -> tuple[tuple[int, bool], tuple[int, bool]]:
    """Numbers of the `count` tokens from position `start` on that are before and after a prompt's `end`.

    Each comes with whether `scope` steers them.
    """
    before = min(max(end - start, 0), count)
    return (before, scope != GENERATED), (count - before, scope != PROMPT)


def scoped_digest(digest: str, scope: str) -> str:
    """The digest of what a profile with this digest does to the tokens of a scope; with ``all`` the profile's own."""
    return digest if scope == ALL else hashlib.sha256(f"{digest}:{scope}".encode()).hexdigest()
