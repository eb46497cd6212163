"""Websockets, over which nothing is steered: one that names steering is refused, or closed, rather than ignored."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl

from hones_serving.asgi import App, Message, Receive, Scope, Send, dump_json, error_content
from hones_serving.bodies import parse_request
from hones_serving.contract import Service, named_steering
from hones_serving.facts import joined

_POLICY_VIOLATION = 1008
_REASON_BYTES = 120  # of the 123 that the protocol allows


async def open_session(app: App, service: Service, scope: Scope, receive: Receive, send: Send) -> None:
    """Hand a websocket on to `app`, unless its headers or query name steering: then it is refused with 400.

    A message that names steering closes it (1008): the application gets the end of the connection instead.
    """
    headers = joined((name.decode("latin-1"), value.decode("latin-1")) for name, value in scope.get("headers", ()))
    query = dict(parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True))
    named = named_steering(service, query, headers)
    if named is not None:
        await receive()  # the client's wish to connect
        await _refuse(scope, send, named)
        return
    closed = False

    async def checked() -> Message:
        nonlocal closed
        message = await receive()
        named = _named_in(service, message)
        if named is None:
            return message
        closed = True
        reason = _words(named).encode()[:_REASON_BYTES].decode(errors="ignore")
        await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": reason})
        return {"type": "websocket.disconnect", "code": _POLICY_VIOLATION, "reason": reason}

    async def unless_closed(message: Message) -> None:
        if not closed:
            await send(message)

    await app(scope, checked, unless_closed)


async def _refuse(scope: Scope, send: Send, named: str) -> None:
    """Answer the wish to connect with 400, or as the server does (403) where it cannot give another status."""
    if "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": ""})
        return
    body = dump_json(error_content(400, _words(named)))
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"x-hones-profile", b"none"),
        (b"x-hones-route", b"path"),
    ]
    await send({"type": "websocket.http.response.start", "status": 400, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": body})


def _words(named: str) -> str:
    return f"websockets cannot be steered; leave out {named}"


def _named_in(service: Service, message: Message) -> str | None:
    """The name of steering in a JSON message, at its top or in the session that it describes; None if there is none."""
    data = message.get("text") or message.get("bytes") or b""
    value: Any = parse_request(data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data)
    places = [value, value.get("session")] if isinstance(value, dict) else []
    return next((named for place in places if (named := named_steering(service, place, {})) is not None), None)
