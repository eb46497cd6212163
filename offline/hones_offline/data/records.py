"""Data files taken apart with every type checked; what is wrong with them is a `DataError`.

Functions that take a path name the file in it, functions that take a value the field; `naming` adds the rest.
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

# Neither file systems nor tokenizers take these, though JSON does.
_IMPOSSIBLE = re.compile("[\0\ud800-\udfff]")


class UnusableError(DataError):
    """A sound record that can be no example: a text of it says nothing, or its dataset does not count it."""


@contextmanager
def naming(place: object) -> Iterator[None]:
    """Put where it was before what a DataError from inside says; an UnusableError stays as it is."""
    try:
        yield
    except UnusableError:
        raise
    except DataError as error:
        raise DataError(f"{place}: {str(error).removesuffix('.')}.") from error


def read_file(path: Path) -> bytes:
    """The file's bytes."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"Data file '{path}' cannot be read: {error.strerror}") from error


def read_json(path: Path) -> Any:
    """What a JSON file holds."""
    content = read_file(path)
    with naming(path):
        return parse_json(content)


def decode(content: bytes) -> str:
    """UTF-8 text, with a byte order mark or without."""
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
    """A CSV file's rows, at least one, by column; each has these columns and all of its fields are text."""
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
    """The records of the list "{kind}s" by the number in their `field`, which none may share."""
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
    """Whether it is a text that says something and that a tokenizer takes."""
    return isinstance(value, str) and bool(value.strip()) and not _IMPOSSIBLE.search(value)


def require_part(record: Record, field: str, kind: type[Any]) -> Any:
    """A record's non-empty list, object or text `field`."""
    value = record.get(field)
    if not isinstance(value, kind) or not value:
        raise DataError(f"no {field}")
    return value


def require_text(value: object, field: str) -> str:
    """The value, if it is a text; raises UnusableError where it is one that says nothing."""
    if not is_text(value):
        raise (UnusableError if isinstance(value, str) else DataError)(f"no text in {field}")
    return value


def require_texts(values: object, field: str) -> list[str]:
    """The values, if they are a list of texts; raises UnusableError where there is none or one says nothing."""
    if not isinstance(values, list):
        raise DataError(f"no list of texts in {field}")
    if not values:
        raise UnusableError(f"no text in {field}")
    return [require_text(value, field) for value in values]


def require_number(value: object, field: str) -> int:
    """The value, if it is a whole number from 0 on."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise DataError(f"no whole number in {field}")
    return value
