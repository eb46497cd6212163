"""Signatures of a library's functions that are wrapped or overridden: a version that changed them is refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from hones_steer.errors import StateError


def check(functions: Iterable[tuple[Callable[..., Any], tuple[str, ...]]], library: str, tested: str) -> None:
    """Compare each function's parameters with the names they must begin with.

    `functions` has (function, names) pairs, and may be a generator that imports; `library` is the library's name and
    version, `tested` the version that is known to work.

    Raises:
        StateError: a function differs or is missing; the message names it.
    """
    unsupported = f"this {library.partition(' ')[0]} version is not supported: {library.partition(' ')[2]}"
    try:
        for function, expected in functions:
            actual = tuple(inspect.signature(function).parameters)
            if actual[: len(expected)] != expected:
                raise StateError(
                    f"{unsupported} ({function.__module__}.{function.__qualname__} takes {', '.join(actual)} "
                    f"instead of {', '.join(expected)}); tested: {tested}"
                )
    except (ImportError, AttributeError) as error:
        raise StateError(f"{unsupported} ({error}); tested: {tested}") from error
