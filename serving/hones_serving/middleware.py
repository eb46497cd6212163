"""The HTTP side of steering, as one ASGI middleware around any engine that speaks OpenAI's API.

=====================================  ==============================================================
``POST /v1/chat/completions``,         read, decided, admitted, and handed on without what only we
``POST /v1/completions``               understand; the response says what steered it
any other ``POST``                     400 if it names steering, else untouched; where it generates, the
                                       response says that nothing steered it
``GET /v1/models``                     the engine's list, with ``<model>:<task>`` for each profile
``GET /v1/hones/profiles``             the profiles
``POST /v1/hones/profiles``            load one: ``{"name": "vqa", "path": "vqa-v2.safetensors"}``
``DELETE /v1/hones/profiles/{name}``   forget one
``POST /v1/hones/steering``            the kill switch: ``{"enabled": false}``
``GET /hones``                         the playground, where the server was started with --playground
=====================================  ==============================================================

What changes something is 403 unless the server was started with --allow-profile-updates. All of it acts when a
request is admitted: what was admitted finishes as admitted. Everything else, and every byte of a request that neither
names steering nor gets any, passes through as it is. Requests count once their answer begins: what an engine refuses
was not steered.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, TypeAlias

from hones_serving import playground
from hones_serving.metrics import Metrics
from hones_serving.registry import Admission, CapacityError, ProfileRegistry, label_of
from hones_serving.routing import (
    Decision,
    RequestFacts,
    RoutingPlan,
    UnknownAliasError,
    decide,
    facts_of_chat,
    facts_of_completion,
    joined,
    split_alias,
)
from hones_serving.unsteered import Exchange
from hones_steer.errors import MismatchError, ProfileError, RoutingError
from hones_steer.profile import Profile
from hones_steer.store import parse_expression

Message: TypeAlias = MutableMapping[str, Any]
Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]
FactsOf: TypeAlias = Callable[[object, Mapping[str, str]], RequestFacts]  # from body and headers
Labels: TypeAlias = list[tuple[bytes, bytes]]  # headers of a response
Change: TypeAlias = Callable[[dict[str, Any]], bool]  # of a JSON object in place; whether there was one to make

_COVERED: dict[str, FactsOf] = {"/v1/chat/completions": facts_of_chat, "/v1/completions": facts_of_completion}
_MODELS = "/v1/models"
_PROFILES = "/v1/hones/profiles"
_STEERING = "/v1/hones/steering"

_JSON, _EVENTS = "application/json", "text/event-stream"

_PREFIX = "hones_"
_TASK = "hones_task"
_TASK_HEADER = "x-hones-task"

_REFUSED_FROM = 400  # statuses

logger = logging.getLogger(__name__)


@dataclass
class Service:
    """What the middleware works with, once the engine is up.

    `served` are the model's own names; `exact` also gives those of LoRA adapters, which may change: one that reads
    like an alias is logged, once. `stamp` writes the admission of a steered request into its body, where the engine
    will find it.
    """

    registry: ProfileRegistry
    plan: RoutingPlan
    metrics: Metrics
    served: tuple[str, ...]
    exact: Callable[[], Collection[str]]
    allow_updates: bool
    playground: bool
    stamp: Callable[[dict[str, Any], Admission], None]
    _reported: set[str] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        self.report_taken(self.exact())

    def report_taken(self, names: Iterable[str]) -> None:
        """Log which of these names of models and LoRA adapters are also aliases, which therefore steer nothing."""
        for name in set(names) - self._reported:
            alias = split_alias(name, [each for each in self.served if each != name], ())
            if alias is not None and self._is_known(alias[1]):
                self._reported.add(name)
                logger.warning(
                    "%r is the name of a model or LoRA adapter, so it does not ask for %r steered with %r: "
                    "rename the adapter, or name the task in hones_task or X-Hones-Task",
                    *(name, *alias),
                )

    def _is_known(self, text: str) -> bool:
        try:
            self.registry.require_known(parse_expression(text))
        except RoutingError:
            return False
        return True


class _Refused(Exception):  # noqa: N818 -- an answer, not a failure
    """Answer the request with an error. Only raised before anything was sent."""

    def __init__(self, status: int, message: str, param: str | None = None, route: str = "off") -> None:
        super().__init__(message)
        self.status, self.route = status, route
        self.content = error_content(status, message, param)


def error_content(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """The JSON of an error as OpenAI's API and vLLM give it."""
    kind = HTTPStatus(status).phrase.replace(" ", "") + "Error"
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


