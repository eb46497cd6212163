"""ASGI and JSON as the middleware needs them: hand a body on once more, answer, change an answer on its way.

Nothing here knows of steering. ASGI describes an HTTP request by its `scope`, gives its body through `receive`, and
takes its response through `send`. A function called `with_...` that takes a `send` returns one that does more.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from http import HTTPStatus
from typing import Any, TypeAlias

Message: TypeAlias = MutableMapping[str, Any]
Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]
RawHeaders: TypeAlias = list[tuple[bytes, bytes]]
Change: TypeAlias = Callable[[dict[str, Any]], bool]  # changes a JSON object in place; returns whether it did

JSON, EVENTS = "application/json", "text/event-stream"
REFUSED_FROM = 400  # statuses


# Requests -------------------------------------------------------------------------------------------------


def path_of(scope: Scope) -> str:
    """The path that the inner application routes by: without the prefix it is mounted under."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(root + "/") else path


def media_type(message: Message) -> str:
    """The media type of a request (its scope) or of the start of a response, in lower case; empty if it has none."""
    types = [value for name, value in message.get("headers", ()) if name.lower() == b"content-type"]
    return types[0].decode("latin-1").partition(";")[0].strip().lower() if types else ""


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that was read once more, then what really comes, such as the client leaving."""
    unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return unread.pop() if unread else await receive()

    return replayed


# JSON -----------------------------------------------------------------------------------------------------


def parse_json(data: bytes) -> object:
    """The JSON value, or None where there is none that an engine could read."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def dump_json(value: object) -> bytes:
    """A JSON value without spaces, as engines write it."""
    return json.dumps(value, separators=(",", ":")).encode()


def error_content(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """The JSON of an error as OpenAI's API and vLLM give it; `param` names the field of the request that is wrong."""
    kind = HTTPStatus(status).phrase.replace(" ", "") + "Error"
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


# Responses ------------------------------------------------------------------------------------------------


async def respond_json(send: Send, status: int, content: dict[str, Any]) -> None:
    """Send a whole response whose body is a JSON object."""
    await respond(send, status, {"Content-Type": JSON}, json.dumps(content).encode())


async def respond(send: Send, status: int, headers: Mapping[str, str], body: bytes) -> None:
    """Send a whole response; its Content-Length is added."""
    raw = [(name.lower().encode("ascii"), value.encode("ascii")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": with_length(raw, body)})
    await send({"type": "http.response.body", "body": body})


def with_length(headers: Any, body: bytes) -> RawHeaders:
    """Raw headers (any iterable of pairs) with the Content-Length of `body` instead of their own length or encoding."""
    kept = [(name, value) for name, value in headers if name.lower() not in (b"content-length", b"transfer-encoding")]
    return [*kept, (b"content-length", b"%d" % len(body))]


def with_headers(send: Send, headers_of: Callable[[Message], RawHeaders]) -> Send:
    """Add headers to the response; `headers_of` is called once, with the message that starts it."""

    async def extended(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *headers_of(message)]}
        await send(message)

    return extended


def with_changed_answer(send: Send, whole: Change, event: Change) -> Send:
    """Let `whole` have the JSON of the response, or `event` that of each event of a stream; others pass through."""
    by_type = {JSON: with_changed_json(send, whole), EVENTS: with_changed_events(send, event)}
    chosen = send

    async def changed(message: Message) -> None:
        nonlocal chosen
        if message["type"] == "http.response.start":
            chosen = by_type.get(media_type(message), send)
        await chosen(message)

    return changed


def with_changed_json(send: Send, change: Change) -> Send:
    """Hold the response back until it is whole, and let `change` have it if it is a JSON object and no error."""
    start: Message = {}
    chunks: list[bytes] = []

    async def changed(message: Message) -> None:
        if message["type"] == "http.response.start":
            start.update(message)
            return
        chunks.append(message.get("body", b""))
        if message.get("more_body", False):
            return
        body = b"".join(chunks)
        answer = parse_json(body)
        if start["status"] < REFUSED_FROM and isinstance(answer, dict) and change(answer):
            body = dump_json(answer)
            start["headers"] = with_length(start.get("headers", ()), body)
        await send(start)
        await send({"type": "http.response.body", "body": body})

    return changed


def with_changed_events(send: Send, change: Change) -> Send:
    """Let `change` have each JSON object of a stream of events; they go on as they come, line by line."""
    unfinished = b""

    async def changed(message: Message) -> None:
        nonlocal unfinished
        if message["type"] == "http.response.body":
            more = message.get("more_body", False)
            *lines, unfinished = (unfinished + message.get("body", b"")).split(b"\n")
            lines.append(b"" if more else unfinished)
            body = b"\n".join(_changed_line(line, change) for line in lines)
            if more and not body:
                return
            message = {**message, "body": body}
        await send(message)

    return changed


def _changed_line(line: bytes, change: Change) -> bytes:
    field, _, value = line.partition(b":")
    event = parse_json(value) if field == b"data" else None
    if not isinstance(event, dict) or not change(event):
        return line
    return b"data: " + dump_json(event) + (b"\r" if line.endswith(b"\r") else b"")
