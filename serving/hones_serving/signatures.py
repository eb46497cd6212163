"""Functions of a library that are wrapped or overridden: a version that has changed them is refused at the start."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from hones_steer.errors import StateError


def check(functions: Iterable[tuple[Callable[..., Any], tuple[str, ...]]], library: str, tested: str) -> None:
    """Compare each function's parameters with those it must begin with; `library` is its name and version.

    Raises:
        StateError: naming what differs, or is not there (`functions` may be a generator that imports).
    """
    unsupported = f"this {library.partition(' ')[0]} version is not supported: {library.partition(' ')[2]}"
    try:
        for function, expected in functions:
            found = tuple(inspect.signature(function).parameters)
            if found[: len(expected)] != expected:
                raise StateError(
                    f"{unsupported} ({function.__module__}.{function.__qualname__} takes {', '.join(found)} "
                    f"instead of {', '.join(expected)}); tested: {tested}"
                )
    except (ImportError, AttributeError) as error:
        raise StateError(f"{unsupported} ({error}); tested: {tested}") from error
