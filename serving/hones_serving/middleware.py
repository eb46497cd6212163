"""The HTTP side of steering, as one ASGI middleware around any engine that speaks OpenAI's API.

=====================================  ==============================================================
``POST /v1/chat/completions``,         read, decided, admitted, and handed on without the fields that
``POST /v1/completions``               engines do not know; the response says what steered it
any other ``POST``                     400 if it names steering, else untouched; where it generates, the
                                       response says that nothing steered it
``GET /v1/models``                     the engine's list, with ``<model>:<task>`` for each profile
``GET /v1/hones/profiles``             the profiles
``POST /v1/hones/profiles``            load one: ``{"name": "vqa", "path": "vqa-v2.safetensors"}``
``DELETE /v1/hones/profiles/{name}``   forget one
``POST /v1/hones/steering``            the kill switch: ``{"enabled": false}``
``GET /hones``                         the playground, where the server was started with --playground
=====================================  ==============================================================

Calls that change something are 403 unless the server was started with --allow-profile-updates. Changes act on requests
that are admitted later: an admitted request finishes as admitted. Everything else, and every byte of a request that
neither names steering nor gets any, passes through as it is. Requests count once their answer begins: a request that
the engine refuses was not steered.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from hones_serving import playground
from hones_serving.asgi import (
    EVENTS,
    JSON,
    REFUSED_FROM,
    App,
    ClientLeftError,
    Message,
    RawHeaders,
    Receive,
    Scope,
    Send,
    dump_json,
    error_content,
    media_type,
    parse_json,
    path_of,
    read_body,
    replay,
    respond,
    respond_json,
    with_changed_answer,
    with_changed_json,
    with_headers,
    with_length,
)
from hones_serving.expert_room import RoomError
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

FactsOf: TypeAlias = Callable[[object, Mapping[str, str]], RequestFacts]  # from body and headers

_STEERABLE: dict[str, FactsOf] = {"/v1/chat/completions": facts_of_chat, "/v1/completions": facts_of_completion}
_MODELS = "/v1/models"
_PROFILES = "/v1/hones/profiles"
_STEERING = "/v1/hones/steering"

_PREFIX = "hones_"
_TASK = "hones_task"
_TASK_HEADER = "x-hones-task"

logger = logging.getLogger(__name__)


@dataclass
class Service:
    """Everything the middleware works with, once the engine is up.

    Args:
        registry: the profiles, and who is admitted.
        plan: the routing file's content.
        metrics: count requests, and attempts to load a profile.
        served: the names that the server gives its model.
        exact: gives all names that the engine knows: `served` and those of LoRA adapters, which may change. A name that
            reads like an alias is logged, once.
        allow_updates: whether clients may replace profiles and switch steering off.
        playground: whether there is a page at /hones.
        stamp: writes the admission of a steered request into its JSON body, where the engine will find it.
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
        self.report_ambiguous(self.exact())

    def report_ambiguous(self, names: Iterable[str]) -> None:
        """Log which of these names of models and LoRA adapters also read as aliases; as names they steer nothing."""
        for name in set(names) - self._reported:
            alias = split_alias(name, [model for model in self.served if model != name], ())
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
    """Raised to answer the request with an error, always before anything was sent.

    `route` is what X-Hones-Route says; `message` and `param` are those of `error_content`.
    """

    def __init__(self, status: int, message: str, param: str | None = None, route: str = "off") -> None:
        super().__init__(message)
        self.status, self.route = status, route
        self.content = error_content(status, message, param)


