"""The contract of steering, whatever a request comes in by: what may be steered, by what, what the answer says.

`admit` decides on a JSON body and headers, and lets the request in; `Admitted` is what it was admitted with, and makes
the answer's JSON say so. `middleware` does this over HTTP, `vllm.batch` for the lines of a batch file.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hones_serving.asgi import error_content
from hones_serving.bodies import RepeatedNames
from hones_serving.facts import FactsOf, RequestFacts
from hones_serving.metrics import Metrics
from hones_serving.registry import Admission, CapacityError, ProfileRegistry, label_of
from hones_serving.routing import Decision, RoutingPlan, UnknownAliasError, decide, split_alias
from hones_serving.shared_state import SharedStateError
from hones_steer.errors import RoutingError
from hones_steer.profile import Profile
from hones_steer.scopes import ALL, check_scope, scoped_digest
from hones_steer.store import parse_expression

PREFIX = "hones_"  # of all names that are ours, in a body or in vLLM's `extra_args`
TASK = PREFIX + "task"
SCOPE = PREFIX + "scope"
TASK_HEADER = "x-hones-task"
CONFIRMATION = "hones"  # the object of an answer that says what steered it

_FIELDS = (TASK, SCOPE)

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
        max_body: largest body of a request, in bytes, as received and once decompressed.
    """

    registry: ProfileRegistry
    plan: RoutingPlan
    metrics: Metrics
    served: tuple[str, ...]
    exact: Callable[[], Collection[str]]
    allow_updates: bool
    playground: bool
    max_body: int
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

    def count_unsteered(self) -> None:
        """Count a request that generates on a route that is not steered, and the default that does not reach it."""
        self.metrics.requests("none", "path")
        default = parse_expression(self.plan.default or "none")
        if default.terms and self.registry.enabled:
            self.metrics.unreached_defaults(label_of(default))

    def _is_known(self, text: str) -> bool:
        try:
            self.registry.require_known(parse_expression(text))
        except RoutingError:
            return False
        return True


class RefusedError(Exception):
    """Raised to answer the request with an error, always before anything was sent.

    `route` is what X-Hones-Route says; `message` and `param` are those of `error_content`.
    """

    def __init__(self, status: int, message: str, param: str | None = None, route: str = "off") -> None:
        super().__init__(message)
        self.status, self.route = status, route
        self.content = error_content(status, message, param)


# Who gets in ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Admitted:
    """A request that was let in, and what its answer is to say.

    `asked` says whether the request itself names steering or a scope, whatever came of it. `alias` is the model's name
    as the request has it, if that decided; `totals` whether a stream of chunks ends with one that has the usage of all.
    """

    decision: Decision
    admission: Admission
    asked: bool
    alias: str | None
    totals: bool

    @property
    def header(self) -> str:
        """The value of X-Hones-Profile."""
        return profile_header(self.decision, self.admission.profile, self.admission.scope)

    @property
    def confirmation(self) -> dict[str, Any] | None:
        """The object ``hones`` of the answer; None where nothing was asked for or applied."""
        profile, scope, route = self.admission.profile, self.admission.scope, self.decision.route
        if profile is None:
            return {"profile": "none", "digest": None, "route": route} if self.asked else None
        digest = scoped_digest(profile.digest, scope)
        named = {} if scope == ALL else {"scope": scope}
        return {"profile": self.decision.asked, "digest": digest, **named, "route": route}

    def complete(self, answer: dict[str, Any]) -> bool:
        """Let a whole answer say what steered it. Returns whether that changed it."""
        return self._rename(answer) | self._confirm(answer)

    def complete_event(self, event: dict[str, Any]) -> bool:
        """Let an event of a stream say what steered the answer, if it is the place. Returns whether that changed it."""
        # Chunks of OpenAI's completions are an answer themselves; events of the other two protocols can have one.
        nested = [event[name] for name in ("response", "message") if isinstance(event.get(name), dict)]
        answer = nested[0] if nested else event
        changed = self._rename(answer)
        return (self._is_last(event, answer) and self._confirm(answer)) or changed

    def _rename(self, answer: dict[str, Any]) -> bool:
        """Let the answer call the model what the request called it; engines know no aliases."""
        if self.alias is None or not isinstance(answer.get("model"), str):
            return False
        answer["model"] = self.alias
        return True

    def _confirm(self, answer: dict[str, Any]) -> bool:
        confirmation = self.confirmation
        if confirmation is None:
            return False
        answer[CONFIRMATION] = confirmation
        return True

    def _is_last(self, event: dict[str, Any], answer: dict[str, Any]) -> bool:
        if answer is not event:  # Anthropic's first event has the message; OpenAI's last ones have the usage
            return event.get("type") == "message_start" or answer.get("usage") is not None
        choices = event.get("choices")
        if not isinstance(choices, list):
            return False
        ends = any(isinstance(choice, dict) and choice.get("finish_reason") is not None for choice in choices)
        return (event.get("usage") is not None and (ends or not choices)) or (ends and not self.totals)


