"""The HTTP side of steering, as one ASGI middleware around any engine that speaks OpenAI's API.

=====================================  ==============================================================
``POST /v1/chat/completions``,         read, decided, admitted, and handed on without the fields that
``POST /v1/completions``,              engines do not know; the response says what steered it, in headers
``POST /v1/responses``,                and, where steering was asked for or applied, in its JSON
``POST /v1/messages``
``POST /tokenize``,                    as below, but the model may be an alias; the engine gets its name
``POST /v1/messages/count_tokens``
any other ``POST``                     400 if it names steering, else untouched; where it generates, the
                                       response says that nothing steered it
a websocket                            refused if it names steering, and closed if a message does
``GET /v1/models``                     the engine's list, with ``<model>:<task>`` for each profile
``GET /v1/hones/profiles``             the profiles
``POST /v1/hones/profiles``            load one: ``{"name": "vqa", "path": "vqa-v2.safetensors"}``
``DELETE /v1/hones/profiles/{name}``   forget one
``POST /v1/hones/steering``            the kill switch: ``{"enabled": false}``
``GET /hones``                         the playground, where the server was started with --playground
=====================================  ==============================================================

The engine finds what a request was admitted with in `exchange`, which follows the request through the engine's tasks:
nothing is written into a body, so one way serves all routes, `n` answers, tools that call the model again, and
responses in the background.

Calls that change something are 403 unless the server was started with --allow-profile-updates. Changes act on requests
that are admitted later: an admitted request finishes as admitted. Bodies of more than `Service.max_body` bytes are 413.
Everything else, and every byte of a request that neither names steering nor gets any, passes through as it is.
Requests count once their answer begins: a request that the engine refuses was not steered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from hones_serving import bodies, playground
from hones_serving.asgi import (
    EVENTS,
    REFUSED_FROM,
    App,
    Message,
    RawHeaders,
    Receive,
    Scope,
    Send,
    dump_json,
    media_type,
    path_of,
    replay,
    respond,
    respond_json,
    with_changed_answer,
    with_changed_json,
    with_headers,
    with_length,
)
from hones_serving.bodies import BodyError, ClientLeftError
from hones_serving.contract import (
    TASK_HEADER,
    RefusedError,
    Service,
    admit,
    check_repeated,
    clean,
    drop_alias,
    named_steering,
)
from hones_serving.exchange import Exchange
from hones_serving.expert_room import RoomError
from hones_serving.facts import FactsOf, facts_of_chat, facts_of_completion, facts_of_message, facts_of_response, joined
from hones_serving.shared_state import SharedStateError, UnconfirmedError
from hones_serving.websockets import open_session
from hones_steer.errors import MismatchError, ProfileError, RoutingError
from hones_steer.store import parse_expression

_MESSAGES = "/v1/messages"
_STEERABLE: dict[str, FactsOf] = {
    "/v1/chat/completions": facts_of_chat,
    "/v1/completions": facts_of_completion,
    "/v1/responses": facts_of_response,
    _MESSAGES: facts_of_message,
}
# Steering does not change what these count, but clients name one model on all routes.
_COUNTING = (f"{_MESSAGES}/count_tokens", "/tokenize")
_MODELS = "/v1/models"
_PROFILES = "/v1/hones/profiles"
_STEERING = "/v1/hones/steering"


class HonesMiddleware:
    """Steers the requests to an ASGI application, as the module's table says.

    Goes inside authentication: unauthenticated requests must not get here. `service` is called for every request.
    """

    def __init__(self, app: App, service: Callable[[], Service]) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request or websocket; the lifespan passes through."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        # For every request, also one that never begins its exchange: uvicorn may run a pipelined request in the context
        # of the one before.
        exchange = Exchange(lambda: self._service().count_unsteered())
        with exchange.handled():
            if scope["type"] == "http":
                await self._answer(scope, receive, send, exchange)
            else:
                exchange.begin()
                await open_session(self._app, self._service(), scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, exchange: Exchange) -> None:
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            try:
                await self._handle(scope, receive, noted, exchange)
            except BodyError as error:
                if not begun:  # else the whole answer was sent before the body was
                    raise RefusedError(error.status, str(error)) from error
        except RefusedError as refused:
            headers = _steering_headers("none", refused.route)
            content = refused.content
            if path_of(scope) in (_MESSAGES, _COUNTING[0]):
                content = {"type": "error", **content}  # so that Anthropic's clients know it, too
            await respond_json(with_headers(send, lambda _: headers), refused.status, content)
        except ClientLeftError:
            pass

    async def _handle(self, scope: Scope, receive: Receive, send: Send, exchange: Exchange) -> None:
        method, path = scope["method"], path_of(scope)
        if path in (_PROFILES, _STEERING) or path.startswith(_PROFILES + "/"):
            try:
                await respond_json(send, 200, await _administer(self._service(), scope, receive))
            except SharedStateError as error:
                raise RefusedError(503, str(error)) from error
        elif method == "POST" and path in _STEERABLE:
            await self._complete(self._service(), _STEERABLE[path], scope, receive, send, exchange)
        elif method == "POST":
            await self._pass(self._service(), scope, receive, send, exchange)
        elif method in ("GET", "HEAD") and path == _MODELS:
            await self._app(scope, receive, _with_aliases(self._service(), send))
        elif method in ("GET", "HEAD") and path == playground.PATH and self._service().playground:
            await respond(send, 200, playground.HEADERS, playground.PAGE)
        else:
            await self._app(scope, receive, send)

    async def _complete(
        self, service: Service, facts_of: FactsOf, scope: Scope, receive: Receive, send: Send, exchange: Exchange
    ) -> None:
        """Handle a request to a route that can be steered: decide, admit, hand on, and say what steered the answer."""
        headers = _request_headers(scope)
        scope, data = await bodies.read(scope, receive, service.max_body)
        body = bodies.parse_request(data)
        if not isinstance(body, dict):  # the engine says what is wrong with it
            if TASK_HEADER in headers:
                raise RefusedError(400, "X-Hones-Task is given, but the body is no JSON object; send one")
            unsteered = _steering_headers("none", "off")
            await self._app(scope, replay(data, receive), with_headers(send, lambda _: unsteered))
            return
        admitted = admit(service, facts_of, body, headers)
        admission, decision = admitted.admission, admitted.decision
        exchange.admission = admission

        def steering_headers(start: Message) -> RawHeaders:
            if start["status"] >= REFUSED_FROM:
                return _steering_headers("none", decision.route)
            service.metrics.requests(admission.label, decision.route)
            return _steering_headers(admitted.header, decision.route)

        try:
            send = with_headers(send, steering_headers)
            if admitted.confirmation is not None:
                send = with_changed_answer(send, admitted.complete, admitted.complete_event)
            if clean(body, decision.model):
                data = dump_json(body)
                scope = {**scope, "headers": with_length(scope["headers"], data)}
            receive = replay(data, receive)
            # A response can take minutes, and a body with an image has megabytes.
            del body, data
            await self._app(scope, receive, send)
        finally:
            service.registry.leave(admission)

    async def _pass(self, service: Service, scope: Scope, receive: Receive, send: Send, exchange: Exchange) -> None:
        """Hand on a POST to a route that cannot be steered, unless it names steering or is too large.

        Raises:
            RefusedError: 400, naming the header, field or alias.
            BodyError: 413 or 415.
        """
        headers, body = _request_headers(scope), None
        _refuse_steering(service, None, headers)  # before a large body is read
        if bodies.is_json(scope) or bodies.is_encoded(scope):
            scope, data = await bodies.read(scope, receive, service.max_body)
            body = bodies.parse_request(data) if bodies.is_json(scope) else None
            if path_of(scope) in _COUNTING and isinstance(body, dict) and drop_alias(service, body):
                data = dump_json(body)
                scope = {**scope, "headers": with_length(scope["headers"], data)}
            receive = replay(data, receive)
            _refuse_steering(service, body, headers)
            del body, data
        else:
            bodies.check_length(scope, service.max_body)
            receive, send = _limited(receive, send, service.max_body)
        await self._app(scope, receive, with_headers(send, _unsteered_headers(exchange)))
        service.report_ambiguous(service.exact())  # it may have loaded a LoRA adapter


# Routes that cannot be steered ----------------------------------------------------------------------------


def _refuse_steering(service: Service, body: object, headers: dict[str, str]) -> None:
    if isinstance(body, dict):
        check_repeated(body)
    if (named := named_steering(service, body, headers)) is not None:
        *others, last = _STEERABLE
        routes = f"{', '.join(others)} and {last}"
        raise RefusedError(400, f"only {routes} can be steered; leave out {named}", route="path")


def _limited(receive: Receive, send: Send, limit: int) -> tuple[Receive, Send]:
    """Both ends of a request whose body is not read here, which end with a BodyError once it is too large.

    Frameworks may answer such an error themselves, with another status, so that answer is dropped.
    """
    excess: list[BodyError] = []
    counted = bodies.within(receive, limit)

    async def receive_limited() -> Message:
        try:
            return await counted()
        except BodyError as error:
            excess.append(error)
            raise

    async def send_limited(message: Message) -> None:
        if excess:
            raise excess[0]
        await send(message)

    return receive_limited, send_limited


def _unsteered_headers(exchange: Exchange) -> Callable[[Message], RawHeaders]:
    """The headers of an answer on a route that cannot be steered: none unless the request generates."""

    def headers_of(start: Message) -> RawHeaders:
        if start["status"] >= REFUSED_FROM:
            return []
        if media_type(start) == EVENTS:  # nothing else is streamed, and the engine may be asked only afterwards
            exchange.generate()
        exchange.begin()
        return _steering_headers("none", "path") if exchange.generates else []

    return headers_of


# The list of models ---------------------------------------------------------------------------------------


def _with_aliases(service: Service, send: Send) -> Send:
    """Add an entry ``<model>:<task>`` for each model and task to the engine's list of models."""

    def add(listing: dict[str, Any]) -> bool:
        if not isinstance(listing.get("data"), list):
            return False
        listing["data"] += _aliases(service, listing["data"])
        return True

    return with_changed_json(send, add)


