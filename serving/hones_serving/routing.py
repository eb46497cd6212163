"""Routing: chooses the steering of a request from what it asks for itself, else from the server's plan.

Precedence: body `hones_task`, header `X-Hones-Task`, model alias ``<model>:<expression>``, rules, default; a canary may
replace what a rule or the default gives. No engine, no profiles, no files here: the registry knows which tasks exist.
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
    """The alias in a request's model names a task that does not exist: to the client an unknown model, HTTP 404."""


# The request ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RequestFacts:
    """The parts of a request that routing looks at.

    `headers` has lower-case names. `prompt` is the last user message's text, or all prompts of a completion; `system`
    is the text of all system and developer messages; `first` is the JSON value that opens the conversation.
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
        """The text that a canary draws by: X-Hones-Key, else `user`, else a hash of `first`. A conversation keeps it.

        Computed on each access, because an image in the first message makes it megabytes to hash.
        """
        named = self.headers.get("x-hones-key") or self.user
        if named:
            return named
        try:
            canonical = json.dumps(self.first, sort_keys=True, separators=(",", ":"))
        except RecursionError:  # nested deeper than any engine accepts: it answers with an error of its own
            canonical = ""
        return hashlib.sha256(canonical.encode()).hexdigest()


def facts_of_chat(body: object, headers: Mapping[str, str]) -> RequestFacts:
    """The facts of a chat completion, from its JSON body and its headers.

    A malformed field counts as absent: the engine will refuse it.

    Raises:
        RoutingError: `hones_task` is not a string, or it or X-Hones-Task is given twice with different values.
    """
    messages = _field(body, "messages")
    messages = [message for message in messages if isinstance(message, dict)] if isinstance(messages, list) else []
    asking = [message for message in messages if message.get("role") == "user"]
    system = [_text(message) for message in messages if message.get("role") in ("system", "developer")]
    # Most conversations with a model share its system message, so the first question tells them apart.
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
    """The facts of a completion, from its JSON body and its headers.

    The prompt may be text, a list of texts, or token ids, which count as no text.

    Raises:
        RoutingError: `hones_task` is not a string, or it or X-Hones-Task is given twice with different values.
    """
    prompt = _field(body, "prompt")
    prompts = prompt if isinstance(prompt, list) else [prompt]
    text = "\n".join(entry for entry in prompts if isinstance(entry, str))
    return _facts(body, headers, has_image=False, prompt=text, system="", first=prompt)


def _facts(
    body: object, headers: Mapping[str, str], *, has_image: bool, prompt: str, system: str, first: object
) -> RequestFacts:
    lowered = {name.lower(): value for name, value in headers.items()}
    model, user = _field(body, "model"), _field(body, "user")
    return RequestFacts(
        body_task=_body_task(body),
        header_task=_header_task(lowered.get("x-hones-task")),
        model=model if isinstance(model, str) else None,
        has_image=has_image,
        prompt=prompt,
        system=system,
        headers=lowered,
        user=user if isinstance(user, str) else None,
        first=first,
    )


def _body_task(body: object) -> str | None:
    values = [_field(body, "hones_task"), _field(_field(body, "vllm_xargs"), "hones_task")]
    tasks = [task for task in values if task is not None]
    for task in tasks:
        if not isinstance(task, str):
            raise RoutingError(f"hones_task must be a string such as 'vqa' or 'none', not {type(task).__name__}")
    if len(set(tasks)) > 1:
        raise RoutingError(
            f"hones_task is {short(tasks[0])} and in vllm_xargs {short(tasks[1])}; give it once, or the same twice"
        )
    return tasks[0] if tasks else None


def joined(headers: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Headers by lower-case name; different values of one are joined, so that contradictory ones are refused later."""
    by_name: dict[str, list[str]] = {}
    for name, value in headers:
        values = by_name.setdefault(name.lower(), [])
        if (value := value.strip(" \t")) not in values:
            values.append(value)
    return {name: ", ".join(values) for name, values in by_name.items()}


def _header_task(value: str | None) -> str | None:
    """The expression in X-Hones-Task, which may be a list of equal ones: proxies join a header that is sent twice."""
    if value is None:
        return None
    tasks = dict.fromkeys(task.strip(" \t") for task in value.split(","))
    if len(tasks) > 1:
        raise RoutingError(f"X-Hones-Task is {' and '.join(map(short, tasks))}; give it once, or the same twice")
    return next(iter(tasks))


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
    """A client's or operator's text in quotes, cut to 60 characters, for a message."""
    return repr(text) if len(text) <= 60 else repr(text[:57]) + "..."