def admit(service: Service, facts_of: FactsOf, body: dict[str, Any], headers: Mapping[str, str]) -> Admitted:
    """Decide on a request and let it in.

    The caller must make the admission leave.

    Raises:
        RefusedError: 400, 404 or 429; the message says what is wrong with the steering that the request names. 503: it
            is not known what would steer the request.
    """
    scope = _check_names(body)
    route = "off"
    try:
        facts = facts_of(body, headers)
        _follow(service, facts)
        decision, asked = _decide(service, facts)
        route = decision.route
        profile = service.registry.resolve(decision.expression)
        # How beams are built over several requests to the engine is not tested. They take any value but a plain no.
        if profile is not None and body.get("use_beam_search") not in (None, False):
            raise RoutingError("beam search cannot be steered; leave out use_beam_search, or name hones_task 'none'")
        if scope != ALL and profile is None and route == "default":
            message = f"{SCOPE} is {scope!r}, but nothing steers this request; name {TASK!r}"
            raise RefusedError(400, message, SCOPE, route)
        admission = service.registry.admit(profile, label_of(decision.expression), scope)
    except CapacityError as error:
        raise RefusedError(429, str(error), route=route) from error
    except UnknownAliasError as error:
        raise RefusedError(404, str(error), "model", "alias") from error
    except RoutingError as error:
        raise RefusedError(400, str(error), TASK if route == "body" else None, route) from error
    options = body.get("stream_options")
    totals = isinstance(options, dict) and bool(options.get("include_usage"))
    alias = body["model"] if route == "alias" else None
    return Admitted(decision, admission, asked or scope != ALL, alias, totals)


def clean(body: dict[str, Any], model: str | None) -> bool:
    """Take out the fields that engines do not know, and give the model its own name (None: as it is).

    Returns whether that changed anything.
    """
    changed = False
    for place in _places(body):
        for name in _FIELDS:
            if name in place:
                del place[name]
                changed = True
    if changed and body.get("vllm_xargs") == {}:
        del body["vllm_xargs"]  # other engines know no such field
    if model is not None and body["model"] != model:
        body["model"] = model
        changed = True
    return changed


def _check_names(body: dict[str, Any]) -> str:
    """Check what a body names that engines do not know, all but the expression; returns the scope."""
    check_repeated(body)
    places = _places(body)
    for name in itertools.chain(*places):
        if name.startswith(PREFIX) and name not in _FIELDS:
            raise RefusedError(400, f"{name!r} is a reserved name; name steering with {TASK!r}", name)
    if not isinstance(body.get("vllm_xargs"), dict | None):
        raise RefusedError(400, "vllm_xargs is no object; give names and values", "vllm_xargs")
    try:
        scopes = [check_scope(place[SCOPE]) for place in places if place.get(SCOPE) is not None]
    except RoutingError as error:
        raise RefusedError(400, str(error), SCOPE) from error
    if len({*scopes}) > 1:
        raise RefusedError(400, f"{SCOPE} is {scopes[0]!r} and in vllm_xargs {scopes[1]!r}; give it once", SCOPE)
    return scopes[0] if scopes else ALL


def check_repeated(body: dict[str, Any]) -> None:
    """Refuse a body that gives a name twice which can name steering, so that nobody has to know which one counts.

    Raises:
        RefusedError: 400, naming it.
    """
    for place in _places(body):
        for name in sorted(place.names) if isinstance(place, RepeatedNames) else ():
            if name.startswith(PREFIX) or (place is body and name in ("model", "vllm_xargs")):
                raise RefusedError(400, f"the body gives {name!r} more than once; give it once", name)