class HonesMiddleware:
    """Steers the requests to an ASGI application, as the module's table says.

    Goes inside authentication: unauthenticated requests must not get here. `service` is called for every request.
    """

    def __init__(self, app: App, service: Callable[[], Service]) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; lifespan and websockets pass through."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        # For every request, also one that never begins its exchange: uvicorn may run a pipelined request in the context
        # of the one before.
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
            headers = _steering_headers("none", refused.route)
            await respond_json(with_headers(send, lambda _: headers), refused.status, refused.content)
        except ClientLeftError:
            pass

    async def _handle(self, scope: Scope, receive: Receive, send: Send, exchange: Exchange) -> None:
        method, path = scope["method"], path_of(scope)
        if path in (_PROFILES, _STEERING) or path.startswith(_PROFILES + "/"):
            await respond_json(send, 200, await _administer(self._service(), method, path, receive))
        elif method == "POST" and path in _STEERABLE:
            await self._complete(self._service(), _STEERABLE[path], scope, receive, send)
        elif method == "POST":
            receive = await _refuse_steering(self._service(), scope, receive)
            await self._app(scope, receive, with_headers(send, _unsteered_headers(exchange)))
            self._service().report_ambiguous(self._service().exact())  # it may have loaded a LoRA adapter
        elif method in ("GET", "HEAD") and path == _MODELS:
            await self._app(scope, receive, _with_aliases(self._service(), send))
        elif method in ("GET", "HEAD") and path == playground.PATH and self._service().playground:
            await respond(send, 200, playground.HEADERS, playground.PAGE)
        else:
            await self._app(scope, receive, send)

    async def _complete(self, service: Service, facts_of: FactsOf, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request to a route that can be steered: decide, admit, hand on, and say what steered the answer."""
        headers = _request_headers(scope)
        data = await read_body(receive)
        body = parse_json(data)
        if not isinstance(body, dict):  # the engine says what is wrong with it
            if _TASK_HEADER in headers:
                raise _Refused(400, "X-Hones-Task is given, but the body is no JSON object; send one")
            unsteered = _steering_headers("none", "off")
            await self._app(scope, replay(data, receive), with_headers(send, lambda _: unsteered))
            return
        decision, admission = _admit(service, facts_of, body, headers)

        def steering_headers(start: Message) -> RawHeaders:
            if start["status"] >= REFUSED_FROM:
                return _steering_headers("none", decision.route)
            service.metrics.requests(admission.label, decision.route)
            return _steering_headers(profile_header(decision, admission.profile), decision.route)

        try:
            send = with_headers(send, steering_headers)
            if decision.route == "alias":
                send = _with_model_name(send, body["model"])
            if _clean(body, decision.model) or admission.profile is not None:
                if admission.profile is not None:
                    service.stamp(body, admission)
                data = dump_json(body)
                scope = {**scope, "headers": with_length(scope["headers"], data)}
            receive = replay(data, receive)
            # A response can take minutes, and a body with an image has megabytes.
            del body, data
            await self._app(scope, receive, send)
        finally:
            service.registry.leave(admission)


# Completions ----------------------------------------------------------------------------------------------


def _admit(
    service: Service, facts_of: FactsOf, body: dict[str, Any], headers: Mapping[str, str]
) -> tuple[Decision, Admission]:
    """Decide on a request and let it in. The caller must make the admission leave.

    Raises:
        _Refused: 400, 404 or 429; the message says what is wrong with the steering that the request names.
    """
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
        # Engines drop the stamp when they run beams. They may take any value but a plain no for a yes.
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
    """The steering of a request. Names that a client gave are checked, also while steering is switched off.

    Raises:
        UnknownAliasError: the model's name is an alias of a task that has no profile.
        RoutingError: an expression is malformed, or names a task that has no profile.
    """
    registry, served, exact = service.registry, service.served, service.exact()
    if facts.model is not None and facts.model in exact:
        service.report_ambiguous([facts.model])
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
    """The JSON objects of a request whose keys may begin with ``hones_``: the body and its `vllm_xargs`."""
    xargs = body.get("vllm_xargs")
    return (body, xargs) if isinstance(xargs, dict) else (body,)


def _with_model_name(send: Send, model: str) -> Send:
    """Let the answer call the model what the request called it; engines know no aliases."""

    def rename(answer: dict[str, Any]) -> bool:
        if not isinstance(answer.get("model"), str):
            return False
        answer["model"] = model
        return True

    return with_changed_answer(send, rename)


def _clean(body: dict[str, Any], model: str | None) -> bool:
    """Take out the fields that engines do not know, and give the model its own name (None: as it is).

    Returns whether that changed anything.
    """
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


# Other routes ---------------------------------------------------------------------------------------------


async def _refuse_steering(service: Service, scope: Scope, receive: Receive) -> Receive:
    """Refuse a POST that names steering on a route that cannot be steered.

    Returns the `receive` to hand on: a JSON body has been read by then.

    Raises:
        _Refused: 400, naming the header, field or alias.
    """
    headers, body = _request_headers(scope), None
    kind = media_type(scope)
    if kind == JSON or kind.endswith("+json"):
        data = await read_body(receive)
        body, receive = parse_json(data), replay(data, receive)
    if (named := _named_steering(service, body, headers)) is not None:
        raise _Refused(400, f"only {' and '.join(_STEERABLE)} can be steered; leave out {named}", route="path")
    return receive


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


def _named_steering(service: Service, body: object, headers: Mapping[str, str]) -> str | None:
    """The header, field or alias by which a request names steering, for a message; None if it names none."""
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
    """Add an entry ``<model>:<task>`` for each model and task to the engine's list of models."""

    def add(listing: dict[str, Any]) -> bool:
        if not isinstance(listing.get("data"), list):
            return False
        listing["data"] += _aliases(service, listing["data"])
        return True

    return with_changed_json(send, add)


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
    """Handle a call to /v1/hones/...; returns the JSON to answer with.

    Raises:
        _Refused: 400, 403, 404 or 405.
    """
    registry = service.registry
    if (method, path) == ("GET", _PROFILES):
        return {"object": "list", "enabled": registry.enabled, "data": registry.profiles()}
    if not service.allow_updates:
        raise _Refused(403, "this server allows no changes; start it with --allow-profile-updates")
    if (method, path) == ("POST", _PROFILES):
        return await _load(service, parse_json(await read_body(receive)))
    if (method, path) == ("POST", _STEERING):
        body = parse_json(await read_body(receive))
        if not (isinstance(body, dict) and body.keys() == {"enabled"} and isinstance(body["enabled"], bool)):
            raise _Refused(400, 'send {"enabled": true} or {"enabled": false}', "enabled")
        registry.enabled = body["enabled"]
        return {"enabled": registry.enabled}
    if method == "DELETE" and path.startswith(_PROFILES + "/"):
        return _unload(service, path.removeprefix(_PROFILES + "/"))
    raise _Refused(405, f"{method} is not supported at {path}; see the table of calls in the documentation")


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
    except RoomError as error:
        service.metrics.loads("error")
        raise _Refused(409, str(error), "path") from error
    service.metrics.loads("ok")
    service.report_ambiguous(service.exact())
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


# Headers --------------------------------------------------------------------------------------------------


def _request_headers(scope: Scope) -> dict[str, str]:
    return joined((name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"])


def _steering_headers(profile: str, route: str) -> RawHeaders:
    return [(b"x-hones-profile", profile.encode("ascii")), (b"x-hones-route", route.encode("ascii"))]


def profile_header(decision: Decision, profile: Profile | None) -> str:
    """The value of X-Hones-Profile: the expression as written and the digest of what was applied, or ``none``."""
    return "none" if profile is None else f"{decision.asked} ({profile.short_digest})"
