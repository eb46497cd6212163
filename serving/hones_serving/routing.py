"""Which steering a request gets: what it asks for itself, else the rules, default and canary of the server's plan.

Precedence: body `hones_task`, header `X-Hones-Task`, model alias ``<model>:<expression>``, rules, default. No
engine, no profiles and no files here: whether a task asked for in a request exists is the registry's business.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import re2  # type: ignore[import-untyped]

from hones_steer.errors import RoutingError
from hones_steer.store import Expression, parse_expression

ROUTES = ("body", "header", "alias", "rule", "default", "canary", "off", "path")
MATCHED_BYTES = 8 * 1024

_IMAGES = ("image_url", "input_image", "image", "image_pil", "image_embeds")


class UnknownAliasError(RoutingError):
    """A model alias names a task that does not exist: to the client an unknown model, HTTP 404."""


# What a request says --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RequestFacts:
    """What routing looks at in a request.

    `headers` has lower-case names; `prompt` is the last user message's text (all of a completion's prompts), `system`
    that of all system and developer messages; `first` is the JSON value that opens the conversation.
    """

    body_task: str | None = None
    header_task: str | None = None
    model: str | None = None
    has_image: bool = False
    prompt: str = ""
    system: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    user: str | None = None
    first: object = None

    @property
    def key(self) -> str:
        """What a canary draws by: stays the same throughout a conversation.

        Computed when asked for: an image in the first message makes it megabytes to hash.
        """
        given = self.headers.get("x-hones-key") or self.user
        if given:
            return given
        try:
            canonical = json.dumps(self.first, sort_keys=True, separators=(",", ":"))
        except RecursionError:  # nested deeper than any engine accepts: it answers with an error of its own
            canonical = ""
        return hashlib.sha256(canonical.encode()).hexdigest()


def facts_of_chat(body: object, headers: Mapping[str, str]) -> RequestFacts:
    """The facts of a chat completion's JSON body; what is malformed counts as absent, the engine will refuse it.

    Raises:
        RoutingError: `hones_task` is not a string, or given twice with different values.
    """
    messages = _field(body, "messages")
    messages = [message for message in messages if isinstance(message, dict)] if isinstance(messages, list) else []
    asking = [message for message in messages if message.get("role") == "user"]
    system = [_text(message) for message in messages if message.get("role") in ("system", "developer")]
    # The system message is most often the same for all conversations, so the first question tells them apart.
    opening = (asking or messages)[:1]
    return _facts(
        body,
        headers,
        has_image=any(_is_image(part) for message in messages for part in _parts(message)),
        prompt=_text(asking[-1]) if asking else "",
        system="\n".join(system),
        first=opening[0].get("content") if opening else None,
    )


def facts_of_completion(body: object, headers: Mapping[str, str]) -> RequestFacts:
    """The facts of a completion's JSON body, whose prompt may be text, several texts, or token ids (no text).

    Raises:
        RoutingError: as `facts_of_chat`.
    """
    prompt = _field(body, "prompt")
    texts = prompt if isinstance(prompt, list) else [prompt]
    return _facts(body, headers, prompt="\n".join(text for text in texts if isinstance(text, str)), first=prompt)


def _facts(body: object, headers: Mapping[str, str], **found: Any) -> RequestFacts:
    lowered = {name.lower(): value for name, value in headers.items()}
    model, user = _field(body, "model"), _field(body, "user")
    return RequestFacts(
        body_task=_body_task(body),
        header_task=_header_task(lowered.get("x-hones-task")),
        model=model if isinstance(model, str) else None,
        headers=lowered,
        user=user if isinstance(user, str) else None,
        **found,
    )


def _body_task(body: object) -> str | None:
    given = [_field(body, "hones_task"), _field(_field(body, "vllm_xargs"), "hones_task")]
    tasks = [task for task in given if task is not None]
    for task in tasks:
        if not isinstance(task, str):
            raise RoutingError(f"hones_task must be a string such as 'vqa' or 'none', not {type(task).__name__}")
    if len(set(tasks)) > 1:
        raise RoutingError(
            f"hones_task is {short(tasks[0])} and in vllm_xargs {short(tasks[1])}; give it once, or the same twice"
        )
    return tasks[0] if tasks else None


def joined(headers: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Headers by lower-case name; different values are joined: contradictory ones are malformed, not ignored."""
    values: dict[str, list[str]] = {}
    for name, value in headers:
        given = values.setdefault(name.lower(), [])
        if (value := value.strip(" \t")) not in given:
            given.append(value)
    return {name: ", ".join(given) for name, given in values.items()}


def _header_task(value: str | None) -> str | None:
    """A header given several times is the list of its values, also to proxies, which may join them."""
    if value is None:
        return None
    given = dict.fromkeys(each.strip(" \t") for each in value.split(","))
    if len(given) > 1:
        raise RoutingError(f"X-Hones-Task is {' and '.join(map(short, given))}; give it once, or the same twice")
    return next(iter(given))