class _ClientLeft(Exception):  # noqa: N818
    """Nobody is there to be answered."""


class HonesMiddleware:
    """Goes inside authentication: what is unauthenticated must not get here. `service` is asked for per request."""

    def __init__(self, app: App, service: Callable[[], Service]) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection; lifespan and websockets pass through."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        # Of every request, also of those that never begin it: uvicorn runs a pipelined one in the context of another.
        exchange = Exchange(lambda: self._service().metrics.requests("none", "path"))
        with exchange.handled():
            if scope["type"] == "http":
                await self._answer(scope, receive, send, exchange)
            else:
                exchange.begin()
                await self._app(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, exchange: Exchange) -> None:
        try:
            await self._handle(scope, receive, send, exchange)
        except _Refused as refused:
            labels = _labels("none", refused.route)
            await _respond(_labelled(send, lambda _: labels), refused.status, refused.content)
        except _ClientLeft:
            pass

    async def _handle(self, scope: Scope, receive: Receive, send: Send, exchange: Exchange) -> None:
        method, path = scope["method"], _path(scope)
        if path in (_PROFILES, _STEERING) or path.startswith(_PROFILES + "/"):
            await _respond(send, 200, await _administer(self._service(), method, path, receive))
        elif method == "POST" and path in _COVERED:
            await self._complete(self._service(), _COVERED[path], scope, receive, send)
        elif method == "POST":
            receive = await _checked_elsewhere(self._service(), scope, receive)
            await self._app(scope, receive, _labelled(send, _unsteered_labels(exchange)))
            self._service().report_taken(self._service().exact())  # it may have loaded a LoRA adapter
        elif method in ("GET", "HEAD") and path == _MODELS:
            await self._app(scope, receive, _with_aliases(self._service(), send))
        elif method in ("GET", "HEAD") and path == playground.PATH and self._service().playground:
            await _send(send, 200, playground.HEADERS, playground.PAGE)
        else:
            await self._app(scope, receive, send)

    async def _complete(self, service: Service, facts_of: FactsOf, scope: Scope, receive: Receive, send: Send) -> None:
        headers = _headers(scope)
        data = await _read(receive)
        body = _parsed(data)
        if not isinstance(body, dict):  # the engine says what is wrong with it
            if _TASK_HEADER in headers:
                raise _Refused(400, "X-Hones-Task is given, but the body is no JSON object; send one")
            await self._app(scope, _replay(data, receive), _labelled(send, lambda _: _labels("none", "off")))
            return
        decision, admission = _admit(service, facts_of, body, headers)

        def labels(start: Message) -> Labels:
            if start["status"] >= _REFUSED_FROM:
                return _labels("none", decision.route)
            service.metrics.requests(admission.label, decision.route)
            return _labels(shown(decision, admission.profile), decision.route)

        try:
            send = _labelled(send, labels)
            if decision.route == "alias":
                send = _named_as_asked(send, body["model"])
            if _cleaned(body, decision.model) or admission.profile is not None:
                if admission.profile is not None:
                    service.stamp(body, admission)
                data = _dumped(body)
                scope = {**scope, "headers": _with_length(scope["headers"], data)}
            receive = _replay(data, receive)
            # A response can take minutes, and an image megabytes.
            del body, data
            await self._app(scope, receive, send)
        finally:
            service.registry.leave(admission)


# Completions ----------------------------------------------------------------------------------------------