# The plan -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """A rule of the plan: `task` is the expression for requests that meet all conditions but those that are None.

    `header` maps lower-case names to the values they must have; the regexes are compiled by `compile_regex`.
    """

    task: str
    has_image: bool | None = None
    prompt_regex: Any = None
    system_regex: Any = None
    model: str | None = None
    header: Mapping[str, str] = field(default_factory=dict)

    def matches(self, facts: RequestFacts) -> bool:
        """Test all conditions; true if every one holds."""
        return all(reason is None for _, reason in self.conditions(facts))

    def conditions(self, facts: RequestFacts) -> Iterator[tuple[str, str | None]]:
        """Yield each condition as the routing file has it, and the reason why it does not hold (None where it does)."""
        if self.has_image is not None:
            mismatch = f"the request has {'an' if facts.has_image else 'no'} image"
            yield f"has_image: {str(self.has_image).lower()}", None if self.has_image == facts.has_image else mismatch
        if self.model is not None:
            yield f"model: {self.model}", _mismatch(self.model, facts.model)
        for name, value in self.header.items():
            yield f"header: {{{name}: {value}}}", _mismatch(value, facts.headers.get(name))
        if self.prompt_regex is not None:
            holds = _matches(self.prompt_regex, facts.prompt)
            yield f"prompt_regex: {self.prompt_regex.pattern}", None if holds else "not in the last user message"
        if self.system_regex is not None:
            holds = _matches(self.system_regex, facts.system)
            yield f"system_regex: {self.system_regex.pattern}", None if holds else "not in the system message"


def _mismatch(expected: str, actual: str | None) -> str | None:
    if actual == expected:
        return None
    return "the request has none" if actual is None else f"the request has {short(actual)}"


def compile_regex(pattern: str) -> Any:
    """Compile a pattern of RE2, which takes time linear in the text and has no look-around and no back-references.

    Raises:
        re2.error, UnicodeEncodeError: `pattern` is not one.
    """
    options = re2.Options()
    options.log_errors = False
    options.never_capture = True
    return re2.compile(pattern, options)


def _matches(regex: Any, text: str) -> bool:
    # JSON can carry half a surrogate pair, which has no UTF-8 form.
    return regex.search(text[:MATCHED_BYTES].encode("utf-8", "replace")[:MATCHED_BYTES]) is not None


@dataclass(frozen=True)
class Canary:
    """A trial of the expression `to` on a share of the traffic that rules or the default steer with `task`.

    `percent` is that share, from 0 to 100.
    """

    task: str
    to: str
    percent: float

    def takes(self, key: str) -> bool:
        """Draw by a key; true if its requests get `to`, which then stays so at any higher percentage.

        Both expressions salt the hash, so that two canaries do not pick the same users.
        """
        salted = f"{parse_expression(self.task)}\0{parse_expression(self.to)}\0{key}"
        digest = hashlib.sha256(salted.encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(digest[:8], "big") < self.percent / 100 * 2**64


@dataclass(frozen=True)
class RoutingPlan:
    """The server's steering for requests that do not name any; an empty plan steers nothing."""

    default: str | None = None
    rules: tuple[Rule, ...] = ()
    canary: Canary | None = None


# Deciding -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decision:
    """The steering of one request.

    `asked` is the expression as it was written, `expression` the same parsed; `route` is one of ROUTES and says who
    decided; `model` is the request's model without an alias's expression.
    """

    asked: str
    expression: Expression
    route: str
    model: str | None


def split_alias(model: str, served: Collection[str], exact: Collection[str]) -> tuple[str, str] | None:
    """Split an alias ``<served name>:<expression>`` into the two; None if `model` is no alias.

    The longest served name counts. `exact` are names (of models and LoRA adapters) that are never read as aliases.
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
    """Decide which steering a request gets under `plan`.

    `served` and `exact` are those of `split_alias`. If not `enabled` (the kill switch), the decision is no steering, by
    the route "off".

    Raises:
        RoutingError: the expression asked for, or the alias's, is malformed; also while not enabled.
    """
    alias = split_alias(facts.model, served, exact) if facts.model is not None else None
    model, alias_task = alias or (facts.model, None)
    if alias_task is not None:
        parse_expression(alias_task)  # a malformed model name is an error whoever decides
    asked, route = _asked(facts, alias_task) or _planned(facts, plan)
    expression = parse_expression(asked)
    if not enabled:
        return Decision("none", Expression((), ()), "off", model)
    canary = plan.canary
    if (
        canary is not None
        and route in ("rule", "default")
        and steer_alike(asked, canary.task)
        and canary.takes(facts.key)
    ):
        return Decision(canary.to, parse_expression(canary.to), "canary", model)
    return Decision(asked, expression, route, model)


def steer_alike(left: str, right: str) -> bool:
    """Compare two expressions; true if they steer alike, however they are written."""
    return parse_expression(left) == parse_expression(right)


def _asked(facts: RequestFacts, alias_task: str | None) -> tuple[str, str] | None:
    asked = ((facts.body_task, "body"), (facts.header_task, "header"), (alias_task, "alias"))
    return next(((task, route) for task, route in asked if task is not None), None)


def _planned(facts: RequestFacts, plan: RoutingPlan) -> tuple[str, str]:
    for rule in plan.rules:
        if rule.matches(facts):
            return rule.task, "rule"
    return plan.default or "none", "default"