def _aliases(service: Service, models: list[Any]) -> list[dict[str, Any]]:
    entries = {entry["id"]: entry for entry in models}
    try:
        service.registry.follow()
    except SharedStateError:
        return []  # nothing is steered, whatever it is called
    return [
        {**entries[name], "id": alias, "parent": name}
        for name in service.served
        for task in service.registry.tasks()
        if name in entries and (alias := f"{name}:{task}") not in entries
    ]


# Administration -------------------------------------------------------------------------------------------


async def _administer(service: Service, scope: Scope, receive: Receive) -> dict[str, Any]:
    """Handle a call to /v1/hones/...; returns the JSON to answer with.

    Raises:
        RefusedError: 400, 403, 404 or 405.
        BodyError: 413 or 415.
        SharedStateError: other processes of the server cannot be told, or have not said that they know.
    """
    registry, method, path = service.registry, scope["method"], path_of(scope)
    if (method, path) == ("GET", _PROFILES):
        registry.follow()
        return {"object": "list", "enabled": registry.enabled, **registry.about(), "data": registry.profiles()}
    if not service.allow_updates:
        raise RefusedError(403, "this server allows no changes; start it with --allow-profile-updates")
    if (method, path) == ("POST", _PROFILES):
        return await _load(service, await _json_of(service, scope, receive))
    if (method, path) == ("POST", _STEERING):
        body = await _json_of(service, scope, receive)
        if not (isinstance(body, dict) and body.keys() == {"enabled"} and isinstance(body["enabled"], bool)):
            raise RefusedError(400, 'send {"enabled": true} or {"enabled": false}', "enabled")
        await asyncio.to_thread(registry.switch, body["enabled"])  # other processes have to hear of it, too
        return {"enabled": body["enabled"]}
    if method == "DELETE" and path.startswith(_PROFILES + "/"):
        return await _unload(service, path.removeprefix(_PROFILES + "/"))
    raise RefusedError(405, f"{method} is not supported at {path}; see the table of calls in the documentation")