def _admit(
    service: Service, facts_of: FactsOf, body: dict[str, Any], headers: Mapping[str, str]
) -> tuple[Decision, Admission]:
    """Decide on a request and let it in. Whoever calls must make the admission leave."""
    for name in itertools.chain(*_places(body)):
        if name.startswith(_PREFIX) and name != _TASK:
            raise _Refused(400, f"{name!r} is a reserved name; name steering with {_TASK!r}", name)
    if not isinstance(body.get("vllm_xargs"), dict | None):
        raise _Refused(400, "vllm_xargs is no object; give names and values", "vllm_xargs")
    route = "off"
    try:
        decision = _decide(service, facts_of(body, headers))
        route = decision.route
        profile = service.registry.resolve(decision.expression)
        # Engines drop what was stamped when they run beams. Anything but a plain no may count as a yes.
        if profile is not None and body.get("use_beam_search") not in (None, False):
            raise RoutingError("beam search cannot be steered; leave out use_beam_search, or name hones_task 'none'")
        return decision, service.registry.admit(profile, label_of(decision.expression))
    except CapacityError as error:
        raise _Refused(429, str(error), route=route) from error
    except UnknownAliasError as error:
        raise _Refused(404, str(error), "model", "alias") from error
    except RoutingError as error:
        raise _Refused(400, str(error), _TASK if route == "body" else None, route) from error


def _decide(service: Service, facts: RequestFacts) -> Decision:
    """What steers this request. Names are checked where a client gave them, also while steering is switched off."""
    registry, served, exact = service.registry, service.served, service.exact()
    if facts.model is not None and facts.model in exact:
        service.report_taken([facts.model])
    if facts.model is not None and (alias := split_alias(facts.model, served, exact)) is not None:
        expression = parse_expression(alias[1])
        try:
            registry.require_known(expression)
        except RoutingError as error:
            raise UnknownAliasError(f"the model {facts.model!r} does not exist: {error}") from error
    decision = decide(facts, service.plan, served=served, exact=exact, enabled=True)
    if registry.enabled:
        return decision
    if decision.route in ("body", "header"):
        registry.require_known(decision.expression)
    return decide(facts, service.plan, served=served, exact=exact, enabled=False)


