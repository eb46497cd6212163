"""Readers of JSON and CSV data files that check every type and raise `DataError` for anything wrong.

A function that takes a path names the file in its message; a function that takes a value names the field, and `naming`
puts the file and the record before it.
"""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

from hones_steer import strict_json
from hones_steer.errors import DataError

Record = dict[str, Any]
"""A JSON object."""

# File systems and tokenizers refuse these characters, though JSON allows them.
_IMPOSSIBLE = re.compile("[\0\ud800-\udfff]")


class UnusableError(DataError):
    """A well-formed record that gives no example: one of its texts is blank, or its dataset does not count it."""


@contextmanager
def naming(place: object) -> Iterator[None]:
    """Put `place` before the message of a DataError raised inside the block; an UnusableError stays as it is."""
    try:
        yield
    except UnusableError:
        raise
    except DataError as error:
        raise DataError(f"{place}: {str(error).removesuffix('.')}.") from error


def read_file(path: Path) -> bytes:
    """The file's bytes; raises DataError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"Data file '{path}' cannot be read: {error.strerror}") from error


def read_json(path: Path) -> Any:
    """The value in a JSON file; raises DataError if it cannot be read or is not valid JSON."""
    content = read_file(path)
    with naming(path):
        return parse_json(content)


def decode(content: bytes) -> str:
    """Decode UTF-8 text with or without a byte order mark; raises DataError if it is not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError("not UTF-8 text.") from error


def parse_json(content: bytes) -> Any:
    """The value of strict JSON text; raises DataError, saying what is wrong with it."""
    try:
        return strict_json.parse_json(decode(content), allow_nan=True)
    except ValueError as error:
        raise DataError(f"{error}.") from error


def read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Read the rows of a CSV file as dictionaries by column.

    Raises:
        DataError: the file cannot be read, has no rows, lacks one of `columns`, or a row has more or fewer fields than
            the first line.
    """
    content = read_file(path)
    with naming(path):
        reader = csv.DictReader(io.StringIO(decode(content), newline=""), strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.reader.line_num}: not valid CSV ({error}).") from error
    if not rows:
        raise DataError(f"{path} has no rows.")
    missing = [column for column in columns if column not in (reader.fieldnames or ())]
    if missing:
        raise DataError(f"{path} has no column {', '.join(missing)}; it needs {', '.join(columns)}.")
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise DataError(f"{path}, row {number}: it has more or fewer fields than the first line.")
    return rows


def records_by_id(content: object, path: Path, kind: str, field: str) -> dict[int, Record]:
    """The records of the list "{kind}s" by the number in their `field`; raises DataError if two share one."""
    records = content.get(f"{kind}s") if isinstance(content, dict) else None
    if not isinstance(records, list):
        raise DataError(f'{path}: there is no list "{kind}s" in it.')
    result: dict[int, Record] = {}
    for position, record in enumerate(records, start=1):
        with naming(f"{path}, {kind} number {position} of the list"):
            if not isinstance(record, dict):
                raise DataError("not an object")
            number = require_number(record.get(field), field)
            if result.setdefault(number, record) is not record:
                raise DataError(f"{field} {number} was used before")
    return result


def is_text(value: object) -> TypeGuard[str]:
    """Whether `value` is a text that is not blank and that a tokenizer accepts."""
    return isinstance(value, str) and bool(value.strip()) and not _IMPOSSIBLE.search(value)


def require_part(record: Record, field: str, kind: type[Any]) -> Any:
    """The record's `field`, of type `kind`; raises DataError if it is missing, empty or of another type."""
    value = record.get(field)
    if not isinstance(value, kind) or not value:
        raise DataError(f"no {field}")
    return value


def require_text(value: object, field: str) -> str:
    """Return the value if it is a text; raises UnusableError if it is a blank text, else DataError."""
    if not is_text(value):
        raise (UnusableError if isinstance(value, str) else DataError)(f"no text in {field}")
    return value


def require_texts(values: object, field: str) -> list[str]:
    """Return the values if they are a list of texts.

    Raises:
        UnusableError: the list is empty or one of its texts is blank.
        DataError: anything else is wrong.
    """
    if not isinstance(values, list):
        raise DataError(f"no list of texts in {field}")
    if not values:
        raise UnusableError(f"no text in {field}")
    return [require_text(value, field) for value in values]


def require_number(value: object, field: str) -> int:
    """Return the value if it is a whole number from 0 on; raises DataError if not."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise DataError(f"no whole number in {field}")
    return value
