"""Routing: chooses the steering of a request from what it asks for itself, else from the server's plan.

Precedence: body `hones_task`, header `X-Hones-Task`, model alias ``<model>:<expression>``, rules, default; a canary may
replace what a rule or the default gives. No engine, no profiles, no files here: the registry knows which tasks exist.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import re2  # type: ignore[import-untyped]

from hones_serving.facts import RequestFacts, facts_of_chat, short  # noqa: F401 -- was documented as being here
from hones_steer.errors import RoutingError
from hones_steer.store import Expression, parse_expression

ROUTES = ("body", "header", "alias", "rule", "default", "canary", "off", "path")
MATCHED_BYTES = 8 * 1024


class UnknownAliasError(RoutingError):
    """The alias in a request's model names a task that does not exist: to the client an unknown model, HTTP 404."""


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