def _places(body: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """The objects of a request in which names of ours may stand."""
    xargs = body.get("vllm_xargs")
    return (body, xargs) if isinstance(xargs, dict) else (body,)


def _named_as_asked(send: Send, model: str) -> Send:
    """Let the answer name the model as the request did; engines know no aliases."""

    def rename(answer: dict[str, Any]) -> bool:
        if not isinstance(answer.get("model"), str):
            return False
        answer["model"] = model
        return True

    kinds = {_JSON: _with_changed_json(send, rename), _EVENTS: _with_changed_events(send, rename)}
    chosen = send

    async def named(message: Message) -> None:
        nonlocal chosen
        if message["type"] == "http.response.start":
            chosen = kinds.get(_media_type(message), send)
        await chosen(message)

    return named


def _cleaned(body: dict[str, Any], model: str | None) -> bool:
    """Take out what engines do not know, and put in the model's own name. Returns whether that changed anything."""
    changed = False
    for place in _places(body):
        if _TASK in place:
            del place[_TASK]
            changed = True
    if changed and body.get("vllm_xargs") == {}:
        del body["vllm_xargs"]  # other engines know no such field
    if model is not None and body["model"] != model:
        body["model"] = model
        changed = True
    return changed


def shown(decision: Decision, profile: Profile | None) -> str:
    """What X-Hones-Profile says."""
    return "none" if profile is None else f"{decision.asked} ({profile.short_digest})"


# Other routes ---------------------------------------------------------------------------------------------


async def _checked_elsewhere(service: Service, scope: Scope, receive: Receive) -> Receive:
    """Refuse a POST that names steering where there is none. Returns how to receive it: JSON has been read by then."""
    headers, body = _headers(scope), None
    kind = _media_type(scope)
    if kind == _JSON or kind.endswith("+json"):
        data = await _read(receive)
        body, receive = _parsed(data), _replay(data, receive)
    if (named := _named(service, body, headers)) is not None:
        raise _Refused(400, f"only {' and '.join(_COVERED)} can be steered; leave out {named}", route="path")
    return receive


def _unsteered_labels(exchange: Exchange) -> Callable[[Message], Labels]:
    def labels(start: Message) -> Labels:
        if start["status"] >= _REFUSED_FROM:
            return []
        if _media_type(start) == _EVENTS:  # nothing else is streamed, and the engine may be asked only afterwards
            exchange.generate()
        exchange.begin()
        return _labels("none", "path") if exchange.generates else []

    return labels


def _named(service: Service, body: object, headers: Mapping[str, str]) -> str | None:
    """What in a request names steering, or None."""
    if _TASK_HEADER in headers:
        return "X-Hones-Task"
    if not isinstance(body, dict):
        return None
    for name, value in itertools.chain(*(place.items() for place in _places(body))):
        if name.startswith(_PREFIX) and (name != _TASK or value is not None):
            return repr(name)
    model = body.get("model")
    alias = split_alias(model, service.served, service.exact()) if isinstance(model, str) else None
    return None if alias is None else f"{alias[1]!r} in the model's name, which is {alias[0]!r}"


# The list of models ---------------------------------------------------------------------------------------


def _with_aliases(service: Service, send: Send) -> Send:
    """Add an alias for each model and task to the engine's list."""

    def add(listing: dict[str, Any]) -> bool:
        if not isinstance(listing.get("data"), list):
            return False
        listing["data"] += _aliases(service, listing["data"])
        return True

    return _with_changed_json(send, add)


def _aliases(service: Service, models: list[Any]) -> list[dict[str, Any]]:
    entries = {entry["id"]: entry for entry in models}
    return [
        {**entries[name], "id": alias, "parent": name}
        for name in service.served
        for task in service.registry.tasks()
        if name in entries and (alias := f"{name}:{task}") not in entries
    ]


# Administration -------------------------------------------------------------------------------------------


async def _administer(service: Service, method: str, path: str, receive: Receive) -> dict[str, Any]:
    """The JSON to answer with."""
    registry = service.registry
    if (method, path) == ("GET", _PROFILES):
        return {"object": "list", "enabled": registry.enabled, "data": registry.profiles()}
    if not service.allow_updates:
        raise _Refused(403, "this server allows no changes; start it with --allow-profile-updates")
    if (method, path) == ("POST", _PROFILES):
        return await _load(service, _parsed(await _read(receive)))
    if (method, path) == ("POST", _STEERING):
        body = _parsed(await _read(receive))
        if not (isinstance(body, dict) and body.keys() == {"enabled"} and isinstance(body["enabled"], bool)):
            raise _Refused(400, 'send {"enabled": true} or {"enabled": false}', "enabled")
        registry.enabled = body["enabled"]
        return {"enabled": registry.enabled}
    if method == "DELETE" and path.startswith(_PROFILES + "/"):
        return _unload(service, path.removeprefix(_PROFILES + "/"))
    raise _Refused(405, f"{method} means nothing at {path}")


async def _load(service: Service, body: object) -> dict[str, Any]:
    names = ("name", "path")
    if not (isinstance(body, dict) and body.keys() == set(names) and all(isinstance(body[n], str) for n in names)):
        raise _Refused(400, 'send {"name": "<task>", "path": "<file in the folder of profiles>"}')
    try:
        # Reading may take a while, and other requests go on meanwhile.
        entry = await asyncio.to_thread(service.registry.load, body["name"], body["path"])
    except (ProfileError, MismatchError) as error:
        service.metrics.loads("error")
        raise _Refused(400, str(error), "path") from error
    service.metrics.loads("ok")
    service.report_taken(service.exact())
    return entry


def _unload(service: Service, name: str) -> dict[str, Any]:
    plan = service.plan
    planned = [plan.default, *(rule.task for rule in plan.rules), *((plan.canary.to,) if plan.canary else ())]
    if any(name in parse_expression(text).names for text in planned if text is not None):
        raise _Refused(400, f"the routing file steers with {name!r}; change it and restart, or load another version")
    try:
        service.registry.unload(name)
    except RoutingError as error:
        raise _Refused(404, str(error), "name") from error
    return {"name": name, "deleted": True}


# ASGI -----------------------------------------------------------------------------------------------------


def _path(scope: Scope) -> str:
    """The path that the inner application routes by: without the prefix it is mounted under."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(root + "/") else path


def _headers(scope: Scope) -> dict[str, str]:
    return joined((name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"])


def _media_type(message: Message) -> str:
    """The media type of a request or of the start of a response, in lower case."""
    types = [value for name, value in message.get("headers", ()) if name.lower() == b"content-type"]
    return types[0].decode("latin-1").partition(";")[0].strip().lower() if types else ""


async def _read(receive: Receive) -> bytes:
    chunks = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _ClientLeft
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(chunks)


def _replay(data: bytes, receive: Receive) -> Receive:
    """Give a body that was read once more, then what really comes, such as the client leaving."""
    unread: list[Message] = [{"type": "http.request", "body": data, "more_body": False}]

    async def replayed() -> Message:
        return unread.pop() if unread else await receive()

    return replayed


def _parsed(data: bytes) -> object:
    """The JSON value, or None where there is none that an engine could read."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _with_length(headers: Any, data: bytes) -> list[tuple[bytes, bytes]]:
    kept = [(name, value) for name, value in headers if name.lower() not in (b"content-length", b"transfer-encoding")]
    return [*kept, (b"content-length", b"%d" % len(data))]


def _labels(profile: str, route: str) -> Labels:
    return [(b"x-hones-profile", profile.encode("ascii")), (b"x-hones-route", route.encode("ascii"))]


def _labelled(send: Send, labels: Callable[[Message], Labels]) -> Send:
    """Let the response say what steers it; `labels` is called once, with the message that starts it."""

    async def labelled(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *labels(message)]}
        await send(message)

    return labelled