def _decide(service: Service, facts: RequestFacts) -> tuple[Decision, bool]:
    """The steering of a request, and whether the request itself names any.

    Names that a client gave are checked, also while steering is switched off.

    Raises:
        UnknownAliasError: the model's name is an alias of a task that has no profile.
        RoutingError: an expression is malformed, or names a task that has no profile.
    """
    registry, served, exact = service.registry, service.served, service.exact()
    if facts.model is not None and facts.model in exact:
        service.report_ambiguous([facts.model])
    if facts.model is not None:
        _known_alias(service, facts.model, exact)
    decision = decide(facts, service.plan, served=served, exact=exact, enabled=True)
    asked = decision.route in ("body", "header", "alias")
    if registry.enabled:
        return decision, asked
    if decision.route in ("body", "header"):
        registry.require_known(decision.expression)
    return decide(facts, service.plan, served=served, exact=exact, enabled=False), asked


def _follow(service: Service, facts: RequestFacts) -> None:
    """Take over what other processes of the server have changed.

    Raises:
        RefusedError: 503, if that cannot be read and something would steer the request.
        RoutingError: an expression is malformed.
    """
    try:
        service.registry.follow()
    except SharedStateError as error:
        decision = decide(facts, service.plan, served=service.served, exact=service.exact(), enabled=True)
        if decision.expression.names:
            raise RefusedError(503, _unknown(error), route=decision.route) from error


def _unknown(error: SharedStateError) -> str:
    return f"this API server does not know what steers now, so it steers nothing: {error}"


def _known_alias(service: Service, model: str, exact: Collection[str]) -> tuple[str, str] | None:
    """`split_alias` of a model's name. Raises RoutingError if it is malformed, or (UnknownAliasError) no profile's."""
    alias = split_alias(model, service.served, exact)
    if alias is not None:
        expression = parse_expression(alias[1])
        try:
            service.registry.require_known(expression)
        except RoutingError as error:
            raise UnknownAliasError(f"the model {model!r} does not exist: {error}") from error
    return alias


def drop_alias(service: Service, body: dict[str, Any]) -> bool:
    """Give the model in a body its own name, for a route that only counts tokens. Returns whether that changed it.

    Raises:
        RefusedError: 400, 404 or 503, as for the same name on a route that is steered.
    """
    check_repeated(body)
    model = body.get("model")
    if not isinstance(model, str):
        return False
    try:
        if split_alias(model, service.served, service.exact()) is not None:
            service.registry.follow()
        alias = _known_alias(service, model, service.exact())
    except UnknownAliasError as error:
        raise RefusedError(404, str(error), "model", "path") from error
    except RoutingError as error:
        raise RefusedError(400, str(error), "model", "path") from error
    except SharedStateError as error:
        raise RefusedError(503, _unknown(error), route="path") from error
    if alias is None:
        return False
    body["model"] = alias[0]
    return True


def _places(body: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """The JSON objects of a request whose keys may begin with ``hones_``: the body and its `vllm_xargs`."""
    xargs = body.get("vllm_xargs")
    return (body, xargs) if isinstance(xargs, dict) else (body,)


def named_steering(service: Service, body: object, headers: Mapping[str, str]) -> str | None:
    """The header, field or alias by which a request names steering, for a message; None if it names none."""
    if TASK_HEADER in headers:
        return "X-Hones-Task"
    if not isinstance(body, dict):
        return None
    for name, value in itertools.chain(*(place.items() for place in _places(body))):
        if name.startswith(PREFIX) and (name not in _FIELDS or value is not None):
            return repr(name)
    model = body.get("model")
    alias = split_alias(model, service.served, service.exact()) if isinstance(model, str) else None
    return None if alias is None else f"{alias[1]!r} in the model's name, which is {alias[0]!r}"


def profile_header(decision: Decision, profile: Profile | None, scope: str = ALL) -> str:
    """The value of X-Hones-Profile: the expression as written and the digest of what was applied, or ``none``.

    Where a scope was applied, it follows the digest, which is then that of the profile and the scope.
    """
    if profile is None:
        return "none"
    digest = scoped_digest(profile.digest, scope)[: len(profile.short_digest)]
    return f"{decision.asked} ({digest})" if scope == ALL else f"{decision.asked} ({digest}; {scope})"
