"""The reader of JSON that all three packages share."""

import math

import pytest

from hones_steer.errors import DataError
from hones_steer.strict_json import parse_json, parse_object


@pytest.mark.parametrize("text", ['{"a": [1, 2.5, "é", null, true]}', '{"a": [1, 2.5, "é", null, true]}'.encode()])
def test_a_sound_text_is_its_value(text: str | bytes) -> None:
    assert parse_json(text) == {"a": [1, 2.5, "é", None, True]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON: Expecting"),
        (b"\xff\xfe", "is not UTF-8 text: "),
        ("[" * 100_000, "is nested too deep"),
        ('{"a": {"task": 1, "task": 2}}', "is not valid JSON: duplicate key 'task'"),
        ("[NaN]", "is not valid JSON: NaN is not a number"),
        ("[-Infinity]", "is not valid JSON: -Infinity is not a number"),
        ("9" * 5000, "is not valid JSON: "),
        ("", "is not valid JSON: "),
    ],
)
def test_what_is_not_strict_json_is_refused_with_the_reason(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        parse_json(text)
    with pytest.raises(DataError, match=f"^the file {message}"):
        parse_object(text, "the file", DataError)


def test_a_caller_that_checks_numbers_itself_gets_them_all() -> None:
    not_a_number, infinite = parse_json("[NaN, -Infinity]", allow_nan=True)
    assert math.isnan(not_a_number)
    assert infinite == -math.inf
    with pytest.raises(ValueError, match="duplicate key 'a'"):
        parse_json('{"a": 1, "a": NaN}', allow_nan=True)


def test_an_object_is_asked_for() -> None:
    with pytest.raises(DataError, match="the file is not a JSON object"):
        parse_object("[1]", "the file", DataError)
