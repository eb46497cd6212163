"""Bodies of requests: read within a limit of bytes, also once decompressed, as the JSON that the engine will see.

What is checked here is what the engine gets. A compressed body is handed on decompressed, so nobody unpacks it anew;
an object that gives one name twice, which parsers may read differently, is told from one that does not.
"""

from __future__ import annotations

import asyncio
import json
import zlib
from collections import Counter
from typing import Any

from hones_serving.asgi import JSON, Message, Receive, Scope, media_type, with_length

_GZIP = 16 + zlib.MAX_WBITS  # zlib's way of saying that a gzip header is expected
MIB = 2**20


class ClientLeftError(Exception):
    """The client closed its connection before it had sent the whole body; nobody is there to be answered."""


class BodyError(Exception):
    """The body cannot be taken; `status` is that of the answer, the message its text."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class RepeatedNames(dict[str, Any]):
    """A JSON object of which a request gives some `names` more than once; the last value counts."""

    names: frozenset[str]


def is_json(scope: Scope) -> bool:
    """Test the Content-Type of a request; true if it is a JSON type."""
    kind = media_type(scope)
    return kind == JSON or kind.endswith("+json")


def is_encoded(scope: Scope) -> bool:
    """Test whether the body of a request is compressed. Raises BodyError (415) if it is in a way that is not known."""
    encodings = [value.decode("latin-1") for name, value in scope["headers"] if name.lower() == b"content-encoding"]
    given = [entry.strip().lower() for entry in ",".join(encodings).split(",")]
    known = [entry for entry in given if entry not in ("", "identity")]
    if not known:
        return False
    if known in (["gzip"], ["x-gzip"]):
        return True
    raise BodyError(415, f"Content-Encoding is {', '.join(known)[:60]!r}; send the body as it is, or with gzip")


async def read(scope: Scope, receive: Receive, limit: int) -> tuple[Scope, bytes]:
    """Read the whole body of a request, at most `limit` bytes as received and once decompressed.

    Returns the scope to hand on, whose headers fit the body that is returned, and that body, decompressed.

    Raises:
        BodyError: 413 for a larger body, 415 for an unknown encoding, 400 for what is no gzip.
        ClientLeftError: the client closes the connection before the end of the body.
    """
    encoded = is_encoded(scope)
    check_length(scope, limit)
    data = await _received(receive, limit)
    if not encoded:
        return scope, data
    body = await asyncio.to_thread(_decompressed, data, limit)  # may take as long as a step of a model
    headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-encoding"]
    return {**scope, "headers": with_length(headers, body)}, body


def check_length(scope: Scope, limit: int) -> None:
    """Compare the Content-Length of a request with `limit` bytes. Raises BodyError (413) if it is more."""
    lengths = [value for name, value in scope["headers"] if name.lower() == b"content-length"]
    if any(value.isdigit() and int(value) > limit for value in lengths):
        raise _too_large(limit)


async def _received(receive: Receive, limit: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeftError
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > limit:
            raise _too_large(limit)
        if not message.get("more_body", False):
            return b"".join(chunks)


def within(receive: Receive, limit: int) -> Receive:
    """A `receive` for a body that is not read here; it raises BodyError (413) once more than `limit` bytes came."""
    size = 0

    async def counted() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > limit:
            raise _too_large(limit)
        return message

    return counted


def _decompressed(data: bytes, limit: int) -> bytes:
    """The contents of a gzip file, which may have several members."""
    parts: list[bytes] = []
    room = limit + 1  # one more tells a body of `limit` bytes from a longer one; zlib reads 0 as no limit
    while data:
        unpacker = zlib.decompressobj(_GZIP)
        try:
            parts.append(unpacker.decompress(data, room))
        except zlib.error as error:
            raise BodyError(400, f"the body is no gzip, as Content-Encoding says: {error}") from error
        room -= len(parts[-1])
        if room <= 0:
            raise _too_large(limit)
        if not unpacker.eof:
            raise BodyError(400, "the body ends in the middle of its gzip; send the whole")
        data = unpacker.unused_data
    return b"".join(parts)


def _too_large(limit: int) -> BodyError:
    return BodyError(
        413,
        f"the body has more than the {limit / MIB:g} MiB that this server takes, as sent or decompressed; "
        "send less, or start it with a larger --max-body-mb",
    )


# JSON -----------------------------------------------------------------------------------------------------


def parse_request(data: bytes) -> object:
    """The JSON value of a body, or None where there is none that an engine could read.

    An object that gives a name twice is a `RepeatedNames`; its last value counts, as for the engines, which read JSON
    with the same parser.
    """
    try:
        return json.loads(data, object_pairs_hook=_object)
    except (ValueError, RecursionError):
        return None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    plain = dict(pairs)
    if len(plain) == len(pairs):
        return plain
    repeated = RepeatedNames(plain)
    repeated.names = frozenset(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
    return repeated