async def _json_of(service: Service, scope: Scope, receive: Receive) -> object:
    _, data = await bodies.read(scope, receive, service.max_body)
    body = bodies.parse_request(data)
    if isinstance(body, bodies.RepeatedNames):
        raise RefusedError(400, f"the body gives {min(body.names)!r} more than once; give it once", min(body.names))
    return body


async def _load(service: Service, body: object) -> dict[str, Any]:
    names = ("name", "path")
    if not (isinstance(body, dict) and body.keys() == set(names) and all(isinstance(body[n], str) for n in names)):
        raise RefusedError(400, 'send {"name": "<task>", "path": "<file in the folder of profiles>"}')
    try:
        # Reading may take a while, and other requests go on meanwhile.
        entry = await asyncio.to_thread(service.registry.load, body["name"], body["path"])
    except (ProfileError, MismatchError) as error:
        service.metrics.loads("error")
        raise RefusedError(400, str(error), "path") from error
    except RoomError as error:
        service.metrics.loads("error")
        raise RefusedError(409, str(error), "path") from error
    except SharedStateError as error:
        service.metrics.loads("ok" if isinstance(error, UnconfirmedError) else "error")
        raise
    service.metrics.loads("ok")
    service.report_ambiguous(service.exact())
    return entry


async def _unload(service: Service, name: str) -> dict[str, Any]:
    plan = service.plan
    planned = [plan.default, *(rule.task for rule in plan.rules), *((plan.canary.to,) if plan.canary else ())]
    if any(name in parse_expression(text).names for text in planned if text is not None):
        raise RefusedError(
            400, f"the routing file steers with {name!r}; change it and restart, or load another version"
        )
    try:
        await asyncio.to_thread(service.registry.unload, name)
    except RoutingError as error:
        raise RefusedError(404, str(error), "name") from error
    return {"name": name, "deleted": True}


# Headers --------------------------------------------------------------------------------------------------


def _request_headers(scope: Scope) -> dict[str, str]:
    return joined((name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"])


def _steering_headers(profile: str, route: str) -> RawHeaders:
    return [(b"x-hones-profile", profile.encode("ascii")), (b"x-hones-route", route.encode("ascii"))]
