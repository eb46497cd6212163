"""JSON read strictly: no key twice in one object, and no NaN or infinity unless the caller looks for them.

JSON that another program reads as well, such as a model's `config.json` or the body of a request, is not read with this
but with `json.loads`, so that both take the same from it.
"""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from typing import Any, NoReturn

from hones_steer.errors import HonesError


def parse_json(text: str | bytes, *, allow_nan: bool = False) -> Any:
    """Parse a JSON value; bytes must be UTF-8.

    With `allow_nan`, NaN and infinity are numbers, for callers that can name the value which is not finite.

    Raises:
        ValueError: the text is not strict JSON. The message ends a sentence about it, such as "is nested too deep".
    """
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8")
        constants = float if allow_nan else _refuse_constant
        return json.loads(decoded, object_pairs_hook=_unique_keys, parse_constant=constants)
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text: {error.reason}") from error
    except RecursionError as error:
        raise ValueError("is nested too deep") from error
    except ValueError as error:  # malformed, refused below, or an integer of thousands of digits
        raise ValueError(f"is not valid JSON: {error}") from error


def parse_object(text: str | bytes, what: str, error_type: type[HonesError]) -> dict[str, Any]:
    """Parse a JSON object; raises an `error_type` that begins with `what`, a name for the text, if it is none."""
    try:
        value = parse_json(text)
    except ValueError as error:
        raise error_type(f"{what} {error}") from error
    if not isinstance(value, dict):
        raise error_type(f"{what} is not a JSON object")
    return value


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"duplicate key {reprlib.repr(key)}")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")
