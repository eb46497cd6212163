"""Checks of the JSON values in a profile, the same for one read from a file and for one built in code.

Each raises ProfileError, whose message begins with the place of the value, such as "base_model.name".
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from hones_steer.errors import ProfileError

MAX_JSON_DEPTH = 32
MAX_INT32 = 2**31 - 1


def shown(value: object) -> str:
    """The repr of a value from an untrusted file, cut to 80 characters for an error message."""
    text = reprlib.repr(value)  # plain repr fails on deep nesting
    return text if len(text) <= 80 else text[:77] + "..."


def check_keys(value: Mapping[str, object], expected: Iterable[str], what: str) -> None:
    """Check that an object has exactly these keys; `what` names it."""
    for key in sorted(set(expected) - value.keys()):
        raise ProfileError(f"{what} lacks the key {key!r}")
    for key in sorted(value.keys() - set(expected)):
        raise ProfileError(f"{what} has the unknown key {shown(key)}")


def check_text(value: object, where: str) -> None:
    """Check that a value is text that UTF-8 can hold."""
    if not isinstance(value, str):
        raise ProfileError(f"{where} is {shown(value)}, not a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ProfileError(f"{where} contains a lone surrogate, which is not text") from error


def check_size(value: object, where: str) -> None:
    """Check that a value is a positive integer below 2^31."""
    if type(value) is not int or not 1 <= value <= MAX_INT32:
        raise ProfileError(f"{where} is {shown(value)}, not a positive integer")


def checked_numbers(value: object, count: int, where: str) -> tuple[float, ...]:
    """Check that a value is a list of `count` finite numbers, and return them."""
    if not isinstance(value, list | tuple) or len(value) != count:
        raise ProfileError(f"{where} is {shown(value)}, not {count} numbers")
    for number in value:
        if isinstance(number, bool) or not isinstance(number, int | float) or not _is_finite(number):
            raise ProfileError(f"{where} contains {shown(number)}, not a finite number")
    return tuple(float(number) for number in value)


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer too large for a float
        return False


def checked_object(value: object, where: str) -> dict[str, Any]:
    """Check that a value is a JSON object, at most 32 deep, and return a deep copy as JSON would give it back."""
    if not isinstance(value, Mapping):
        raise ProfileError(f"{where} is {shown(value)}, not a JSON object")
    return dict(_items(value, where, 1))


def _checked(value: object, where: str, depth: int) -> object:
    """A deep copy of `value` as JSON would give it back (tuples become lists)."""
    if depth > MAX_JSON_DEPTH:
        raise ProfileError(f"{where[:80]}... is nested deeper than {MAX_JSON_DEPTH}")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        check_text(value, where)
        return str(value)
    if type(value) is int:
        if not -(2**63) <= value < 2**63:
            raise ProfileError(f"{where} is an integer beyond 64 bits")
        return value
    if type(value) is float:
        if not math.isfinite(value):
            raise ProfileError(f"{where} is {value}, not a finite number")
        return value
    if isinstance(value, list | tuple):
        return [_checked(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        return dict(_items(value, where, depth))
    raise ProfileError(
        f"{where} is a {type(value).__name__}; give plain JSON values (str, int, float, bool, list, dict)"
    )


def _items(value: Mapping[Any, object], where: str, depth: int) -> Iterator[tuple[str, object]]:
    for key, item in value.items():
        check_text(key, f"a key of {where}")
        yield key, _checked(item, f"{where}.{key}", depth + 1)