def _field(value: object, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None


def _parts(message: dict[str, Any]) -> list[object]:
    content = message.get("content")
    return content if isinstance(content, list) else [content]


def _text(message: dict[str, Any]) -> str:
    texts = (part if isinstance(part, str) else _field(part, "text") for part in _parts(message))
    return "\n".join(text for text in texts if isinstance(text, str))


def _is_image(part: object) -> bool:
    kind = _field(part, "type")
    # Engines accept a part without a type whose key tells what it is.
    return kind in _IMAGES if kind is not None else any(_field(part, name) is not None for name in _IMAGES)


def short(text: str) -> str:
    """A client's or operator's text, for a message."""
    return repr(text) if len(text) <= 60 else repr(text[:57]) + "..."


# The plan -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """Steer with the expression `task` where every condition that is given holds; `header` has lower-case names."""

    task: str
    has_image: bool | None = None
    prompt_regex: Any = None  # compiled, see `compile_regex`
    system_regex: Any = None
    model: str | None = None
    header: Mapping[str, str] = field(default_factory=dict)

    def matches(self, facts: RequestFacts) -> bool:
        """Whether all conditions hold."""
        return all(reason is None for _, reason in self.conditions(facts))

    def conditions(self, facts: RequestFacts) -> Iterator[tuple[str, str | None]]:
        """Each condition that is given, as the routing file has it, and why it does not hold (None where it does)."""
        if self.has_image is not None:
            there = f"the request has {'an' if facts.has_image else 'no'} image"
            yield f"has_image: {str(self.has_image).lower()}", None if self.has_image == facts.has_image else there
        if self.model is not None:
            yield f"model: {self.model}", _other(self.model, facts.model)
        for name, value in self.header.items():
            yield f"header: {{{name}: {value}}}", _other(value, facts.headers.get(name))
        if self.prompt_regex is not None:
            found = _found(self.prompt_regex, facts.prompt)
            yield f"prompt_regex: {self.prompt_regex.pattern}", None if found else "not in the last user message"
        if self.system_regex is not None:
            found = _found(self.system_regex, facts.system)
            yield f"system_regex: {self.system_regex.pattern}", None if found else "not in the system message"


def _other(wanted: str, given: str | None) -> str | None:
    if given == wanted:
        return None
    return "the request has none" if given is None else f"the request has {short(given)}"


def compile_regex(pattern: str) -> Any:
    """A pattern of RE2: time linear in the text, no look-around and no back-references.

    Raises:
        re2.error, UnicodeEncodeError: not a pattern.
    """
    options = re2.Options()
    options.log_errors = False
    options.never_capture = True
    return re2.compile(pattern, options)


def _found(regex: Any, text: str) -> bool:
    # JSON can carry half a surrogate pair, which has no UTF-8.
    return regex.search(text[:MATCHED_BYTES].encode("utf-8", "replace")[:MATCHED_BYTES]) is not None


@dataclass(frozen=True)
class Canary:
    """Of the traffic that rules or the default steer with `task`, `percent` (0-100) gets `to` instead."""

    task: str
    to: str
    percent: float

    def takes(self, key: str) -> bool:
        """Whether this key is in; who is in at some percent is in at any higher one.

        Salted with what is compared, so that two canaries do not pick the same users.
        """
        salted = f"{parse_expression(self.task)}\0{parse_expression(self.to)}\0{key}"
        digest = hashlib.sha256(salted.encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(digest[:8], "big") < self.percent / 100 * 2**64


@dataclass(frozen=True)
class RoutingPlan:
    """What the server's operator wants for requests that do not ask themselves. Empty: no steering."""

    default: str | None = None
    rules: tuple[Rule, ...] = ()
    canary: Canary | None = None


# Deciding -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decision:
    """The steering of one request: `asked` is the expression as written, `model` the name without an alias."""

    asked: str
    expression: Expression
    route: str  # one of ROUTES
    model: str | None


def split_alias(model: str, served: Collection[str], exact: Collection[str]) -> tuple[str, str] | None:
    """``<served name>:<expression>`` as (served name, expression), or None where `model` is no alias.

    The longest served name counts. `exact` are names that win over a reading as alias (served and LoRA names).
    """
    if model in exact or model in served:
        return None
    bases = [name for name in served if model.startswith(name + ":")]
    if not bases:
        return None
    base = max(bases, key=len)
    return base, model[len(base) + 1 :]


def decide(
    facts: RequestFacts, plan: RoutingPlan, *, served: Collection[str], exact: Collection[str], enabled: bool
) -> Decision:
    """The steering that `facts` get under `plan`. Not `enabled` (the kill switch): none, by the route "off".

    Raises:
        RoutingError: the expression asked for, or the alias's, is malformed; also while not enabled.
    """
    alias = split_alias(facts.model, served, exact) if facts.model is not None else None
    model, alias_task = alias or (facts.model, None)
    if alias_task is not None:
        parse_expression(alias_task)  # part of the model's name: malformed is an error whoever decides
    asked, route = _asked(facts, alias_task) or _planned(facts, plan)
    expression = parse_expression(asked)
    if not enabled:
        return Decision("none", Expression((), ()), "off", model)
    canary = plan.canary
    if canary is not None and route in ("rule", "default") and same(asked, canary.task) and canary.takes(facts.key):
        return Decision(canary.to, parse_expression(canary.to), "canary", model)
    return Decision(asked, expression, route, model)


def same(one: str, other: str) -> bool:
    """Whether two expressions steer alike."""
    return parse_expression(one) == parse_expression(other)


def _asked(facts: RequestFacts, alias_task: str | None) -> tuple[str, str] | None:
    asked = ((facts.body_task, "body"), (facts.header_task, "header"), (alias_task, "alias"))
    return next(((task, route) for task, route in asked if task is not None), None)


def _planned(facts: RequestFacts, plan: RoutingPlan) -> tuple[str, str]:
    for rule in plan.rules:
        if rule.matches(facts):
            return rule.task, "rule"
    return plan.default or "none", "default"