def _with_changed_json(send: Send, change: Change) -> Send:
    """Hold an answer back until it is whole, and let `change` have it if it is a JSON object."""
    start: Message = {}
    chunks: list[bytes] = []

    async def changed(message: Message) -> None:
        if message["type"] == "http.response.start":
            start.update(message)
            return
        chunks.append(message.get("body", b""))
        if message.get("more_body", False):
            return
        data = b"".join(chunks)
        answer = _parsed(data)
        if start["status"] < _REFUSED_FROM and isinstance(answer, dict) and change(answer):
            data = _dumped(answer)
            start["headers"] = _with_length(start.get("headers", ()), data)
        await send(start)
        await send({"type": "http.response.body", "body": data})

    return changed


def _with_changed_events(send: Send, change: Change) -> Send:
    """Let `change` have each JSON object of a stream of events; they go on as they come, line by line."""
    unfinished = b""

    async def changed(message: Message) -> None:
        nonlocal unfinished
        if message["type"] == "http.response.body":
            more = message.get("more_body", False)
            *lines, unfinished = (unfinished + message.get("body", b"")).split(b"\n")
            lines.append(b"" if more else unfinished)
            data = b"\n".join(_changed_line(line, change) for line in lines)
            if more and not data:
                return
            message = {**message, "body": data}
        await send(message)

    return changed


def _changed_line(line: bytes, change: Change) -> bytes:
    field_name, _, value = line.partition(b":")
    event = _parsed(value) if field_name == b"data" else None
    if not isinstance(event, dict) or not change(event):
        return line
    return b"data: " + _dumped(event) + (b"\r" if line.endswith(b"\r") else b"")


def _dumped(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


async def _respond(send: Send, status: int, content: dict[str, Any]) -> None:
    await _send(send, status, {"Content-Type": "application/json"}, json.dumps(content).encode())


async def _send(send: Send, status: int, headers: Mapping[str, str], data: bytes) -> None:
    raw = [(name.lower().encode("ascii"), value.encode("ascii")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": _with_length(raw, data)})
    await send({"type": "http.response.body", "body": data})
